"""A whole expert layer as a few kernels: rows are never written between the two halves of a projection.

Between forward and backward it keeps what its argument ``keep`` says; nothing else of N rows lives that long.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.experts.ffns import GatedParams, MlpParams
from moekit.experts.tiles import LayerSize, LayerTiles, Tile, check_tiles, layer_tiles
from moekit.experts.triton_matmul import check_dtypes
from moekit.operators import operator
from moekit.types import ExpertLayer, Routing


class Activation(NamedTuple):
    """What the hidden units of fused experts do.

    Attributes:
        function: f; the kernels know silu, gelu (exact), gelu_tanh, relu, and relu2 = relu(x)^2.
        gated: whether experts are f(x W_gate) * (x W_up), of GatedParams, or f(x W_up), of MlpParams.
    """

    function: str
    gated: bool


SWIGLU = Activation("silu", gated=True)
GEGLU = Activation("gelu", gated=True)
GEGLU_TANH = Activation("gelu_tanh", gated=True)
GELU_MLP = Activation("gelu_tanh", gated=False)
RELU_MLP = Activation("relu", gated=False)
RELU2 = Activation("relu2", gated=False)


class Keep(NamedTuple):
    """What lives from the forward to the backward, beside tokens, routing and parameters; the rest is computed again.

    Attributes:
        rows: the tokens copied to their rows, N D entries; else they are copied again.
        preactivation: the up-projections, N F entries each; else the backward computes them again, which adds a ninth
            of the arithmetic of forward and backward for MLP experts, and two ninths for gated ones.
    """

    rows: bool
    preactivation: bool


EVERYTHING = Keep(rows=True, preactivation=True)
PREACTIVATION = Keep(rows=False, preactivation=True)
INPUTS = Keep(rows=False, preactivation=False)


def fused_layer(
    *,
    activation: Activation = SWIGLU,
    keep: Keep = PREACTIVATION,
    precision: str = "ieee",
    tiles: Callable[[LayerSize], LayerTiles] = layer_tiles,
) -> ExpertLayer:
    """Return a dropless expert layer out of Triton kernels, forward and backward.

    It computes what ``expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=loop))`` does: up-projections
    with the activation in their epilogue, down-projection, and one kernel that sums each token's rows, weighted. In the
    backward, the gradient of a router weight is an inner product in the epilogue of the down-projection's: <a, dy W^T>.

    Causal. No host synchronisation. Deterministic on CUDA for token choice (T, K); other routings add rows with
    ``index_add``, whose order on CUDA varies. On the CPU it runs only in Triton's interpreter.

    Args:
        activation: what experts do, and which parameters they have.
        keep: what lives from the forward to the backward.
        precision: of float32 products, "ieee" or "tf32".
        tiles: chooses the kernels' tiles by the size of the layer.

    Returns:
        A function (x (T, D), routing, params) -> (T, D), of float32, bfloat16 or float16; sums are taken in float32.

    Raises:
        ValueError: from the layer, if ``params`` do not fit the activation, or their shapes and dtypes each other.

    Example:
        >>> layer = fused_layer(activation=GEGLU, keep=INPUTS)
        >>> layer.keywords["keep"]
        Keep(rows=False, preactivation=False)

    References:
        Guo et al., SonicMoE, 2025 (the router's gradient from the down-projection's backward; what is kept),
            https://arxiv.org/abs/2512.14080
        Tan et al., Scattered Mixture-of-Experts Implementation, 2024, https://arxiv.org/abs/2403.08245
    """
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"fused_layer: precision = {precision!r}; expected 'ieee' or 'tf32'.")
    return partial(_fused_layer, activation=activation, keep=keep, precision=precision, tiles=tiles)


def _fused_layer(
    x: Tensor,
    routing: Routing,
    params: Any,
    *,
    activation: Activation,
    keep: Keep,
    precision: str,
    tiles: Callable[[LayerSize], LayerTiles],
) -> Tensor:
    _check(x, routing, params, activation)
    projections = tuple(params)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, *projections = (t.to(dtype) for t in (x, *projections))  # type: ignore[assignment]
    check_dtypes("fused_layer", x, *projections)
    experts, tokens = routing.expert_indices, routing.token_indices
    if experts.ndim != 2:
        experts, tokens = experts.flatten(), tokens.flatten()
    size = LayerSize(x.dtype, experts.numel(), routing.num_experts, x.shape[1], params.up.shape[2], activation.gated)
    chosen = check_tiles(tiles(size))
    plan = _plan(experts, tokens, routing.num_experts, chosen.up.m, chosen.grad_up.k)
    weights = routing.weights.view(experts.shape).to(torch.float32)
    settings = _Settings(activation.function, precision, keep, [n for tile in chosen for n in tile], len(plan))
    y: Tensor = _Fused.apply(settings, x, weights, *plan, *projections)
    return y


class _Settings(NamedTuple):
    function: str
    precision: str
    keep: Keep
    tiles: list[int]
    num_plan: int


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings: _Settings, x: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        plan, projections = list(rest[: settings.num_plan]), list(rest[settings.num_plan :])
        needed = any(ctx.needs_input_grad)
        kept = settings.keep.rows and needed, settings.keep.preactivation and needed
        y, rows, pre = _forward(x, weights, plan, projections, *settings[:2], settings.tiles, *kept)
        ctx.settings = settings
        ctx.save_for_backward(x, weights, rows, pre, *rest)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weights, rows, pre, *rest = ctx.saved_tensors
        settings = ctx.settings
        plan, projections = list(rest[: settings.num_plan]), list(rest[settings.num_plan :])
        grad_x, grad_weights, grad_ups, grad_down = _backward(
            grad, x, weights, plan, projections, rows, pre, *settings[:2], settings.tiles
        )
        return None, grad_x, grad_weights, *[None] * len(plan), *grad_ups.unbind(0), grad_down


def _plan_fake(experts: Tensor, tokens: Tensor, num_experts: int, height: int, align: int) -> list[Tensor]:
    from moekit.experts import _tiles_triton

    if experts.numel() == 0:
        return [torch.empty_like(experts)]
    num_rows = _tiles_triton.aligned_rows(experts.numel(), num_experts, align)
    num_owners = _tiles_triton.most_tiles(num_rows, num_experts, height)
    schedule = [
        experts.new_empty(n, dtype=torch.int32) for n in (num_experts, num_experts, num_experts + 1, num_owners)
    ]
    padding = experts.new_empty(num_rows, dtype=torch.bool)
    return [torch.empty_like(experts), experts.new_empty(num_rows), padding, *schedule]


@operator("fused_plan", _plan_fake)
def _plan(experts: Tensor, tokens: Tensor, num_experts: int, height: int, align: int) -> list[Tensor]:
    from moekit.experts import _fused_triton

    if experts.numel() == 0:
        return [experts.clone()]
    rows, tokens_of_rows, padding, schedule = _fused_triton.make_plan(
        experts, tokens, num_experts, height=height, align=align
    )
    return [rows, tokens_of_rows, padding, *schedule]


def _forward_fake(
    x: Tensor,
    weights: Tensor,
    plan: list[Tensor],
    projections: list[Tensor],
    function: str,
    precision: str,
    tiles: list[int],
    keep_rows: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = plan[1].shape[0] if len(plan) > 1 else 0
    rows = x.new_empty(num_rows if keep_rows else 0, x.shape[1])
    pre = x.new_empty(num_rows if keep_pre else 0, sum(p.shape[2] for p in projections[:-1]))
    return x.new_empty(x.shape), rows, pre


@operator("fused_experts", _forward_fake)
def _forward(
    x: Tensor,
    weights: Tensor,
    plan: list[Tensor],
    projections: list[Tensor],
    function: str,
    precision: str,
    tiles: list[int],
    keep_rows: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from moekit.experts import _fused_triton

    if weights.numel() == 0:
        y, rows, pre = _forward_fake(x, weights, plan, projections, function, precision, tiles, keep_rows, keep_pre)
        return y.zero_(), rows, pre
    y, rows, pre = _fused_triton.forward(
        x.contiguous(), weights.contiguous(), _plan_of(plan), tuple(p.contiguous() for p in projections),
        activation=function, precision=precision, tiles=_layer_tiles(tiles), keep_pre=keep_pre,
    )  # fmt: skip
    return y, rows if keep_rows else rows.new_empty(0, rows.shape[1]), pre


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    plan: list[Tensor],
    projections: list[Tensor],
    rows: Tensor,
    pre: Tensor,
    function: str,
    precision: str,
    tiles: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *ups, down = projections
    return (
        x.new_empty(x.shape),
        weights.new_empty(weights.shape),
        x.new_empty(len(ups), *ups[0].shape),
        x.new_empty(down.shape),
    )


@operator("fused_experts_backward", _backward_fake)
def _backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    plan: list[Tensor],
    projections: list[Tensor],
    rows: Tensor,
    pre: Tensor,
    function: str,
    precision: str,
    tiles: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from moekit.experts import _fused_triton

    if weights.numel() == 0:
        first, second, third, fourth = _backward_fake(
            grad, x, weights, plan, projections, rows, pre, function, precision, tiles
        )
        return first.zero_(), second.zero_(), third.zero_(), fourth.zero_()
    return _fused_triton.backward(
        grad.contiguous(), x.contiguous(), weights.contiguous(), _plan_of(plan),
        tuple(p.contiguous() for p in projections), (rows, pre),
        activation=function, precision=precision, tiles=_layer_tiles(tiles),
    )  # fmt: skip


def _plan_of(tensors: list[Tensor]) -> Any:
    from moekit.experts._fused_triton import Plan
    from moekit.experts._tiles_triton import Schedule

    rows, tokens, padding, *schedule = tensors
    return Plan(rows, tokens, padding, Schedule(*schedule))


def _layer_tiles(numbers: list[int]) -> LayerTiles:
    """Undo the flattening that operators need; an overlap has become 0 or 1."""
    width = len(Tile._fields)
    return LayerTiles(*(Tile(*numbers[at : at + width]) for at in range(0, len(numbers), width)))  # type: ignore[arg-type]


def _check(x: Tensor, routing: Routing, params: Any, activation: Activation) -> None:
    expected = GatedParams if activation.gated else MlpParams
    if not isinstance(params, expected):
        raise ValueError(
            f"fused_layer: the parameters are {type(params).__name__}, and the activation {activation}; expected "
            f"{expected.__name__}. Pass the activation of these experts, or other parameters."
        )
    up, down = params.up, params.down
    shapes = [tuple(p.shape) for p in params]
    wanted = [(routing.num_experts, x.shape[-1], up.shape[-1])] * (len(params) - 1)
    if x.shape != (routing.num_tokens, down.shape[-1]) or shapes != [*wanted, (up.shape[0], up.shape[2], up.shape[1])]:
        raise ValueError(
            f"fused_layer: x {tuple(x.shape)} and parameters {shapes} do not fit a routing of {routing.num_tokens} "
            f"tokens and {routing.num_experts} experts; expected (T, D), (E, D, F) each, and (E, F, D) for down."
        )
