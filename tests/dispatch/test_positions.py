"""A routing whose rows are out of order, and that says so, is planned like the one whose rows are in order."""

import pytest
import torch

from moekit.dispatch import by_choice, by_position, by_weight, dropless_plan, padded_plan
from moekit.routing.top_k import token_choice
from moekit.types import Routing

T, K, E = 20, 3, 6
PRIORITIES = {"position": by_position, "choice": by_choice, "weight": by_weight}
every_priority = pytest.mark.parametrize("priority", PRIORITIES.values(), ids=PRIORITIES)


def in_order(seed: int) -> Routing:
    """Route with ties between weights, popular experts, and choices that do not exist."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator) + torch.linspace(2, 0, E)
    experts = logits.argsort(-1, descending=True)[:, :K]
    missing = torch.rand(T, K, generator=generator) < 0.2
    weights = torch.randint(1, 4, (T, K), generator=generator).float().sort(-1, descending=True).values
    return token_choice(experts.masked_fill(missing, -1), weights, logits)


def shuffled(routing: Routing, order: torch.Tensor) -> Routing:
    """Put the rows in another order, and say where each was."""
    places = torch.arange(T * K).view(T, K)
    return routing._replace(
        expert_indices=routing.expert_indices[order], weights=routing.weights[order], positions=places[order]
    )


def assignments_in_order(assignments: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Name assignments by their place."""
    places = torch.cat([routing.positions.flatten(), torch.tensor([-1])])
    return places[assignments]


@every_priority
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("factor", [0.2, 0.7, 1.5])
def test_positions_stand_for_the_order_of_rows(priority, seed, factor):
    plain = in_order(seed)
    mixed = shuffled(plain, torch.randperm(T, generator=torch.Generator().manual_seed(seed + 50)))
    expected = padded_plan(plain, capacity_factor=factor, priority=priority)
    found = padded_plan(mixed, capacity_factor=factor, priority=priority)
    assert torch.equal(assignments_in_order(found.assignments, mixed), expected.assignments)
    assert found.groups.capacity == expected.groups.capacity
    assert torch.equal(found.groups.sizes, expected.groups.sizes)


@every_priority
def test_without_positions_the_same_rows_drop_others(priority):
    """The test above can fail."""
    plain = in_order(0)
    mixed = shuffled(plain, torch.arange(T).flip(0))
    expected = padded_plan(plain, capacity_factor=0.2, priority=priority)
    found = padded_plan(mixed._replace(positions=None), capacity_factor=0.2, priority=priority)
    assert not torch.equal(assignments_in_order(found.assignments, mixed), expected.assignments)


@every_priority
@pytest.mark.parametrize("seed", range(4))
def test_the_priority_itself_is_the_same(priority, seed):
    plain = in_order(seed)
    mixed = shuffled(plain, torch.randperm(T, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(assignments_in_order(priority(mixed), mixed), priority(plain))


@every_priority
def test_only_the_order_of_positions_counts(priority):
    """Ranks leave gaps: their positions are those among the assignments of all."""
    mixed = shuffled(in_order(1), torch.randperm(T))
    spread = mixed._replace(positions=mixed.positions * 7 + 2**41)
    assert torch.equal(priority(mixed), priority(spread))


@every_priority
def test_positions_in_order_change_nothing(priority):
    plain = in_order(2)
    assert torch.equal(priority(plain), priority(shuffled(plain, torch.arange(T))))


def test_a_list_has_positions_too():
    places = torch.tensor([5, 0, 3, 1])
    ones = torch.ones(4)
    routing = Routing(torch.arange(4), torch.zeros(4).long(), ones, 4, num_experts=1, pool=4, positions=places)
    assert by_position(routing).tolist() == [1, 3, 2, 0]
    assert padded_plan(routing, capacity_factor=0.5).assignments.tolist() == [1, 3]


def test_where_nothing_is_dropped_rows_stay_in_the_order_of_the_list():
    plain = in_order(3)
    mixed = shuffled(plain, torch.randperm(T))
    assert torch.equal(dropless_plan(mixed).assignments, dropless_plan(mixed._replace(positions=None)).assignments)


def test_no_tokens():
    empty = torch.zeros(0, K, dtype=torch.int64)
    routing = Routing(empty, empty, torch.zeros(0, K), 0, num_experts=E, pool=0, positions=empty)
    for priority in PRIORITIES.values():
        assert priority(routing).shape == (0,)
