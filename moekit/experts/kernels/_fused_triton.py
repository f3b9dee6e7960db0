"""The whole expert layer out of kernels: plan, up with activation, down, weighted sum; and the backward of all that.

Groups of rows begin at multiples of what one step of a weight gradient adds up, and the rows in between are zero: so
no step needs a mask, and every operand can be read by tensor descriptors.
"""

from functools import partial
from typing import NamedTuple

from torch import Tensor

from moekit import _rows_triton
from moekit.experts.activations import Activation
from moekit.experts.kernels import _gemms_triton, _hidden_triton, _lists_triton
from moekit.experts.kernels._back_triton import back_through
from moekit.experts.kernels._biases_triton import Weighing, bias_gradient
from moekit.experts.kernels._lists_triton import TokenLists
from moekit.experts.kernels._tiles_triton import Schedule
from moekit.experts.tiles import LayerTiles, Tile


class Plan(NamedTuple):
    """Where the rows of assignments are.

    Attributes:
        rows: (T, K) int64, the row of each assignment, -1 for one that does not exist; (N,) for any other routing.
        assignments: (R,) int64, the assignment of each row; -1 for a padding row.
        schedule: of the aligned groups.
        lists: of each token's assignments, where ``rows`` are no (T, K).
    """

    rows: Tensor
    assignments: Tensor
    schedule: Schedule
    lists: TokenLists | None = None


class Experts(NamedTuple):
    """The parameters of experts, as views of whatever lies in memory; one of the last two strides of a matrix is 1.

    Attributes:
        ups: gate and up, or up alone, (E, D, F) each, with the same strides.
        down: (E, F, D).
        up_biases: none, or one (E, 1, F) for each of ``ups``.
        down_bias: (E, 1, D), or None.
        packed: whether gate and up are the halves of one tensor, which gets one gradient.
        up_transposed: whether gradients of ``ups`` are to be (E, F, D), as these lie in memory.
        down_transposed: whether the gradient of ``down`` is to be (E, D, F).
    """

    ups: tuple[Tensor, ...]
    down: Tensor
    up_biases: tuple[Tensor, ...]
    down_bias: Tensor | None
    packed: bool
    up_transposed: bool
    down_transposed: bool


class Gradients(NamedTuple):
    """The gradients of a layer; those of matrices are in the order of memory of their matrices.

    Attributes:
        x: (T, D).
        weights: the shape of the routing, float32.
        ups: (P, E, D, F) or (P, E, F, D) of P matrices; (1, E, D, 2 F) or (1, E, 2 F, D) of packed ones. None of frozen
            experts.
        down: (E, F, D) or (E, D, F), or None.
        biases: nothing, or those of ``up_biases`` (P, E, 1, F), and of ``down_bias`` (E, 1, D).
    """

    x: Tensor
    weights: Tensor
    ups: Tensor | None
    down: Tensor | None
    biases: tuple[Tensor, ...]


def dispatched(x: Tensor, plan: Plan) -> Tensor:
    """Copy tokens (T, D) to their rows (R, D); padding rows of groups are zero, rows past all groups anything."""
    if plan.lists is None:
        return _rows_triton.copy(x, plan.rows, plan.assignments, *plan.schedule)
    return _lists_triton.copied(x, plan.rows, plan.assignments, plan.lists, plan.schedule)


def combined(rows: Tensor, weights: Tensor | None, plan: Plan) -> Tensor:
    """Sum rows (R, D) into their tokens (T, D), with a weight for each assignment if given."""
    if plan.lists is None:
        return _rows_triton.add_up(rows, plan.rows, weights)
    return _lists_triton.summed(rows, plan.rows, plan.lists, weights=weights)


def forward(
    x: Tensor,
    weights: Tensor,
    plan: Plan,
    experts: Experts,
    *,
    activation: Activation,
    precision: str,
    tiles: LayerTiles,
    keep_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the layer.

    Args:
        x: (T, D).
        weights: (*A) float32.
        plan: of this routing.
        experts: their parameters.
        activation: of the experts.
        precision: of float32 products, "ieee" or "tf32".
        tiles: of the layer.
        keep_pre: whether to keep the pre-activation.

    Returns:
        y (T, D), the rows of x (R, D), and the pre-activation (R, P F), which is empty if it is not kept.
    """
    rows = dispatched(x, plan)
    pre, hidden = _hidden_triton.up(
        rows, plan.schedule, experts.ups, biases=experts.up_biases,
        activation=activation, keep_pre=keep_pre, precision=precision, tile=tiles.up,
    )  # fmt: skip
    out = _gemms_triton.grouped_rows(
        hidden, plan.schedule, (experts.down,), bias=experts.down_bias, precision=precision, tile=tiles.down
    )
    return combined(out, weights, plan), rows, pre


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    plan: Plan,
    experts: Experts,
    kept: tuple[Tensor, Tensor],
    *,
    activation: Activation,
    precision: str,
    tiles: LayerTiles,
    frozen: bool,
) -> Gradients:
    """Run the layer's backward; of ``frozen`` experts without the gradients of their parameters.

    ``kept`` are the rows of x and the pre-activation, each empty if it is to be computed again.
    """
    schedule, ups, down = plan.schedule, experts.ups, experts.down
    rows = kept[0] if kept[0].shape[0] else None
    pre = kept[1]
    if pre.shape[0] == 0:
        rows = dispatched(x, plan) if rows is None else rows
        pre, _ = _hidden_triton.up(
            rows, schedule, ups, biases=experts.up_biases,
            activation=activation, keep_hidden=False, precision=precision, tile=tiles.up,
        )  # fmt: skip
    grad_rows = dispatched(grad, plan)
    hidden, grad_pre, grad_weights = back_through(
        grad_rows, schedule, down, pre, weights, plan.assignments,
        activation=activation, precision=precision, tile=tiles.grad_hidden,
    )  # fmt: skip
    grad_biases: tuple[Tensor, ...] = ()
    if experts.down_bias is not None:
        add_up = partial(bias_gradient, schedule=schedule, height=tiles.up.m)
        weighing = Weighing(weights, experts.down_bias, grad_weights, plan.assignments)
        grad_bias = add_up(grad_rows, weighing=weighing)[0]  # which also adds to the gradients of the weights
        grad_biases = () if frozen else (add_up(grad_pre, parts=len(ups)), grad_bias)
    weight_grad = partial(_weight_gradient, schedule=schedule, precision=precision)
    grad_ups, grad_down = None, None
    if not frozen:
        grad_down = weight_grad(hidden, grads=grad_rows, transposed=experts.down_transposed, tile=tiles.grad_down)[0]
    del hidden, grad_rows, pre
    if not frozen:
        rows = dispatched(x, plan) if rows is None else rows
        grad_ups = weight_grad(
            rows,
            grads=grad_pre,
            transposed=experts.up_transposed,
            parts=1 if experts.packed else len(ups),
            tile=tiles.grad_up,
        )
    del rows
    grad_of_rows = _gemms_triton.grouped_rows(
        grad_pre, schedule, tuple(w.transpose(1, 2) for w in ups), precision=precision, tile=tiles.grad_rows
    )
    grad_x = combined(grad_of_rows, None, plan)
    return Gradients(grad_x, grad_weights, grad_ups, grad_down, grad_biases)


def _weight_gradient(
    rows: Tensor, *, grads: Tensor, schedule: Schedule, transposed: bool, parts: int = 1, precision: str, tile: Tile
) -> Tensor:
    """Return the gradients of ``parts`` matrices that rows were multiplied by, each in its matrix's order of memory."""
    left, right = (grads, rows) if transposed else (rows, grads)
    return _gemms_triton.grouped_weight(
        left, schedule, right, parts=parts, tall=transposed, aligned=True, precision=precision, tile=tile
    )
