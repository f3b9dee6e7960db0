"""Weights on what goes into experts, against the loop y_t = sum_e f_e(g_te x_t)."""

from functools import partial

import pytest
import torch
from torch import Tensor

from moekit.dispatch import by_weight, dropless, gather_rows_by_index, padded, scatter_rows_by_index, weigh_inputs
from moekit.experts import grouped, init_gated, swiglu
from moekit.recipes import expert_layer
from moekit.routing import sigmoid, top_k
from moekit.types import Dispatcher, DispatchPlan, Routing

T, D, F, E, K = 11, 5, 6, 4, 2
BY_INDEX = dropless()._replace(dispatch=gather_rows_by_index, combine=scatter_rows_by_index)
DISPATCHERS = {
    "dropless": dropless(),
    "by index": BY_INDEX,
    "roomy": padded(capacity_factor=4.0),
    "tight": padded(capacity_factor=0.6),
    "tight by weight": padded(capacity_factor=0.6, priority=by_weight),
}


def expert(x: Tensor, params, e: int) -> Tensor:
    gate, up, down = (p[e] for p in params)
    hidden = x @ gate
    return (hidden / (1 + torch.exp(-hidden)) * (x @ up)) @ down


def loops(x: Tensor, routing: Routing, plan: DispatchPlan, params) -> Tensor:
    kept = set(plan.assignments.tolist())
    y = [torch.zeros(D, dtype=x.dtype) for _ in range(T)]
    for t in range(T):
        for j in range(K):
            if t * K + j in kept:
                y[t] = y[t] + expert(routing.weights[t, j] * x[t], params, int(routing.expert_indices[t, j]))
    return torch.stack(y)


def draw() -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    params = init_gated(E, D, F, dtype=torch.float64)
    return x, logits, type(params)(*(p.requires_grad_() for p in params))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", DISPATCHERS)
def test_output_and_gradients_are_those_of_the_loop(name: str) -> None:
    dispatcher = DISPATCHERS[name]
    x, logits, params = draw()
    routing = top_k(logits, k=K, score=sigmoid)
    layer = expert_layer(dispatcher=weigh_inputs(dispatcher), experts=partial(swiglu, matmul=grouped))
    y, expected = layer(x, routing, params), loops(x, routing, dispatcher.plan(routing), params)
    torch.testing.assert_close(y, expected)
    cotangent, leaves = torch.randn_like(y), {"x": x, "logits": logits, **params._asdict()}
    grads = torch.autograd.grad((y * cotangent).sum(), list(leaves.values()), retain_graph=True)
    wanted = torch.autograd.grad((expected * cotangent).sum(), list(leaves.values()))
    for leaf, grad, want in zip(leaves, grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, msg=lambda text, n=leaf: f"{n}\n{text}")


def test_weights_inside_differ_from_weights_outside() -> None:
    x, logits, params = draw()
    routing = top_k(logits, k=K)
    inside, outside = (
        expert_layer(dispatcher=d, experts=partial(swiglu, matmul=grouped))(x, routing, params)
        for d in (weigh_inputs(dropless()), dropless())
    )
    assert not torch.allclose(inside, outside)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dispatcher", [dropless(), BY_INDEX, padded(capacity_factor=4.0)])
def test_the_gradient_of_padding_rows_reaches_nothing(dispatcher: Dispatcher) -> None:
    x, logits, _ = draw()
    routing = top_k(logits, k=K, score=sigmoid)
    routing = routing._replace(expert_indices=routing.expert_indices.masked_fill(routing.expert_indices == 1, -1))
    weighed = weigh_inputs(dispatcher)
    plan = weighed.plan(routing)
    padding = (plan.assignments < 0).unsqueeze(1)
    assert padding.any()
    rows = weighed.dispatch(x, routing, plan)
    assert (rows.masked_select(padding) == 0).all()
    grads = torch.autograd.grad(rows, [x, logits], torch.ones_like(rows).masked_fill(padding, torch.nan))
    assert all(grad.isfinite().all() for grad in grads)
    y = weighed.combine(rows.masked_fill(padding, torch.nan), routing, plan)
    assert y.isfinite().all()


def test_missing_assignments_count_for_nothing() -> None:
    x, logits, params = draw()
    routing = top_k(logits, k=K)
    gone = routing.expert_indices == 2
    missing = routing._replace(
        expert_indices=routing.expert_indices.masked_fill(gone, -1), weights=routing.weights.masked_fill(gone, 0.0)
    )
    layer = expert_layer(dispatcher=weigh_inputs(dropless()), experts=partial(swiglu, matmul=grouped))
    torch.testing.assert_close(
        layer(x, missing, params), loops(x, missing, DispatchPlan((~gone.flatten()).nonzero().flatten(), None), params)
    )


@pytest.mark.parametrize("dispatcher", [dropless(), padded(capacity_factor=1.0)])
def test_no_tokens(dispatcher: Dispatcher) -> None:
    logits = torch.zeros(0, E, requires_grad=True)
    x, params = torch.zeros(0, D, requires_grad=True), init_gated(E, D, F)
    layer = expert_layer(dispatcher=weigh_inputs(dispatcher), experts=partial(swiglu, matmul=grouped))
    y = layer(x, top_k(logits, k=K), params)
    assert y.shape == (0, D)
    y.sum().backward()
    assert x.grad is not None
    assert logits.grad is not None, "a rank without tokens must still reach its router"


def test_half_precision_rows_are_weighed_in_float32() -> None:
    # (1 + 2^-7) (1 + 2^-8) is just above the middle between two bfloat16 numbers; the weight itself would round to 1.
    routing = top_k(torch.zeros(1, 3), k=1)._replace(weights=torch.tensor([[1 + 2**-8]]))
    weighed = weigh_inputs(dropless())
    rows = weighed.dispatch(torch.full((1, 1), 1 + 2**-7).bfloat16(), routing, weighed.plan(routing))
    assert rows.dtype == torch.bfloat16
    assert rows.item() == 1 + 2 * 2**-7


def test_combine_sees_weight_one_and_zero_where_there_is_no_assignment() -> None:
    routing = top_k(torch.randn(T, E), k=K)
    routing = routing._replace(expert_indices=routing.expert_indices.masked_fill(routing.expert_indices == 1, -1))
    probe = weigh_inputs(dropless()._replace(combine=lambda rows, routing, plan: routing.weights))
    seen = probe.combine(torch.zeros(0), routing, probe.plan(routing))
    assert torch.equal(seen, (routing.expert_indices >= 0).float())


def test_it_compiles_whole() -> None:
    x, logits, params = draw()
    layer = expert_layer(dispatcher=weigh_inputs(dropless()), experts=partial(swiglu, matmul=grouped))

    def run(x: Tensor, logits: Tensor) -> Tensor:
        return layer(x, top_k(logits, k=K), params)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, logits), run(x, logits))
