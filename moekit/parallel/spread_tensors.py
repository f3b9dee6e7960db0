"""Tensors that may be spread over ranks: this rank's part, the whole, and filling them."""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_spread(value: Any) -> "TypeGuard[DTensor]":
    """Say whether a value is a sharded tensor (DTensor).

    Where nobody has loaded ``torch.distributed.tensor`` there is none; loading that is a quarter of ``import moekit``.

    Args:
        value: any.

    Returns:
        Whether it is.

    Example:
        >>> is_spread(torch.ones(2))
        False
    """
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)  # None while that is being loaded
    return kind is not None and isinstance(value, kind)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor; gradients flow through.

    Args:
        tensor: any.

    Returns:
        A plain tensor.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.to_local() if is_spread(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded; every rank must ask for it.

    Args:
        tensor: any.

    Returns:
        The same values, whole on this rank.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.full_tensor() if is_spread(tensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded; every rank must have the same value.

    Args:
        tensor: changed in place.
        value: of the same shape, whole, on any device and of any dtype.

    Example:
        >>> x = torch.zeros(2)
        >>> fill(x, torch.tensor([1.0, 2.0]))
        >>> x
        tensor([1., 2.])
    """
    if is_spread(tensor):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(tensor.device, tensor.dtype)
        tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None))
    else:
        tensor.copy_(value)


def mesh_names(tensor: Tensor) -> tuple[str, ...]:
    """Name the axes of ranks that a tensor is spread over.

    Args:
        tensor: any.

    Returns:
        Names, with sizes; none for a whole tensor. The axes of a mesh without names are numbered. Tensors with the same
        may share a fused operation.

    Example:
        >>> mesh_names(torch.ones(2))
        ()
    """
    if not is_spread(tensor):
        return ()
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or [f"axis {number}" for number in range(mesh.ndim)]
    return tuple(f"{name} {ranks}" for name, ranks in zip(names, mesh.shape, strict=True))
