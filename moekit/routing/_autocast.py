"""Stepping out of autocast, at no cost where there is none to step out of."""

from contextlib import AbstractContextManager, nullcontext

import torch


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
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
