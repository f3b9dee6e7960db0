"""The rows of the layer benchmark that have no routing: the bound, products alone, and a whole dense expert."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.dispatch import dropless_plan, gather_rows
from moekit.recipes.bench.rows import Case, Contender
from moekit.routing import linear_gate

_SPREAD = 0.6  # of silu(z), silu'(z) and silu(z) z' for normal numbers z, z': 0.5967, 0.6164 and 0.5967


def dense_bound(case: Case) -> Contender:
    """Build the bound: the six products of one SwiGLU expert fed T K rows, and nothing else.

    Forward rows @ [gate | up] and hidden @ down; backward grad @ down^T, hidden^T @ grad, slope @ [gate | up]^T and
    rows^T @ slope: 18 T K D F operations, the useful ones of a layer. Rows and their gradients are those that the
    layer's experts are fed, in their order. The hidden rows, and the slope, which stands for the gradient of the
    pre-activations, are drawn when the row is built, at the scale that they would have. Products are written to memory
    that is there, for fresh pages cost time and are no arithmetic: what one run returns is overwritten by the next.
    Does not synchronise with the host.

    Args:
        case: to compute with; expert 0 is taken.

    Returns:
        Contender of the leaves rows (T K, D), [gate | up] (D, 2 F) and down (F, D). y and the gradients have their
        shapes, and are not those of a layer.

    Example:
        >>> from moekit.recipes.bench.rows import make_case
        >>> from moekit.recipes.bench.shapes import LayerShape
        >>> case = make_case(LayerShape("", 8, 4, 6, 4, 2), "uniform", device="cpu", dtype=torch.float32)
        >>> [tuple(leaf.shape) for leaf in dense_bound(case).leaves]
        [(16, 4), (4, 12), (6, 4)]
    """
    rows, grad = _rows(case)
    gate, up, down = (w[0].detach() for w in case.experts)
    leaves = [rows, torch.cat([gate, up], 1).requires_grad_(), down.clone().requires_grad_()]
    drawn, out = _draw(case), _allocate(leaves, case.shape.hidden)

    def forward() -> Tensor:
        y = _Products.apply(*leaves, drawn, out)
        assert isinstance(y, Tensor)
        return y

    return Contender(forward, leaves, grad)


def dense_expert(case: Case) -> Contender:
    """Build what a dense model pays: one eager SwiGLU expert fed T K rows, its activation and autograd included.

    Args:
        case: to compute with; expert 0 is taken.

    Returns:
        Contender of the leaves rows (T K, D), gate and up (D, F), and down (F, D).

    Example:
        >>> from moekit.recipes.bench.rows import make_case
        >>> from moekit.recipes.bench.shapes import LayerShape
        >>> case = make_case(LayerShape("", 8, 4, 6, 4, 2), "uniform", device="cpu", dtype=torch.float32)
        >>> dense_expert(case).forward().shape
        torch.Size([16, 4])
    """
    rows, grad = _rows(case)
    gate, up, down = (w[0].detach().clone().requires_grad_() for w in case.experts)
    return Contender(lambda: (F.silu(rows @ gate) * (rows @ up)) @ down, [rows, gate, up, down], grad)


@torch.no_grad()
def _rows(case: Case) -> tuple[Tensor, Tensor]:
    """Tokens and their gradients as the layer's experts are fed them: in that order no row is like the one before.

    K copies of a token in a row would change fewer bits, and a device at its limit of power multiplies them faster.
    """
    routing = case.route(linear_gate(case.x, case.gate))
    plan = dropless_plan(routing)
    return gather_rows(case.x, routing, plan).requires_grad_(), gather_rows(case.grad, routing, plan)


class _Drawn(NamedTuple):
    hidden: Tensor  # (T K, F)
    slope: Tensor  # (T K, 2 F), the gradient of the pre-activations


class _Out(NamedTuple):
    preactivations: Tensor  # (T K, 2 F)
    y: Tensor  # (T K, D)
    hidden: Tensor  # (T K, F), a gradient as all below
    rows: Tensor
    up: Tensor
    down: Tensor


def _draw(case: Case) -> _Drawn:
    s, generator = case.shape, torch.Generator(case.x.device).manual_seed(0)
    hidden = case.x.new_empty(s.rows, s.hidden).normal_(std=_SPREAD, generator=generator)
    spread = _SPREAD * (s.dim / s.hidden) ** 0.5
    return _Drawn(hidden, case.x.new_empty(s.rows, 2 * s.hidden).normal_(std=spread, generator=generator))


def _allocate(leaves: list[Tensor], width: int) -> _Out:
    rows, up, down = (torch.empty_like(leaf, requires_grad=False) for leaf in leaves)
    n = rows.shape[0]
    return _Out(rows.new_empty(n, 2 * width), torch.empty_like(rows), rows.new_empty(n, width), rows, up, down)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, up: Tensor, down: Tensor, drawn: _Drawn, out: _Out) -> Tensor:
        ctx.save_for_backward(rows, up, down)
        ctx.drawn, ctx.out = drawn, out
        torch.mm(rows, up, out=out.preactivations)
        return torch.mm(drawn.hidden, down, out=out.y).detach()  # a tensor of its own, for it gets a history

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows, up, down = ctx.saved_tensors
        (hidden, slope), out = ctx.drawn, ctx.out
        torch.mm(grad, down.T, out=out.hidden)
        into_down = torch.mm(hidden.T, grad, out=out.down)
        into_rows = torch.mm(slope, up.T, out=out.rows)
        return into_rows, torch.mm(rows.T, slope, out=out.up), into_down, None, None
