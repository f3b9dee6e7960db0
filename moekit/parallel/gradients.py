"""Gradients over ranks: summed where several hold the same parameters, and their norm, each element once."""

from collections.abc import Iterable, Sequence
from functools import lru_cache, reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.parallel.grids import Grid
from moekit.parallel.processes import World
from moekit.parallel.spread_tensors import is_spread, local

_LONGEST_ROW = 4096  # of squares that a CPU adds up one after the other


def sum_gradients(parameters: Iterable[Tensor], grid: Grid) -> None:
    """Add gradients up over the ranks that hold the same parameters whole; what FSDP shards has been reduced already.

    A parameter without a gradient counts as zero, so that ranks whose tokens reached other parts of the model agree.

    Args:
        parameters: in the same order on every rank; their ``.grad`` is replaced.
        grid: of all ranks.

    Example:
        >>> from moekit.parallel import make_grid, one_process, replicated
        >>> sum_gradients([], make_grid(one_process(), replicated(1, 1)))
    """
    if grid.experts is None:
        return
    mine = [p for p in parameters if p.requires_grad]
    _sum([p for p in mine if not is_spread(p)], [None])
    axes = [name for name in ("copies", "shards") if grid.experts[name].size() > 1]
    _sum([p for p in mine if _is_part(p)], [grid.experts[name].get_group() for name in axes])


@torch.no_grad()
def squared_norm(parameters: Iterable[Tensor], world: World) -> Tensor:
    """Add up the squares of all gradients, each element of the model once, over every rank's part.

    Args:
        parameters: with gradients; those of whole parameters are the same on all ranks that hold them.
        world: all ranks.

    Returns:
        Scalar float64 where the gradients are, the same on every rank; 0 on the ranks' device without any.

    Example:
        >>> from moekit.parallel import one_process
        >>> x = torch.zeros(2, requires_grad=True)
        >>> x.grad = torch.tensor([3.0, 4.0])
        >>> squared_norm([x], one_process())
        tensor(25., dtype=torch.float64)
    """
    found = [(local(p.grad), holders(p, world.size)) for p in parameters if p.grad is not None]
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    if found:
        wide = reduce(torch.promote_types, (gradient.dtype for gradient, _ in found), torch.float32)
        norms = torch.stack(_norms([gradient for gradient, _ in found], wide)).double()
        shares = torch.tensor([1 / count for _, count in found], dtype=torch.float64)
        total = (norms.square() * shares.to(norms.device, non_blocking=True)).sum()
    if world.size > 1:
        dist.all_reduce(total)
    return total


def _norms(gradients: list[Tensor], wide: torch.dtype) -> tuple[Tensor, ...]:
    """Compute the norm of each gradient; on a CPU of each row first, for it adds squares up one after the other.

    In float32 the norm of 12 million numbers comes out 4e-4 too small so, and another where ranks hold parts of them.
    """
    if any(gradient.is_cpu for gradient in gradients):
        gradients = [_norms_of_rows(gradient, wide) for gradient in gradients]
        wide = torch.float64
    return torch._foreach_norm(gradients, dtype=wide)


def _norms_of_rows(gradient: Tensor, wide: torch.dtype) -> Tensor:
    """Compute the norm of each row; of long rows that of each piece, in one axis of all pieces."""
    if gradient.ndim == 0 or gradient.shape[-1] <= _LONGEST_ROW:
        return torch.linalg.vector_norm(gradient, dim=-1, dtype=wide)
    end = gradient.shape[-1] // _LONGEST_ROW * _LONGEST_ROW
    pieces = gradient[..., :end].unflatten(-1, (-1, _LONGEST_ROW)), gradient[..., end:]
    return torch.cat([torch.linalg.vector_norm(piece, dim=-1, dtype=wide).flatten() for piece in pieces])


def holders(tensor: Tensor, world_size: int) -> int:
    """Count the ranks that hold each element of a tensor.

    Args:
        tensor: whole, the same on all ranks, or a DTensor.
        world_size: ranks in all.

    Returns:
        How many.

    Example:
        >>> holders(torch.ones(2), 4)
        4
    """
    return world_size // _pieces(tensor.device_mesh, tensor.placements) if is_spread(tensor) else world_size


@lru_cache(maxsize=512)  # every step asks it of every parameter
def _pieces(mesh: Any, placements: tuple[Any, ...]) -> int:
    cut = [mesh.size(axis) for axis, placement in enumerate(placements) if not placement.is_replicate()]
    return torch.Size(cut).numel()


def _is_part(tensor: Tensor) -> bool:
    """Say whether a tensor is a part of the experts that this rank holds without FSDP."""
    return is_spread(tensor) and "shards" not in (tensor.device_mesh.mesh_dim_names or ())


def _sum(parameters: Sequence[Tensor], groups: Sequence[dist.ProcessGroup | None]) -> None:
    """Add the gradients of parameters up over groups of ranks, one after the other, in one exchange per dtype."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not groups:  # nobody else has them
        return
    for dtype in sorted({p.dtype for p in parameters}, key=str):
        mine = [p for p in parameters if p.dtype == dtype]
        parts = [local(p.grad) for p in mine if p.grad is not None]  # all of them, by now
        flat = torch.cat([part.flatten() for part in parts])
        for group in groups:
            dist.all_reduce(flat, group=group)
        for parameter, piece, part in zip(mine, flat.split([part.numel() for part in parts]), parts, strict=True):
            _set_gradient(parameter, piece.view_as(part))


def _set_gradient(parameter: Tensor, value: Tensor) -> None:
    if is_spread(parameter):
        from torch.distributed.tensor import DTensor

        value = DTensor.from_local(value, parameter.device_mesh, parameter.placements, run_check=False)
    parameter.grad = value
