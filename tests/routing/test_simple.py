from fractions import Fraction

import pytest
import torch
from torch import Tensor

from moekit.dispatch import padded_plan
from moekit.routing.simple import without_simple
from moekit.routing.top_k import top_k

T, E, Z, K = 20, 4, 3, 2


def test_real_experts_keep_theirs_and_the_others_vanish() -> None:
    logits = torch.randn(T, E + Z, requires_grad=True)
    before = top_k(logits, k=K)
    after = without_simple(before, num_experts=E)
    real = before.expert_indices < E
    assert 0 < real.sum() < real.numel()
    assert torch.equal(after.expert_indices, before.expert_indices.where(real, -1))
    assert torch.equal(after.weights, before.weights * real)
    assert torch.equal(after.token_indices, before.token_indices)
    assert (after.num_tokens, after.num_experts) == (T, E)
    grads = [
        torch.autograd.grad((r.weights * real).square().sum(), logits, retain_graph=True)[0] for r in (before, after)
    ]
    assert torch.equal(*grads)


def test_missing_assignments_and_positions_stay() -> None:
    before = top_k(torch.randn(T, E + Z), k=K)
    positions = torch.randperm(T * K).view(T, K)
    before = before._replace(expert_indices=before.expert_indices.where(before.weights > 0.3, -1), positions=positions)
    after = without_simple(before, num_experts=E)
    assert torch.equal(after.expert_indices >= 0, (before.expert_indices >= 0) & (before.expert_indices < E))
    assert after.positions is positions


@pytest.mark.parametrize(("tau", "num_simple"), [(1.0, 3), (0.75, 3), (0.1, 12), (0.75, 0), (1e-6, 3)])
@pytest.mark.parametrize("capacity_factor", [1.0, 1.1, 1.25])
def test_capacity_is_that_of_moe_plus_plus(tau: float, num_simple: int, capacity_factor: float) -> None:
    routing = without_simple(top_k(torch.randn(1000, E + num_simple), k=K), num_experts=E, tau=tau)
    share = Fraction(str(tau)) / (Fraction(str(tau)) * E + num_simple)
    expected = max(1, int(Fraction(str(capacity_factor)) * share * 1000 * K))
    assert padded_plan(routing, capacity_factor=capacity_factor).groups.capacity == expected


def test_without_simple_experts_nothing_changes() -> None:
    before = top_k(torch.randn(T, E), k=K)
    after = without_simple(before, num_experts=E, tau=0.75)
    assert torch.equal(after.expert_indices, before.expert_indices)
    assert torch.equal(after.weights, before.weights)
    assert after.pool == before.pool


def test_no_tokens() -> None:
    after = without_simple(top_k(torch.zeros(0, E + Z), k=K), num_experts=E)
    assert after.weights.shape == (0, K)
    assert after.pool == 0


def test_one_graph() -> None:
    torch._dynamo.reset()
    logits = torch.randn(T, E + Z)

    def plan(logits: Tensor) -> Tensor:
        return padded_plan(without_simple(top_k(logits, k=K), num_experts=E, tau=0.75), capacity_factor=1.1).assignments

    assert torch.equal(torch.compile(plan, fullgraph=True, backend="aot_eager")(logits), plan(logits))


@pytest.mark.parametrize("options", [{"num_experts": 0}, {"num_experts": E + Z + 1}, {"num_experts": E, "tau": 0.0}])
def test_errors_say_what_was_given(options: dict) -> None:
    words = r"without_simple: num_experts = \d+ and tau = .* over 7 experts; expected 1 <= num_experts <= 7 and tau > 0"
    with pytest.raises(ValueError, match=words):
        without_simple(top_k(torch.zeros(T, E + Z), k=K), **options)
