"""The operators of the fused layer: its plan, and its forward and backward, which compilers leave whole."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.experts.activations import Activation
from moekit.experts.tiles import LayerTiles, Tile
from moekit.operators import operator


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
    """What is no tensor.

    Attributes:
        function: of the activation.
        constants: of the activation.
        precision: of float32 products.
        tiles: flattened.
        layout: of the parameters.
        keep_rows: whether the copied tokens live until the backward.
        keep_pre: whether the pre-activation does.
        num_plan: how many of the tensors are the plan.
    """

    function: str
    constants: list[float]
    precision: str
    tiles: list[int]
    layout: list[bool]
    keep_rows: bool
    keep_pre: bool
    num_plan: int


class Fused(torch.autograd.Function):
    """(settings, x, weights, *plan, *parameters) -> y."""

    @staticmethod
    def forward(ctx, settings: Settings, x: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """Run the layer, and keep what the settings say if there is to be a gradient."""
        plan, projections = list(rest[: settings.num_plan]), list(rest[settings.num_plan :])
        needed = any(ctx.needs_input_grad)
        kept = settings.keep_rows and needed, settings.keep_pre and needed
        y, rows, pre = _forward(x, weights, plan, projections, *settings[:5], *kept)
        ctx.settings = settings
        ctx.save_for_backward(x, weights, rows, pre, *rest)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        """Return the gradients of tokens, routing weights and parameters."""
        x, weights, rows, pre, *rest = ctx.saved_tensors
        settings = ctx.settings
        plan, projections = list(rest[: settings.num_plan]), list(rest[settings.num_plan :])
        grads = _backward(grad, x, weights, plan, projections, rows, pre, *settings[:5])
        grad_x, grad_weights, grad_ups, grad_down, *grad_biases = grads
        if grad_biases:
            grad_biases = [*grad_biases[0].unbind(0), grad_biases[1]]
        return None, grad_x, grad_weights, *[None] * len(plan), *grad_ups.unbind(0), grad_down, *grad_biases


def _plan_fake(experts: Tensor, num_experts: int, height: int, align: int) -> list[Tensor]:
    from moekit.experts import _tiles_triton

    if experts.numel() == 0:
        return [torch.empty_like(experts)]
    num_rows = _tiles_triton.aligned_rows(experts.numel(), num_experts, align)
    num_owners = _tiles_triton.most_tiles(num_rows, num_experts, height)
    schedule = [
        experts.new_empty(n, dtype=torch.int32) for n in (num_experts, num_experts, num_experts + 1, num_owners)
    ]
    return [torch.empty_like(experts), experts.new_empty(num_rows), *schedule]


@operator("fused_plan", _plan_fake)
def plan_layer(experts: Tensor, num_experts: int, height: int, align: int) -> list[Tensor]:
    """Make the plan of expert numbers (*A), -1 for an assignment that does not exist."""
    from moekit.experts import _plan_triton

    if experts.numel() == 0:
        return [experts.clone()]
    rows, assignments, schedule = _plan_triton.make_plan(experts, num_experts, height=height, align=align)
    return [rows, assignments, *schedule]


def _forward_fake(
    x: Tensor,
    weights: Tensor,
    plan: list[Tensor],
    projections: list[Tensor],
    function: str,
    constants: list[float],
    precision: str,
    tiles: list[int],
    layout: list[bool],
    keep_rows: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = plan[1].shape[0] if len(plan) > 1 else 0
    rows = x.new_empty(num_rows if keep_rows else 0, x.shape[1])
    pre = x.new_empty(num_rows if keep_pre else 0, _preactivations(projections, layout))
    return x.new_empty(x.shape), rows, pre


@operator("fused_experts", _forward_fake)
def _forward(
    x: Tensor,
    weights: Tensor,
    plan: list[Tensor],
    projections: list[Tensor],
    function: str,
    constants: list[float],
    precision: str,
    tiles: list[int],
    layout: list[bool],
    keep_rows: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from moekit.experts import _fused_triton

    if weights.numel() == 0:
        y, rows, pre = _forward_fake(
            x, weights, plan, projections, function, constants, precision, tiles, layout, keep_rows, keep_pre
        )
        return y.zero_(), rows, pre
    experts = _experts(projections, Layout(*layout))
    y, rows, pre = _fused_triton.forward(
        x.contiguous(), weights.contiguous(), _plan_of(plan), experts,
        activation=Activation(function, len(experts.ups) == 2, *constants), precision=precision,
        tiles=_layer_tiles(tiles), keep_pre=keep_pre,
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
    constants: list[float],
    precision: str,
    tiles: list[int],
    layout: list[bool],
) -> list[Tensor]:
    matrices, biases = _matrices(projections, Layout(*layout))
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
    function: str,
    constants: list[float],
    precision: str,
    tiles: list[int],
    layout: list[bool],
) -> list[Tensor]:
    from moekit.experts import _fused_triton

    if weights.numel() == 0:
        zeros = _backward_fake(
            grad, x, weights, plan, projections, rows, pre, function, constants, precision, tiles, layout
        )
        return [each.zero_() for each in zeros]
    experts = _experts(projections, Layout(*layout))
    *grads, biases = _fused_triton.backward(
        grad.contiguous(), x.contiguous(), weights.contiguous(), _plan_of(plan), experts, (rows, pre),
        activation=Activation(function, len(experts.ups) == 2, *constants), precision=precision,
        tiles=_layer_tiles(tiles),
    )  # fmt: skip
    return [*grads, *biases]


def _matrices(projections: list[Tensor], layout: Layout) -> tuple[list[Tensor], list[Tensor]]:
    """Part matrices and biases, of which there are as many, unless they are packed."""
    if not layout.biased:
        return projections, []
    return projections[: len(projections) // 2], projections[len(projections) // 2 :]


def _preactivations(projections: list[Tensor], layout: list[bool]) -> int:
    """Return P F."""
    matrices, _ = _matrices(projections, Layout(*layout))
    axis = 1 if Layout(*layout).up_transposed else 2
    return sum(p.shape[axis] for p in matrices[:-1])


def _experts(projections: list[Tensor], layout: Layout) -> Any:
    """View parameters as (E, D, F) and (E, F, D), whatever their order in memory."""
    from moekit.experts._fused_triton import Experts

    matrices, biases = _matrices(projections, layout)
    *ups, down = (_readable(p) for p in matrices)
    if len(ups) == 2 and ups[0].stride() != ups[1].stride():  # a kernel walks through both alike
        ups = [p.contiguous() for p in ups]
    if layout.up_transposed:
        ups = [p.transpose(1, 2) for p in ups]
    if layout.down_transposed:
        down = down.transpose(1, 2)
    halves = ups[0].chunk(2, 2) if layout.packed else tuple(ups)
    *up_biases, down_bias = (p.contiguous() for p in biases) if biases else (None,)
    return Experts(halves, down, tuple(up_biases), down_bias, layout.packed, *layout[2:])


def _readable(w: Tensor) -> Tensor:
    """Return matrices whose rows are each in one piece, copied if they are not."""
    batch, row, column = w.stride()
    return w if column == 1 and row >= w.shape[2] and batch > 0 else w.contiguous()


def _plan_of(tensors: list[Tensor]) -> Any:
    from moekit.experts._fused_triton import Plan
    from moekit.experts._lists_triton import TokenLists
    from moekit.experts._tiles_triton import Schedule

    rows, assignments, *rest = tensors
    lists = TokenLists(*rest[4:]) if len(rest) > 4 else None
    return Plan(rows, assignments, Schedule(*rest[:4]), lists)


def _layer_tiles(numbers: list[int]) -> LayerTiles:
    """Undo the flattening that operators need; an overlap has become 0 or 1."""
    width = len(Tile._fields)
    return LayerTiles(*(Tile(*numbers[at : at + width]) for at in range(0, len(numbers), width)))  # type: ignore[arg-type]
