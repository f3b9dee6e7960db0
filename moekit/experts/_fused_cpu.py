"""The expert layer on the CPU as one operator: expert by expert, on rows that stay in the cache.

Between the products nothing of size (R, F) is kept but h, the pre-activations, which the backward needs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.experts._activations_cpu import ACTIVATIONS
from moekit.experts._huge_pages import empty
from moekit.experts._memory_order import is_transposed
from moekit.experts._workers import share
from moekit.operators import differentiated_once, transformable
from moekit.rows import summed
from moekit.segments import rows_of_assignments

_BLOCK = 1024  # rows that are worked on at once, which bounds the scratch memory when one expert has all the rows


class _Rows(NamedTuple):
    """The rows that carry an assignment, R' of R, grouped by expert.

    Attributes:
        assignments: (R',) into the flattened routing.
        tokens: (R',).
        weights: (R', 1).
        ends: (E + 1) where each expert's rows end, and 0 before.
    """

    assignments: Tensor
    tokens: Tensor
    weights: Tensor
    ends: list[int]

    def blocks(self, expert: int) -> list[slice]:
        start, end = self.ends[expert : expert + 2]
        return [slice(at, min(at + _BLOCK, end)) for at in range(start, end, _BLOCK)]

    @property
    def sizes(self) -> list[int]:
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]

    def scratch(self, width: int, number: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(number, min(_BLOCK, max(self.sizes, default=0)), width, dtype=dtype)


def _rows_of(weights: Tensor, tokens: Tensor, assignments: Tensor, sizes: Tensor) -> _Rows:
    ends = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int64), (1, 0))
    assignments = assignments[: int(ends[-1])]
    real = assignments >= 0
    before = torch.nn.functional.pad(real.cumsum(0), (1, 0))  # real rows before each row
    assignments = assignments[real]
    chosen = weights.flatten()[assignments].unsqueeze(1)
    return _Rows(assignments, tokens.flatten()[assignments], chosen, before[ends].tolist())


@torch.library.custom_op("moekit::fused_cpu", mutates_args=(), device_types="cpu")
def fused(
    x: Tensor,
    weights: Tensor,
    tokens: Tensor,
    assignments: Tensor,
    sizes: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    packed: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (T, D) and h (1 or 2, R, F): up, or gate and up, before the activation; undefined past the R' rows.

    If ``packed``, gate is None and up (E, D, 2 F) both of them, side by side, and so is h (1, R, 2 F).
    Without ``keep`` h has no rows, and a backward, if there is one all the same, computes it again.
    x is (T, D); weights and tokens (*A), of the routing; assignments (R,) and sizes (E,), of the plan.
    """
    rows, firsts = _rows_of(weights, tokens, assignments, sizes), [up] if gate is None else [gate, up]
    h = empty((len(firsts), assignments.shape[0] if keep else 0, up.shape[2]), x.dtype)
    out = empty((rows.ends[-1], x.shape[1]), x.dtype)

    def prepare():  # type: ignore[no-untyped-def]
        of_dim, of_hidden = rows.scratch(x.shape[1], 1, x.dtype)[0], rows.scratch(down.shape[1], 1, x.dtype)[0]
        of_firsts = _room(h, rows)

        def do(expert: int) -> None:
            for block in rows.blocks(expert):
                n = block.stop - block.start
                x_e = torch.index_select(x, 0, rows.tokens[block], out=of_dim[:n])
                parts = _parts(_project(x_e, firsts, expert, of_firsts(block)), packed)
                a = ACTIVATIONS[activation].forward(parts[0], of_hidden[:n])
                torch.mm(a if len(parts) == 1 else a.mul_(parts[1]), down[expert], out=out[block])

        return do

    share([2 * size * _numbers(firsts, down) for size in rows.sizes], prepare)
    return _summed(out, rows, weights, tokens, x), h


@torch.library.custom_op("moekit::fused_cpu_backward", mutates_args=(), device_types="cpu")
def _fused_backward(
    grad: Tensor,
    h: Tensor,
    x: Tensor,
    weights: Tensor,
    tokens: Tensor,
    assignments: Tensor,
    sizes: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    packed: bool,
    frozen: bool,
) -> list[Tensor]:
    """Return the gradients of x, weights and, unless experts are frozen, of gate if there is one, up and down.

    Those of matrices are in the order of memory of their matrices.
    """
    rows, firsts = _rows_of(weights, tokens, assignments, sizes), [up] if gate is None else [gate, up]
    d_matrices = [] if frozen else [_as_in_memory(w, partial(empty, dtype=w.dtype)) for w in (*firsts, down)]
    d_rows = empty((rows.ends[-1], x.shape[1]), x.dtype)
    d_chosen = torch.empty_like(rows.weights, dtype=_wide(x))

    def prepare():  # type: ignore[no-untyped-def]
        of_dim, of_hidden = rows.scratch(x.shape[1], 2, x.dtype), _hidden_scratch(rows, down.shape[1], packed, x.dtype)
        of_firsts, kept = _room(h, rows), h.shape[1] > 0

        def do(expert: int) -> None:
            blocks = rows.blocks(expert)
            sums = [_Sum.of(d_w[expert], len(blocks)) for d_w in d_matrices]
            for each in sums if not blocks else ():
                each.out.zero_()
            for i, block in enumerate(blocks):
                n = block.stop - block.start
                x_e = torch.index_select(x, 0, rows.tokens[block], out=of_dim[0, :n])
                d_y = torch.index_select(grad, 0, rows.tokens[block], out=of_dim[1, :n])
                d_a, *rest = (each[:n] for each in of_hidden)
                torch.mm(d_y, down[expert].T, out=d_a)
                pre = of_firsts(block) if kept else _project(x_e, firsts, expert, of_firsts(block))
                a, d_h = _through(_parts(pre, packed), d_a, rest, activation, d_chosen[block])
                d_h = [_side_by_side(d_h)] if packed else d_h
                for j, (part, w) in enumerate(zip(d_h, firsts, strict=True)):
                    _add_product(d_rows[block], part, w[expert].T, first=j == 0)
                if not frozen:
                    _add_to_matrices(sums, x_e, d_h, a, d_y, rows.weights[block], (i, len(blocks)))

        return do

    share([4 * size * _numbers(firsts, down) for size in rows.sizes], prepare)
    d_weights = weights.new_zeros(weights.numel())
    d_weights[rows.assignments] = d_chosen.squeeze(1).to(weights.dtype)
    return [_summed(d_rows, rows, weights, tokens, x), d_weights.view(weights.shape), *d_matrices]


def _room(h: Tensor, rows: _Rows) -> Callable[[slice], Tensor]:
    """Say where a block's pre-activations (1 or 2, n, F) are: in their rows of ``h`` or, if it has none, in scratch."""
    if h.shape[1]:
        return lambda block: h[:, block]
    room = rows.scratch(h.shape[2], h.shape[0], h.dtype)
    return lambda block: room[:, : block.stop - block.start]


def _parts(h: Tensor, packed: bool) -> Sequence[Tensor]:
    """Return up, or gate and up, (n, F) each, of a block's pre-activations."""
    return h[0].chunk(2, 1) if packed else h.unbind(0)


def _hidden_scratch(rows: _Rows, width: int, packed: bool, dtype: torch.dtype) -> list[Tensor]:
    """Allocate four (rows, F); if ``packed``, the first two of them are the halves of one (rows, 2 F)."""
    if not packed:
        return [*rows.scratch(width, 4, dtype)]
    return [*rows.scratch(2 * width, 1, dtype)[0].chunk(2, 1), *rows.scratch(width, 2, dtype)]


def _side_by_side(halves: Sequence[Tensor]) -> Tensor:
    """Return the (n, 2 F) of which two tensors (n, F) are the halves."""
    first, second = halves
    assert second.data_ptr() == first.data_ptr() + first.shape[1] * first.element_size()
    return first.as_strided((first.shape[0], 2 * first.shape[1]), (first.stride(0), 1))


def _numbers(firsts: list[Tensor], down: Tensor) -> int:
    """Count the entries of an expert's matrices."""
    return sum(w[0].numel() for w in (*firsts, down))


def _as_in_memory(w: Tensor, make: Callable[[torch.Size], Tensor]) -> Tensor:
    """Make a tensor for gradients of matrices, of their shape: transposed if they lie so in memory, else contiguous."""
    return make(w.transpose(1, 2).shape).transpose(1, 2) if is_transposed(w) else make(w.shape)


def _project(x_e: Tensor, firsts: list[Tensor], expert: int, out: Tensor) -> Tensor:
    """Multiply the rows of an expert (n, D) by its first matrices, into (1 or 2, n, F), and return that."""
    for part, w in zip(out, firsts, strict=True):
        torch.mm(x_e, w[expert], out=part)
    return out


def _through(
    h: Sequence[Tensor], d_a: Tensor, scratch: Sequence[Tensor], activation: str, d_weights: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Go back through the activation of a block of n rows, overwriting ``d_a`` and ``scratch``, three (n, F).

    ``d_a`` (n, F) is dy W_down^T, not weighted: its inner product with a is the gradient of the router's weight.
    Returns a, and the gradients of ``h``, not weighted either: of gate in ``d_a``, of up in the first of ``scratch``.
    """
    act, (s, a, product) = ACTIVATIONS[activation], scratch
    if len(h) == 1:
        torch.mul(act.forward(h[0], a), d_a, out=product)
        torch.sum(product, 1, keepdim=True, dtype=d_weights.dtype, out=d_weights)
        return a, [act.backward(d_a, h[0], d_a)]
    torch.mul(act.forward(h[0], s), h[1], out=a)
    d_up = s.mul_(d_a)
    torch.sum(torch.mul(d_up, h[1], out=product), 1, keepdim=True, dtype=d_weights.dtype, out=d_weights)
    return a, [act.backward(d_a.mul_(h[1]), h[0], d_a), d_up]


class _Sum(NamedTuple):
    """Products of several blocks, added up.

    Attributes:
        out: their sum.
        total: the same in float32, where ``out`` is narrower and there are several: rounded each time, their sum would
            lose what is small beside it.
    """

    out: Tensor
    total: Tensor | None

    @classmethod
    def of(cls, out: Tensor, blocks: int) -> "_Sum":
        wide = _wide(out)
        return cls(out, torch.empty_like(out, dtype=wide) if blocks > 1 and wide != out.dtype else None)

    def add(self, left: Tensor, right: Tensor, *, first: bool, last: bool) -> None:
        _add_product(self.out, left, right, first=first or self.total is not None)
        if self.total is None:
            return
        total = self.total.copy_(self.out) if first else self.total.add_(self.out)
        if last:
            self.out.copy_(total)


def _add_to_matrices(
    d_matrices: list[_Sum],
    x_e: Tensor,
    d_h: list[Tensor],
    a: Tensor,
    d_y: Tensor,
    weights: Tensor,
    block: tuple[int, int],
) -> None:
    """Add a block's share to the gradients of an expert's matrices, overwriting ``x_e`` and ``d_y``, both (n, D).

    Nothing is weighted before: the gradients of rows are where they are added up, and here the narrower factors are.
    ``block`` is its number, and how many there are.
    """
    first, last = block[0] == 0, block[0] == block[1] - 1
    *d_firsts, d_down = d_matrices
    d_down.add(a.T, d_y.mul_(weights), first=first, last=last)
    x_e.mul_(weights)
    for part, d_w in zip(d_h, d_firsts, strict=True):
        d_w.add(x_e.T, part, first=first, last=last)


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    if first:  # also where out holds NaN
        torch.mm(left, right, out=out)
    else:
        out.addmm_(left, right)


def _wide(x: Tensor) -> torch.dtype:
    """Return what sums over tokens' entries are taken in; torch's sums of weighted rows are fast in these."""
    return torch.promote_types(x.dtype, torch.float32)


def _summed(values: Tensor, rows: _Rows, weights: Tensor, tokens: Tensor, x: Tensor) -> Tensor:
    """Add up each token's rows, weighted: (R', D) to (T, D)."""
    wide = values.to(_wide(x))
    if tokens.ndim == 2 and tokens.shape[0] == x.shape[0]:  # token choice, (T, K)
        links = rows_of_assignments(rows.assignments, tokens.numel()).view(tokens.shape)
        return summed(wide, links, weights).to(x.dtype)
    weighted = wide * rows.weights.to(wide.dtype)
    return torch.zeros(x.shape, dtype=wide.dtype).index_add_(0, rows.tokens, weighted).to(x.dtype)


@fused.register_fake
def _(x, weights, tokens, assignments, sizes, gate, up, down, activation, packed, keep):  # type: ignore[no-untyped-def]
    rows = assignments.shape[0] if keep else 0
    return x.new_empty(x.shape), x.new_empty(1 if gate is None else 2, rows, up.shape[2])


@_fused_backward.register_fake
def _(grad, h, x, weights, tokens, assignments, sizes, gate, up, down, activation, packed, frozen):  # type: ignore[no-untyped-def]
    grads = [x.new_empty(x.shape), weights.new_empty(weights.shape)]
    matrices = [] if frozen else [w for w in (gate, up, down) if w is not None]
    return [*grads, *(_as_in_memory(w, w.new_empty) for w in matrices)]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.activation, ctx.packed, _keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 11
    frozen, saved = not any(ctx.needs_input_grad[5:8]), ctx.saved_tensors
    with torch.no_grad():
        d_x, d_weights, *d_matrices = _fused_backward(grad, *saved, ctx.activation, ctx.packed, frozen)
    grads = d_x, d_weights, None, None, None, *[None] * (3 - len(d_matrices)), *d_matrices, None, None, None
    return differentiated_once("fused_cpu", (grad, *saved), *grads)


fused.register_autograd(_backward, setup_context=_save)
fused_experts = transformable("fused_cpu", fused, _backward, _save)
