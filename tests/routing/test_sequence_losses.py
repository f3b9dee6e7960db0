from functools import partial

import pytest
import reference
import torch

from moekit.routing import load_balance_loss, round_robin, sigmoid, softmax, top_k
from moekit.routing.scopes import whole_batch
from moekit.routing.sequence_losses import sequence_balance_loss
from moekit.segments import tokens_per_expert

T, E, K, L = 15, 4, 2, 5
loss_of = partial(sequence_balance_loss, sequence_length=L)


def deepseek(logits: torch.Tensor, experts: torch.Tensor, mask: torch.Tensor, score) -> torch.Tensor:
    """Equations 17 to 20 of DeepSeek-V3, sequence by sequence, and the mean over all tokens."""
    total = 0
    for start in range(0, T, L):
        tokens = [t for t in range(start, start + L) if mask[t]]
        if not tokens:
            continue
        loss = 0
        for i in range(E):
            f = E / (K * len(tokens)) * sum(experts[t].tolist().count(i) for t in tokens)
            loss = loss + f * sum(score(logits[t])[i] / score(logits[t]).sum() for t in tokens) / len(tokens)
        total = total + loss * len(tokens)
    return total / mask.sum()


@pytest.mark.parametrize("kept", [15, 13, 8], ids=["no mask", "a short sequence", "an empty sequence"])
@pytest.mark.parametrize(
    ("score", "expected_score"),
    [(softmax, reference.softmax), (sigmoid, reference.sigmoid)],
    ids=["softmax", "sigmoid"],
)
def test_it_follows_deepseeks_equations(kept: int, score, expected_score) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    routing, mask = top_k(logits, k=K, score=score), torch.arange(T) < kept
    loss = loss_of(logits, routing, score=score, token_mask=mask.view(3, 5) if kept < T else None)
    expected = deepseek(logits, routing.expert_indices, mask, expected_score)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_it_is_one_at_balance(k: int) -> None:
    logits = torch.zeros(24, E)
    assert sequence_balance_loss(logits, round_robin(logits, k=k), sequence_length=8).item() == pytest.approx(1)


def test_sequences_that_collapse_each_on_its_own_expert_pay_though_the_batch_is_balanced() -> None:
    logits = 100.0 * torch.eye(E).repeat_interleave(6, 0)
    routing = top_k(logits, k=1)
    assert load_balance_loss(logits, routing).item() == pytest.approx(1)
    assert sequence_balance_loss(logits, routing, sequence_length=6).item() == pytest.approx(E)


def test_one_sequence_is_the_batch() -> None:
    logits = torch.randn(T, E, dtype=torch.float64)
    routing = top_k(logits, k=K)
    expected = load_balance_loss(logits, routing, choices=1, per_token=1)
    torch.testing.assert_close(
        sequence_balance_loss(logits, routing, sequence_length=T, choices=1, per_token=1), expected
    )
    torch.testing.assert_close(loss_of(logits, routing, choices=1, per_token=1, scope=whole_batch), expected)


@pytest.mark.parametrize("kept", [4 * L, 3 * L + 2, 2 * L + 1])
def test_sequences_may_come_in_other_batches(kept: int) -> None:
    """The mean over micro-batches, weighed by their tokens, is the loss of all: nothing is added up beforehand."""
    logits, mask = torch.randn(4 * L, E, dtype=torch.float64), torch.arange(4 * L) < kept
    whole = loss_of(logits, top_k(logits, k=K), token_mask=mask)
    parts = [
        real.sum() / kept * loss_of(part, top_k(part, k=K), token_mask=real)
        for part, real in zip(logits.split(2 * L), mask.split(2 * L), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_counts_from_elsewhere_change_nothing() -> None:
    logits = torch.randn(T, E)
    routing = top_k(logits, k=K)
    counts = tokens_per_expert(routing.expert_indices, E)
    assert loss_of(logits, routing, tokens_per_expert=counts) == loss_of(logits, routing)
    assert loss_of(logits, routing) != load_balance_loss(logits, routing, tokens_per_expert=counts)


def test_it_needs_a_length() -> None:
    logits = torch.zeros(T, E)
    with pytest.raises(ValueError, match="Pass sequence_length= to the loss"):
        sequence_balance_loss(logits, top_k(logits, k=K))
