import math
from functools import partial

import pytest
import reference
import torch

from moekit.routing import load_balance_loss, round_robin, sigmoid, top_k, z_loss
from moekit.routing.regularizers import weighted_l1_loss
from moekit.segments import tokens_per_expert
from moekit.types import NoisyLogits, Routing

T, E, K = 12, 4, 2


def routed(k: int = K, *, score=None) -> tuple[torch.Tensor, Routing]:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    return logits, top_k(logits, k=k) if score is None else top_k(logits, k=k, score=score)


def as_reference(routing: Routing) -> list[reference.Assignment]:
    return [
        reference.Assignment(t, i, e, routing.weights[t, i])
        for t, row in enumerate(routing.expert_indices.tolist())
        for i, e in enumerate(row)
    ]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("score", [partial(torch.softmax, dim=-1), sigmoid], ids=["softmax", "sigmoid"])
def test_balancing_loss_is_one_at_perfect_balance(k: int, score) -> None:
    logits = torch.zeros(T, E)
    assert load_balance_loss(logits, round_robin(logits, k=k), score=score).item() == pytest.approx(1)


def test_balancing_loss_is_one_when_decided_but_balanced() -> None:
    logits = 100.0 * torch.eye(E).repeat(3, 1)
    assert load_balance_loss(logits, top_k(logits, k=1)).item() == pytest.approx(1)


def test_balancing_loss_is_e_at_collapse() -> None:
    logits = torch.tensor([[100.0, 0.0, 0.0, 0.0]]).expand(T, E)
    assert load_balance_loss(logits, top_k(logits, k=1)).item() == pytest.approx(E)


def test_collapse_on_k_experts_is_e_over_k() -> None:
    logits = torch.tensor([[100.0, 100.0, 0.0, 0.0]]).expand(T, E)
    assert load_balance_loss(logits, top_k(logits, k=2)).item() == pytest.approx(E / 2)


@pytest.mark.parametrize("choices", [None, 1, 2])
@pytest.mark.parametrize(
    ("score", "expected_score"),
    [(partial(torch.softmax, dim=-1), reference.softmax), (sigmoid, reference.sigmoid)],
    ids=["softmax", "sigmoid"],
)
def test_balancing_loss_and_its_gradient_follow_the_formula(choices: int | None, score, expected_score) -> None:
    logits, routing = routed(3)
    loss = load_balance_loss(logits, routing, score=score, choices=choices)
    expected = reference.load_balance(logits, as_reference(routing), score=expected_score, choices=choices)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


def test_z_loss_and_its_gradient_follow_the_formula() -> None:
    logits, routing = routed()
    loss, expected = z_loss(logits, routing), reference.z_loss(logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


def test_z_loss_of_zero_logits() -> None:
    assert z_loss(torch.zeros(3, E)).item() == pytest.approx(math.log(E) ** 2)


@pytest.mark.parametrize("loss", [load_balance_loss, z_loss, partial(load_balance_loss, choices=1)])
def test_masked_tokens_count_in_no_loss(loss) -> None:
    logits, routing = routed()
    mask = torch.arange(T) % 3 != 0
    real = top_k(logits[mask], k=K)
    expected = loss(logits[mask], real)
    masked = loss(logits, routing, token_mask=mask.view(3, 4))
    torch.testing.assert_close(masked, expected)
    (grad,) = torch.autograd.grad(masked, logits)
    assert (grad[~mask] == 0).all()
    torch.testing.assert_close(grad[mask], torch.autograd.grad(expected, logits)[0][mask])


@pytest.mark.parametrize("loss", [load_balance_loss, z_loss, partial(load_balance_loss, score=sigmoid)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_masked_tokens_hold_is_of_no_matter(loss, bad: float) -> None:
    logits, routing = routed()
    mask = torch.arange(T) < 7
    expected = loss(logits, routing, token_mask=mask)
    spoiled = logits.detach().masked_fill(~mask.unsqueeze(1), bad).requires_grad_()
    value = loss(spoiled, routing, token_mask=mask)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, spoiled), torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("loss", [load_balance_loss, z_loss])
def test_noise_reaches_no_score(loss) -> None:
    """With a noisy gate the counts are of what was chosen with noise, and the scores are without."""
    logits, _ = routed()
    noisy = NoisyLogits(logits + torch.randn(T, E), logits, torch.ones(T, E))
    routing = top_k(noisy.logits, k=K)
    torch.testing.assert_close(loss(noisy, routing), loss(logits, routing))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("per_token", [1.0, float(K), 3.0])
def test_the_divisor_of_the_counts_may_be_given(per_token: float, missing: bool) -> None:
    """f_e = c_e / (per_token * T), which is no share where choices are missing."""
    logits, routing = routed()
    if missing:
        routing = routing._replace(expert_indices=routing.expert_indices.where(routing.weights > 0.3, -1))
        assert (routing.expert_indices < 0).any()
    counts = tokens_per_expert(routing.expert_indices, E)
    expected = sum(E * counts[e] / (per_token * T) * torch.softmax(logits, -1)[:, e].mean() for e in range(E))
    loss = load_balance_loss(logits, routing, per_token=per_token)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))
    assert ((loss - load_balance_loss(logits, routing)).abs() < 1e-9) == (per_token == K and not missing)


def test_one_assignment_per_token_is_hugging_faces_normalisation() -> None:
    logits = torch.zeros(T, E)
    assert load_balance_loss(logits, round_robin(logits, k=3), per_token=1).item() == pytest.approx(3)


def test_the_divisor_holds_for_counts_from_elsewhere() -> None:
    """Counts of a larger batch come times this call's share of its tokens; here some tokens have no choice at all."""
    logits, routing = routed()
    routing = routing._replace(expert_indices=routing.expert_indices.where(routing.weights > 0.6, -1))
    counts = tokens_per_expert(routing.expert_indices, E)
    whole, sizes = load_balance_loss(logits, routing, per_token=1), [3, 1, 8]
    parts = zip(logits.split(sizes), *(each.split(sizes) for each in routing[1:3]), strict=True)
    total = 0.0
    for part, experts, weights in parts:
        size = len(part)
        tokens = torch.arange(size).unsqueeze(1).expand(size, K)
        own = Routing(tokens, experts, weights, num_tokens=size, num_experts=E, pool=size * K)
        share = size / T
        total = total + share * load_balance_loss(part, own, tokens_per_expert=counts.double() * share, per_token=1)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, logits), torch.autograd.grad(whole, logits))


@pytest.mark.parametrize("loss", [load_balance_loss, z_loss])
def test_nothing_real_gives_zero(loss) -> None:
    logits, routing = routed()
    assert loss(logits, routing, token_mask=torch.zeros(T, dtype=torch.bool)).item() == 0
    empty = torch.zeros(0, E, requires_grad=True)
    value = loss(empty, top_k(empty, k=K))
    assert value.item() == 0
    assert torch.autograd.grad(value, empty)[0].shape == (0, E)


def test_counts_may_come_from_elsewhere() -> None:
    """Two halves with the counts of the whole average to the loss of the whole (global-batch statistics)."""
    logits, routing = routed()
    whole = load_balance_loss(logits, routing)
    counts = tokens_per_expert(routing.expert_indices, E)
    halves = [load_balance_loss(half, top_k(half, k=K), tokens_per_expert=counts) for half in logits.split(T // 2)]
    torch.testing.assert_close(sum(halves) / 2, whole)
    own = [load_balance_loss(half, top_k(half, k=K)) for half in logits.split(T // 2)]
    assert (sum(own) / 2 - whole).abs() > 1e-3


@pytest.mark.parametrize("choices", [None, 1, 2])
def test_counts_from_elsewhere_may_be_by_choice(choices: int | None) -> None:
    """Of (K, E) counts the loss takes the choices that it counts by itself."""
    logits, routing = routed(3)
    by_choice = torch.stack([tokens_per_expert(row, E) for row in routing.expert_indices.unbind(1)])
    assert by_choice.shape == (3, E)
    given = load_balance_loss(logits, routing, tokens_per_expert=by_choice, choices=choices)
    own = load_balance_loss(logits, routing, choices=choices)
    torch.testing.assert_close(given, own)
    torch.testing.assert_close(torch.autograd.grad(given, logits), torch.autograd.grad(own, logits))
    if choices != 1:
        first = load_balance_loss(logits, routing, tokens_per_expert=by_choice, choices=1)
        assert (first - own).abs() > 1e-3


def test_counts_of_the_first_choices_over_several_batches_give_gshards_loss() -> None:
    logits, routing = routed()
    counts = torch.stack([tokens_per_expert(row, E) for row in routing.expert_indices.unbind(1)])
    parts = [
        load_balance_loss(part, top_k(part, k=K), tokens_per_expert=counts, choices=1) for part in logits.split(T // 3)
    ]
    torch.testing.assert_close(sum(parts) / 3, load_balance_loss(logits, routing, choices=1))


def test_counts_carry_no_gradient_and_assignments_that_do_not_exist_do_not_count() -> None:
    logits, routing = routed(1)
    gone = routing._replace(expert_indices=routing.expert_indices.masked_fill(routing.expert_indices == 0, -1))
    loss = load_balance_loss(logits, gone)
    expected = reference.load_balance(logits, [a for a in as_reference(routing) if a.expert != 0])
    torch.testing.assert_close(loss, expected)


def test_sigmoid_scores_that_underflow_give_no_nan() -> None:
    logits = torch.full((T, E), -200.0, requires_grad=True)
    loss = load_balance_loss(logits, round_robin(logits, k=1), score=sigmoid)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_counts_from_elsewhere_are_by_choice_where_choices_are_given() -> None:
    logits, routing = routed()
    by_choice = torch.stack([tokens_per_expert(routing.expert_indices[:, i], E) for i in range(K)])
    for choices in (1, 2):
        loss = load_balance_loss(logits, routing, tokens_per_expert=by_choice, choices=choices)
        torch.testing.assert_close(loss, load_balance_loss(logits, routing, choices=choices))
    with pytest.raises(
        ValueError, match=r"choices = 1 was given with tokens_per_expert of shape \(4,\).*; expected \(K, E\)"
    ):
        load_balance_loss(logits, routing, tokens_per_expert=by_choice.sum(0), choices=1)


def test_choices_need_choices() -> None:
    indices = torch.zeros(5, dtype=torch.int64)
    routing = Routing(indices, indices, torch.ones(5), num_tokens=5, num_experts=E, pool=5)
    with pytest.raises(ValueError, match=r"choices=1 counts first choices.*shape \(5,\), not \(T, K\). Leave choices"):
        load_balance_loss(torch.zeros(5, E), routing, choices=1)


@pytest.mark.parametrize("shape", [(), (1,), (E - 1,), (E + 1,), (K + 1, E), (K, 1), (1, K, E)])
@pytest.mark.parametrize("loss", [load_balance_loss, partial(weighted_l1_loss, k=K)])
def test_counts_of_other_experts_or_choices_are_refused(loss, shape: tuple[int, ...]) -> None:
    """A number alone would be spread over all experts, and a loss without balance train in silence."""
    logits, routing = routed()
    with pytest.raises(ValueError, match=r"tokens_per_expert has shape .*, and the routing .*; expected \(E,\), or"):
        loss(logits, routing, tokens_per_expert=torch.ones(shape))


@pytest.mark.parametrize("choices", [0, -1])
@pytest.mark.parametrize("counted", [False, True])
def test_at_least_one_choice_counts(choices: int, counted: bool) -> None:
    logits, routing = routed()
    counts = {"tokens_per_expert": torch.ones(K, E)} if counted else {}
    with pytest.raises(ValueError, match=rf"choices = {choices} first choices of a token are to count; expected at"):
        load_balance_loss(logits, routing, choices=choices, **counts)


@pytest.mark.parametrize("per_token", [0.0, -1.0, float("nan")])
def test_assignments_that_count_as_one_are_a_positive_number(per_token: float) -> None:
    logits, routing = routed()
    with pytest.raises(ValueError, match=rf"per_token = {per_token} assignments count as one; expected a positive"):
        load_balance_loss(logits, routing, per_token=per_token)
