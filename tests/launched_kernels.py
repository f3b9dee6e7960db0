"""Kernels that ``test_launches`` launches; a file of their own, for whoever imports it imports Triton."""

import triton
import triton.language as tl


@triton.jit
def scale(x, shift, out, length, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write (x + shift) * factor; ``shift`` may be None."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + places, mask=places < length, other=0.0)
    if shift is not None:
        values += tl.load(shift + places, mask=places < length, other=0.0)
    tl.store(out + places, (values * factor).to(out.dtype.element_ty), mask=places < length)


@triton.jit
def scale_in_place(x, again, width, factor, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read blocks (M, N) of a matrix of ``width`` columns, and write x * factor there by pointers."""
    row, column = tl.program_id(0) * M, tl.program_id(1) * N
    places = (row + tl.arange(0, M))[:, None] * width + column + tl.arange(0, N)[None, :]
    tl.store(again + places, (x.load([row, column]) * factor).to(again.dtype.element_ty))


@triton.jit
def scale_blocks(x, out, factor, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write x * factor, both given as blocks (M, N)."""
    row, column = tl.program_id(0) * M, tl.program_id(1) * N
    out.store([row, column], (x.load([row, column]) * factor).to(out.dtype))
