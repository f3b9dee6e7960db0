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


def in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of one device in autocast's dtype; outside autocast as they are.

    Args:
        tensors: at least one.

    Returns:
        As many.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     in_autocast(torch.ones(1))
        (tensor([1.], dtype=torch.bfloat16),)
    """
    dtype = autocast_dtype(tensors[0].device.type)
    return tensors if dtype is None else tuple(t.to(dtype) for t in tensors)


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
