"""Tensors that may be spread over ranks: this rank's part, the whole, and filling them."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


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
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device, tensor.dtype)
        tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None))
    else:
        tensor.copy_(value)


def mesh_names(tensor: Tensor) -> tuple[str, ...]:
    """Name the axes of ranks that a tensor is spread over.

    Args:
        tensor: any.

    Returns:
        Names, with sizes; none for a whole tensor. Tensors with the same may share a fused operation.

    Example:
        >>> mesh_names(torch.ones(2))
        ()
    """
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(f"{name} {ranks}" for name, ranks in zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
