"""Memory for large tensors on the CPU: in pages of 2 MiB where the system has them, and used again once it is free."""

import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

# What malloc hands out from this size on is always freshly mapped, and given back when it is freed (glibc's
# DEFAULT_MMAP_THRESHOLD_MAX): every gradient of a stacked weight then pays for cleared pages, each step.
_ALWAYS_MAPPED = 32 * 2**20


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate a CPU tensor without filling it; a large one in huge pages, which take 1/512 of the page faults.

    The memory of a large tensor that is gone is kept for the next of the same size, whose pages are then there
    already: clearing fresh ones for every gradient costs a step more than reading all weights. All that is in use or
    kept is never more than was in use at one time, and what is kept the system may take back whenever it is short.

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
    memory = _take(size) or _map(size)
    lease = (ctypes.c_char * size).from_buffer(memory)  # lives as long as the tensor's storage
    weakref.finalize(lease, _keep, memory).atexit = False
    return torch.frombuffer(lease, dtype=dtype).view(shape)


@cache
def _kept() -> list[mmap.mmap]:
    """Return what is free, the longest first: of the process, as what torch's allocators keep is."""
    return []


def _keep(memory: mmap.mmap) -> None:
    memory.madvise(mmap.MADV_FREE)
    _kept().append(memory)


def _take(size: int) -> mmap.mmap | None:
    for memory in list(_kept()):
        if len(memory) == size and _remove(memory):
            return memory
    return None


def _map(size: int) -> mmap.mmap:
    gone = 0
    for memory in list(_kept()):  # of other sizes: as much as is mapped now, the longest free first
        if gone >= size:
            break
        gone += len(memory) if _remove(memory) else 0
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _remove(memory: mmap.mmap) -> bool:
    try:
        _kept().remove(memory)
    except ValueError:  # another thread was faster
        return False
    return True
