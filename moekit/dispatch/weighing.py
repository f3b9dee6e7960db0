"""Router weights on the rows that go into experts, in place of those that come out."""

from functools import partial

import torch
from torch import Tensor

from moekit.dispatch.rows import weights_of_rows
from moekit.types import Dispatcher, DispatchPlan, Routing


def weigh_inputs(dispatcher: Dispatcher) -> Dispatcher:
    """Let a dispatcher multiply each row by its weight before the experts, and add up afterwards with weight one.

    y_t = sum_e f_e(g_te x_t), where the usual layer is sum_e g_te f_e(x_t). Experts are not linear, so the two differ.
    The router's gradient flows through the same weights.

    As causal as the dispatcher. No host synchronisation. Deterministic on CUDA if the dispatcher is.

    Args:
        dispatcher: any; its plan stays as it is, so that a priority by weight still sees the weights.

    Returns:
        Dispatcher.

    Example:
        >>> from moekit.dispatch import dropless
        >>> from moekit.routing import top_k
        >>> halves = weigh_inputs(dropless())
        >>> routing = top_k(torch.zeros(1, 2), k=1)
        >>> rows = halves.dispatch(torch.ones(1, 1), routing, halves.plan(routing))
        >>> rows, halves.combine(rows, routing, halves.plan(routing))
        (tensor([[0.5000]]), tensor([[0.5000]]))

    References:
        Meta, Llama 4, 2025, https://ai.meta.com/blog/llama-4-multimodal-intelligence; that weights go in is in its
            released code, ``models/llama4/moe.py`` of https://github.com/meta-llama/llama-models
    """
    return Dispatcher(
        dispatcher.plan,
        partial(_dispatch, dispatcher=dispatcher),
        partial(_combine, dispatcher=dispatcher),
    )


def _dispatch(x: Tensor, routing: Routing, plan: DispatchPlan, *, dispatcher: Dispatcher) -> Tensor:
    rows = dispatcher.dispatch(x, routing, plan)  # (R, D)
    weights = weights_of_rows(routing, plan).unsqueeze(1)
    return (rows * weights.to(torch.promote_types(rows.dtype, torch.float32))).to(rows.dtype)


def _combine(rows: Tensor, routing: Routing, plan: DispatchPlan, *, dispatcher: Dispatcher) -> Tensor:
    # An assignment that does not exist has no row; its weight stays zero all the same.
    ones = torch.ones_like(routing.weights).masked_fill(routing.expert_indices < 0, 0.0)
    return dispatcher.combine(rows, routing._replace(weights=ones), plan)
