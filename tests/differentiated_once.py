"""What is held of functions whose gradient has none: they work inside checkpoint, and refuse gradients of gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def check_differentiated_once(name: str, total: Callable[..., Tensor], *leaves: Tensor) -> None:
    """Differentiate a scalar of a function as checkpointing does, which unpacks once what was kept; and twice."""
    expected = torch.autograd.grad(total(*leaves), leaves)
    found = torch.autograd.grad(checkpoint(total, *leaves, use_reentrant=False), leaves)
    assert all(map(torch.equal, found, expected))
    grads = torch.autograd.grad(total(*leaves), leaves, create_graph=True)
    for leaf in leaves:
        with pytest.raises(RuntimeError, match=f"{name}: its gradient has no gradient"):
            torch.autograd.grad(sum(grad.float().square().sum() for grad in grads), leaf, retain_graph=True)
