"""Selecting the n greatest of many keys by one program of a kernel; keys are integers in the order of floats.

A threshold is a number that n keys are above; or fewer, and with those that equal it n or more. The keys are read three
times. First the greatest key of each lane is kept: a threshold of those bounds one of all from below. Then the keys
above the bound are put aside, which are few, and the threshold is found among them by halving. Last what is above the
threshold is taken, and of what equals it the first ones. Nothing depends on the order in which programs run.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))  # below the key of every float
LOWEST_FINITE = tl.constexpr(-(2**31) + 2**23)  # the key of the lowest finite float
_INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def in_order(bits):  # type: ignore[no-untyped-def]
    """Return int32 in the order of the float32 values that have these bits.

    The bits of a float32 without its sign are in the order of its values; those of a negative one are turned round.
    """
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_of(values):  # type: ignore[no-untyped-def]
    """Return int32 in the order of float32 values; both zeros are one, and NaN is infinity."""
    bits = values.to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) > _INFINITY_BITS, _INFINITY_BITS, bits)
    return tl.where(bits == LOWEST, 0, in_order(bits))


@triton.jit
def _narrow(low, high, above, reached, number):  # type: ignore[no-untyped-def]
    """Go on with the half that a threshold is in, now that ``reached`` keys are known to be above the middle.

    ``above`` keys are greater than ``high``, ``number`` at most; and ``number`` or more are not below ``low``.
    """
    middle = (low + high) >> 1
    upper = reached > number
    return tl.where(upper, middle + 1, low), tl.where(upper, high, middle), tl.where(upper, above, reached)


@triton.jit
def _search_lanes(keys, number):  # type: ignore[no-untyped-def]
    """Return a threshold of keys in registers, and how many are above; the lowest number if there are too few keys."""
    low, high = tl.full((), LOWEST, tl.int64), tl.max(keys).to(tl.int64)
    above = tl.full((), 0, tl.int32)
    while (low < high) & (above < number):
        reached = tl.sum((keys > ((low + high) >> 1).to(tl.int32)).to(tl.int32))
        low, high, above = _narrow(low, high, above, reached, number)
    return high.to(tl.int32), above


@triton.jit
def _search(keys, length, low, high, number, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the same of keys (length,) in memory: none is above ``high``, and ``number`` or more not below ``low``."""
    lanes = tl.arange(0, CHUNK)
    low, high = low.to(tl.int64), high.to(tl.int64)
    above = tl.full((), 0, tl.int32)
    while (low < high) & (above < number):
        middle = ((low + high) >> 1).to(tl.int32)
        reached = tl.full((), 0, tl.int32)
        for start in range(0, length, CHUNK):
            some = tl.load(keys + start + lanes, mask=start + lanes < length, other=LOWEST)
            reached += tl.sum((some > middle).to(tl.int32))
        low, high, above = _narrow(low, high, above, reached, number)
    return high.to(tl.int32), above


@triton.jit
def find_threshold(keys, length, number, aside, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a threshold of keys (length,) in memory, and how many are above it; 1 <= number <= length.

    ``aside`` is memory for the keys above the bound: those of ``number`` lanes at most; all, if there are fewer lanes.
    """
    lanes = tl.arange(0, CHUNK)
    greatest = tl.full((CHUNK,), LOWEST, tl.int32)
    for start in range(0, length, CHUNK):
        some = tl.load(keys + start + lanes, mask=start + lanes < length, other=LOWEST)
        greatest = tl.maximum(greatest, some)
    bound, _ = _search_lanes(greatest, number)
    above = tl.full((), 0, tl.int32)
    for start in range(0, length, CHUNK):
        some = tl.load(keys + start + lanes, mask=start + lanes < length, other=LOWEST)
        is_above = some > bound
        tl.store(aside + above + tl.cumsum(is_above.to(tl.int32), 0) - 1, some, mask=is_above)
        above += tl.sum(is_above.to(tl.int32))
    if above > number:
        tl.debug_barrier()  # other threads of the program wrote what this one reads
        bound, above = _search(aside, above, bound, tl.max(greatest), number, CHUNK // 4)
    return bound, above


@triton.jit
def selected(keys, real, threshold, ties):  # type: ignore[no-untyped-def]
    """Say which keys are above the threshold or among the first ``ties`` that equal it; and how many ties are left."""
    tied = (keys == threshold) & real
    taken = (keys > threshold) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= ties))
    return taken, ties - tl.sum(tied.to(tl.int32))
