"""Grouped GEMM kernels: rows times their group's matrix, and its gradient, whose sum runs over a group's rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.experts._tiles_triton import (
    Schedule,
    described,
    described_groups,
    described_weight,
    has_tma,
    is_transposed,
    is_whole,
    load_bias,
    load_rows,
    load_weight,
    place,
    programs,
    schedule,
    steps,
    store_group,
    store_rows,
    store_tile,
)
from moekit.experts.tiles import Tile, row_tile, weight_tile
from moekit.operators import blocks_of


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    a,
    w,
    w2,
    bias,
    out,
    out_rows,
    starts,
    sizes,
    firsts,
    owners,
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
    total = tl.load(firsts + num_groups) * num_n
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=OVERLAP):
        group, row, end, column = place(tile, starts, sizes, firsts, owners, num_n, M, BAND)
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
    starts,
    sizes,
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
    TMA: tl.constexpr,
    TMA_STORE: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply groups of a (R, height), transposed, by those of b (R, parts * width): (parts, E, height, width).

    If ``TALL``, a is (R, parts * height) and b (R, width).
    """
    num_m, num_n = tl.cdiv(height, M), tl.cdiv(width, N)
    num_of_part = num_m if TALL else num_n
    a_width, b_width = height, width
    if TALL:
        num_m *= parts
        a_width *= parts
    else:
        num_n *= parts
        b_width *= parts
    for tile in tl.range(tl.program_id(0), num_groups * num_m * num_n, tl.num_programs(0), flatten=OVERLAP):
        group = tile // (num_m * num_n)
        local = tile % (num_m * num_n)
        band = local // (BAND * num_n)
        tall = min(num_m - band * BAND, BAND)
        inside = local - band * BAND * num_n
        row, column = band * BAND + inside % tall, inside // tall
        part = (row if TALL else column) // num_of_part
        if TALL:
            row -= part * num_of_part
        else:
            column -= part * num_of_part
        m, n = row * M, column * N
        a_column = part * height + m if TALL else m
        b_column = n if TALL else part * width + n
        start = tl.load(starts + group)
        end = start + tl.load(sizes + group)
        whole = end if ALIGNED else start + (end - start) // K * K
        sums = tl.zeros((M, N), tl.float32)
        for k in range(start, whole, K):
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
    plan: Schedule,
    weights: tuple[Tensor, ...],
    *,
    bias: Tensor | None = None,
    precision: str = "ieee",
    tile: Tile,
) -> Tensor:
    """Multiply grouped rows by their group's matrix, or by two matrices, one for each half of their columns.

    Matrices are read as they lie in memory, a transposed view as what it is a view of.

    Args:
        rows: (R, D), or (R, 2 D) for two weights.
        plan: of tiles as high as ``tile.m``.
        weights: one of (E, D, F), or two with the same strides; one of the last two is 1.
        bias: (E, 1, F), contiguous, which is added.
        precision: of float32 products, "ieee" or "tf32".
        tile: of the product.

    Returns:
        (R, F); rows past the last group are not written.
    """
    num_groups, depth, width = weights[0].shape
    out = rows.new_empty(rows.shape[0], width)
    if out.numel() == 0:
        return out
    tma = has_tma(rows, out, *weights) and (len(weights) == 1 or is_whole(depth, rows.dtype))
    first, second = (described_weight(w, tile, tma) for w in (weights[0], weights[-1]))
    overlap = tile.overlap and tma and len(weights) == 1
    written = described_groups(out, tile, tma) if overlap else described(out, (tile.m, tile.n), tma)
    _rows_kernel[(programs(rows.device),)](
        described(rows, (tile.m, tile.k), tma), first, second, bias, written, out,
        *plan, num_groups, depth, width, rows.shape[1], *steps(weights[0]), M=tile.m, N=tile.n, K=tile.k,
        BAND=tile.band, TRANSPOSED=is_transposed(weights[0]), TWO=len(weights) == 2, BIASED=bias is not None, TMA=tma,
        OVERLAP=overlap, PRECISION=precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def grouped_weight(
    rows: Tensor,
    plan: Schedule,
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
        plan: whose starts and sizes are read alone.
        grad: (R, parts * F), or (R, F) if ``tall``.
        parts: how many matrices lie side by side in ``grad``, or in ``rows``.
        tall: in which of the two.
        aligned: whether sizes are multiples of ``tile.k``, with zero rows at the end of a group.
        precision: of float32 products, "ieee" or "tf32".
        tile: of the product.

    Returns:
        (parts, E, D, F); zero for an empty group.
    """
    num_groups, height, width = plan.sizes.shape[0], rows.shape[1], grad.shape[1]
    height, width = (height // parts, width) if tall else (height, width // parts)
    out = torch.empty(parts, num_groups, height, width, dtype=rows.dtype, device=rows.device)
    if out.numel() == 0 or rows.shape[0] == 0:
        return out.zero_()
    tma = has_tma(rows, grad) and (parts == 1 or is_whole(height if tall else width, rows.dtype))
    matrices = out.view(-1, width)
    tma_store = tma and has_tma(matrices) and matrices.shape[0] < 2**30
    tiles = num_groups * blocks_of(height, tile.m) * blocks_of(width, tile.n) * parts
    _weight_kernel[(min(programs(rows.device), tiles),)](
        described(rows, (tile.k, tile.m), tma), described(grad, (tile.k, tile.n), tma),
        described_groups(matrices, tile, True) if tma_store else out, plan.starts, plan.sizes,
        num_groups, height, width, parts, M=tile.m, N=tile.n, K=tile.k, BAND=tile.band, TALL=tall,
        ALIGNED=aligned, TMA=tma, TMA_STORE=tma_store, OVERLAP=tile.overlap and tma_store and aligned,
        PRECISION=precision,         num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def multiply(rows: Tensor, sizes: Tensor, w: Tensor, transposed: bool, precision: str) -> Tensor:
    """Multiply rows (R, D), grouped by ``sizes`` (E,), by w (E, D, F), or (E, F, D) if ``transposed``, to (R, F)."""
    tile = row_tile(rows.dtype, rows.shape[0], w.shape[0])
    plan = schedule(sizes, rows.shape[0], tile.m)
    return grouped_rows(rows, plan, (w.transpose(1, 2) if transposed else w,), precision=precision, tile=tile)


def multiply_transposed(rows: Tensor, sizes: Tensor, grad: Tensor, precision: str) -> Tensor:
    """Multiply each group's rows (R, D), transposed, by its grad (R, F), to (E, D, F)."""
    plan = schedule(sizes, rows.shape[0], 128)
    return grouped_weight(rows, plan, grad, precision=precision, tile=weight_tile(rows.dtype))[0]
