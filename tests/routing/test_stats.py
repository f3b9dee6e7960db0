import math

import pytest
import torch

from moekit.dispatch import dropless_plan, padded_plan
from moekit.routing import mask_tokens, round_robin, routing_stats, top_k
from moekit.routing.top_k import token_choice


def example():
    """Six tokens on four experts: loads 3, 2, 1, 0; at one row each, experts 0 and 1 drop three assignments."""
    experts = torch.tensor([[0], [0], [1], [0], [1], [2]])
    weights = torch.tensor([[0.5], [0.25], [0.5], [0.25], [1.0], [0.5]])
    logits = torch.zeros(6, 4)
    return logits, token_choice(experts, weights, logits)


def test_hand_written_example() -> None:
    logits, routing = example()
    stats = routing_stats(logits, routing, padded_plan(routing, capacity_factor=0.7))
    assert stats.tokens_per_expert.tolist() == [3, 2, 1, 0]
    torch.testing.assert_close(stats.load, torch.tensor([3, 2, 1, 0]) / 6)
    assert stats.max_violation.item() == pytest.approx(3 / 1.5 - 1)
    assert stats.dead_experts.item() == 1
    assert stats.entropy.item() == pytest.approx(math.log(4))
    assert stats.load_entropy.item() == pytest.approx(math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6)
    assert stats.drop_rate.item() == pytest.approx(3 / 6)
    assert stats.mass_lost.item() == pytest.approx((0.25 + 0.25 + 1.0) / 3)


def test_dropless_loses_nothing() -> None:
    logits, routing = example()
    stats = routing_stats(logits, routing, dropless_plan(routing))
    assert stats.drop_rate.item() == 0
    assert stats.mass_lost.item() == pytest.approx(0, abs=1e-6)


def test_one_dropped_assignment_of_many_is_told_exactly() -> None:
    routing = round_robin(torch.zeros(300_000, 4), k=2)
    plan = dropless_plan(routing)
    plan.assignments[0] = -1
    stats = routing_stats(torch.zeros(300_000, 4), routing, plan)
    assert stats.drop_rate.item() == pytest.approx(1 / 600_000, rel=1e-6)  # 1.001 of it by 1 - 599,999 / 600,000


def test_perfect_balance() -> None:
    routing = round_robin(torch.zeros(8, 4), k=2)
    stats = routing_stats(torch.zeros(8, 4), routing, padded_plan(routing, capacity_factor=1.0))
    assert stats.max_violation.item() == pytest.approx(0)
    assert stats.load_entropy.item() == pytest.approx(math.log(4))
    assert stats.dead_experts.item() == 0
    assert stats.drop_rate.item() == 0


def test_decided_tokens_have_no_entropy() -> None:
    logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    routing = top_k(logits, k=1)
    assert routing_stats(logits, routing, dropless_plan(routing)).entropy.item() == pytest.approx(0, abs=1e-6)


def test_masked_tokens_do_not_count() -> None:
    logits = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    mask = torch.tensor([True, True, False])
    routing = mask_tokens(top_k(logits, k=1), mask)
    stats = routing_stats(logits, routing, dropless_plan(routing), token_mask=mask)
    assert stats.tokens_per_expert.sum().item() == 2
    assert stats.entropy.item() == pytest.approx(math.log(2) / 2)
    assert stats.drop_rate.item() == 0  # masked is not dropped


def test_weights_of_missing_assignments_are_no_mass() -> None:
    logits = torch.zeros(2, 2)
    routing = token_choice(torch.tensor([[0, -1], [0, -1]]), torch.tensor([[1.0, 7.0], [1.0, 7.0]]), logits)
    stats = routing_stats(logits, routing, padded_plan(routing, capacity_factor=0.5))
    assert stats.drop_rate.item() == pytest.approx(0.5)
    assert stats.mass_lost.item() == pytest.approx(0.5)


def test_nothing_routed() -> None:
    logits = torch.zeros(3, 2)
    nobody = mask_tokens(top_k(logits, k=1), torch.zeros(3, dtype=torch.bool))
    for z, routing in ((logits, nobody), (torch.zeros(0, 2), top_k(torch.zeros(0, 2), k=1))):
        stats = routing_stats(z, routing, padded_plan(routing, capacity_factor=1.0))
        for name in ("max_violation", "load_entropy", "drop_rate", "mass_lost"):
            assert getattr(stats, name).item() == 0, name
        assert stats.dead_experts.item() == 2
        assert stats.entropy.isfinite()


def test_statistics_carry_no_gradient() -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    routing = top_k(logits, k=2)
    assert not any(value.requires_grad for value in routing_stats(logits, routing, dropless_plan(routing)))


@pytest.mark.parametrize("logit", [1e4, -1e4, -torch.inf])
def test_extreme_logits_give_finite_statistics(logit: float) -> None:
    logits = torch.zeros(4, 3)
    logits[:, 1] = logit
    routing = top_k(logits, k=1)
    stats = routing_stats(logits, routing, dropless_plan(routing))
    assert all(value.isfinite().all() for value in stats)


@pytest.mark.parametrize("seed", range(50))
def test_a_plan_that_drops_nobody_loses_no_mass(seed: int) -> None:
    """Two sums in other orders may differ by a bit, either way."""
    logits = torch.randn(257, 8, generator=torch.Generator().manual_seed(seed))
    routing = top_k(logits, k=2)
    assert 0 <= routing_stats(logits, routing, dropless_plan(routing)).mass_lost < 1e-6
