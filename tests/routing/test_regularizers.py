import math

import pytest
import torch

from moekit.routing import round_robin, sigmoid, token_choice, top_k
from moekit.routing.regularizers import entropy_loss, weighted_l1_loss
from moekit.routing.scopes import each_sequence, each_token
from moekit.segments import tokens_per_expert
from moekit.types import Routing

T, E, K, L = 12, 5, 2, 4


def relu(logits: torch.Tensor) -> Routing:
    experts = torch.arange(E).expand_as(logits).where(logits > 0, -1)
    return token_choice(experts, torch.relu(logits), logits)


def remoe(logits: torch.Tensor, k: float, kept: int) -> torch.Tensor:
    """E / (k T^2) * sum_e c_e sum_t g_te, for g = relu(z)."""
    total = 0
    for e in range(E):
        c = sum(logits[t, e].item() > 0 for t in range(kept))
        total = total + c * sum(logits[t, e] for t in range(kept) if logits[t, e] > 0)
    return E / (k * kept**2) * total


def negative_entropy(logits: torch.Tensor, tokens: range, score) -> torch.Tensor:
    mean = sum(score(logits[t]) / score(logits[t]).sum() for t in tokens) / len(tokens)
    return sum(p * torch.log(p) for p in mean)


@pytest.mark.parametrize("kept", [T, 7])
@pytest.mark.parametrize("k", [1, 2.5])
def test_the_weighted_norm_and_its_gradient_follow_the_formula(k: float, kept: int) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(T) < kept if kept < T else None
    loss, expected = weighted_l1_loss(logits, relu(logits), k=k, token_mask=mask), remoe(logits, k, kept)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_at_balance_the_weighted_norm_is_the_norm(k: int) -> None:
    logits = torch.zeros(20, E)
    routing = round_robin(logits, k=k)._replace(weights=torch.full((20, k), 0.3))
    assert weighted_l1_loss(logits, routing, k=k).item() == pytest.approx(0.3 * k)
    assert weighted_l1_loss(logits, routing, k=2 * k).item() == pytest.approx(0.3 * k / 2)  # half of what is wanted


def test_busy_experts_are_pulled_down_more() -> None:
    logits = torch.full((T, E), -1.0)
    logits[:, 0], logits[:3, 1] = 1.0, 1.0
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(weighted_l1_loss(logits, relu(logits), k=1), logits)
    assert grad[0, 0].item() == pytest.approx(4 * grad[0, 1].item())
    assert (grad[:, 2:] == 0).all()


def test_counts_of_a_larger_batch_replace_those_of_this_one() -> None:
    logits = torch.randn(T, E, dtype=torch.float64)
    routing = relu(logits)
    own = tokens_per_expert(routing.expert_indices, E)
    expected = weighted_l1_loss(logits, routing, k=K)
    parts = logits.split([T - 5, 5])  # each with the counts of the whole, times its share of the tokens
    shares = [len(part) / T for part in parts]
    losses = [
        share * weighted_l1_loss(part, relu(part), k=K, tokens_per_expert=own * share)
        for part, share in zip(parts, shares, strict=True)
    ]
    torch.testing.assert_close(sum(losses), expected)
    assert (weighted_l1_loss(parts[0], relu(parts[0]), k=K) - losses[0] / shares[0]).abs() > 1e-3
    by_choice = torch.stack([tokens_per_expert(column, E) for column in routing.expert_indices.unbind(1)])
    torch.testing.assert_close(weighted_l1_loss(logits, routing, k=K, tokens_per_expert=3 * by_choice), 3 * expected)
    uniform = weighted_l1_loss(logits, routing, k=K, tokens_per_expert=own.sum() / E * torch.ones(E))
    torch.testing.assert_close(uniform, own.sum() / (K * T) * torch.relu(logits).sum() / T)
    assert (uniform - expected).abs() > 1e-3


def test_no_experts_have_no_norm() -> None:
    logits = torch.full((T, E), -1.0, requires_grad=True)
    loss = weighted_l1_loss(logits, relu(logits), k=1)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()
    empty = torch.zeros(0, E)
    assert weighted_l1_loss(empty, top_k(empty, k=1), k=1).item() == 0


def test_the_wanted_number_must_be_positive() -> None:
    logits = torch.zeros(T, E)
    with pytest.raises(ValueError, match=r"weighted_l1_loss: k = 0 experts per token are wanted; expected a positive"):
        weighted_l1_loss(logits, relu(logits), k=0)


@pytest.mark.parametrize("score", [lambda z: torch.softmax(z, -1), sigmoid], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("scope", [None, each_sequence, each_token])
@pytest.mark.parametrize("kept", [T, 7])
def test_entropy_and_its_gradient_follow_the_formula(scope, score, kept: int) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    step = {None: T, each_sequence: L, each_token: 1}[scope]
    pools = [range(start, min(start + step, kept)) for start in range(0, kept, step)]
    expected = sum(len(pool) * negative_entropy(logits, pool, score) for pool in pools) / kept
    given = {} if scope is None else {"scope": scope}
    mask = torch.arange(T) < kept if kept < T else None
    loss = entropy_loss(logits, token_mask=mask, score=score, sequence_length=L, **given)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


def test_entropy_at_balance_at_collapse_and_in_between() -> None:
    assert entropy_loss(torch.zeros(T, E)).item() == pytest.approx(-math.log(E))
    decided = 300.0 * torch.eye(E)  # each token sure, the batch balanced
    assert entropy_loss(decided).item() == pytest.approx(-math.log(E))
    assert entropy_loss(decided, scope=each_token).item() == pytest.approx(0)
    collapsed = torch.tensor([[300.0, 0, 0, 0, 0]]).repeat(T, 1).requires_grad_()
    loss = entropy_loss(collapsed)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, collapsed)[0].isfinite().all()
    assert entropy_loss(torch.zeros(0, E)).item() == 0
