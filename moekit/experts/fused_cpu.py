"""A whole expert layer on the CPU: what lies between the products stays in the cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from moekit.autocast import in_autocast
from moekit.checks import check_devices, check_routing
from moekit.experts._activations_cpu import ACTIVATIONS
from moekit.experts._fused_cpu import fused_experts
from moekit.experts.activations import SWIGLU, Activation
from moekit.experts.checks import check_activation, check_dtypes
from moekit.experts.ffns import GatedParams, MlpParams
from moekit.experts.packed import PackedGatedParams
from moekit.operators import refuse_tangents, wants_gradient
from moekit.types import DispatchPlan, ExpertLayer, Routing


def fused_cpu(*, plan: Callable[[Routing], DispatchPlan], activation: Activation = SWIGLU) -> ExpertLayer:
    """Return an expert layer for the CPU that computes expert by expert, each on a thread of its own.

    It computes what ``expert_layer`` does with the same plan. Rows are gathered, multiplied and sent through the
    activation a block at a time; padding rows are not computed at all. Between forward and backward it keeps the
    pre-activations alone, R F entries for each up-projection; where gradients are off, or nothing wants one, nothing.
    The gradient of a router weight is the inner product <a, dy W_down^T>, which needs no expert's output.

    Matrices are read as they lie in memory, also transposed, and gradients come back in that order. Gradients of frozen
    experts, whose parameters want none, are not computed.

    As causal as the plan. Deterministic for a given number of threads. CPU tensors only.

    Args:
        plan: which assignments get a row, of a dispatcher.
        activation: what experts do. Gated ones take ``GatedParams`` or ``PackedGatedParams``, others ``MlpParams``.

    Returns:
        A function (x (T, D), routing, params) -> (T, D) of any floating dtype; sums are taken in float32, float64 for
        float64 tensors. The operator is one for ``torch.compile``; its gradient has no gradient.

    Raises:
        ValueError: if it does not know the activation; from the layer, if tensors are elsewhere, or ``params`` do not
            fit the activation or each other.
        NotImplementedError: from the layer, if a tensor has a tangent, for a gradient in forward mode.

    Example:
        >>> import torch
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
    x, *projections = in_autocast(x, *params)
    check_dtypes("fused_cpu", x, *projections)
    refuse_tangents("fused_cpu", x, routing.weights, *projections)
    assignments, groups = plan(routing)
    packed = isinstance(params, PackedGatedParams)
    if packed:
        projections = [w.transpose(1, 2) for w in projections]
    gate, up, down = projections if activation.gated and not packed else (None, *projections)
    keep = wants_gradient(x, routing.weights, *projections)
    y, _ = fused_experts(
        x, routing.weights, routing.token_indices, assignments, groups.sizes, gate, up, down,
        activation.function, packed, keep,
    )  # fmt: skip
    return y


def _check(x: Tensor, routing: Routing, params: Any, activation: Activation) -> None:
    check_routing("fused_cpu", routing)
    if x.device.type != "cpu":
        raise ValueError(f"fused_cpu: x is on {x.device}; expected the CPU. Use fused_layer on a GPU.")
    check_devices("fused_cpu", x, *routing[:3], *params)
    packed = activation.gated and isinstance(params, PackedGatedParams)
    kind = PackedGatedParams if packed else GatedParams if activation.gated else MlpParams
    if len(params) != len(kind._fields) or isinstance(params, PackedGatedParams) != packed:
        raise ValueError(
            f"fused_cpu: {len(params)} projections were given for {activation}; expected those of {kind.__name__}, "
            f"{', '.join(kind._fields)}. Pass the activation that fits the parameters."
        )
    shapes, num_experts, dim = [tuple(w.shape) for w in params], routing.num_experts, x.shape[-1]
    hidden = (shapes[-1 if packed else 0] or (0,))[-1]
    if packed:
        wanted = [(num_experts, 2 * hidden, dim), (num_experts, dim, hidden)]
        said = "(E, 2F, D) and, for down, (E, D, F)"
    else:
        wanted = [*[(num_experts, dim, hidden)] * (len(shapes) - 1), (num_experts, hidden, dim)]
        said = "(E, D, F) and, for down, (E, F, D)"
    if shapes != wanted or x.shape[:-1] != (routing.num_tokens,):
        raise ValueError(
            f"fused_cpu: x {tuple(x.shape)} and projections {shapes} do not fit a routing of {routing.num_tokens} "
            f"tokens over {routing.num_experts} experts; expected (T, D), {said}."
        )
