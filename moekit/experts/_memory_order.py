"""How matrices lie in memory: products read them, and write their gradients, in that order."""

from torch import Tensor


def is_transposed(w: Tensor) -> bool:
    """Say whether matrices lie in memory the other way round, as a transposed view does.

    Args:
        w: (E, M, N).

    Returns:
        Whether the entries of a column are adjacent, and those of a row not.

    Example:
        >>> import torch
        >>> w = torch.ones(2, 3, 4)
        >>> is_transposed(w), is_transposed(w.transpose(1, 2))
        (False, True)
    """
    return w.stride(1) == 1 != w.stride(2)
