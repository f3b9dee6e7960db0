"""Integer arithmetic of grouped rows: counts, offsets and ranks, without reading the device.

On CUDA the work of one function is one or a few Triton kernels, where Triton is installed; the plain versions in torch
are what the CPU runs, and what the kernels are held to.
"""

import torch
from torch import Tensor

from moekit.operators import HAS_TRITON

_MOST_EXPERTS = 1024  # of the counting sort


def tokens_per_expert(expert_indices: Tensor, num_experts: int) -> Tensor:
    """Count the assignments of each expert; -1 counts for nobody.

    Args:
        expert_indices: (*A) int64 in [0, E), or -1.
        num_experts: E.

    Returns:
        (E,) int64. Deterministic, and no host synchronisation.

    Example:
        >>> tokens_per_expert(torch.tensor([[2, 0], [2, -1]]), 3)
        tensor([1, 0, 2])
    """
    if _has_kernels(expert_indices, num_experts):
        from moekit import _segments_triton

        return _segments_triton.tokens_per_expert(expert_indices.flatten(), num_experts)
    keys = _missing_last(expert_indices.flatten(), num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=keys.device)
    return counts.scatter_add(0, keys, torch.ones_like(keys))[:num_experts]  # in place is closed to vmap


def exclusive_cumsum(sizes: Tensor) -> Tensor:
    """Return where each group starts.

    Args:
        sizes: (E,) integers.

    Returns:
        (E,) int64, the sum of all sizes before.

    Example:
        >>> exclusive_cumsum(torch.tensor([3, 0, 2]))
        tensor([0, 3, 3])
    """
    return sizes.cumsum(0, dtype=torch.int64) - sizes


def sort_by_expert(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order assignments by expert, keeping their order within an expert; those that do not exist come last.

    No host synchronisation. Deterministic on CUDA, where it is a counting sort up to 1024 experts.

    Args:
        expert_indices: (N,) int64 in [0, E), or -1.
        num_experts: E.

    Returns:
        order (N,) int64, the assignments in expert order; sizes (E,) int64, how many each expert has.

    Example:
        >>> sort_by_expert(torch.tensor([1, -1, 0, 1]), 2)
        (tensor([2, 0, 3, 1]), tensor([1, 2]))
    """
    if _has_kernels(expert_indices, num_experts):
        from moekit import _segments_triton

        return _segments_triton.counting_sort(expert_indices, num_experts)[:2]
    keys = _missing_last(expert_indices, num_experts)
    # Fewer bits mean fewer passes of the radix sort; int16 holds every expert number that fits a machine.
    narrow = torch.int16 if num_experts < 2**15 else torch.int64
    order = torch.sort(keys.to(narrow), stable=True).indices
    return order, tokens_per_expert(expert_indices, num_experts)


def first_of_groups(order: Tensor, sizes: Tensor, number: int) -> Tensor:
    """Take as many entries of each group, the first ones.

    No host synchronisation. Deterministic.

    Args:
        order: (N,) int64, group after group.
        sizes: (E,) int64, the entries of each group.
        number: C, how many to take.

    Returns:
        (E * C,) int64, C of each group, -1 where it has fewer.

    Example:
        >>> first_of_groups(torch.tensor([4, 0, 2, 1]), torch.tensor([3, 1]), 2)
        tensor([ 4,  0,  1, -1])
    """
    if _has_kernels(order, sizes.shape[0]):
        from moekit import _segments_triton

        return _segments_triton.first_of_groups(order, sizes, number)
    slots = torch.arange(number, device=order.device)  # (C,)
    sources = exclusive_cumsum(sizes).unsqueeze(1) + slots  # (E, C)
    sources = torch.where(slots < sizes.unsqueeze(1), sources, order.shape[0])
    return torch.cat([order, order.new_full((1,), -1)])[sources].flatten()  # the last entry is what is missing


def rows_of_assignments(assignments: Tensor, num_assignments: int) -> Tensor:
    """Invert a plan: where each assignment's row is.

    Args:
        assignments: (R,) int64 in [0, N), each at most once, or -1.
        num_assignments: N.

    Returns:
        (N,) int64 in [0, R), or -1 for an assignment without a row.

    Example:
        >>> rows_of_assignments(torch.tensor([2, -1, 0]), 3)
        tensor([ 2, -1,  0])
    """
    if assignments.is_cuda and HAS_TRITON:
        from moekit import _segments_triton

        return _segments_triton.rows_of_assignments(assignments, num_assignments)
    num_rows = assignments.shape[0]
    rows = torch.full((num_assignments + 1,), -1, dtype=torch.int64, device=assignments.device)
    targets = _missing_last(assignments, num_assignments)
    return rows.scatter_(0, targets, torch.arange(num_rows, device=assignments.device))[:num_assignments]


def _has_kernels(experts: Tensor, num_experts: int) -> bool:
    return experts.is_cuda and experts.dtype == torch.int64 and num_experts <= _MOST_EXPERTS and HAS_TRITON


def _missing_last(indices: Tensor, end: int) -> Tensor:
    return torch.where(indices < 0, end, indices)
