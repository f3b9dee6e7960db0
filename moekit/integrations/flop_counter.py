"""FLOP counters know moekit's operators: ``torch.utils.flop_counter`` counts the products of every backend alike.

Formulas see shapes alone: which assignments do not exist (-1, as those that ``limited`` drops), and which rows are
padding, they cannot tell. So they count every assignment of a routing, and every row of a grouped product. What a
backward computes again is counted, and gradients of frozen experts are not.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils import flop_counter

from moekit.experts import _fused_cpu, _grouped_cpu, matmuls, triton_matmul  # noqa: F401 - whose operators these are
from moekit.experts._fused_operators import matrices_of, settings_of
from moekit.routing import _half_gates  # noqa: F401

Shape = Sequence[int]


def register() -> None:
    """Tell ``torch.utils.flop_counter`` what moekit's operators compute: call it once, before a counter is made.

    Without it a counter sees nothing of ``fused_layer``, ``fused_cpu``, ``triton``, ``grouped`` and gates of bfloat16,
    for it knows torch's operators alone. A formula that is registered already stays, so calling it again does no harm.

    Example:
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> from moekit.experts import init_gated
        >>> from moekit.recipes import auto, mixtral
        >>> register()
        >>> recipe = mixtral(k=2)._replace(layer=auto())
        >>> with FlopCounterMode(display=False) as counter:
        ...     _ = recipe.layer(torch.ones(5, 4), recipe.route(torch.zeros(5, 3)), init_gated(3, 4, 8))
        >>> counter.get_total_flops() == 6 * 5 * 2 * 4 * 8
        True

    References:
        ``torch.utils.flop_counter.register_flop_formula``: two operations for each number that a product multiplies
            and adds, none for anything else.
    """
    for operators, formulas in ((torch.ops.moekit, _FORMULAS), (torch.ops.aten, _OF_TORCH)):
        for name, formula in formulas.items():
            target = getattr(operators, name)
            if target not in flop_counter.flop_registry:
                flop_counter.register_flop_formula(target)(formula)


def _forward(num_rows: int, ups: Sequence[Shape], down: Shape) -> int:
    """Count the products of rows and an expert's matrices, (E, ., .) each."""
    return 2 * num_rows * sum(prod(w[1:]) for w in (*ups, down))


def _backward(num_rows: int, ups: Sequence[Shape], down: Shape, *, again: bool, frozen: bool) -> int:
    """Count those of the gradients of rows and, unless ``frozen``, of matrices; if ``again``, pre-activations too."""
    once, of_ups = _forward(num_rows, ups, down), 2 * num_rows * sum(prod(w[1:]) for w in ups)
    return once * (1 if frozen else 2) + (of_ups if again else 0)


def _shapes(projections: list[Any], settings: str) -> tuple[list[Shape], Shape]:
    """Return the shapes of ``ups`` and ``down``, leaving out those of biases."""
    matrices: list[Any] = matrices_of(projections, settings_of(settings).layout)[0]
    return matrices[:-1], matrices[-1]


def _of_fused(*given: Any, out_shape: Any) -> int:
    _, weights, _, projections, settings = given[:5]
    ups, down = _shapes(projections, settings)
    return _forward(prod(weights), ups, down)


def _of_fused_backward(*given: Any, out_shape: Any) -> int:
    _, _, weights, _, projections, _, pre, settings, _, frozen = given
    ups, down = _shapes(projections, settings)
    return _backward(prod(weights), ups, down, again=pre[0] == 0, frozen=frozen)


def _of_fused_cpu(*given: Any, out_shape: Any) -> int:
    _, weights, _, assignments, _, gate, up, down = given[:8]
    return _forward(_rows_of(weights, assignments), _ups(gate, up), down)


def _of_fused_cpu_backward(*given: Any, out_shape: Any) -> int:
    _, h, _, weights, _, assignments, _, gate, up, down, _, _, frozen = given
    return _backward(_rows_of(weights, assignments), _ups(gate, up), down, again=h[1] == 0, frozen=frozen)


def _rows_of(weights: Shape, assignments: Shape) -> int:
    """Return how many rows there can be, without padding: one for each assignment that the plan has room for."""
    return min(prod(weights), assignments[0])


def _ups(gate: Shape | None, up: Shape) -> list[Shape]:
    return [up] if gate is None else [gate, up]


def _of_product(rows: Shape, sizes: Shape, w: Shape, *_: Any, out_shape: Any) -> int:
    return 2 * rows[0] * prod(w[1:])


def _of_grad_w(rows: Shape, sizes: Shape, grad: Shape, *_: Any, out_shape: Any) -> int:
    return 2 * prod(rows) * grad[1]


def _of_gate(x: Shape, w: Shape, *, out_shape: Any) -> int:
    """Count one product of float32, as other gates take: not the two or three of bfloat16 that it is made of."""
    return 2 * x[0] * prod(w)


def _of_gate_backward(grad: Shape, x: Shape, w: Shape, beside: Shape | None, *, out_shape: Any) -> int:
    return 4 * x[0] * prod(w)


def _of_grouped_mm(left: Shape, right: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    """Count torch's: one side's rows, or the columns summed over, are divided among groups, so all count once."""
    batches = left[0] if len(left) == len(right) == 3 else 1
    return 2 * batches * left[-2] * left[-1] * right[-1]


_FORMULAS: dict[str, Callable[..., int]] = {
    "fused_experts": _of_fused,
    "fused_experts_backward": _of_fused_backward,
    "fused_cpu": _of_fused_cpu,
    "fused_cpu_backward": _of_fused_cpu_backward,
    "grouped_mm": _of_grouped_mm,
    "grouped_mm_cpu": _of_product,
    "grouped_mm_cpu_grad_w": _of_grad_w,
    "grouped_mm_triton": _of_product,
    "grouped_mm_triton_grad_w": _of_grad_w,
    "half_gate": _of_gate,
    "half_gate_backward": _of_gate_backward,
}
_OF_TORCH: dict[str, Callable[..., int]] = {"_grouped_mm": _of_grouped_mm}
