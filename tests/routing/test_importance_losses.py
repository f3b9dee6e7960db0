import math
from functools import partial

import pytest
import torch

from moekit.routing import round_robin, sigmoid, softmax, top_k
from moekit.routing.importance_losses import importance_loss, load_loss
from moekit.routing.scopes import each_sequence
from moekit.types import NoisyLogits, Routing

T, E, K, L = 12, 5, 2, 4


def squared_variation(numbers: list[torch.Tensor]) -> torch.Tensor:
    mean = sum(numbers) / len(numbers)
    return sum((number - mean) ** 2 for number in numbers) / len(numbers) / mean**2


def weights_of(logits: torch.Tensor, routing: Routing, score, t: int, e: int) -> torch.Tensor:
    if score is not None:
        return score(logits)[t, e]
    return sum(w for w, i in zip(routing.weights[t], routing.expert_indices[t].tolist(), strict=True) if i == e)


def noisy_logits(std: float = 0.7) -> NoisyLogits:
    clean = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    spread = (std + torch.rand(T, E, dtype=torch.float64)).requires_grad_()
    return NoisyLogits(clean + torch.randn(T, E, dtype=torch.float64) * spread, clean, spread)


def assert_same_gradients(loss: torch.Tensor, expected: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    grads = torch.autograd.grad(loss, leaves, retain_graph=True)  # both go through the same weights
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves))


def chance(logits: NoisyLogits, t: int, e: int, *, k: int, excluding_self: bool) -> torch.Tensor:
    """Phi of the distance to the K-th largest noisy logit, of the others or of all."""
    rivals = [logits.logits[t, i] for i in range(E) if i != e or not excluding_self]
    threshold = sorted(rivals, key=lambda value: value.item(), reverse=True)[k - 1]
    return (1 + torch.erf((logits.clean[t, e] - threshold) / logits.std[t, e] / math.sqrt(2))) / 2


@pytest.mark.parametrize("kept", [T, 9, 7])
@pytest.mark.parametrize("score", [None, softmax], ids=["weights", "scores"])
def test_importance_and_its_gradient_follow_the_formula(score, kept: int) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    routing, mask = top_k(logits, k=K), torch.arange(T) < kept if kept < T else None
    loss = importance_loss(logits, routing, score=score, token_mask=mask)
    expected = squared_variation([sum(weights_of(logits, routing, score, t, e) for t in range(kept)) for e in range(E)])
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(loss, expected, [logits])


def test_importance_within_sequences_is_the_mean_of_theirs() -> None:
    logits = torch.randn(T, E, dtype=torch.float64)
    routing = top_k(logits, k=K)
    each = [
        squared_variation(
            [sum(weights_of(logits, routing, None, t, e) for t in range(start, start + L)) for e in range(E)]
        )
        for start in range(0, T, L)
    ]
    loss = importance_loss(logits, routing, scope=each_sequence, sequence_length=L)
    torch.testing.assert_close(loss, sum(each) / len(each))


@pytest.mark.parametrize("axes", [1, 3])
def test_importance_takes_a_routing_of_any_shape(axes: int) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    routing = top_k(logits, k=K)
    shape = (-1,) if axes == 1 else (2, 3, -1)
    parts = [part.flatten()[torch.arange(T * K - 1, -1, -1)].view(shape) for part in routing[:3]]
    loss, expected = importance_loss(logits, Routing(*parts, *routing[3:])), importance_loss(logits, routing)
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(loss, expected, [logits])


def test_assignments_that_do_not_exist_weigh_nothing() -> None:
    routing = round_robin(torch.zeros(E, E), k=1)._replace(weights=torch.ones(E, 1))
    gone = routing._replace(expert_indices=torch.tensor([[0], [1], [2], [-1], [-1]]), weights=torch.ones(E, 1))
    assert importance_loss(torch.zeros(E, E), routing).item() == pytest.approx(0)
    assert importance_loss(torch.zeros(E, E), gone).item() == pytest.approx(E / 3 - 1)


@pytest.mark.parametrize("k", [1, 2, 4, 5])
@pytest.mark.parametrize("excluding_self", [True, False])
def test_load_and_its_gradients_follow_the_formula(k: int, excluding_self: bool) -> None:
    logits = noisy_logits()
    loss = load_loss(logits, top_k(logits.logits, k=k), excluding_self=excluding_self)
    if excluding_self and k == E:
        assert loss.item() == 0  # all are chosen, whatever the noise
        return
    chances = partial(chance, logits, k=k, excluding_self=excluding_self)
    expected = squared_variation([sum(chances(t, e) for t in range(T)) for e in range(E)])
    torch.testing.assert_close(loss, expected)
    leaves = [logits.clean, logits.std]
    assert_same_gradients(loss, expected, leaves)


def test_load_leaves_padding_out_whatever_it_holds() -> None:
    logits = noisy_logits()
    kept = NoisyLogits(*(part[:7].detach() for part in logits))
    expected = load_loss(kept, top_k(kept.logits, k=K))
    mask = torch.arange(T) < 7
    for bad in (torch.nan, torch.inf, 0.0):
        spoiled = NoisyLogits(*(part.detach().masked_fill(~mask.unsqueeze(1), bad).requires_grad_() for part in logits))
        loss = load_loss(spoiled, top_k(logits.logits, k=K), token_mask=mask)
        torch.testing.assert_close(loss, expected)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, list(spoiled)))


@pytest.mark.parametrize("excluding_self", [True, False])
def test_load_without_noise_counts_and_has_no_gradient(excluding_self: bool) -> None:
    """``logit_noise(std=0)``: the chance is a step, which is 1/2 where a logit is at its threshold."""
    z = torch.tensor([[3.0, 2.0, 2.0, 1.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]], requires_grad=True)
    std = torch.zeros(2, E, requires_grad=True)
    loss = load_loss(NoisyLogits(z, z, std), top_k(z, k=K), excluding_self=excluding_self)
    steps = [[1, 0.5, 0.5, 0, 0], [1, 1, 0, 0, 0]] if excluding_self else [[1, 0.5, 0.5, 0, 0], [1, 0.5, 0, 0, 0]]
    sums = torch.tensor(steps).sum(0)
    torch.testing.assert_close(loss, sums.var(correction=0) / sums.mean() ** 2)
    for grad in torch.autograd.grad(loss, (z, std)):
        assert (grad == 0).all()


def test_load_without_noise_for_one_token_leaves_the_others_their_gradient() -> None:
    logits = noisy_logits()
    std = logits.std.detach().clone()
    std[0] = 0.0
    std.requires_grad_()
    loss = load_loss(logits._replace(std=std), top_k(logits.logits, k=K))
    for grad in torch.autograd.grad(loss, (logits.clean, std)):
        assert grad.isfinite().all()
        assert (grad[0] == 0).all()
        assert (grad[1:] != 0).any()


def test_load_within_sequences() -> None:
    logits = noisy_logits()
    routing = top_k(logits.logits, k=K)
    each = [
        load_loss(part, top_k(part.logits, k=K))
        for part in map(NoisyLogits._make, zip(*(p.split(L) for p in logits), strict=True))
    ]
    torch.testing.assert_close(load_loss(logits, routing, scope=each_sequence, sequence_length=L), sum(each) / 3)


def test_both_are_zero_at_balance_and_e_less_one_at_collapse() -> None:
    zero = torch.zeros(20, E)
    assert importance_loss(zero, round_robin(zero, k=K)).item() == pytest.approx(0, abs=1e-9)
    one = torch.tensor([50.0, 0, 0, 0, 0]).expand(20, E)
    assert importance_loss(one, top_k(one, k=1)).item() == pytest.approx(E - 1)
    assert load_loss(NoisyLogits(one, one, torch.ones(20, E)), top_k(one, k=1)).item() == pytest.approx(E - 1)
    balanced = 50.0 * torch.eye(E).repeat(4, 1)
    assert load_loss(NoisyLogits(balanced, balanced, torch.ones(20, E)), top_k(balanced, k=1)).item() < 1e-9


@pytest.mark.parametrize("shift", [-60.0, -80.0])
def test_scores_however_small_are_as_uneven(shift) -> None:
    logits = torch.full((64, 4), shift)
    logits[:, 0] += 2
    logits.requires_grad_()
    routing = top_k(logits, k=1)
    loss, exact = (importance_loss(z, routing, score=sigmoid) for z in (logits, logits.double()))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    assert exact.item() > 1
    gradients = (torch.autograd.grad(each, logits)[0] for each in (loss, exact))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("score", [None, softmax])
def test_nothing_has_no_importance_and_no_gradient(score) -> None:
    empty = torch.zeros(0, E, requires_grad=True)
    assert importance_loss(empty, top_k(empty, k=K), score=score).item() == 0
    logits = torch.randn(T, E, requires_grad=True)
    nothing = importance_loss(logits, top_k(logits, k=K), score=score, token_mask=torch.zeros(T, dtype=torch.bool))
    assert nothing.item() == 0
    assert (torch.autograd.grad(nothing, logits)[0] == 0).all()


def test_load_needs_noise_and_choices() -> None:
    logits = noisy_logits()
    routing = top_k(logits.logits, k=K)
    with pytest.raises(ValueError, match=r"plain tensor of shape \(12, 5\); expected NoisyLogits.*Use a noisy gate"):
        load_loss(logits.logits, routing)
    flat = Routing(*(part.flatten() for part in routing[:3]), *routing[3:])
    with pytest.raises(ValueError, match=r"shape \(24,\); expected \(T, K\).*Use importance_loss"):
        load_loss(logits, flat)
