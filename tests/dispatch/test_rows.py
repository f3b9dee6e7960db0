import pytest
import torch
from torch import Tensor

from moekit.dispatch import (
    dropless,
    dropless_plan,
    gather_rows,
    gather_rows_by_index,
    padded,
    padded_plan,
    scatter_rows,
    scatter_rows_by_index,
)
from moekit.dispatch.rows import weights_of_rows
from moekit.routing import round_robin, top_k
from moekit.routing.top_k import token_choice
from moekit.types import DispatchPlan, Groups, Routing

T, D, E, K = 13, 6, 5, 3


def popular(dtype: torch.dtype = torch.float64, *, missing: bool = False) -> Routing:
    """Route so that some experts are much more wanted than others; every fifth assignment missing if asked."""
    routing = top_k((torch.randn(T, E) + torch.arange(E)).to(dtype), k=K)
    if missing:
        gone = (torch.arange(T * K) % 5 == 0).view(T, K)
        gone[4] = True
        routing = routing._replace(expert_indices=routing.expert_indices.masked_fill(gone, -1))
    return routing


PLANS = {
    "dropless": dropless_plan,
    "with drops": lambda routing: padded_plan(routing, capacity_factor=0.5),
    "roomy": lambda routing: padded_plan(routing, capacity_factor=2.0),
}
PAIRS = {"fast": (gather_rows, scatter_rows), "by index": (gather_rows_by_index, scatter_rows_by_index)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}

plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
pairs = pytest.mark.parametrize(("gather", "scatter"), PAIRS.values(), ids=PAIRS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@plans
@pairs
@pytest.mark.parametrize("missing", [False, True])
def test_gather_copies_tokens_and_leaves_padding_zero(plan, gather, scatter, missing: bool) -> None:
    routing = popular(missing=missing)
    plan = plan(routing)
    x = torch.randn(T, D, dtype=torch.float64)
    rows = gather(x, routing, plan)
    for row, assignment in zip(rows, plan.assignments.tolist(), strict=True):
        expected = x[assignment // K] if assignment >= 0 else torch.zeros(D, dtype=torch.float64)
        assert torch.equal(row, expected)


@plans
@pairs
@pytest.mark.parametrize("missing", [False, True])
def test_scatter_is_the_transpose_of_gather(plan, gather, scatter, missing: bool) -> None:
    routing = popular(missing=missing)
    plan = plan(routing)
    routing = routing._replace(weights=torch.ones(T, K, dtype=torch.float64))
    x = torch.randn(T, D, dtype=torch.float64)
    rows = torch.randn(plan.assignments.shape[0], D, dtype=torch.float64)
    torch.testing.assert_close((gather(x, routing, plan) * rows).sum(), (x * scatter(rows, routing, plan)).sum())


@plans
@pairs
def test_each_backward_is_the_other_forward(plan, gather, scatter) -> None:
    routing = popular(missing=True)
    plan = plan(routing)
    routing = routing._replace(weights=torch.ones(T, K, dtype=torch.float64))
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(plan.assignments.shape[0], D, dtype=torch.float64, requires_grad=True)
    (grad_x,) = torch.autograd.grad(gather(x, routing, plan), x, rows.detach())
    torch.testing.assert_close(grad_x, scatter(rows, routing, plan))
    (grad_rows,) = torch.autograd.grad(scatter(rows, routing, plan), rows, x.detach())
    torch.testing.assert_close(grad_rows, gather(x, routing, plan))


def test_averaging_what_was_gathered_gives_the_tokens_back() -> None:
    routing = round_robin(torch.zeros(T, E), k=K, normalize=True)
    plan = dropless_plan(routing)
    x = torch.randn(T, D)
    torch.testing.assert_close(scatter_rows(gather_rows(x, routing, plan), routing, plan), x)


@pytest.mark.usefixtures("poison")
@plans
@dtypes
@pytest.mark.parametrize("missing", [False, True])
def test_fast_path_equals_index_add_in_value_and_every_gradient(plan, dtype: torch.dtype, missing: bool) -> None:
    routing = popular(torch.promote_types(dtype, torch.float32), missing=missing)
    plan = plan(routing)
    x = torch.randn(T, D).to(dtype).requires_grad_()
    rows = torch.randn(plan.assignments.shape[0], D).to(dtype)
    rows = rows.masked_fill((plan.assignments < 0).unsqueeze(1), torch.nan).requires_grad_()
    weights = routing.weights.detach().requires_grad_()
    routing = routing._replace(weights=weights)
    d_rows, d_y = torch.randn(rows.shape).to(dtype), torch.randn(T, D).to(dtype)

    def run(gather, scatter) -> dict[str, Tensor]:
        gathered, y = gather(x, routing, plan), scatter(rows, routing, plan)
        (grad_x,) = torch.autograd.grad(gathered, x, d_rows)
        grad_rows, grad_weights = torch.autograd.grad(y, (rows, weights), d_y)
        return {"rows": gathered, "y": y, "dx": grad_x, "drows": grad_rows, "dweights": grad_weights}

    fast, plain = run(*PAIRS["fast"]), run(*PAIRS["by index"])
    for name, value in plain.items():
        torch.testing.assert_close(
            fast[name],
            value,
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype],
            msg=lambda text: f"{name}\n{text}",  # noqa: B023
        )
    assert fast["dweights"].dtype == weights.dtype


@plans
@pairs
def test_sums_are_taken_in_float32_and_rounded_once(plan, gather, scatter) -> None:
    routing = popular(torch.float32)
    plan = plan(routing)
    rows = torch.randn(plan.assignments.shape[0], D).to(torch.bfloat16)
    exact = scatter_rows_by_index(rows.double(), routing._replace(weights=routing.weights.double()), plan)
    y = scatter(rows, routing, plan)
    assert y.dtype == torch.bfloat16
    # One rounding to bfloat16 is at most 2^-8 of the value; what float32 adds to it is far below 2^-8 of that.
    torch.testing.assert_close(y.double(), exact, rtol=2**-8 * (1 + 2**-8), atol=1e-6)


def test_gradient_of_the_gather_is_summed_in_float32() -> None:
    k = 64
    routing = round_robin(torch.zeros(2, k), k=k)
    plan = dropless_plan(routing)
    x = torch.zeros(2, D, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2 * k, D).to(torch.bfloat16)
    (grad_x,) = torch.autograd.grad(gather_rows(x, routing, plan), x, grad)
    exact = scatter_rows_by_index(grad.double(), routing._replace(weights=torch.ones(2, k).double()), plan)
    torch.testing.assert_close(grad_x.double(), exact, rtol=2**-8 * (1 + 2**-8), atol=1e-5)


@pairs
def test_gradient_of_a_dropped_weight_is_zero_even_if_padding_is_nan(gather, scatter) -> None:
    routing = popular(missing=True)
    weights = routing.weights.detach().requires_grad_()
    plan = padded_plan(routing, capacity_factor=0.5)
    rows = torch.ones(plan.assignments.shape[0], D, dtype=torch.float64)
    rows[plan.assignments < 0] = torch.nan
    rows[plan.assignments < 0, 0] = torch.inf
    y = scatter(rows, routing._replace(weights=weights), plan)
    assert y.isfinite().all()
    (grad,) = torch.autograd.grad(y.sum(), weights)
    kept = torch.zeros(T * K, dtype=torch.bool)
    kept[plan.assignments[plan.assignments >= 0]] = True
    assert torch.equal(grad.flatten(), kept.double() * D)
    assert not kept.all()


@pairs
def test_a_missing_choice_beside_a_kept_one_reads_no_padding(gather, scatter) -> None:
    """Nobody wants expert 0, so that row 0, which an index of -1 is easily taken for, is padding."""
    experts = torch.tensor([[1, -1], [-1, 1], [1, 1]])
    routing = token_choice(experts, torch.ones(3, 2, requires_grad=True), torch.zeros(3, 2))
    plan = padded_plan(routing, capacity_factor=1.0)
    assert plan.assignments.tolist() == [-1, -1, -1, 0, 3, 4]  # the last choice of token 2 is dropped
    rows = torch.ones(6, D).masked_fill((plan.assignments < 0).unsqueeze(1), torch.nan).requires_grad_()
    y = scatter(rows, routing, plan)
    assert torch.equal(y, torch.ones(3, D))
    grad_rows, grad_weights = torch.autograd.grad(y.sum(), (rows, routing.weights))
    assert torch.equal(grad_rows[3:], torch.ones(3, D))
    assert grad_weights.tolist() == [[D, 0], [0, D], [D, 0]]


@pairs
def test_padding_rows_get_no_gradient(gather, scatter) -> None:
    routing = popular()
    plan = padded_plan(routing, capacity_factor=2.0)
    rows = torch.randn(plan.assignments.shape[0], D, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(scatter(rows, routing, plan).sum(), rows)
    padding = plan.assignments < 0
    assert padding.any()
    assert (grad[padding] == 0).all()
    assert (grad[~padding] != 0).all()


@pairs
def test_token_whose_choices_were_all_dropped_gets_zero(gather, scatter) -> None:
    routing = token_choice(torch.zeros(4, 1).long(), torch.ones(4, 1), torch.zeros(4, 2))
    plan = padded_plan(routing, capacity_factor=1.0)
    y = scatter(torch.full((4, D), 3.0), routing, plan)
    assert y.tolist() == [[3.0] * D] * 2 + [[0.0] * D] * 2


@pytest.mark.usefixtures("poison")
@pairs
def test_everything_dropped(gather, scatter) -> None:
    routing = token_choice(torch.full((4, 2), -1), torch.rand(4, 2, requires_grad=True), torch.zeros(4, 2))
    for plan in (dropless_plan(routing), padded_plan(routing, capacity_factor=1.0)):
        x = torch.randn(4, D, requires_grad=True)
        rows = gather(x, routing, plan)
        assert (rows == 0).all()
        bad = (rows * torch.nan).detach().requires_grad_()
        y = scatter(bad, routing, plan)
        assert (y == 0).all()
        for grad in torch.autograd.grad(rows.sum() + y.sum(), (x, bad, routing.weights)):
            assert (grad == 0).all()


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens(gather, scatter, dtype: torch.dtype) -> None:
    routing = round_robin(torch.zeros(0, 3, requires_grad=True), k=2)
    for plan in (dropless_plan(routing), padded_plan(routing, capacity_factor=1.0)):
        x = torch.zeros(0, D, dtype=dtype, requires_grad=True)
        rows = gather(x, routing, plan)
        assert rows.shape == (plan.assignments.shape[0], D)
        assert (rows == 0).all()
        y = scatter(rows, routing, plan)
        assert y.shape == (0, D)
        assert y.dtype == dtype


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows(gather, scatter, dtype: torch.dtype) -> None:
    routing = round_robin(torch.zeros(3, 2), k=2)
    weights = routing.weights.requires_grad_()
    empty = DispatchPlan(torch.zeros(0, dtype=torch.int64), Groups(torch.zeros(2, dtype=torch.int32), None))
    x = torch.ones(3, D, dtype=dtype, requires_grad=True)
    rows = gather(x, routing, empty)
    assert rows.shape == (0, D)
    y = scatter(rows, routing._replace(weights=weights), empty)
    assert torch.equal(y, torch.zeros(3, D, dtype=dtype))


def test_no_rows_still_leave_gradients_of_zero() -> None:
    routing = round_robin(torch.zeros(3, 2), k=2)
    weights = routing.weights.requires_grad_()
    empty = DispatchPlan(torch.zeros(0, dtype=torch.int64), Groups(torch.zeros(2, dtype=torch.int32), None))
    x = torch.ones(3, D, requires_grad=True)
    y = scatter_rows(gather_rows(x, routing, empty), routing._replace(weights=weights), empty)
    for grad in torch.autograd.grad(y.sum(), (x, weights)):
        assert (grad == 0).all()


def test_padding_reads_different_tokens() -> None:
    """Padding rows that all read token 0 would serialise the backward of the index path on a GPU (contract 3)."""
    from moekit.dispatch.rows import _tokens_of_rows

    routing = token_choice(torch.zeros(8, 1).long(), torch.ones(8, 1), torch.zeros(8, 4))
    tokens, padding = _tokens_of_rows(routing, padded_plan(routing, capacity_factor=4.0))
    assert padding.sum() == 24
    assert tokens[padding].bincount().tolist() == [3] * 8


@pytest.mark.parametrize("shape", [(T + 1, D), (T,), (1, T, D)])
def test_gather_refuses_another_number_of_tokens(shape: tuple[int, ...]) -> None:
    routing = popular()
    with pytest.raises(ValueError, match=r"gather_rows: x has shape .*expected \(13, width\): T, the tokens of the"):
        gather_rows(torch.zeros(shape), routing, dropless_plan(routing))


@pytest.mark.parametrize("shape", [(T * K - 1, D), (T, K, D)])
def test_scatter_refuses_another_number_of_rows(shape: tuple[int, ...]) -> None:
    routing = popular()
    with pytest.raises(ValueError, match=r"scatter_rows: rows has shape .*expected \(39, width\): R, the rows of the"):
        scatter_rows(torch.zeros(shape), routing, dropless_plan(routing))


@pytest.mark.parametrize("dispatcher", [dropless(), padded(capacity_factor=1.0)], ids=["dropless", "padded"])
def test_a_list_without_assignments_leaves_zeros(dispatcher) -> None:
    none, weights = torch.empty(0, dtype=torch.int64), torch.empty(0, requires_grad=True)
    routing = Routing(none, none, weights, num_tokens=3, num_experts=2, pool=0)
    x, plan = torch.ones(3, 4, requires_grad=True), dispatcher.plan(routing)
    y = dispatcher.combine(dispatcher.dispatch(x, routing, plan), routing, plan)
    assert torch.equal(y, torch.zeros(3, 4))
    grads = torch.autograd.grad(y.sum(), (x, weights))
    assert [grad.tolist() for grad in grads] == [[[0.0] * 4] * 3, []]


@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_padding_takes_no_weight_and_gives_none_a_gradient(junk: float) -> None:
    routing = popular()
    routing = routing._replace(**{name: getattr(routing, name).flatten() for name in routing._fields[:3]})  # a list
    plan = padded_plan(routing, capacity_factor=2.0)
    weights = routing.weights.detach().clone()
    weights[:K] = junk  # of token 0
    y = scatter_rows(torch.randn(plan.assignments.shape[0], D).double(), routing._replace(weights=weights), plan)
    assert y.isfinite().all(1).tolist() == [False] + [True] * (T - 1)
    weights = routing.weights.detach().requires_grad_()
    y = scatter_rows(torch.ones(plan.assignments.shape[0], D).double(), routing._replace(weights=weights), plan)
    grad = torch.zeros_like(y)
    grad[T - 1] = junk
    (found,) = torch.autograd.grad(y, weights, grad)
    assert found.isfinite().tolist() == [True] * (K * (T - 1)) + [False] * K


def test_padding_reads_different_weights() -> None:
    routing = popular()
    plan = padded_plan(routing, capacity_factor=8.0)
    weights = routing.weights.detach().requires_grad_()
    found = weights_of_rows(routing._replace(weights=weights), plan)
    reads = found.grad_fn.next_functions[0][0]  # behind the mask
    counts = reads._saved_index.bincount()
    assert counts.max() - counts.min() <= 2, "else the backward adds to one weight, one after the other"
