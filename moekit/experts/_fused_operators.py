"""The operators of the fused layer's forward and backward, which compilers leave whole, and its autograd function."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.experts._fused_plan import plan_of, plan_routing
from moekit.experts.activations import Activation
from moekit.experts.tiles import LayerTiles, Tile
from moekit.operators import differentiated_once, operator, without_vmap


class Layout(NamedTuple):
    """How parameters lie in memory: operators get them in that order, and return gradients in it.

    Attributes:
        packed: whether gate and up are the halves of one tensor, (E, D, 2 F) or (E, 2 F, D).
        biased: whether a bias of each matrix follows the matrices.
        up_transposed: whether gate and up are (E, F, D), not (E, D, F).
        down_transposed: whether down is (E, D, F), not (E, F, D).
    """

    packed: bool
    biased: bool
    up_transposed: bool
    down_transposed: bool


class Settings(NamedTuple):
    """What is no tensor, and decides which code runs.

    Attributes:
        function: of the activation.
        gated: whether experts are.
        precision: of float32 products.
        layout: of the parameters.
        tiles: of the kernels.
    """

    function: str
    gated: bool
    precision: str
    layout: Layout
    tiles: LayerTiles

    def text(self) -> str:
        """Write them as operators can take them; by names, for Dynamo (torch 2.11) cannot loop over a constant tile."""
        tiles = [getattr(self.tiles, product) for product in LayerTiles._fields]
        numbers = [self.gated, *self.layout, *[getattr(tile, name) for tile in tiles for name in Tile._fields]]
        return " ".join([self.function, self.precision, *[str(int(n)) for n in numbers]])


@lru_cache(maxsize=512)
def settings_of(text: str) -> Settings:
    """Read settings from the text that ``Settings`` is written as."""
    function, precision, *words = text.split()
    gated, *numbers = [int(word) for word in words]
    start, width = len(Layout._fields), len(Tile._fields)
    tiles = [Tile(*numbers[at : at + width]) for at in range(start, len(numbers), width)]  # type: ignore[arg-type]
    return Settings(function, bool(gated), precision, Layout(*map(bool, numbers[:start])), LayerTiles(*tiles))


class Fused(torch.autograd.Function):
    """(settings, constants, keep_rows, keep_pre, height, align, most, x, weights, experts, tokens, *parameters) -> y.

    ``height`` is of the plan's tiles, ``align`` of its groups, and so many assignments exist at ``most``.
    """

    @staticmethod
    def forward(ctx, *given: Any) -> Tensor:  # type: ignore[no-untyped-def]
        """Run the layer, and keep what is to be kept.

        One name for all that is given: without gradients Dynamo leaves ``ctx`` out where as many are given as named.
        """
        settings, constants, keep_rows, keep_pre, height, align, most, *tensors = given
        x, weights, experts, tokens, *projections = tensors
        plan = plan_routing(experts, tokens, x.shape[0], projections[0].shape[0], height, align, most)
        y, rows, pre = _forward(x, weights, plan, projections, settings, constants, keep_rows, keep_pre)
        _save(ctx, (settings, constants), (x, weights, rows, pre), plan, projections)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        """Return the gradients of tokens, routing weights and parameters."""
        x, weights, rows, pre, *rest = ctx.saved_tensors
        plan, projections = rest[: ctx.num_plan], rest[ctx.num_plan :]
        grads = _backward(grad, x, weights, plan, projections, rows, pre, *ctx.decided, ctx.frozen)
        grad_x, grad_weights, *of_experts = grads
        parameters: list[Tensor | None] = [None] * len(projections)
        if of_experts:
            grad_ups, grad_down, *grad_biases = of_experts
            if grad_biases:
                grad_biases = [*grad_biases[0].unbind(0), grad_biases[1]]
            parameters = [*grad_ups.unbind(0), grad_down, *grad_biases]
        none = (None,) * 7
        inputs = (grad, x, weights, *projections)
        return differentiated_once("fused_layer", inputs, *none, grad_x, grad_weights, None, None, *parameters)


class FusedOnce(torch.autograd.Function):
    """``Fused`` for transforms of ``torch.func``: what it keeps it returns too, behind y, as they ask of a function."""

    @staticmethod
    def forward(
        settings: str,
        constants: list[float],
        keep_rows: bool,
        keep_pre: bool,
        height: int,
        align: int,
        most: int,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        """Run the layer."""
        x, weights, experts, tokens, *projections = rest
        plan = plan_routing(experts, tokens, x.shape[0], projections[0].shape[0], height, align, most)
        y, rows, pre = _forward(x, weights, plan, projections, settings, constants, keep_rows, keep_pre)
        return y, rows, pre, *plan

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # type: ignore[no-untyped-def]
        """Keep what is to be kept."""
        settings, constants, _, _, _, _, _, x, weights, _, _, *projections = inputs
        _, rows, pre, *plan = output
        ctx.mark_non_differentiable(rows, pre, *plan)
        ctx.set_materialize_grads(False)
        _save(ctx, (settings, constants), (x, weights, rows, pre), plan, projections)

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        """Return the gradients of tokens, routing weights and parameters."""
        return (None,) * len(ctx.needs_input_grad) if grad is None else Fused.backward(ctx, grad)

    vmap = staticmethod(without_vmap("fused_layer"))


def _save(  # type: ignore[no-untyped-def]
    ctx, decided: tuple[Any, ...], saved: tuple[Tensor, ...], plan: list[Tensor], projections: list[Tensor]
) -> None:
    ctx.decided, ctx.num_plan = decided, len(plan)
    ctx.frozen = not any(ctx.needs_input_grad[-len(projections) :])
    ctx.save_for_backward(*saved, *plan, *projections)


def _forward_fake(
    x: Tensor,
    weights: Tensor,
    plan: list[Tensor],
    projections: list[Tensor],
    settings: str,
    constants: list[float],
    keep_rows: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = plan[1].shape[0] if len(plan) > 1 else 0
    rows = x.new_empty(num_rows if keep_rows else 0, x.shape[1])
    pre = x.new_empty(num_rows if keep_pre else 0, _preactivations(projections, settings_of(settings).layout))
    return x.new_empty(x.shape), rows, pre


@operator("fused_experts", _forward_fake)
def _forward(
    x: Tensor,
    weights: Tensor,
    plan: list[Tensor],
    projections: list[Tensor],
    settings: str,
    constants: list[float],
    keep_rows: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from moekit.experts.kernels import _fused_triton

    if weights.numel() == 0:
        y, rows, pre = _forward_fake(x, weights, plan, projections, settings, constants, keep_rows, keep_pre)
        return y.zero_(), rows, pre
    function, gated, precision, layout, tiles = settings_of(settings)
    y, rows, pre = _fused_triton.forward(
        x.contiguous(), weights.contiguous(), plan_of(plan, projections[0].shape[0]), _experts(projections, layout),
        activation=Activation(function, gated, *constants), precision=precision, tiles=tiles, keep_pre=keep_pre,
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
    settings: str,
    constants: list[float],
    frozen: bool,
) -> list[Tensor]:
    if frozen:
        return [x.new_empty(x.shape), weights.new_empty(weights.shape)]
    matrices, biases = matrices_of(projections, settings_of(settings).layout)
    *ups, down = matrices
    shapes: list[tuple[int, ...]] = [(len(ups), *ups[0].shape), tuple(down.shape)]
    if biases:
        shapes += [(len(biases) - 1, *biases[0].shape), tuple(biases[-1].shape)]
    return [x.new_empty(x.shape), weights.new_empty(weights.shape), *(x.new_empty(shape) for shape in shapes)]


@operator("fused_experts_backward", _backward_fake)
def _backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    plan: list[Tensor],
    projections: list[Tensor],
    rows: Tensor,
    pre: Tensor,
    settings: str,
    constants: list[float],
    frozen: bool,
) -> list[Tensor]:
    from moekit.experts.kernels import _fused_triton

    if weights.numel() == 0:
        zeros = _backward_fake(grad, x, weights, plan, projections, rows, pre, settings, constants, frozen)
        return [each.zero_() for each in zeros]
    function, gated, precision, layout, tiles = settings_of(settings)
    *grads, biases = _fused_triton.backward(
        grad.contiguous(), x.contiguous(), weights.contiguous(), plan_of(plan, projections[0].shape[0]),
        _experts(projections, layout), (rows, pre), activation=Activation(function, gated, *constants),
        precision=precision, tiles=tiles, frozen=frozen,
    )  # fmt: skip
    return [each for each in (*grads, *biases) if each is not None]


def matrices_of(projections: list[Tensor], layout: Layout) -> tuple[list[Tensor], list[Tensor]]:
    """Part matrices and biases, of which there are as many, unless they are packed."""
    if not layout.biased:
        return projections, []
    return projections[: len(projections) // 2], projections[len(projections) // 2 :]


def _preactivations(projections: list[Tensor], layout: Layout) -> int:
    """Return P F."""
    matrices, _ = matrices_of(projections, layout)
    axis = 1 if layout.up_transposed else 2
    return sum(p.shape[axis] for p in matrices[:-1])


def _experts(projections: list[Tensor], layout: Layout) -> Any:
    """View parameters as (E, D, F) and (E, F, D), whatever their order in memory."""
    from moekit.experts.kernels._fused_triton import Experts

    matrices, biases = matrices_of(projections, layout)
    *ups, down = (_readable(p) for p in matrices)
    if len(ups) == 2 and ups[0].stride() != ups[1].stride():  # a kernel walks through both alike
        ups = [p.contiguous() for p in ups]
    if layout.up_transposed:
        ups = [p.transpose(1, 2) for p in ups]
    if layout.down_transposed:
        down = down.transpose(1, 2)
    halves = ups[0].chunk(2, 2) if layout.packed else tuple(ups)
    *up_biases, down_bias = (p.contiguous() for p in biases) if biases else (None,)
    return Experts(
        halves, down, tuple(up_biases), down_bias, layout.packed, layout.up_transposed, layout.down_transposed
    )


def _readable(w: Tensor) -> Tensor:
    """Return matrices whose rows are each in one piece and, in a matrix, within 32 bits; copied if they are not."""
    batch, row, column = w.stride()
    near = row * (w.shape[1] - 1) + w.shape[2] <= 2**31
    return w if column == 1 and row >= w.shape[2] and batch > 0 and near else w.contiguous()
