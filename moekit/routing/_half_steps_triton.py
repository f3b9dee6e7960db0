"""The steps of ``_half_steps``, as Triton kernels; but for the product each tensor is read once and written once."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import POINTER, Launch, begins_whole, has_tma, is_whole, matrix
from moekit.operators import blocks_of, power_of_two
from moekit.routing._half_steps import HALF, Steps


@triton.jit
def _tile(num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a program's rows (ROWS, 1) and columns (1, COLUMNS), and which of them there are."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return rows, columns, (rows < num_rows) & (columns < width)


@triton.jit
def _split_kernel(  # type: ignore[no-untyped-def]
    values, parts, left, num_rows, width, TERMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write values (N, width) as parts (N, TERMS, width); and the first two of them twice as left (N, 4, width)."""
    rows, columns, inside = _tile(num_rows, width, ROWS, COLUMNS)
    rest = tl.load(values + rows * width + columns, mask=inside, other=0.0)
    for i in tl.static_range(TERMS):
        part = rest.to(parts.dtype.element_ty)
        rest -= part.to(tl.float32)
        tl.store(parts + (rows * TERMS + i) * width + columns, part, mask=inside)
        if left is not None and i < 2:
            tl.store(left + (rows * 4 + i) * width + columns, part, mask=inside)
            tl.store(left + (rows * 4 + i + 2) * width + columns, part, mask=inside)


@triton.jit
def _fold_kernel(  # type: ignore[no-untyped-def]
    sums,
    out,
    w,
    pairs,
    num_rows,
    width,
    TERMS: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up the terms of sums (N, TERMS, width); and write w (N, width) as pairs (N, HALVES, 2, width)."""
    rows, columns, inside = _tile(num_rows, width, ROWS, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(TERMS):
        total += tl.load(sums + (rows * TERMS + i) * width + columns, mask=inside, other=0.0)
    tl.store(out + rows * width + columns, total.to(out.dtype.element_ty), mask=inside)
    if w is not None:
        rest = tl.load(w + rows * width + columns, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(HALVES):
            half = rest.to(pairs.dtype.element_ty)
            rest -= half.to(tl.float32)
            place = pairs + (rows * HALVES + i) * 2 * width + columns
            tl.store(place, half, mask=inside)
            tl.store(place + width, half, mask=inside)


@triton.jit
def _add_product_kernel(  # type: ignore[no-untyped-def]
    left,
    right,
    beside,
    out,
    num_tokens,
    depth,
    dim,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TMA: tl.constexpr,
):
    """Multiply left (T, depth) by right (D, depth), transposed, and add beside (T, D)."""
    blocks = tl.cdiv(dim, COLUMNS)
    first, column = tl.program_id(0) // blocks * TOKENS, tl.program_id(0) % blocks * COLUMNS
    tokens, columns = first.to(tl.int64) + tl.arange(0, TOKENS), column + tl.arange(0, COLUMNS)
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, depth, STEP):
        if TMA:
            a = left.load([first, start])
            b = right.load([column, start])
        else:
            terms = start + tl.arange(0, STEP)
            real = (terms < depth)[None, :]
            places = tokens[:, None] * depth + terms[None, :]
            a = tl.load(left + places, mask=(tokens < num_tokens)[:, None] & real, other=0.0)
            places = columns[:, None].to(tl.int64) * depth + terms[None, :]
            b = tl.load(right + places, mask=(columns < dim)[:, None] & real, other=0.0)
        sums = tl.dot(a, b.T, sums)
    inside = (tokens < num_tokens)[:, None] & (columns < dim)[None, :]
    places = tokens[:, None] * dim + columns[None, :]
    sums += tl.load(beside + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=inside)


def _blocks(num_rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Cut (N, width) into tiles of 1024 numbers, which two warps move; return the grid, and the tile."""
    columns = min(power_of_two(width), 1024)
    rows = 1024 // columns
    return (blocks_of(num_rows, rows), blocks_of(width, columns)), {"ROWS": rows, "COLUMNS": columns, "num_warps": 2}


@lru_cache(maxsize=512)
def _split_launch(num_rows: int, width: int, terms: int, repeated: bool) -> Launch:
    grid, tile = _blocks(num_rows, width)
    left = POINTER if repeated else None
    return Launch(_split_kernel, grid, (POINTER, POINTER, left, num_rows, width), **{"TERMS": terms, **tile})


@lru_cache(maxsize=512)
def _fold_launch(num_rows: int, width: int, terms: int, halves: int) -> Launch:
    """Decide the folding kernel; ``halves`` of 0 is that there is no gate to write as pairs."""
    grid, tile = _blocks(num_rows, width)
    gate = POINTER if halves else None
    arguments = (POINTER, POINTER, gate, gate, num_rows, width)
    return Launch(_fold_kernel, grid, arguments, **{"TERMS": terms, "HALVES": halves, **tile})


@lru_cache(maxsize=512)
def _add_product_launch(
    device: torch.device, dtype: torch.dtype, num_tokens: int, depth: int, dim: int, whole: bool
) -> Launch:
    tokens, columns = (64 if depth < 128 else 128), 128
    step = max(16, min(64, power_of_two(depth)))
    tma = has_tma(device) and whole and is_whole(depth, dtype)
    return Launch(
        _add_product_kernel, (blocks_of(num_tokens, tokens) * blocks_of(dim, columns),),
        (
            matrix((num_tokens, depth), (tokens, step), tma), matrix((dim, depth), (columns, step), tma),
            POINTER, POINTER, num_tokens, depth, dim,
        ),
        TOKENS=tokens, COLUMNS=columns, STEP=step, TMA=tma, num_warps=4, num_stages=3,
    )  # fmt: skip


def split(values: Tensor, terms: int, *, half: torch.dtype = HALF) -> Tensor:
    """Do what ``_half_steps.split`` does."""
    values = values.contiguous()
    num_rows, width = values.shape
    parts = torch.empty(num_rows, terms * width, dtype=half, device=values.device)
    if num_rows and width:
        _split_launch(num_rows, width, terms, False)(values, parts)
    return parts


def grad_parts(grad: Tensor, terms: int, *, half: torch.dtype = HALF) -> tuple[Tensor, Tensor]:
    """Do what ``_half_steps.grad_parts`` does."""
    if terms == 2:
        parts = split(grad, terms, half=half)
        return parts, parts
    grad = grad.contiguous()
    num_rows, width = grad.shape
    parts = torch.empty(num_rows, terms * width, dtype=half, device=grad.device)
    left = torch.empty(num_rows, 4 * width, dtype=half, device=grad.device)
    if num_rows and width:
        _split_launch(num_rows, width, terms, True)(grad, parts, left)
    return parts, left


def folded(sums: Tensor, terms: int) -> Tensor:
    """Do what ``_half_steps.folded`` does."""
    num_rows, width = sums.shape[0], sums.shape[1] // terms
    out = torch.empty(num_rows, width, dtype=torch.float32, device=sums.device)
    if num_rows and width:
        _fold_launch(num_rows, width, terms, 0)(sums, out)
    return out


def gate_gradient(sums: Tensor, w: Tensor, *, half: torch.dtype = HALF) -> tuple[Tensor, Tensor]:
    """Do what ``_half_steps.gate_gradient`` does."""
    w = w.contiguous()
    num_rows, width = w.shape
    halves = 1 if w.dtype == half else 2
    grad = torch.empty(num_rows, width, dtype=w.dtype, device=w.device)
    pairs = torch.empty(num_rows, halves * 2 * width, dtype=half, device=w.device)
    if num_rows and width:
        _fold_launch(num_rows, width, sums.shape[1] // width, halves)(sums, grad, w, pairs)
    return grad, pairs


def add_product(left: Tensor, right: Tensor, beside: Tensor) -> Tensor:
    """Do what ``_half_steps.add_product`` does."""
    left, right, beside = left.contiguous(), right.contiguous(), beside.contiguous()
    (num_tokens, depth), dim = left.shape, right.shape[0]
    out = torch.empty_like(beside)
    if not out.numel():
        return out
    launch = _add_product_launch(left.device, left.dtype, num_tokens, depth, dim, begins_whole(left, right))
    launch(left, right, beside, out)
    return out


KERNELS = Steps(split, grad_parts, folded, gate_gradient, add_product)
