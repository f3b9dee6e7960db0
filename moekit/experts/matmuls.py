"""Grouped matrix products: one signature, (rows (R, D), groups, w (E, D, F)) -> (R, F), several backends.

What rows past the last group come out as is undefined, and may be NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.autocast import in_autocast
from moekit.experts import _grouped_cpu
from moekit.experts.checks import KERNEL_DTYPES, check_dtypes, check_product
from moekit.experts.tiles import compute_capability
from moekit.operators import is_transformed, operator, refuse_tangents
from moekit.types import Groups


def loop(rows: Tensor, groups: Groups, w: Tensor) -> Tensor:
    """Multiply group by group in a Python loop: the obvious version, and the reference of the others.

    Synchronises with the host once, to read the sizes, unless ``groups.capacity`` is known. Deterministic on CUDA. Does
    not compile without a graph break when it reads sizes.

    Args:
        rows: (R, D).
        groups: of E groups.
        w: (E, D, F).

    Returns:
        (R, F); rows past the last group are zero.

    Raises:
        ValueError: if the shapes do not fit, the tensors are on several devices, or of two dtypes, in autocast too.

    Example:
        >>> loop(torch.ones(3, 2), Groups(torch.tensor([1, 2]), None), torch.ones(2, 2, 4)).shape
        torch.Size([3, 4])
    """
    check_product(rows, groups, w)
    num_experts = w.shape[0]
    sizes = groups.sizes.tolist() if groups.capacity is None else [groups.capacity] * num_experts
    tail = rows.shape[0] - sum(sizes)
    # unbind once: indexing w[e] would allocate a gradient of the size of w for every expert
    outputs = [x @ w_e for x, w_e in zip(rows.split([*sizes, tail])[:num_experts], w.unbind(0), strict=True)]
    if not outputs:
        return rows @ w.sum(0)  # no experts: zeros, still connected to both inputs
    return torch.cat([*outputs, outputs[0].new_zeros(tail, w.shape[2])])


def batched(rows: Tensor, groups: Groups, w: Tensor) -> Tensor:
    """Multiply equal groups with one batched product; needs a padded dispatcher.

    No host synchronisation. Deterministic on CUDA.

    Args:
        rows: (E * C, D).
        groups: of E groups of C rows each.
        w: (E, D, F).

    Returns:
        (E * C, F).

    Raises:
        ValueError: if the groups are not known to be equal, the shapes do not fit, the tensors are on several devices,
            or of two dtypes, in autocast too.

    Example:
        >>> batched(torch.ones(4, 2), Groups(torch.tensor([2, 2]), 2), torch.ones(2, 2, 3)).shape
        torch.Size([4, 3])

    References:
        Lepikhin et al., GShard, 2020, Algorithm 2 (experts as one product over (E, C, D)),
        https://arxiv.org/abs/2006.16668
    """
    check_product(rows, groups, w)
    if groups.capacity is None:
        raise ValueError(
            "batched: the groups have no common capacity (they come from a dropless plan); expected equal groups. "
            "Use the padded dispatcher, or the matmul `grouped` or `loop`."
        )
    blocks = rows.view(w.shape[0], groups.capacity, rows.shape[1])
    return torch.bmm(blocks, w).flatten(0, 1)


def grouped(rows: Tensor, groups: Groups, w: Tensor) -> Tensor:
    """Multiply groups of any sizes in one call: ``torch.nn.functional.grouped_mm`` on CUDA, own products on the CPU.

    On the CPU each group's product is written straight into its place in the output, in the forward and in both
    backward products, which nothing between PyTorch operators can do.

    On CUDA torch has a kernel for bfloat16; in float32 and float16 it loops over the groups, whose sizes the host waits
    for. One group that is known to have all rows, as shared experts are, is one product, of any dtype and widths.

    No host synchronisation on CUDA in bfloat16, or of such a group. Deterministic.

    Args:
        rows: (R, D); on CUDA float32, bfloat16 or float16, with D and F multiples of 16 bytes.
        groups: of E groups.
        w: (E, D, F).

    Returns:
        (R, F); rows past the last group are undefined.

    Raises:
        ValueError: if the shapes do not fit, the tensors are on several devices, or of two dtypes, in autocast too; on
            CUDA, if they are of another dtype, if rows of D or F numbers are no multiple of 16 bytes, or there are
            more than 1,023 groups of bfloat16 from Hopper on.
        NotImplementedError: on the CPU, if a tensor has a tangent, for a gradient in forward mode, or inside
            ``torch.vmap``.

    Example:
        >>> grouped(torch.ones(3, 2), Groups(torch.tensor([1, 2]), None), torch.ones(2, 2, 4)).shape
        torch.Size([3, 4])

    References:
        Gale et al., MegaBlocks, 2022 (experts of unequal loads as one product), https://arxiv.org/abs/2211.15841
    """
    check_product(rows, groups, w)
    rows, w = in_autocast(rows, w)
    if rows.is_cuda:
        if w.shape[0] == 1 and groups.capacity == rows.shape[0]:
            return rows @ w.squeeze(0)
        _check_kernel(rows, w)
        return _grouped_mm(rows, groups.sizes, w)
    refuse_tangents("grouped", rows, w)
    return _grouped_cpu.product(rows, groups.sizes, w)


_MOST_GROUPS = 1023  # of torch 2.11's kernel, for bfloat16 from Hopper on; the rest goes through a loop


def _grouped_mm(rows: Tensor, sizes: Tensor, w: Tensor) -> Tensor:
    compiles = torch.compiler.is_compiling()
    opaque = compiles and rows.dtype != torch.bfloat16  # which compilers know alone
    product = _Opaque.apply(rows, sizes, w) if opaque else _torchs_product(rows, w, sizes)
    return _ContiguousGradient.apply(product, compiles or is_transformed())


def _torchs_product(a: Tensor, b: Tensor, sizes: Tensor) -> Tensor:
    # Cast last: Inductor replaces the running sum of equal sizes by a range, and forgets its dtype.
    return F.grouped_mm(a, b, offs=sizes.cumsum(0).to(torch.int32))


def _product_fake(a: Tensor, b: Tensor, sizes: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2]) if b.ndim == 3 else a.new_empty(len(sizes), a.shape[0], b.shape[1])


@operator("grouped_mm", _product_fake)
def _opaque_product(a: Tensor, b: Tensor, sizes: Tensor) -> Tensor:
    """Multiply groups of rows, (R, D) by (E, D, F), or of columns, (D, R) by (R, F), to (E, D, F)."""
    return _torchs_product(a, b, sizes).contiguous()


class _Opaque(torch.autograd.Function):
    """torch's product of a dtype that compilers refuse, as an operator into which they do not look."""

    @staticmethod
    def forward(ctx, rows: Tensor, sizes: Tensor, w: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, sizes, w)
        product: Tensor = _opaque_product(rows, w, sizes)
        return product

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        rows, sizes, w = ctx.saved_tensors
        of_rows = _opaque_product(grad, w.transpose(1, 2), sizes) if ctx.needs_input_grad[0] else None
        of_w = _opaque_product(rows.T, grad, sizes) if ctx.needs_input_grad[2] else None
        return of_rows, None, of_w


class _ContiguousGradient(torch.autograd.Function):
    """A tensor as it is, with a gradient as it lies in memory: ``grouped_mm`` refuses that of a sum, one number.

    Eagerly it is the tensor itself, so that who gets it may change it in place; of a function's view torch forbids it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, as_view: bool) -> Tensor:
        return x.view_as(x) if as_view else x

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, bool], output: Tensor) -> None:  # type: ignore[no-untyped-def]
        if not inputs[1]:
            ctx.mark_dirty(inputs[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad.contiguous(), None


def _check_kernel(rows: Tensor, w: Tensor) -> None:
    check_dtypes("grouped", rows, w, allowed=KERNEL_DTYPES)  # as torch's kernel and its loop take
    if rows.dtype == torch.bfloat16 and w.shape[0] > _MOST_GROUPS and compute_capability(rows.device) >= (9, 0):
        raise ValueError(
            f"grouped: {w.shape[0]} groups; CUDA's grouped_mm takes at most {_MOST_GROUPS} in bfloat16. Use the matmul "
            f"`triton`, or the layer `fused_layer`."
        )
    for name, width in (("D", rows.shape[1]), ("F", w.shape[2])):
        if width * rows.element_size() % 16:
            raise ValueError(
                f"grouped: {name} = {width} in {rows.dtype} is {width * rows.element_size()} bytes a row; CUDA's "
                f"grouped_mm needs a multiple of 16 bytes. Use another width, or the matmul `loop` or `batched`."
            )
