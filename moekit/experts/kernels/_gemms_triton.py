"""Grouped GEMM kernels: rows times their group's matrix, and its gradient, whose sum runs over a group's rows."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import AGAIN, POINTER, Launch, begins_whole, has_tma, is_whole, matrix
from moekit.experts.kernels._parts_triton import part_of
from moekit.experts.kernels._tiles_triton import (
    MOST_ROWS,
    Matrices,
    Schedule,
    describable,
    first_tile,
    groups,
    is_specialized,
    load_bias,
    load_rows,
    load_weight,
    make_schedule,
    matrices,
    place,
    programs,
    store_group,
    store_rows,
    store_tile,
)
from moekit.experts.kernels._transposes_triton import straightened, transposed
from moekit.experts.tiles import Tile, capability_of, is_narrow, row_tile, weight_tile
from moekit.operators import blocks_of


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    a,
    w,
    w2,
    bias,
    out,
    out_rows,
    schedule,
    num_groups,
    depth,
    width,
    a_stride,
    batch,
    stride,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BAND: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TWO: tl.constexpr,
    BIASED: tl.constexpr,
    TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply (R, depth), or (R, 2 depth) if ``TWO``, by w (E, depth, width), or by w over w2, and add the bias."""
    num_n = tl.cdiv(width, N)
    total = first_tile(schedule, num_groups, num_groups) * num_n
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=OVERLAP):
        group, row, end, column = place(tile, schedule, num_groups, num_n, M, BAND)
        n = column * N
        sums = tl.zeros((M, N), tl.float32)
        for k in range(0, depth, K):
            left = load_rows(a, row, end, k, depth, a_stride, M, K, TMA)
            right = load_weight(w, group, k, n, depth, width, batch, stride, K, N, TRANSPOSED, TMA)
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
        if TWO:
            for k in range(0, depth, K):
                left = load_rows(a, row, end, depth + k, 2 * depth, a_stride, M, K, TMA)
                right = load_weight(w2, group, k, n, depth, width, batch, stride, K, N, TRANSPOSED, TMA)
                sums = tl.dot(left, right, sums, input_precision=PRECISION)
        if BIASED:
            sums += load_bias(bias, group, n, width, N)
        if OVERLAP:
            store_group(out, sums, row, end, n, M, N)
        else:
            store_tile(out, out_rows, sums, row, end, n, width, width, M, N, TMA)


@triton.jit
def _weight_kernel(  # type: ignore[no-untyped-def]
    a,
    b,
    out,
    schedule,
    num_groups,
    height,
    width,
    parts,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BAND: tl.constexpr,
    TALL: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACROSS: tl.constexpr,
    TMA: tl.constexpr,
    TMA_STORE: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply groups of a (R, height), transposed, by those of b (R, parts * width): (parts, E, height, width).

    If ``TALL``, a is (R, parts * height) and b (R, width). If ``ACROSS``, both lie transposed in memory.
    """
    num_tiles = tl.cdiv(height, M) * tl.cdiv(width, N) * parts
    a_width = height * parts if TALL else height
    b_width = width if TALL else width * parts
    for tile in tl.range(tl.program_id(0), num_groups * num_tiles, tl.num_programs(0), flatten=OVERLAP):
        group, start, end, part, m, n, a_column, b_column = part_of(
            tile, schedule, num_groups, height, width, parts, M, N, BAND, TALL
        )
        whole = end if ALIGNED else start + (end - start) // K * K
        sums = tl.zeros((M, N), tl.float32)
        for k in range(start, whole, K):
            if ACROSS:
                left, right = a.load([a_column, k]), b.load([b_column, k])
                sums = tl.dot(left, right.T, sums, input_precision=PRECISION)
            else:
                left = load_rows(a, k, end, a_column, a_width, a_width, K, M, TMA)
                right = load_rows(b, k, end, b_column, b_width, b_width, K, N, TMA)
                sums = tl.dot(left.T, right, sums, input_precision=PRECISION)
        # Two conditions: one is known when the kernel is compiled, the other is not.
        if not ALIGNED:  # noqa: SIM102
            # The rest is peeled off: a mask inside the loop would keep its loads from being pipelined.
            if whole < end:
                left = load_rows(a, whole, end, a_column, a_width, a_width, K, M, TMA)
                right = load_rows(b, whole, end, b_column, b_width, b_width, K, N, TMA)
                real = (tl.arange(0, K) < end - whole)[:, None]
                left = tl.where(real, left, 0.0).to(left.dtype)
                right = tl.where(real, right, 0.0).to(right.dtype)
                sums = tl.dot(left.T, right, sums, input_precision=PRECISION)
        matrix = part * num_groups + group
        if TMA_STORE:
            first = matrix * height
            store_group(out, sums, first + m, first + height, n, M, N)
        else:
            store_rows(out + matrix.to(tl.int64) * height * width, sums, m, height, n, width, width, M, N)


def grouped_rows(
    rows: Tensor,
    schedule: Schedule,
    weights: tuple[Tensor, ...],
    *,
    bias: Tensor | None = None,
    precision: str = "ieee",
    tile: Tile,
) -> Tensor:
    """Multiply grouped rows by their group's matrix, or by two matrices, one for each half of their columns.

    Matrices are read as they lie in memory, a transposed view as what it is a view of, but for ``straightened``.

    Args:
        rows: (R, D), or (R, 2 D) for two weights.
        schedule: of tiles as high as ``tile.m``.
        weights: one of (E, D, F), or two with the same strides; one of the last two is 1.
        bias: (E, 1, F), contiguous, which is added.
        precision: of float32 products, "ieee" or "tf32".
        tile: of the product.

    Returns:
        (R, F); rows past the last group are not written.
    """
    out = rows.new_empty(rows.shape[0], weights[0].shape[2])
    if out.numel() == 0:
        return out
    weights = straightened(weights, rows.shape[0], precision)
    launch = _rows_launch(
        rows.device, rows.dtype, tuple(rows.shape), matrices(weights[0]), len(weights) == 2, bias is not None,
        begins_whole(rows, *weights), precision, tile,
    )  # fmt: skip
    launch(rows, *weights, *([] if bias is None else [bias]), out, schedule.table)
    return out


def are_rows_describable(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], weights: Matrices, two: bool, whole: bool
) -> bool:
    """Say whether operands and result can be read and written by descriptors."""
    _, depth, width = weights.shape
    described = describable(shape, (shape[1], 1), dtype) and describable(weights.shape, weights.strides, dtype)
    return whole and has_tma(device) and described and is_whole(width, dtype) and (not two or is_whole(depth, dtype))


@lru_cache(maxsize=512)
def _rows_launch(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    weights: Matrices,
    two: bool,
    biased: bool,
    whole: bool,
    precision: str,
    tile: Tile,
) -> Launch:
    num_groups, depth, width = weights.shape
    tma = are_rows_describable(device, dtype, shape, weights, two, whole)
    if tma and is_specialized(device, dtype, shape[0], tile):
        from moekit.experts.kernels import _ring_loads_triton, _ring_rows_triton

        if _ring_loads_triton.takes(weights, shape[1], halved=False):
            return _ring_rows_triton.rows_launch(device, shape, weights, two=two, biased=biased, tile=tile)
    overlap = tile.overlap and tma and not two and shape[0] < MOST_ROWS
    out, right = (shape[0], width), weights.blocks(tile, tma)
    return Launch(
        _rows_kernel, (programs(device),),
        (
            matrix(shape, (tile.m, tile.k), tma), right, right if two else None, POINTER if biased else None,
            groups(out, tile) if overlap else matrix(out, (tile.m, tile.n), tma), AGAIN, POINTER,
            num_groups, depth, width, shape[1], *weights.steps,
        ),
        M=tile.m, N=tile.n, K=tile.k, BAND=tile.band, TRANSPOSED=weights.transposed, TWO=two, BIASED=biased, TMA=tma,
        OVERLAP=overlap, PRECISION=precision, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def grouped_weight(
    rows: Tensor,
    schedule: Schedule,
    grad: Tensor,
    *,
    parts: int = 1,
    tall: bool = False,
    aligned: bool = False,
    precision: str = "ieee",
    tile: Tile,
) -> Tensor:
    """Multiply each group's rows, transposed, by its rows of ``grad``.

    Args:
        rows: (R, D), or (R, parts * D) if ``tall``.
        schedule: whose starts and sizes are read alone.
        grad: (R, parts * F), or (R, F) if ``tall``.
        parts: how many matrices lie side by side in ``grad``, or in ``rows``.
        tall: in which of the two.
        aligned: whether sizes are multiples of ``tile.k``, with zero rows at the end of a group.
        precision: of float32 products, "ieee" or "tf32". For TF32, whose units want sums to run along memory, both
            operands are copied, transposed, if they are ``aligned`` and the card has descriptors.
        tile: of the product.

    Returns:
        (parts, E, D, F); zero for an empty group.
    """
    height, width = rows.shape[1], grad.shape[1]
    height, width = (height // parts, width) if tall else (height, width // parts)
    out = rows.new_empty(parts, schedule.num_groups, height, width)
    if out.numel() == 0 or rows.shape[0] == 0:
        return out.zero_()
    across = _is_read_across(rows, aligned, precision)
    launch = _weight_launch(
        rows.device, rows.dtype, tuple(rows.shape), tuple(grad.shape), schedule.num_groups, parts, tall, aligned,
        across, begins_whole(rows, grad), precision, tile,
    )  # fmt: skip
    if across:
        rows, grad = transposed(rows), transposed(grad)
    launch(rows, grad, out, schedule.table)
    return out


def _is_read_across(rows: Tensor, aligned: bool, precision: str) -> bool:
    tf32 = precision == "tf32" and rows.dtype == torch.float32
    return tf32 and aligned and has_tma(rows.device) and is_whole(rows.shape[0], rows.dtype)


@lru_cache(maxsize=512)
def _weight_launch(
    device: torch.device,
    dtype: torch.dtype,
    left: tuple[int, int],
    right: tuple[int, int],
    num_groups: int,
    parts: int,
    tall: bool,
    aligned: bool,
    across: bool,
    whole: bool,
    precision: str,
    tile: Tile,
) -> Launch:
    height, width = (left[1] // parts, right[1]) if tall else (left[1], right[1] // parts)
    tma = whole and has_tma(device) and all(describable(each, (each[1], 1), dtype) for each in (left, right))
    tma = tma and (parts == 1 or is_whole(height if tall else width, dtype))
    out = (parts * num_groups * height, width)
    tma_store = (tma or across) and is_whole(width, dtype) and out[0] < MOST_ROWS
    if tma_store and aligned and is_specialized(device, dtype, left[0], tile):
        from moekit.experts.kernels import _ring_weights_triton

        return _ring_weights_triton.weight_launch(
            device, left, right, num_groups, size=(height, width), parts=parts, tall=tall, tile=tile
        )
    if across:
        operands = matrix(left[::-1], (tile.m, tile.k), True), matrix(right[::-1], (tile.n, tile.k), True)
    else:
        operands = matrix(left, (tile.k, tile.m), tma), matrix(right, (tile.k, tile.n), tma)
    tiles = num_groups * blocks_of(height, tile.m) * blocks_of(width, tile.n) * parts
    return Launch(
        _weight_kernel, (min(programs(device), tiles),),
        (*operands, groups(out, tile) if tma_store else POINTER, POINTER, num_groups, height, width, parts),
        M=tile.m, N=tile.n, K=tile.k, BAND=tile.band, TALL=tall, ALIGNED=aligned, ACROSS=across, TMA=tma,
        TMA_STORE=tma_store, OVERLAP=tile.overlap and tma_store and aligned, PRECISION=precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def multiply(rows: Tensor, sizes: Tensor, w: Tensor, transposed: bool, precision: str) -> Tensor:
    """Multiply rows (R, D), grouped by ``sizes`` (E,), by w (E, D, F), or (E, F, D) if ``transposed``, to (R, F)."""
    capability, narrow = capability_of(rows.device), is_narrow(rows.device)
    tile = row_tile(rows.dtype, rows.shape[0], w.shape[0], capability=capability, narrow=narrow, precision=precision)
    schedule = make_schedule(sizes, rows.shape[0], tile.m)
    return grouped_rows(rows, schedule, (w.transpose(1, 2) if transposed else w,), precision=precision, tile=tile)


def multiply_transposed(rows: Tensor, sizes: Tensor, grad: Tensor, precision: str) -> Tensor:
    """Multiply each group's rows (R, D), transposed, by its grad (R, F), to (E, D, F)."""
    schedule = make_schedule(sizes, rows.shape[0], 128)
    tile = weight_tile(rows.dtype, narrow=is_narrow(rows.device))  # not aligned, so nothing is read across
    return grouped_weight(rows, schedule, grad, precision=precision, tile=tile)[0]
