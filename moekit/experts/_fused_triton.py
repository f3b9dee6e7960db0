"""The whole expert layer out of kernels: plan, up with activation, down, weighted sum; and the backward of all that.

Groups of rows begin at multiples of what one step of a weight gradient adds up, and the rows in between are zero: so
no step needs a mask, and every operand can be read by tensor descriptors.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.experts import _gemms_triton, _hidden_triton
from moekit.experts import _tiles_triton as tiling
from moekit.experts._tiles_triton import Schedule
from moekit.experts.tiles import LayerTiles
from moekit.rows import copied, summed
from moekit.segments import rows_of_assignments, sort_by_expert


class Plan(NamedTuple):
    """Where the rows of assignments are.

    Attributes:
        rows: (T, K) int64, the row of each assignment, -1 for one that does not exist; (N,) for any other routing.
        tokens: (R,) int64, the token of each row; 0 for a padding row.
        padding: (R,) bool.
        schedule: of the aligned groups.
    """

    rows: Tensor
    tokens: Tensor
    padding: Tensor
    schedule: Schedule


@triton.jit
def _align_kernel(  # type: ignore[no-untyped-def]
    experts,
    tokens,
    compact,
    sizes,
    rows,
    tokens_of_rows,
    padding,
    aligned,
    num_assignments,
    num_experts,
    ALIGN: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Shift each assignment's row by the padding of all earlier experts."""
    numbers = tl.arange(0, EXPERTS)
    found = tl.load(sizes + numbers, mask=numbers < num_experts, other=0).to(tl.int32)
    whole = (found + (ALIGN - 1)) // ALIGN * ALIGN
    shifts = tl.cumsum(whole - found, 0) - (whole - found)
    if tl.program_id(0) == 0:
        tl.store(aligned + numbers, whole, mask=numbers < num_experts)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_assignments
    expert = tl.load(experts + places, mask=inside, other=-1).to(tl.int32)
    row = tl.load(compact + places, mask=inside, other=-1)
    row = tl.where(expert >= 0, row + tl.gather(shifts, tl.maximum(expert, 0), 0), -1)
    tl.store(rows + places, row, mask=inside)
    real = inside & (expert >= 0)
    tl.store(tokens_of_rows + row, tl.load(tokens + places, mask=inside, other=0), mask=real)
    tl.store(padding + row, tl.zeros((BLOCK,), tl.int8), mask=real)


@triton.jit
def _spread_kernel(weights, rows, out, num_assignments, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + places, mask=places < num_assignments, other=-1)
    tl.store(out + row, tl.load(weights + places, mask=row >= 0, other=0.0), mask=row >= 0)


def make_plan(experts: Tensor, tokens: Tensor, num_experts: int, *, height: int, align: int) -> Plan:
    """Sort assignments by expert into rows whose groups begin at multiples of ``align``, for tiles of ``height`` rows.

    Args:
        experts: (T, K) or (N,) int64 in [0, E), or -1.
        tokens: the same shape, int64.
        num_experts: E.
        height: of a tile.
        align: of the groups.
    """
    num_assignments = experts.numel()
    flat = experts.reshape(-1).contiguous()
    order, sizes = sort_by_expert(flat, num_experts)
    compact = rows_of_assignments(order, num_assignments)
    num_rows = tiling.aligned_rows(num_assignments, num_experts, align)  # at most, for sizes are not read
    rows, aligned = torch.empty_like(flat), sizes.to(torch.int32)
    tokens_of_rows, padding = flat.new_zeros(num_rows), flat.new_full((num_rows,), 1, dtype=torch.bool)
    _align_kernel[(triton.cdiv(num_assignments, 1024),)](
        flat, tokens.reshape(-1).contiguous(), compact, sizes, rows, tokens_of_rows, padding.view(torch.int8), aligned,
        num_assignments, num_experts, ALIGN=align, EXPERTS=max(32, triton.next_power_of_2(num_experts)), BLOCK=1024,
    )  # fmt: skip
    plan = tiling.schedule(aligned, num_rows, height)
    return Plan(rows.view(experts.shape), tokens_of_rows, padding, plan)


def dispatched(x: Tensor, plan: Plan) -> Tensor:
    """Copy tokens (T, D) to their rows (R, D); padding rows are zero."""
    if plan.rows.ndim == 2:
        return copied(x, plan.tokens, plan.padding, plan.rows)
    return x.index_select(0, plan.tokens).masked_fill_(plan.padding.unsqueeze(1), 0.0)


def combined(rows: Tensor, weights: Tensor | None, plan: Plan, num_tokens: int) -> Tensor:
    """Sum rows (R, D) into their tokens (T, D), with a weight for each assignment if given."""
    if plan.rows.ndim == 2:
        return summed(rows, plan.rows, weights)
    clean = rows.float().masked_fill_(plan.padding.unsqueeze(1), 0.0)
    if weights is not None:
        clean.mul_(row_weights(weights, plan).unsqueeze(1))
    sums = torch.zeros(num_tokens, rows.shape[1], dtype=torch.float32, device=rows.device)
    return sums.index_add_(0, plan.tokens, clean).to(rows.dtype)


def row_weights(weights: Tensor, plan: Plan) -> Tensor:
    """Give each row its assignment's weight, (R,) float32; zero for a padding row."""
    out = torch.zeros(plan.tokens.shape[0], dtype=torch.float32, device=weights.device)
    num_assignments = plan.rows.numel()
    _spread_kernel[(triton.cdiv(num_assignments, 1024),)](weights, plan.rows, out, num_assignments, BLOCK=1024)
    return out


def forward(
    x: Tensor,
    weights: Tensor,
    plan: Plan,
    projections: tuple[Tensor, ...],
    *,
    activation: str,
    precision: str,
    tiles: LayerTiles,
    keep_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the layer.

    Args:
        x: (T, D).
        weights: (*A) float32.
        plan: of this routing.
        projections: (up, down), or (gate, up, down).
        activation: its name.
        precision: of float32 products, "ieee" or "tf32".
        tiles: of the layer.
        keep_pre: whether to keep the pre-activation.

    Returns:
        y (T, D), the rows of x (R, D), and the pre-activation (R, P F), which is empty if it is not kept.
    """
    rows = dispatched(x, plan)
    pre, hidden = _hidden_triton.up(
        rows, plan.schedule, projections[:-1],
        activation=activation, keep_pre=keep_pre, precision=precision, tile=tiles.up,
    )  # fmt: skip
    out = _gemms_triton.grouped_rows(hidden, plan.schedule, projections[-1:], precision=precision, tile=tiles.down)
    return combined(out, weights, plan, x.shape[0]), rows, pre


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    plan: Plan,
    projections: tuple[Tensor, ...],
    kept: tuple[Tensor, Tensor],
    *,
    activation: str,
    precision: str,
    tiles: LayerTiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x (T, D), weights (*A), gate and up (P, E, D, F), and down (E, F, D).

    ``kept`` are the rows of x and the pre-activation, each empty if it is to be computed again.
    """
    schedule, *ups, down = plan.schedule, *projections
    rows = kept[0] if kept[0].shape[0] else None
    pre = kept[1]
    if pre.shape[0] == 0:
        rows = dispatched(x, plan) if rows is None else rows
        pre, _ = _hidden_triton.up(
            rows, schedule, tuple(ups), activation=activation, keep_hidden=False, precision=precision, tile=tiles.up
        )
    grad_rows = dispatched(grad, plan)
    hidden = _gemms_triton.grouped_rows(
        grad_rows, schedule, (down,), transposed=True, precision=precision, tile=tiles.grad_hidden
    )
    grad_pre, products = _hidden_triton.back(hidden, pre, row_weights(weights, plan), schedule, activation=activation)
    weight_grad = partial(_gemms_triton.grouped_weight, aligned=True, precision=precision)
    grad_down = weight_grad(hidden, schedule, grad_rows, tile=tiles.grad_down)[0]
    del hidden, grad_rows, pre
    rows = dispatched(x, plan) if rows is None else rows
    grad_ups = weight_grad(rows, schedule, grad_pre, parts=len(ups), tile=tiles.grad_up)
    del rows
    grad_of_rows = _gemms_triton.grouped_rows(
        grad_pre, schedule, tuple(ups), transposed=True, precision=precision, tile=tiles.grad_rows
    )
    grad_x = combined(grad_of_rows, None, plan, x.shape[0])
    chosen = products[plan.rows.clamp_min(0)]
    return grad_x, chosen.masked_fill(plan.rows < 0, 0.0), grad_ups, grad_down
