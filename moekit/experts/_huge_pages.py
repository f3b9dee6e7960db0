"""Fresh memory for large tensors on the CPU, in pages of 2 MiB where the system has them."""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

# What malloc hands out from this size on is always freshly mapped, and given back when it is freed (glibc's
# DEFAULT_MMAP_THRESHOLD_MAX): every gradient of a stacked weight then pays one page fault for every 4 KiB, each step.
_ALWAYS_MAPPED = 32 * 2**20


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate a CPU tensor without filling it; a large one in huge pages, which take 1/512 of the page faults.

    Args:
        shape: of the tensor.
        dtype: of the tensor.

    Returns:
        A contiguous tensor of undefined content.

    Example:
        >>> empty((2, 3), torch.float32).shape
        torch.Size([2, 3])
    """
    size = math.prod(shape) * dtype.itemsize
    # What should be poisoned goes through torch, which poisons it.
    if size < _ALWAYS_MAPPED or not hasattr(mmap, "MADV_HUGEPAGE") or torch.are_deterministic_algorithms_enabled():
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
