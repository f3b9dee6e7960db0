"""A dispatcher whose padding rows hold NaN when they come back from the experts (contract 2 of the design)."""

import torch
from torch import Tensor

from moekit.types import Dispatcher, Routing


class _NanOnPadding(torch.autograd.Function):
    """Put NaN into padding rows; their gradient passes, so that one that is not zero shows in the parameters."""

    @staticmethod
    def forward(ctx, rows: Tensor, padding: Tensor) -> Tensor:
        return rows.masked_fill(padding.unsqueeze(1), torch.nan)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def spoiled(dispatcher: Dispatcher) -> Dispatcher:
    def combine(rows: Tensor, routing: Routing, plan) -> Tensor:
        return dispatcher.combine(_NanOnPadding.apply(rows, plan.assignments < 0), routing, plan)

    return dispatcher._replace(combine=combine)
