"""A whole expert layer on the CPU: what lies between the products stays in the cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from moekit.experts._activations_cpu import ACTIVATIONS
from moekit.experts._fused_cpu import fused
from moekit.experts.activations import SWIGLU, Activation
from moekit.experts.checks import check_activation, check_assignments
from moekit.experts.ffns import GatedParams, MlpParams
from moekit.operators import wants_gradient
from moekit.types import DispatchPlan, ExpertLayer, Routing


def fused_cpu(*, plan: Callable[[Routing], DispatchPlan], activation: Activation = SWIGLU) -> ExpertLayer:
    """Return an expert layer for the CPU that computes expert by expert, each on a thread of its own.

    It computes what ``expert_layer`` does with the same plan. Rows are gathered, multiplied and sent through the
    activation a block at a time; padding rows are not computed at all. Between forward and backward it keeps the
    pre-activations alone, R F entries for each up-projection; where gradients are off, or nothing wants one, nothing.
    The gradient of a router weight is the inner product <a, dy W_down^T>, which needs no expert's output.

    Gradients of frozen experts, whose parameters want none, are not computed.

    As causal as the plan. Deterministic for a given number of threads. CPU tensors only.

    Args:
        plan: which assignments get a row, of a dispatcher.
        activation: what experts do, and which parameters they have.

    Returns:
        A function (x (T, D), routing, params) -> (T, D) of any floating dtype; sums are taken in float32, float64 for
        float64 tensors. The operator is one for ``torch.compile``; its gradient has no gradient.

    Raises:
        ValueError: if it does not know the activation; from the layer, if tensors are elsewhere, or ``params`` do not
            fit the activation or each other.
        NotImplementedError: from the layer, if a tensor has a tangent, for a gradient in forward mode.

    Example:
        >>> from moekit.experts import init_gated
        >>> from moekit.recipes import mixtral
        >>> recipe = mixtral()
        >>> layer = fused_cpu(plan=recipe.plan)
        >>> layer(torch.ones(5, 4), recipe.route(torch.zeros(5, 3)), init_gated(3, 4, 8)).shape
        torch.Size([5, 4])

    References:
        Guo et al., SonicMoE, 2025 (the router's gradient from the down-projection's backward),
            https://arxiv.org/abs/2512.14080
    """
    check_activation("fused_cpu", activation, tuple(ACTIVATIONS))
    return partial(_fused_cpu, plan=plan, activation=activation)


def _fused_cpu(
    x: Tensor, routing: Routing, params: Any, *, plan: Callable[[Routing], DispatchPlan], activation: Activation
) -> Tensor:
    _check(x, routing, params, activation)
    projections = tuple(params)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, *projections = (t.to(dtype) for t in (x, *projections))  # type: ignore[assignment]
    _check_dtypes(x, *projections)
    _refuse_tangents(x, routing.weights, *projections)
    assignments, groups = plan(routing)
    gate, up, down = projections if activation.gated else (None, *projections)
    keep = wants_gradient(x, routing.weights, *projections)
    y, _ = fused(
        x, routing.weights, routing.token_indices, assignments, groups.sizes, gate, up, down, activation.function, keep
    )
    return y


def _check(x: Tensor, routing: Routing, params: Any, activation: Activation) -> None:
    if x.device.type != "cpu":
        raise ValueError(f"fused_cpu: x is on {x.device}; expected the CPU. Use fused_layer on a GPU.")
    kind = GatedParams if activation.gated else MlpParams
    if len(params) != len(kind._fields):
        raise ValueError(
            f"fused_cpu: {len(params)} projections were given for {activation}; expected those of {kind.__name__}, "
            f"{', '.join(kind._fields)}. Pass the activation that fits the parameters."
        )
    shapes = [tuple(w.shape) for w in params]
    fits = len(shapes[0]) == 3 and shapes[0][0] == routing.num_experts
    if fits:
        num_experts, dim, hidden = shapes[0]
        fits = shapes == [shapes[0]] * (len(shapes) - 1) + [(num_experts, hidden, dim)] and x.shape[-1] == dim
    if not fits or x.shape[:-1] != (routing.num_tokens,):
        raise ValueError(
            f"fused_cpu: x {tuple(x.shape)} and projections {shapes} do not fit a routing of {routing.num_tokens} "
            f"tokens over {routing.num_experts} experts; expected (T, D), (E, D, F) and, for down, (E, F, D)."
        )
    check_assignments("fused_cpu", routing)


def _refuse_tangents(*tensors: Tensor) -> None:
    """Raise for forward-mode gradients, which torch drops without a word where no input wants one in reverse."""
    if not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "fused_cpu: it has no forward-mode gradient (torch.func.jvp, dual tensors). Take one in reverse mode, by "
            "torch.autograd.grad."
        )


def _check_dtypes(*tensors: Tensor) -> None:
    if len({t.dtype for t in tensors}) > 1:
        raise ValueError(
            f"fused_cpu: x and projections are {', '.join(str(t.dtype) for t in tensors)}; expected one dtype. Cast "
            f"them, or run inside torch.autocast."
        )
