"""Copies of matrices in the order of memory in which their float32 products are fast."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import POINTER, Launch
from moekit.operators import blocks_of

_TILE = 64


@triton.jit
def _transpose_kernel(values, out, height, width, batch, stride, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy a tile of one of the matrices (B, height, width), whose columns are adjacent, to (B, width, height)."""
    num_n = tl.cdiv(width, TILE)
    num_tiles = tl.cdiv(height, TILE) * num_n
    matrix, tile = (tl.program_id(0) // num_tiles).to(tl.int64), tl.program_id(0) % num_tiles
    rows, columns = tile // num_n * TILE + tl.arange(0, TILE), tile % num_n * TILE + tl.arange(0, TILE)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    places = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    found = tl.load(values + matrix * batch + places, mask=inside)
    places = columns.to(tl.int64)[:, None] * height + rows[None, :]
    tl.store(out + matrix * height * width + places, found.T, mask=inside.T)


def transposed(values: Tensor) -> Tensor:
    """Copy matrices (B, M, N), or one (M, N), to (B, N, M), contiguous.

    Args:
        values: whose last stride is 1.

    Returns:
        What ``values.transpose(-2, -1).contiguous()`` returns.
    """
    height, width = values.shape[-2:]
    out = values.new_empty(*values.shape[:-2], width, height)
    if out.numel() > 0:
        batch = values.stride(0) if values.dim() == 3 else 0
        _transpose_launch(out.numel() // (height * width), height, width, batch, values.stride(-2))(values, out)
    return out


@lru_cache(maxsize=512)
def _transpose_launch(num_matrices: int, height: int, width: int, batch: int, stride: int) -> Launch:
    tiles = blocks_of(height, _TILE) * blocks_of(width, _TILE)
    return Launch(
        _transpose_kernel, (num_matrices * tiles,), (POINTER, POINTER, height, width, batch, stride),
        TILE=_TILE, num_warps=8,
    )  # fmt: skip


def straightened(weights: tuple[Tensor, ...], num_rows: int, precision: str) -> tuple[Tensor, ...]:
    """Return matrices (E, K, N) in the order of memory in which their products are fast, if a copy is worth it.

    Products of 16-bit numbers take them as they lie. Exact float32 products read transposed matrices at a quarter of
    the speed of others, and TF32 products, whose units want sums to run along memory, others at a third of that of
    transposed ones.
    """
    experts, is_transposed = weights[0].shape[0], weights[0].stride(2) != 1
    if weights[0].dtype != torch.float32 or is_transposed == (precision == "tf32"):
        return weights
    if precision == "tf32" and num_rows >= 128 * experts:
        return tuple(transposed(w).transpose(1, 2) for w in weights)
    if precision == "ieee" and num_rows >= 16 * experts:
        return tuple(transposed(w.transpose(1, 2)) for w in weights)
    return weights
