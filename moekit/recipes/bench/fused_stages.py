"""The kernels of the fused layer, one by one, each run as the layer runs it."""

from functools import partial

import torch
from torch import Tensor

from moekit.experts import SWIGLU
from moekit.experts._fused_plan import plan_layer
from moekit.experts.tiles import LayerSize, capability_of, is_narrow
from moekit.recipes.backends import float32_products
from moekit.recipes.bench.rows import Case
from moekit.recipes.bench.times import Work
from moekit.routing import linear_gate, score_and_pass


def fused_stages(case: Case) -> dict[str, Work]:
    """Return the stages of ``fused_layer`` with its gate and router, forward and backward, in their order.

    Args:
        case: to compute with, where the kernels run.

    Returns:
        By name. What one returns is what the layer computes there; the last one returns the gradients of all tokens and
        of the gate.

    Raises:
        Exception: whatever kernels raise where they do not run.
    """
    logits, tokens = score_and_pass(linear_gate, case.x, case.gate)
    assert isinstance(logits, Tensor)
    routing = case.route(logits)
    experts = _experts_stages(case, routing.expert_indices, routing.weights.detach())
    grads = experts["sum of gradients"].run(), experts["through the activation"].run()[2]
    leaves = [case.x, case.gate]
    go_back = partial(torch.autograd.grad, [tokens, routing.weights], leaves, grads, retain_graph=True)
    x, gate, logits = case.x.detach(), case.gate.detach(), logits.detach()
    decision = routing.expert_indices.nbytes + routing.weights.nbytes
    flops = 2 * case.shape.tokens * gate.numel()
    return {
        "gate": Work(partial(linear_gate, x, gate), x.nbytes + gate.nbytes + logits.nbytes, flops),
        "route": Work(partial(case.route, logits), logits.nbytes + decision),
        **experts,
        "router and gate, back": Work(go_back, 3 * x.nbytes + 2 * (gate.nbytes + logits.nbytes) + decision, 2 * flops),
    }


def _experts_stages(case: Case, indices: Tensor, weights: Tensor) -> dict[str, Work]:
    from moekit.experts.kernels import _gemms_triton, _hidden_triton
    from moekit.experts.kernels._back_triton import back_through
    from moekit.experts.kernels._fused_triton import Plan, combined, dispatched
    from moekit.experts.kernels._tiles_triton import Schedule

    dim, width, num_experts = case.shape.dim, case.shape.hidden, case.shape.experts
    x, (gate, up, down) = case.x.detach(), (w.detach() for w in case.experts)
    ups, device = (gate, up), x.device
    precision, card = float32_products(), (capability_of(device), is_narrow(device))
    tiles = case.tiles(LayerSize(x.dtype, indices.numel(), num_experts, dim, width, True, *card, precision))
    make_plan = partial(plan_layer, indices, num_experts, tiles.up.m, tiles.grad_up.k, indices.numel())
    rows_of, assignments, table = make_plan()
    schedule = Schedule(table, num_experts)
    plan = Plan(rows_of, assignments, schedule)
    product = partial(_gemms_triton.grouped_rows, schedule=schedule, precision=precision)
    of_matrix = partial(_gemms_triton.grouped_weight, schedule=schedule, aligned=True, precision=precision)

    copy = partial(dispatched, x, plan)
    rows = copy()
    go_up = partial(_hidden_triton.up, rows, schedule, ups, activation=SWIGLU, precision=precision, tile=tiles.up)
    pre, hidden = go_up()
    go_down = partial(product, hidden, weights=(down,), tile=tiles.down)
    add_up = partial(combined, go_down(), weights, plan)
    copy_grads = partial(dispatched, case.grad, plan)
    grad_rows = copy_grads()
    go_through = partial(
        back_through, grad_rows, schedule, down, pre, weights, assignments,
        activation=SWIGLU, precision=precision, tile=tiles.grad_hidden,
    )  # fmt: skip
    weighted, grad_pre, _ = go_through()
    of_down = partial(of_matrix, weighted, grad=grad_rows, tile=tiles.grad_down)
    of_ups = partial(of_matrix, rows, grad=grad_pre, parts=2, tile=tiles.grad_up)
    of_rows = partial(product, grad_pre, weights=tuple(w.transpose(1, 2) for w in ups), tile=tiles.grad_rows)
    add_up_grads = partial(combined, of_rows(), None, plan)

    each = x.element_size()
    of_x, narrow, wide = (each * n for n in (x.numel(), indices.numel() * dim, indices.numel() * width))
    flops, of_all = 2 * indices.numel() * dim * width, down.nbytes
    matrix = of_all // num_experts * int(schedule.sizes.count_nonzero())  # of experts with rows; gradients are of all
    return {
        "plan": Work(make_plan, 3 * indices.nbytes),
        "copy": Work(copy, of_x + narrow),
        "up": Work(go_up, narrow + 2 * matrix + 3 * wide, 2 * flops),
        "down": Work(go_down, wide + matrix + narrow, flops),
        "sum": Work(add_up, narrow + of_x),
        "copy of gradients": Work(copy_grads, of_x + narrow),
        "through the activation": Work(go_through, narrow + matrix + 5 * wide, flops),
        "gradient of down": Work(of_down, wide + narrow + of_all, flops),
        "copy again": Work(copy, of_x + narrow),
        "gradients of gate and up": Work(of_ups, narrow + 2 * wide + 2 * of_all, 2 * flops),
        "gradient of rows": Work(of_rows, 2 * wide + 2 * matrix + narrow, 2 * flops),
        "sum of gradients": Work(add_up_grads, narrow + of_x),
    }
