"""A whole expert layer on the CPU: what lies between the products stays in the cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from moekit.autocast import in_autocast
from moekit.checks import check_plan
from moekit.experts._activations_cpu import ACTIVATIONS
from moekit.experts._fused_cpu import fused_experts
from moekit.experts.activations import SWIGLU, Activation
from moekit.experts.checks import check_activation, check_dtypes
from moekit.experts.ffns import GatedParams, MlpParams
from moekit.experts.packed import PackedGatedParams
from moekit.experts.param_checks import check_params
from moekit.operators import refuse_tangents, wants_gradient
from moekit.types import DispatchPlan, ExpertLayer, Routing

_GATED = (GatedParams, PackedGatedParams)
_PLAIN = (MlpParams,)


def fused_cpu(*, plan: Callable[[Routing], DispatchPlan], activation: Activation = SWIGLU) -> ExpertLayer:
    """Return an expert layer for the CPU that computes expert by expert, each on a thread of its own.

    It computes what ``expert_layer`` does with the same plan. Rows are gathered, multiplied and sent through the
    activation a block at a time; padding rows are not computed at all. Between forward and backward it keeps the
    pre-activations alone, R F entries for each up-projection; where gradients are off, or nothing wants one, nothing.
    The gradient of a router weight is the inner product <a, dy W_down^T>, which needs no expert's output.

    Matrices are read as they lie in memory, also transposed, and gradients come back in that order. Gradients of frozen
    experts, whose parameters want none, are not computed.

    As causal as the plan. Deterministic for a given number of threads. CPU tensors only.

    Each of its threads tells OpenMP and MKL that it works alone. Where these are not found (Windows), torch is told,
    process-wide: threads that first call torch while a layer runs then count one thread, and keep that.

    Args:
        plan: which assignments get a row, of a dispatcher.
        activation: what experts do. Gated ones take ``GatedParams`` or ``PackedGatedParams``, others ``MlpParams``.

    Returns:
        A function (x (T, D), routing, params) -> (T, D) of any floating dtype; sums are taken in float32, float64 for
        float64 tensors. The operator is one for ``torch.compile``; its gradient has no gradient.

    Raises:
        ValueError: if it does not know the activation, or the plan is no function; from the layer, if tensors are
            elsewhere, of several dtypes, or do not fit each other, or ``params`` do not fit the activation.
        NotImplementedError: from the layer, if a tensor has a tangent, for a gradient in forward mode, or inside
            ``torch.vmap``.

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
    check_plan("fused_cpu", plan)
    return partial(_fused_cpu, plan=plan, activation=activation)


def _fused_cpu(
    x: Tensor, routing: Routing, params: Any, *, plan: Callable[[Routing], DispatchPlan], activation: Activation
) -> Tensor:
    if x.device.type != "cpu":
        raise ValueError(f"fused_cpu: x is on {x.device}; expected the CPU. Use fused_layer on a GPU.")
    check_params("fused_cpu", x, routing, params, activation, _GATED if activation.gated else _PLAIN)
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
