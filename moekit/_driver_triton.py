"""Launches by the CUDA driver itself: a kernel's parameters are written once, and later calls change addresses alone.

Triton's own launcher makes every descriptor of a tensor again and reads every argument, for each launch: 20 to 80 us of
the host where the driver takes five. What this module takes for granted about Triton is how a kernel's arguments become
parameters; the driver is asked for their number and sizes, and a kernel with any other is left to Triton.
"""

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple


class Pointer(NamedTuple):
    """Stands for a tensor that a kernel gets as a pointer."""


class Blocks(NamedTuple):
    """Stands for a tensor that a kernel gets as a descriptor of its blocks.

    Attributes:
        shape: of the tensor.
        strides: of the tensor, the last of them 1.
        block: the shape of a block.
        layout: how a block lies in shared memory, for kernels in Gluon; the others find one themselves.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    layout: Any = None


class Again(NamedTuple):
    """Stands for the tensor of the argument before, as a pointer; it is given once."""


class Driver(NamedTuple):
    """What is asked of the CUDA driver; all return 0 if they did what was asked.

    Attributes:
        launch: cuLaunchKernelEx.
        parameter: cuFuncGetParamInfo.
        describe: cuTensorMapEncodeTiled.
        move: cuTensorMapReplaceAddress.
    """

    launch: Callable[..., int]
    parameter: Callable[..., int]
    describe: Callable[..., int]
    move: Callable[..., int]


@cache
def cuda_driver() -> Driver | None:
    """Return the driver of this machine, or None if there is none, or one from before CUDA 12.4."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        names = ("cuLaunchKernelEx", "cuFuncGetParamInfo", "cuTensorMapEncodeTiled", "cuTensorMapReplaceAddress")
        driver = Driver(*[getattr(library, name) for name in names])
    except (OSError, AttributeError):
        return None
    at, number = ctypes.c_void_p, ctypes.c_uint32
    driver.launch.argtypes = [at] * 4  # type: ignore[attr-defined]
    driver.parameter.argtypes = [at, ctypes.c_size_t, at, at]  # type: ignore[attr-defined]
    driver.describe.argtypes = [at, number, number, *[at] * 5, *[number] * 4]  # type: ignore[attr-defined]
    driver.move.argtypes = [at, at]  # type: ignore[attr-defined]
    return driver


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


_NUMBERS = {"u1": "<B", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "fp32": "<f"}
_DESCRIPTOR, _ADDRESS = 128, 8  # bytes of them
_APART = _DESCRIPTOR  # bytes from parameter to parameter in memory: none is longer, and it begins at a multiple of them
LAST_DESCRIBED = 9  # major compute capability of the last cards whose descriptors are written here: Hopper
_NOWHERE = -1  # the address in a descriptor that is being written


class Prepared:
    """A compiled kernel with the memory of its parameters."""

    def __init__(
        self,
        driver: Driver,
        compiled: Any,
        grid: Sequence[int],
        parameters: Sequence[bytes],
        pointers: Sequence[tuple[int, int]],
        descriptors: Sequence[tuple[int, int, int]],
    ) -> None:
        """Write parameters down.

        Args:
            driver: of CUDA.
            compiled: kernel.
            grid: of programs, on three axes.
            parameters: what each holds.
            pointers: which parameters are the addresses of which tensors, by their numbers.
            descriptors: which are descriptors of which tensors, and the address that each has in it.
        """
        self._memory, begin = _aligned(len(parameters) * _APART)
        places = [begin + i * _APART for i in range(len(parameters))]
        for place, content in zip(places, parameters, strict=True):
            ctypes.memmove(place, content, len(content))
        self._compiled = compiled  # which unloads its code when it goes
        self._config = _Config((*grid,), (32 * compiled.metadata.num_warps, 1, 1), compiled.metadata.shared)
        self._parameters = (ctypes.c_void_p * len(places))(*places)
        self._given = ctypes.addressof(self._config), compiled.function, ctypes.addressof(self._parameters), None
        self._driver, self._lock = driver, threading.Lock()
        self._pointers = [(ctypes.c_uint64.from_address(places[at]), tensor) for at, tensor in pointers]
        self._descriptors = [[places[at], tensor, address] for at, tensor, address in descriptors]

    def __call__(self, addresses: Sequence[int], stream: int) -> bool:
        """Launch the kernel.

        Args:
            addresses: of the tensors, all multiples of 16.
            stream: of the device that is the current one.

        Returns:
            Whether it was launched; not if this thread has no context of the device yet, or another is launching it.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            for pointer, tensor in self._pointers:
                pointer.value = addresses[tensor]
            for each in self._descriptors:
                place, tensor, before = each
                address = addresses[tensor]
                if address != before:
                    each[2] = _NOWHERE  # until it is written: an interrupt may come in between
                    if self._driver.move(place, address):
                        return False
                    each[2] = address
            self._config.stream = stream
            return self._driver.launch(*self._given) == 0
        finally:
            self._lock.release()


def prepare(
    compiled: Any, grid: Sequence[int], values: Sequence[Any], addresses: Sequence[int], driver: Driver | None
) -> Prepared | None:
    """Write a kernel's parameters down.

    Args:
        compiled: what a launch by Triton returned.
        grid: of programs, on three axes.
        values: of the kernel's arguments, in their order; ``Pointer``, ``Blocks`` or ``Again`` for tensors.
        addresses: of the tensors of that launch.
        driver: ``cuda_driver()``.

    Returns:
        The kernel; None if there is no driver, or the kernel takes something that is not known here.
    """
    if driver is None or not _is_plain(compiled.metadata, described=any(isinstance(v, Blocks) for v in values)):
        return None
    described = iter(compiled.metadata.tensordesc_meta or ())
    parameters: list[bytes] = []
    pointers, descriptors, tensor = [], [], -1
    for kind, value in zip(compiled.src.signature.values(), values, strict=True):
        tensor += isinstance(value, Pointer | Blocks)
        if kind == "constexpr":
            continue
        if isinstance(value, Blocks):
            content = _descriptor(driver, value, next(described, None), addresses[tensor])
            if content is None:
                return None
            descriptors.append((len(parameters), tensor, addresses[tensor]))
            parameters.append(content)
            parameters += [struct.pack("<i", each) for each in value.shape]
            parameters += [struct.pack("<q", each) for each in value.strides]
        elif isinstance(value, Pointer | Again):
            pointers.append((len(parameters), tensor))
            parameters.append(bytes(_ADDRESS))
        elif kind in _NUMBERS:
            parameters.append(struct.pack(_NUMBERS[kind], value))
        else:
            return None
    parameters += [bytes(_ADDRESS)] * 2  # of the scratch memories, which there are not
    if _sizes(driver, compiled.function, len(parameters)) != [len(each) for each in parameters]:
        return None
    return Prepared(driver, compiled, grid, parameters, pointers, descriptors)


def _is_plain(metadata: Any, *, described: bool) -> bool:
    """Say whether a launch needs nothing but a grid, shared memory and parameters; with descriptors only up to Hopper.

    For later cards Triton mends small descriptors of some drivers, behind the driver's back.
    """
    special = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    plain = metadata.num_ctas == 1 and not any(getattr(metadata, name, False) for name in special)
    return plain and not (described and metadata.target.arch // 10 > LAST_DESCRIBED)


def _sizes(driver: Driver, function: int, most: int) -> list[int]:
    """Return the sizes of a kernel's parameters; of one more than ``most``, if there are more."""
    offset, size, sizes = ctypes.c_size_t(), ctypes.c_size_t(), []
    for i in range(most + 1):
        if driver.parameter(function, i, ctypes.addressof(offset), ctypes.addressof(size)):
            break
        sizes.append(size.value)
    return sizes


def _descriptor(driver: Driver, blocks: Blocks, described: dict[str, Any] | None, address: int) -> bytes | None:
    """Return the descriptor of a tensor as Triton makes it, or None if this one is of another kind, or refused."""
    if described is None or described["fp4_padded"] or described.get("is_im2col", False):
        return None
    rank, bytes_each, kind = len(blocks.shape), described["elem_size"], described["elem_type"]
    _memory, place = _aligned(_DESCRIPTOR)
    long, short = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
    steps = [step * bytes_each for step in reversed(blocks.strides[:-1])]
    failed = driver.describe(
        place, _DTYPES.get(kind, kind), rank, address,
        long(*reversed(blocks.shape)), long(*steps), short(*reversed(described["block_size"])), short(*[1] * rank),
        _NOT_INTERLEAVED, described["swizzle"], _L2_BY_128_BYTES, _ZEROS_OUTSIDE,
    )  # fmt: skip
    return None if failed else ctypes.string_at(place, _DESCRIPTOR)


_DTYPES = {8: 10, 9: 8, 10: 9}  # the driver's numbers of Triton's, where they differ
_NOT_INTERLEAVED, _L2_BY_128_BYTES, _ZEROS_OUTSIDE = 0, 2, 0  # of CUtensorMapInterleave, L2promotion, FloatOOBfill


def _aligned(size: int) -> tuple[Any, int]:
    """Return memory that lives as long as this object, and the first address in it that a descriptor may have."""
    memory = ctypes.create_string_buffer(size + _APART)
    return memory, -(-ctypes.addressof(memory) // _APART) * _APART
