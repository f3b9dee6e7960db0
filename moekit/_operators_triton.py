"""Launches that are decided once: all that a kernel gets but where its tensors lie.

Triton looks at every argument of every launch, to find the code that was compiled for its like, and checks every
descriptor of a tensor. That takes the host longer than a small layer takes the device, and finds the same each time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor


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


POINTER, AGAIN = Pointer(), Again()


def has_tma(device: torch.device) -> bool:
    """Say whether tensors may have descriptors: whether the card has them; the interpreter does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def begins_whole(*tensors: Tensor) -> bool:
    """Say whether all tensors begin at multiples of 16 bytes."""
    return not any(each.data_ptr() & 15 for each in tensors)


def is_whole(columns: int, dtype: torch.dtype) -> bool:
    """Say whether a descriptor may be read from this column on: whether what lies before it is of whole 16 bytes."""
    return columns * dtype.itemsize % 16 == 0


def matrix(shape: tuple[int, int], block: tuple[int, int], tma: bool) -> Pointer | Blocks:
    """Return what a contiguous matrix is to a launch: blocks of a descriptor, or a pointer where there are none."""
    return Blocks(shape, (shape[1], 1), block) if tma else POINTER


class Launch:
    """A kernel with its grid and all of its arguments but the tensors.

    The first call with tensors of some dtypes on a device is an ordinary launch, which compiles the kernel; later ones
    hand their tensors to what was compiled. Tensors that do not begin at 16 bytes are always launched the ordinary
    way, since other code is compiled for them.

    Attributes:
        kernel: a function of ``triton.jit``.
        grid: of programs, on three axes.
        arguments: in the kernel's order; ``POINTER`` or ``Blocks`` for each tensor, ``AGAIN`` for the one before it.
        constants: the kernel's constants and options, by name.
    """

    def __init__(self, kernel: Any, grid: Sequence[int], arguments: Sequence[Any], **constants: Any) -> None:
        """Decide a launch."""
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.arguments, self.constants = arguments, constants
        rest = kernel.arg_names[len(arguments) :]
        self._values = [*arguments, *(constants[name] for name in rest)]
        self._places = [i for i, each in enumerate(arguments) if isinstance(each, Pointer | Blocks)]
        described = [(n, arguments[place]) for n, place in enumerate(self._places) if arguments[place] is not POINTER]
        self._again = [place for place, each in enumerate(arguments) if isinstance(each, Again)]
        self._described = [(self._places[n], n, *_descriptor(blocks)) for n, blocks in described]
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *tensors: Tensor) -> None:
        """Launch the kernel on the current stream of the tensors' device.

        Args:
            tensors: one for each ``POINTER`` or ``Blocks``, in their order.
        """
        device = tensors[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(*tensors)
            return
        kind = (device, *[each.dtype for each in tensors])
        compiled, pointers, bits = self._compiled.get(kind), [each.data_ptr() for each in tensors], 0
        for pointer in pointers:
            bits |= pointer
        together = len({each.get_device() for each in tensors}) == 1  # else Triton has a word to say
        if compiled is None or bits & 15 or not together or _is_watched():
            self._launch(kind, tensors)
            return
        values = self._values.copy()
        for place, pointer in zip(self._places, pointers, strict=True):
            values[place] = pointer
        for place in self._again:
            values[place] = values[place - 1]
        for place, n, kind_of, fields in self._described:
            described: Any = object.__new__(kind_of)  # unchecked: its like has passed all checks
            values[place] = described
            described.__dict__ = {"base": tensors[n], **fields}
        run, *code = compiled
        run(*self.grid, driver.active.get_current_stream(device), *code, None, None, None, *values)

    def _launch(self, kind: tuple[Any, ...], tensors: Sequence[Tensor]) -> None:
        values = [*self.arguments]
        for place, tensor in zip(self._places, tensors, strict=True):
            values[place] = tensor
        for place in self._again:
            values[place] = values[place - 1]
        for place, _, kind_of, fields in self._described:
            values[place] = kind_of(values[place], **fields)
        compiled = self.kernel[self.grid](*values, **self.constants)
        if tensors[0].is_cuda and begins_whole(*tensors) and not _is_watched():  # the interpreter compiles nothing
            self._compiled[kind] = compiled.run, compiled.function, compiled.packed_metadata


def _is_watched() -> bool:
    """Say whether somebody wants to be told of launches, as a profiler, or wants code for debugging."""
    runtime = knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(runtime.debug or getattr(before, "calls", before) or getattr(after, "calls", after))


def _descriptor(blocks: Blocks) -> tuple[type, dict[str, Any]]:
    """Return the class of a descriptor, and what it is made of beside its tensor."""
    fields = {"shape": [*blocks.shape], "strides": [*blocks.strides], "block_shape": [*blocks.block]}
    if blocks.layout is None:
        return TensorDescriptor, fields
    return GluonDescriptor, {**fields, "layout": blocks.layout}
