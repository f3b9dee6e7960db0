"""Launches that are decided once: all that a kernel gets but where its tensors lie.

Triton looks at every argument of every launch, to find the code that was compiled for its like, and checks every
descriptor of a tensor. That takes the host longer than a small layer takes the device, and finds the same each time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

from moekit._driver_triton import LAST_DESCRIBED, Again, Blocks, Pointer, Prepared, cuda_driver, prepare

POINTER, AGAIN = Pointer(), Again()


def has_tma(device: torch.device) -> bool:
    """Say whether tensors may have descriptors: whether the card has them; the interpreter does."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def is_interpreted() -> bool:
    """Say whether Triton interprets kernels: then it runs them on CPU tensors, and multiplies bfloat16 wrongly."""
    return bool(knobs.runtime.interpret)


def launched_by(major: int) -> str:
    """Say what launches kernels on a CUDA device of a major compute capability; each for the first time Triton does."""
    if cuda_driver() is None:
        return "Triton, for the CUDA driver is older than 12.4"
    return "the CUDA driver" if major <= LAST_DESCRIBED else "the CUDA driver, or Triton if they take descriptors"


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

    The first two calls with tensors of some dtypes on a device are ordinary launches, the first of which compiles the
    kernel; later ones hand the addresses of their tensors to what was compiled. It is the second that writes the
    parameters down for them, for some sizes come once, as the number of rows that an exchange brings. Tensors that do
    not begin at 16 bytes are always launched the ordinary way, since other code is compiled for them.

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
        self._num_tensors = sum(isinstance(each, Pointer | Blocks) for each in arguments)
        self._prepared: dict[tuple[Any, ...], Prepared | None] = {}
        self._launched: set[tuple[Any, ...]] = set()

    def __call__(self, *tensors: Tensor) -> None:
        """Launch the kernel on the current stream of the tensors' device.

        Args:
            tensors: one for each ``POINTER`` or ``Blocks``, in their order.

        Raises:
            ValueError: if there are more or fewer, or they are on no CUDA device and Triton interprets nothing.
        """
        device = tensors[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(*tensors)
            return
        kind: list[Any] = [device]
        addresses, odd = [], 0
        for each in tensors:
            address = each.data_ptr()
            kind.append(each.dtype)
            addresses.append(address)
            odd |= address & 15 | (each.get_device() != device)  # of which Triton has a word to say
        if odd or _is_watched():
            self._launch(tensors)
            return
        key = tuple(kind)
        prepared = self._prepared.get(key)
        if prepared is None or not prepared(addresses, driver.active.get_current_stream(device)):
            compiled = self._launch(tensors)
            if compiled is None or key in self._prepared:  # the interpreter compiles nothing
                return
            if key in self._launched:
                self._prepared[key] = self._prepare(compiled, addresses)
            self._launched.add(key)

    def _launch(self, tensors: Sequence[Tensor]) -> Any:
        if len(tensors) != self._num_tensors:
            raise ValueError(f"{self.kernel}: {len(tensors)} tensors; expected {self._num_tensors}.")
        if isinstance(self.kernel, JITFunction) and not tensors[0].is_cuda:
            raise ValueError(
                f"moekit's Triton kernels were given tensors on {tensors[0].device}; expected a CUDA device. Use "
                f"`auto` or `fused_cpu` for a layer on the CPU, `grouped` for a product; or Triton's interpreter, by "
                f"TRITON_INTERPRET=1 before Triton is imported."
            )
        values, number = [], -1
        for each in self.arguments:
            number += isinstance(each, Pointer | Blocks)
            if isinstance(each, Blocks):
                values.append(_descriptor(tensors[number], each))
            else:
                values.append(tensors[number] if isinstance(each, Pointer | Again) else each)
        return self.kernel[self.grid](*values, **self.constants)

    def _prepare(self, compiled: Any, addresses: Sequence[int]) -> Prepared | None:
        rest = self.kernel.arg_names[len(self.arguments) :]
        values = [*self.arguments, *(self.constants[name] for name in rest)]
        if 0 in self.grid:  # Triton launches nothing, and the driver refuses
            return None
        try:
            return prepare(compiled, self.grid, values, addresses, cuda_driver())
        except (AttributeError, KeyError, ValueError):  # this Triton tells of its kernels in another way
            return None


def _is_watched() -> bool:
    """Say whether somebody wants to be told of launches, as a profiler, or wants code for debugging."""
    runtime = knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(runtime.debug or getattr(before, "calls", before) or getattr(after, "calls", after))


def _descriptor(tensor: Tensor, blocks: Blocks) -> Any:
    fields = {"shape": [*blocks.shape], "strides": [*blocks.strides], "block_shape": [*blocks.block]}
    if blocks.layout is None:
        return TensorDescriptor(tensor, **fields)
    return GluonDescriptor(tensor, **fields, layout=blocks.layout)
