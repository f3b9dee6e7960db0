"""The way back over the hidden axis: from gradients of the experts' output to those of their pre-activation."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import POINTER, Launch, begins_whole
from moekit.experts.activations import Activation
from moekit.experts.kernels._activations_triton import units
from moekit.experts.kernels._gemms_triton import are_rows_describable, grouped_rows
from moekit.experts.kernels._tiles_triton import Matrices, Schedule, is_specialized, matrices
from moekit.experts.tiles import Tile
from moekit.operators import blocks_of, power_of_two


@triton.jit
def _back_kernel(  # type: ignore[no-untyped-def]
    pre,
    grads,
    weights,
    grad_weights,
    assignments,
    grad_pre,
    num_rows,
    width,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take gradients (R, width) of the hidden rows through the activation, and overwrite them by the hidden rows."""
    parts: tl.constexpr = 2 if GATED else 1
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    assignment = tl.load(assignments + rows, mask=exists, other=-1)
    used = assignment >= 0  # padding rows are not read, and become zero
    weight = tl.load(weights + assignment, mask=used, other=0.0)[:, None]
    product = tl.zeros((ROWS, BLOCK), tl.float32)
    for n in range(0, width, BLOCK):
        columns = n + tl.arange(0, BLOCK)
        inside = used[:, None] & (columns < width)[None, :]
        written = exists[:, None] & (columns < width)[None, :]
        places = rows[:, None] * width + columns[None, :]
        pre_places = rows[:, None] * (parts * width) + columns[None, :]
        grad = tl.load(grads + places, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(pre + pre_places, mask=inside, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(pre + pre_places + width, mask=inside, other=0.0).to(tl.float32)
        value, slope, slope_up = units(gate, up, ACTIVATION, GATED, ALPHA, LIMIT)
        weighted = grad * weight
        if GATED:
            grad_up = (weighted * slope_up).to(grad_pre.dtype.element_ty)
            tl.store(grad_pre + pre_places + width, grad_up, mask=written)
        tl.store(grad_pre + pre_places, (weighted * slope).to(grad_pre.dtype.element_ty), mask=written)
        tl.debug_barrier()  # where rows are short, several warps have loaded what one of them overwrites
        tl.store(grads + places, (value * weight).to(grads.dtype.element_ty), mask=written)
        product += value * grad
    tl.store(grad_weights + assignment, tl.sum(product, 1), mask=used)


def back(
    grads: Tensor,
    pre: Tensor,
    weights: Tensor,
    grad_weights: Tensor,
    assignments: Tensor,
    *,
    activation: Activation,
) -> Tensor:
    """Take the gradient of the hidden rows through the activation; ``grads`` becomes the hidden rows, weighted.

    Args:
        grads: (R, F), of the hidden rows, before the router's weights; overwritten.
        pre: (R, P F), the pre-activation; P is 2 for gated experts.
        weights: (*A) float32, the router's.
        grad_weights: (*A) float32, which gets the gradients of the weights whose assignments have a row.
        assignments: (R,) int64, of each row; -1 for a padding row.
        activation: gated if P is 2.

    Returns:
        The gradient of the pre-activation (R, P F); zero for padding rows.
    """
    grad_pre = torch.empty_like(pre)
    launch = _back_launch(*grads.shape, activation)
    launch(pre, grads, weights, grad_weights, assignments, grad_pre)
    return grad_pre


@lru_cache(maxsize=512)
def _back_launch(num_rows: int, width: int, activation: Activation) -> Launch:
    block = min(512, power_of_two(width))
    return Launch(
        _back_kernel, (blocks_of(num_rows, 4),), (*[POINTER] * 6, num_rows, width),
        ACTIVATION=activation.function, GATED=activation.gated, ALPHA=activation.alpha, LIMIT=activation.limit,
        ROWS=4, BLOCK=block, num_warps=8 if block == 512 else 4,
    )  # fmt: skip


def back_through(
    grads: Tensor,
    schedule: Schedule,
    down: Tensor,
    pre: Tensor,
    weights: Tensor,
    assignments: Tensor,
    *,
    activation: Activation,
    precision: str = "ieee",
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the gradient of the experts' output back to the pre-activation and the router's weights.

    On Hopper it is one kernel, which never writes the gradient of the hidden rows; else a product, and ``back``.

    Args:
        grads: (R, D), of the output rows, before the router's weights.
        schedule: of tiles as high as ``tile.m``.
        down: (E, F, D), one of the last two strides 1.
        pre: (R, P F), the pre-activation; P is 2 for gated experts.
        weights: (*A) float32, the router's.
        assignments: (R,) int64, of each row; -1 for a padding row.
        activation: gated if P is 2.
        precision: of float32 products, "ieee" or "tf32".
        tile: of the product.

    Returns:
        The hidden rows (R, F), weighted, and the gradients of the pre-activation (R, P F) and of the weights (*A).
    """
    matrix = down.transpose(1, 2)
    special = _special_launch(
        grads.device, grads.dtype, tuple(grads.shape), matrices(matrix), activation, weights.numel(),
        begins_whole(grads, matrix, pre), tile,
    )  # fmt: skip
    if special is None:
        hidden = grouped_rows(grads, schedule, (matrix,), precision=precision, tile=tile)
        grad_weights = torch.zeros_like(weights)
        grad_pre = back(hidden, pre, weights, grad_weights, assignments, activation=activation)
        return hidden, grad_pre, grad_weights
    launch, num_parts = special
    hidden, grad_pre = grads.new_empty(grads.shape[0], down.shape[1]), torch.empty_like(pre)
    parts = weights.new_zeros(num_parts, *weights.shape)  # of the inner products, a tile's columns each
    launch(grads, matrix, pre, grad_pre, hidden, parts, weights, assignments, schedule.table)
    return hidden, grad_pre, parts[0] if num_parts == 1 else parts.sum(0)


@lru_cache(maxsize=512)
def _special_launch(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    weights: Matrices,
    activation: Activation,
    num_assignments: int,
    whole: bool,
    tile: Tile,
) -> tuple[Launch, int] | None:
    """Return the launch of the kernel that does it all, and its tiles of columns; None if it does not take these."""
    described = are_rows_describable(device, dtype, shape, weights, False, whole)
    if not (described and is_specialized(device, dtype, shape[0], tile)):
        return None
    from moekit.experts.kernels import _ring_back_triton

    if not _ring_back_triton.takes(weights, shape[1]):
        return None
    return _ring_back_triton.back_launch(
        device, shape, weights, activation=activation, num_assignments=num_assignments, tile=tile
    )
