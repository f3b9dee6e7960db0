"""Which part of which matrix's gradient a tile is."""

import triton
import triton.language as tl


@triton.jit
def part_of(  # type: ignore[no-untyped-def]
    tile,
    schedule,
    num_groups,
    height,
    width,
    parts,
    M: tl.constexpr,
    N: tl.constexpr,
    BAND: tl.constexpr,
    TALL: tl.constexpr,
):
    """Return a tile's group, and the first and last row of that; its number of the ``parts``; its row and column there;
    and the first column of either operand that it is a product of.
    """
    num_m, num_n = tl.cdiv(height, M), tl.cdiv(width, N)
    num_of_part = num_m if TALL else num_n
    if TALL:
        num_m *= parts
    else:
        num_n *= parts
    group = tile // (num_m * num_n)
    local = tile % (num_m * num_n)
    band = local // (BAND * num_n)
    tall = min(num_m - band * BAND, BAND)
    inside = local - band * BAND * num_n
    row, column = band * BAND + inside % tall, inside // tall
    part = (row if TALL else column) // num_of_part
    if TALL:
        row -= part * num_of_part
    else:
        column -= part * num_of_part
    m, n = row * M, column * N
    left = part * height + m if TALL else m
    right = n if TALL else part * width + n
    start = tl.load(schedule + group)
    return group, start, start + tl.load(schedule + num_groups + group), part, m, n, left, right
