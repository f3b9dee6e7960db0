"""What autocast asks of tensors, and stepping out of it, at no cost where there is none."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that products on a device are to have inside autocast.

    Args:
        device_type: of the tensors, as "cuda".

    Returns:
        The dtype; None outside autocast, and on "meta", which has none.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     autocast_dtype("cpu"), autocast_dtype("meta")
        (torch.bfloat16, None)
    """
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def dtype_in_products(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype that a tensor has in products: autocast's where there is one, but float64 stays, as in torch.

    Args:
        dtype: of the tensor.
        device_type: of the tensor, as "cuda".

    Returns:
        The dtype.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     dtype_in_products(torch.float32, "cpu"), dtype_in_products(torch.float64, "cpu")
        (torch.bfloat16, torch.float64)
    """
    return dtype if dtype == torch.float64 else autocast_dtype(device_type) or dtype


def in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of one device in the dtypes that they have in products; outside autocast as they are.

    Args:
        tensors: at least one.

    Returns:
        As many.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     in_autocast(torch.ones(1))
        (tensor([1.], dtype=torch.bfloat16),)
    """
    device_type = tensors[0].device.type
    if autocast_dtype(device_type) is None:
        return tensors
    return tuple(t.to(dtype_in_products(t.dtype, device_type)) for t in tensors)


def outside_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which products have the dtypes of their operands.

    ``torch.autocast(..., enabled=False)`` takes the host as long as the launch of a kernel, also where it changes
    nothing.

    Args:
        device_type: of the tensors, as "cuda".

    Returns:
        A context to enter once.

    Example:
        >>> with torch.autocast("cpu"), outside_autocast("cpu"):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)
