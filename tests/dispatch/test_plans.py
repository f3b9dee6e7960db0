import pytest
import torch

from moekit.dispatch import (
    by_choice,
    by_position,
    by_weight,
    capacity,
    dropless,
    dropless_plan,
    padded,
    padded_plan,
    without_dropped,
)
from moekit.routing import round_robin
from moekit.routing.top_k import token_choice
from moekit.types import Routing


def choices(experts: list[list[int]], *, num_experts: int, weights: list[list[float]] | None = None) -> Routing:
    indices = torch.tensor(experts)
    values = torch.ones(indices.shape) if weights is None else torch.tensor(weights)
    return token_choice(indices, values, torch.zeros(len(experts), num_experts))


def blocks(routing: Routing, **options) -> list[list[int]]:
    plan = padded_plan(routing, **options)
    return plan.assignments.view(routing.num_experts, plan.groups.capacity).tolist()


@pytest.mark.parametrize(
    ("num_tokens", "k", "num_experts", "factor", "expected"),
    [
        (4096, 2, 8, 1.25, 1280),  # OpenLM's default
        (2048, 1, 64, 1.0, 32),
        (10, 1, 1, 1.1, 11),  # 1.1 * 10 is 11.000000000000002 in floating point, and 0.29 * 100 is 28.999999999999996
        (100, 1, 1, 0.29, 29),
        (1000, 3, 7, 1.1, 471),  # 471.43 truncated
        (7, 2, 4, 1.25, 4),  # 4.375 truncated, not rounded to a multiple of anything
        (4, 1, 8, 1.0, 1),  # less than one row each: still one
        (4, 1, 8, 1e-9, 1),
        (0, 2, 4, 1.25, 1),
        (6, 2, 3, 2, 8),  # an integer factor
        (70, 7, 8, 8 / 7, 70),  # no decimal: rounded to six digits it would be 69
    ],
)
def test_capacity_is_exact(num_tokens: int, k: int, num_experts: int, factor: float, expected: int) -> None:
    routing = token_choice(
        torch.zeros(num_tokens, k).long(), torch.ones(num_tokens, k), torch.zeros(num_tokens, num_experts)
    )
    assert capacity(routing, capacity_factor=factor) == expected


def test_capacity_follows_the_pool_and_not_the_tokens_at_hand() -> None:
    routing = round_robin(torch.zeros(8, 4), k=2)
    assert capacity(routing, capacity_factor=1.0) == 4
    assert capacity(routing._replace(pool=32), capacity_factor=1.0) == 8


@pytest.mark.parametrize("factor", [0, -1.0, float("inf"), float("nan")])
def test_a_bad_capacity_factor_says_what_to_do(factor: float) -> None:
    routing = round_robin(torch.zeros(4, 2), k=1)
    message = rf"capacity_factor = {factor}; expected a positive, finite number.*dropless dispatcher"
    with pytest.raises(ValueError, match=message):
        padded_plan(routing, capacity_factor=factor)


@pytest.mark.parametrize("factor", [2.0**29, 1e30])
def test_more_rows_than_can_be_counted_are_refused(factor: float) -> None:
    routing = round_robin(torch.zeros(4, 2, device="meta"), k=1)  # R = 4 * factor
    message = r"padded_plan: capacity_factor = [\de.+]+ gives 2 experts [\d,]+ rows each; expected fewer than"
    with pytest.raises(ValueError, match=rf"{message} 2,147,483,648 rows .*--moe-capacity-factor 0"):
        padded_plan(routing, capacity_factor=factor)
    assert padded_plan(routing, capacity_factor=2.0**29 - 1).assignments.shape[0] < 2**31


@pytest.mark.parametrize("factor", [-1.0, float("inf"), float("nan")])
def test_padded_checks_its_factor_when_it_is_composed(factor: float) -> None:
    with pytest.raises(ValueError, match=rf"capacity_factor = {factor}; expected a finite number >= 0, where 0 means"):
        padded(capacity_factor=factor)


def test_padded_takes_a_number_and_a_function() -> None:
    with pytest.raises(
        ValueError, match="capacity_factor = None; expected a finite number >= 0, where 0 means dropless"
    ):
        padded(capacity_factor=None)
    for factor in (torch.tensor(1.25), torch.tensor([0.0, 1.0]), "1.25"):
        with pytest.raises(ValueError, match=r"expected a finite number >= 0.*of a tensor take .item\(\)"):
            padded(capacity_factor=factor)
        with pytest.raises(ValueError, match=r"expected a positive, finite number"):
            padded_plan(round_robin(torch.zeros(4, 2), k=1), capacity_factor=factor)
    with pytest.raises(
        ValueError, match=r"padded: priority = 'by_weight'; expected a function.*by_position, by_choice or"
    ):
        padded(capacity_factor=1.0, priority="by_weight")


def test_factor_zero_is_dropless() -> None:
    assert padded(capacity_factor=0) == dropless()


# Five tokens, two choices, three experts; one row in two falls out at factor 0.6: C = trunc(0.6 * 10 / 3) = 2.
EXPERTS = [[0, 1], [1, 0], [0, 2], [0, 1], [1, 0]]
WEIGHTS = [[0.5, 0.1], [0.9, 0.05], [0.6, 0.2], [0.8, 0.7], [0.4, 0.3]]


def test_drop_order_by_position() -> None:
    routing = choices(EXPERTS, num_experts=3)
    # Expert 0 is wanted by assignments 0, 3, 4, 6, 9; expert 1 by 1, 2, 7, 8; expert 2 by 5.
    assert blocks(routing, capacity_factor=0.6) == [[0, 3], [1, 2], [5, -1]]
    assert blocks(routing, capacity_factor=0.6, priority=by_position) == [[0, 3], [1, 2], [5, -1]]


def test_drop_order_by_choice() -> None:
    routing = choices(EXPERTS, num_experts=3)
    # First choices are assignments 0, 2, 4, 6, 8: for expert 0 these are 0, 4, 6, for expert 1 these are 2, 8.
    assert blocks(routing, capacity_factor=0.6, priority=by_choice) == [[0, 4], [2, 8], [5, -1]]


@pytest.mark.parametrize(
    ("priority", "given"),
    [
        (lambda routing: torch.arange(3), r"\(3,\) of torch.int64"),
        (lambda routing: routing.weights.argsort(descending=True), r"\(4, 2\) of torch.int64"),
        (lambda routing: routing.weights.flatten(), r"\(8,\) of torch.float32"),
        (lambda routing: [0, 1], r"\[0, 1\]"),
    ],
)
def test_a_priority_that_is_no_order_of_the_assignments_is_refused(priority, given) -> None:
    routing = choices([[0, 1]] * 4, num_experts=2)
    with pytest.raises(
        ValueError, match=rf"padded_plan: the priority returned {given}; expected \(8,\) of torch.int64"
    ):
        padded_plan(routing, capacity_factor=1.0, priority=priority)


def test_drop_order_by_weight() -> None:
    routing = choices(EXPERTS, num_experts=3, weights=WEIGHTS)
    # Tokens by their largest weight: 1, 3, 2, 0, 4; then first choices in that order, then second ones.
    assert by_weight(routing).tolist() == [2, 6, 4, 0, 8, 3, 7, 5, 1, 9]
    assert blocks(routing, capacity_factor=0.6, priority=by_weight) == [[6, 4], [2, 8], [5, -1]]


def test_by_weight_keeps_the_order_of_equal_tokens() -> None:
    routing = choices([[0], [0], [0]], num_experts=1, weights=[[0.5], [0.7], [0.5]])
    assert by_weight(routing).tolist() == [1, 0, 2]


def test_by_weight_takes_the_largest_weight_of_whichever_choice() -> None:
    """With a selection bias the first choice need not have it."""
    routing = choices([[0, 1], [0, 1]], num_experts=2, weights=[[0.5, 0.4], [0.1, 0.8]])
    assert by_weight(routing).tolist() == [2, 0, 3, 1]


def test_missing_assignments_take_no_place() -> None:
    routing = choices(
        [[-1, 0], [0, -1], [0, 1], [-1, -1]], num_experts=2, weights=[[9.0, 0.1], [0.5, 0], [0.4, 0], [9, 9]]
    )
    assert blocks(routing, capacity_factor=0.5) == [[1, 2], [5, -1]]
    assert blocks(routing, capacity_factor=0.5, priority=by_choice) == [[2, 4], [5, -1]]
    # The weight 9 belongs to assignments that do not exist, and ranks nobody.
    assert blocks(routing, capacity_factor=0.5, priority=by_weight) == [[2, 4], [5, -1]]


def test_by_weight_is_not_swayed_by_assignments_that_do_not_exist() -> None:
    routing = choices([[0, -1], [0, -1]], num_experts=1, weights=[[-0.4, 0.0], [0.5, 0.0]])
    assert by_weight(routing).tolist() == [2, 0, 3, 1]


def test_dropless_keeps_order_within_an_expert_and_puts_missing_ones_last() -> None:
    plan = dropless_plan(choices([[2, 0], [-1, 2], [0, 2]], num_experts=4))
    assert plan.assignments.tolist() == [1, 4, 0, 3, 5, -1]
    assert plan.groups.sizes.tolist() == [2, 0, 3, 0]
    assert plan.groups.sizes.dtype == torch.int32
    assert plan.groups.capacity is None


def test_padded_has_as_many_rows_as_experts_times_capacity() -> None:
    plan = padded_plan(choices(EXPERTS, num_experts=3), capacity_factor=3.0)
    assert plan.groups.sizes.tolist() == [10, 10, 10]
    assert plan.groups.capacity == 10
    assert plan.assignments.shape == (30,)
    assert sorted(plan.assignments[plan.assignments >= 0].tolist()) == list(range(10))


def test_no_tokens() -> None:
    routing = round_robin(torch.zeros(0, 3), k=2)
    assert dropless_plan(routing).assignments.shape == (0,)
    assert dropless_plan(routing).groups.sizes.tolist() == [0, 0, 0]
    assert padded_plan(routing, capacity_factor=1.0).assignments.tolist() == [-1, -1, -1]


def test_more_experts_than_int16_can_number() -> None:
    experts = torch.tensor([[40_000], [3], [32_768], [40_000]])
    plan = dropless_plan(token_choice(experts, torch.ones(4, 1), torch.zeros(1, 50_000).expand(4, -1)))
    assert plan.assignments.tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("priority", [by_choice, by_weight])
@pytest.mark.parametrize("shape", [(6,), (1, 2, 3)])
def test_orders_of_choices_refuse_other_routings(priority, shape: tuple[int, ...]) -> None:
    indices = torch.zeros(shape, dtype=torch.int64)
    routing = Routing(indices, indices, torch.ones(shape), num_tokens=6, num_experts=2, pool=6)
    with pytest.raises(ValueError, match=rf"{priority.__name__} orders the choices.*not \(T, K\). Use by_position"):
        padded_plan(routing, capacity_factor=1.0, priority=priority)


def test_plans_leave_the_routing_and_its_gradient_alone() -> None:
    routing = choices(EXPERTS, num_experts=3, weights=WEIGHTS)
    routing = routing._replace(weights=routing.weights.requires_grad_())
    before = [field.clone() for field in routing[:3]]
    for plan in (dropless_plan(routing), padded_plan(routing, capacity_factor=0.6, priority=by_weight)):
        assert not plan.assignments.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, routing[:3], strict=True))


def test_what_a_plan_drops_does_not_exist_without_it() -> None:
    routing = choices([[0, 1], [0, -1], [0, 1], [2, 0]], num_experts=3, weights=[[4, 3], [2, 0], [1, 5], [6, 7]])
    kept = without_dropped(routing, padded_plan(routing, capacity_factor=0.75))  # two rows each
    assert kept.expert_indices.tolist() == [[0, 1], [0, -1], [-1, 1], [2, -1]]
    assert kept.weights.tolist() == [[4, 3], [2, 0], [0, 5], [6, 0]]
    assert kept._replace(expert_indices=routing.expert_indices, weights=routing.weights) == routing
    flat = routing._replace(
        token_indices=routing.token_indices.flatten(),
        expert_indices=routing.expert_indices.flatten(),
        weights=routing.weights.flatten(),
    )
    of_list = without_dropped(flat, padded_plan(flat, capacity_factor=0.75))
    assert of_list.expert_indices.tolist() == kept.expert_indices.flatten().tolist()
    whole = without_dropped(routing, dropless_plan(routing))
    assert whole.expert_indices.equal(routing.expert_indices)
    assert whole.weights.equal(routing.weights)
    none = routing._replace(expert_indices=torch.empty(0, 2, dtype=torch.int64), weights=torch.empty(0, 2))
    none = none._replace(token_indices=none.expert_indices, num_tokens=0)
    assert without_dropped(none, padded_plan(none, capacity_factor=1.0)).expert_indices.shape == (0, 2)
