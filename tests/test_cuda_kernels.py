"""The bandwidth-bound kernels where they are used, on CUDA: dispatch, combine, plans and the fused router."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from waiting import nothing_waits

from moekit.dispatch import dropless_plan, gather_rows, padded_plan, scatter_rows
from moekit.routing import sigmoid, softmax, top_k
from moekit.routing.fused_top_k import fused_top_k, fused_top_k_and_load
from moekit.rows import Links, copy_rows, sum_rows
from moekit.segments import rows_of_assignments, sort_by_expert, tokens_per_expert
from moekit.types import DispatchPlan, Groups, Routing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

T, D, E, K = 517, 768, 12, 3
PLANS = {
    "dropless": dropless_plan,
    "with drops": partial(padded_plan, capacity_factor=0.5),
    "roomy": partial(padded_plan, capacity_factor=2.0),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)


def moved(routing: Routing, device: str, dtype: torch.dtype) -> Routing:
    tokens, experts, weights = (each.to(device) for each in routing[:3])
    weights = weights.to(torch.promote_types(dtype, torch.float32)).detach().requires_grad_()
    return routing._replace(token_indices=tokens, expert_indices=experts, weights=weights)


def drawn(*, missing: bool) -> Routing:
    routing = top_k(torch.randn(T, E) + torch.arange(E) / 4, k=K)
    gone = (torch.arange(T * K) % 5 == 0).view(T, K)
    gone[4] = True
    return routing._replace(expert_indices=routing.expert_indices.masked_fill(gone & missing, -1))


def outcome(routing: Routing, plan: DispatchPlan, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dispatch and combine, each from its own input, with every gradient by name; padding rows hold NaN."""
    x, grad_rows, grad_y = given["x"].detach().requires_grad_(), given["rows"], given["grad y"]
    poison = (plan.assignments < 0).unsqueeze(1)
    values = given["rows"].masked_fill(poison, float("nan")).requires_grad_()
    rows, y = gather_rows(x, routing, plan), scatter_rows(values, routing, plan)
    [of_x] = torch.autograd.grad(rows, x, grad_rows.masked_fill(poison, float("nan")))
    of_values, of_weights = torch.autograd.grad(y, (values, routing.weights), grad_y)
    return {"rows": rows, "y": y, "d x": of_x, "d values": of_values, "d weights": of_weights}


@pytest.mark.usefixtures("poison")
@dtypes
@plans
@pytest.mark.parametrize("missing", [False, True])
def test_dispatch_and_combine_equal_float64_on_the_cpu(plan, dtype, missing) -> None:
    routing = drawn(missing=missing)
    fast, exact = moved(routing, "cuda", dtype), moved(routing, "cpu", torch.float64)
    given = {
        "x": torch.randn(T, D),
        "rows": torch.randn(len(plan(routing).assignments), D),
        "grad y": torch.randn(T, D),
    }
    given = {name: value.to(dtype) for name, value in given.items()}
    found = outcome(fast, plan(fast), {name: value.cuda() for name, value in given.items()})
    expected = outcome(exact, plan(exact), {name: value.double() for name, value in given.items()})
    for name, value in expected.items():
        error = (found[name].double().cpu() - value).abs().max() / value.abs().max()
        eps = torch.finfo(torch.promote_types(dtype, torch.float32) if name == "d weights" else dtype).eps
        assert error <= 4 * eps, f"{name}: {error:.1e}"
        again = outcome(fast, plan(fast), {key: each.cuda() for key, each in given.items()})[name]
        assert torch.equal(found[name], again), f"{name} varies"


@plans
def test_plans_equal_those_of_the_cpu(plan) -> None:
    for missing in (False, True):
        routing = drawn(missing=missing)
        found, expected = plan(moved(routing, "cuda", torch.float32)), plan(routing)
        assert torch.equal(found.assignments.cpu(), expected.assignments)
        assert torch.equal(found.groups.sizes.cpu(), expected.groups.sizes)


def test_more_experts_than_the_kernels_take_are_left_to_torch() -> None:
    experts = torch.randint(-1, 1500, (4000,))
    order, sizes = (each.cpu() for each in sort_by_expert(experts.cuda(), 1500))
    assert torch.equal(order, sort_by_expert(experts, 1500)[0])
    assert torch.equal(sizes, sort_by_expert(experts, 1500)[1])
    assert torch.equal(tokens_per_expert(experts.cuda(), 1500).cpu(), sizes)


def everything(x: Tensor, values: Tensor, logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Run every kernel once: the fused router, a plan of its own, both moves and their unweighted kin."""
    routing, load = fused_top_k_and_load(logits, k=K, score=sigmoid, normalize=True, scale=2.0, bias=bias)
    order, sizes = sort_by_expert(routing.expert_indices.flatten(), E)
    plan = DispatchPlan(order, Groups(sizes.to(torch.int32), None))
    rows = rows_of_assignments(order, order.shape[0]).view_as(routing.expert_indices)
    links = Links(order // K, order < 0, rows)
    y = scatter_rows(gather_rows(x, routing, plan) * values, routing, plan)
    return y, sum_rows(copy_rows(x, links), links), load


def arguments(dtype: torch.dtype) -> tuple[Tensor, ...]:
    logits = torch.randn(T, E, device="cuda", requires_grad=True)
    x, values = (torch.randn(n, D, device="cuda", dtype=dtype, requires_grad=True) for n in (T, T * K))
    return x, values, logits, torch.randn(E, device="cuda")


def with_gradients(function: Callable, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    y, sums, load = function(*inputs)
    grads = torch.autograd.grad(y.float().square().sum() + sums.float().square().sum(), inputs[:3])
    return {"y": y, "sums": sums, "load": load, **dict(zip(("d x", "d values", "d logits"), grads, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph_with_the_same_gradients(backend, dtype) -> None:
    inputs = arguments(dtype)
    expected = with_gradients(everything, inputs)
    torch.compiler.reset()
    found = with_gradients(torch.compile(everything, fullgraph=True, backend=backend), inputs)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5), f"{name}: relative error {error:.2e}"


def test_the_forward_is_captured_in_a_cuda_graph() -> None:
    inputs = arguments(torch.bfloat16)
    with torch.no_grad():
        everything(*inputs)  # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = everything(*inputs)
        for given, fresh in zip(inputs, arguments(torch.bfloat16), strict=True):
            given.copy_(fresh)
        graph.replay()
        for found, expected in zip(outputs, everything(*inputs), strict=True):
            assert torch.equal(found, expected)


def test_nothing_reads_the_device() -> None:
    inputs = arguments(torch.bfloat16)
    with_gradients(everything, inputs)
    with nothing_waits():
        with_gradients(everything, inputs)


def test_autocast_changes_no_decision() -> None:
    inputs = arguments(torch.bfloat16)
    expected = with_gradients(everything, inputs)
    with torch.autocast("cuda", dtype=torch.float16):
        found = with_gradients(everything, inputs)
        assert fused_top_k(inputs[2], k=K).weights.dtype == torch.float32
    assert torch.equal(found["load"], expected["load"])
    assert torch.equal(found["y"], expected["y"].to(found["y"].dtype))
    assert torch.equal(found["d logits"], expected["d logits"])


@pytest.mark.parametrize("score", [softmax, sigmoid])
@pytest.mark.parametrize(("num_experts", "k"), [(8, 2), (64, 8), (256, 8), (1000, 32)])
def test_the_fused_router_is_top_k(score, num_experts, k) -> None:
    """At scale: float32 rounding may order near-equal scores otherwise, so compare what was chosen by its score."""
    logits = torch.randn(4099, num_experts, device="cuda", requires_grad=True)
    exact = logits.detach().double().requires_grad_()
    routing, load = fused_top_k_and_load(logits, k=k, score=score, normalize=True)
    expected = top_k(exact, k=k, score=score, normalize=True)
    torch.testing.assert_close(routing.weights.double(), expected.weights, rtol=1e-5, atol=1e-7)
    agree = (routing.expert_indices == expected.expert_indices).all(1)
    assert agree.double().mean() > 0.999
    assert torch.equal(load, tokens_per_expert(routing.expert_indices, num_experts))
    grad = torch.randn(4099, k, device="cuda")
    found, wanted = (
        torch.autograd.grad(w, z, grad.to(w.dtype)) for w, z in ((routing.weights, logits), (expected.weights, exact))
    )
    torch.testing.assert_close(found[0][agree].double(), wanted[0][agree], rtol=1e-4, atol=1e-6)
