"""The up-projection with the activation in its epilogue."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import AGAIN, POINTER, Launch, begins_whole, has_tma, is_whole, matrix
from moekit.experts.activations import Activation
from moekit.experts.kernels._activations_triton import units
from moekit.experts.kernels._tiles_triton import (
    Matrices,
    Schedule,
    describable,
    first_tile,
    is_specialized,
    load_bias,
    load_rows,
    load_weight,
    matrices,
    place,
    programs,
    store_tile,
)
from moekit.experts.kernels._transposes_triton import straightened
from moekit.experts.tiles import Tile


@triton.jit
def _up_kernel(  # type: ignore[no-untyped-def]
    x,
    gate,
    up,
    gate_bias,
    up_bias,
    pre,
    pre_rows,
    hidden,
    hidden_rows,
    schedule,
    num_groups,
    depth,
    width,
    batch,
    stride,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BAND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    APART: tl.constexpr,
    BIASED: tl.constexpr,
    KEEP_PRE: tl.constexpr,
    KEEP_HIDDEN: tl.constexpr,
    TMA: tl.constexpr,
    TMA_STORE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply rows by ``gate``, and by ``up`` if ``GATED``: in a loop of its own if ``APART``."""
    together: tl.constexpr = GATED and not APART
    num_n = tl.cdiv(width, N)
    parts: tl.constexpr = 2 if GATED else 1
    total = first_tile(schedule, num_groups, num_groups) * num_n
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        group, row, end, column = place(tile, schedule, num_groups, num_n, M, BAND)
        n = column * N
        gates = tl.zeros((M, N), tl.float32)
        ups = tl.zeros((M, N), tl.float32)
        for k in range(0, depth, K):
            left = load_rows(x, row, end, k, depth, depth, M, K, TMA)
            right = load_weight(gate, group, k, n, depth, width, batch, stride, K, N, TRANSPOSED, TMA)
            gates = tl.dot(left, right, gates, input_precision=PRECISION)
            if together:
                right = load_weight(up, group, k, n, depth, width, batch, stride, K, N, TRANSPOSED, TMA)
                ups = tl.dot(left, right, ups, input_precision=PRECISION)
        if APART:
            for k in range(0, depth, K):
                left = load_rows(x, row, end, k, depth, depth, M, K, TMA)
                right = load_weight(up, group, k, n, depth, width, batch, stride, K, N, TRANSPOSED, TMA)
                ups = tl.dot(left, right, ups, input_precision=PRECISION)
        if BIASED:
            gates += load_bias(gate_bias, group, n, width, N)
            if GATED:
                ups += load_bias(up_bias, group, n, width, N)
        if KEEP_PRE:
            store_tile(pre, pre_rows, gates, row, end, n, width, parts * width, M, N, TMA_STORE)
            if GATED:
                store_tile(pre, pre_rows, ups, row, end, width + n, parts * width, parts * width, M, N, TMA_STORE)
        if KEEP_HIDDEN:
            value, _, _ = units(gates, ups, ACTIVATION, GATED, ALPHA, LIMIT)
            store_tile(hidden, hidden_rows, value, row, end, n, width, width, M, N, TMA_STORE)


def up(
    rows: Tensor,
    schedule: Schedule,
    weights: tuple[Tensor, ...],
    *,
    biases: tuple[Tensor, ...] = (),
    activation: Activation,
    keep_pre: bool = True,
    keep_hidden: bool = True,
    precision: str = "ieee",
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Multiply rows by one matrix, or by gate and up together, add biases, and apply the activation.

    Matrices are read as they lie in memory, a transposed view as what it is a view of, but for ``straightened``.

    Args:
        rows: (R, D).
        schedule: of tiles as high as ``tile.m``.
        weights: (up,) or (gate, up), each (E, D, F), with the same strides; one of the last two is 1.
        biases: none, or one (E, 1, F) of each, contiguous.
        activation: gated if there are two weights.
        keep_pre: whether to write the pre-activation.
        keep_hidden: whether to write the hidden rows.
        precision: of float32 products, "ieee" or "tf32".
        tile: of the product.

    Returns:
        The pre-activation (R, P F) and the hidden rows (R, F); what is not kept has no rows.
    """
    num_rows, width = rows.shape[0], weights[0].shape[2]
    pre = rows.new_empty(num_rows if keep_pre else 0, len(weights) * width)
    hidden = rows.new_empty(num_rows if keep_hidden else 0, width)
    weights = straightened(weights, num_rows, precision)
    launch = _up_launch(
        rows.device, rows.dtype, tuple(rows.shape), matrices(weights[0]), activation, len(biases) > 0,
        keep_pre, keep_hidden, begins_whole(rows, *weights), precision, tile,
    )  # fmt: skip
    launch(rows, *weights, *biases, *((pre,) if keep_pre else ()), *((hidden,) if keep_hidden else ()), schedule.table)
    return pre, hidden


@lru_cache(maxsize=512)
def _up_launch(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    weights: Matrices,
    activation: Activation,
    biased: bool,
    keep_pre: bool,
    keep_hidden: bool,
    whole: bool,
    precision: str,
    tile: Tile,
) -> Launch:
    num_groups, depth, width = weights.shape
    gated, num_rows = activation.gated, shape[0]
    apart = gated and dtype == torch.float32 and precision == "ieee"  # by units that read operands from registers
    tma = whole and has_tma(device) and describable(shape, (shape[1], 1), dtype)
    tma = tma and describable(weights.shape, weights.strides, dtype)
    if tma and is_specialized(device, dtype, num_rows, tile):
        from moekit.experts.kernels import _ring_loads_triton, _ring_up_triton

        if _ring_loads_triton.takes(weights, depth, halved=gated):
            return _ring_up_triton.up_launch(
                device, shape, weights,
                activation=activation, biased=biased, keep_pre=keep_pre, keep_hidden=keep_hidden, tile=tile,
            )  # fmt: skip
    # The second half of a pre-activation begins where a block does; else a block of the first would run into it.
    tma_store = tma and (width % tile.n == 0 if gated else is_whole(width, dtype))
    right, block, bias = weights.blocks(tile, tma), (tile.m, tile.n), POINTER if biased else None
    pre = (matrix((num_rows, activation.parts * width), block, tma_store), AGAIN)
    hidden = (matrix((num_rows, width), block, tma_store), AGAIN)
    return Launch(
        _up_kernel, (programs(device),),
        (
            matrix(shape, (tile.m, tile.k), tma), right, right if gated else None, bias, bias if gated else None,
            *(pre if keep_pre else (None, None)), *(hidden if keep_hidden else (None, None)), POINTER,
            num_groups, depth, width, *weights.steps,
        ),
        M=tile.m, N=tile.n, K=tile.k, BAND=tile.band, ACTIVATION=activation.function, GATED=gated,
        ALPHA=activation.alpha, LIMIT=activation.limit, TRANSPOSED=weights.transposed, APART=apart, BIASED=biased,
        KEEP_PRE=keep_pre, KEEP_HIDDEN=keep_hidden, TMA=tma, TMA_STORE=tma_store, PRECISION=precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
