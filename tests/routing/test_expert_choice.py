import math
import operator
from functools import partial

import pytest
import torch
from torch import Tensor

from moekit.dispatch import dropless
from moekit.experts import loop
from moekit.routing import mask_tokens, sigmoid, softmax, softmax_over_tokens
from moekit.routing.expert_choice import divide_up, expert_capacity, expert_choice
from moekit.segments import tokens_per_expert
from moekit.types import NoisyLogits, Routing

T, E, L = 12, 5, 4


def reference(logits: Tensor, count: int, *, length: int, real: list[bool] | None = None, normalize=False) -> Tensor:
    """Dense weights (T, E), one expert and one pool at a time."""
    weights = [[logits.new_zeros(()) for _ in range(logits.shape[1])] for _ in range(logits.shape[0])]
    for first in range(0, logits.shape[0], length):
        tokens = [t for t in range(first, first + length) if real is None or real[t]]
        for e in range(logits.shape[1]):
            score = {t: torch.exp(logits[t, e]) / torch.exp(logits[t]).sum() for t in tokens}
            best = sorted(tokens, key=lambda t: -score[t].item())[:count]
            total = sum(score[t] for t in best) if normalize else 1.0
            for t in best:
                weights[t][e] = score[t] / total
    return torch.stack([torch.stack(row) for row in weights])


def dense(routing: Routing) -> Tensor:
    weights = routing.weights.new_zeros(routing.num_tokens, routing.num_experts + 1)
    index = (routing.token_indices.flatten(), routing.expert_indices.flatten())
    return weights.index_put(index, routing.weights.flatten(), accumulate=True)[:, :-1]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("length", "factor", "count"), [(None, 2, 4), (4, 2.5, 2), (3, 0.1, 1), (12, 5, 12), (1, 1, 1)]
)
def test_every_expert_takes_its_best_tokens(normalize: bool, length: int | None, factor: float, count: int) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    routing = expert_choice(logits, capacity_factor=factor, sequence_length=length, normalize=normalize)
    pools = T // (length or T)
    assert routing.expert_indices.shape == routing.token_indices.shape == routing.weights.shape == (pools, E, count)
    assert (routing.num_tokens, routing.num_experts, routing.pool) == (T, E, pools * E * count)
    assert routing.expert_indices.dtype == routing.token_indices.dtype == torch.int64
    assert (routing.weights.diff(dim=-1) <= 0).all()
    actual, expected = dense(routing), reference(logits, count, length=length or T, normalize=normalize)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    cotangent = torch.randn(T, E, dtype=torch.float64)
    grads = [torch.autograd.grad((y * cotangent).sum(), logits)[0] for y in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_hand_written_values() -> None:
    logits = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]]).log()
    routing = expert_choice(logits, capacity_factor=1.5)
    assert routing.token_indices.tolist() == [[[0, 1], [2, 1]]]
    torch.testing.assert_close(routing.weights, torch.tensor([[[0.8, 0.6], [0.9, 0.4]]]))
    normal = expert_choice(logits, capacity_factor=1.5, normalize=True).weights
    torch.testing.assert_close(normal, torch.tensor([[[8 / 14, 6 / 14], [9 / 13, 4 / 13]]]))


def test_load_is_even() -> None:
    routing = expert_choice(torch.randn(T, E) + torch.arange(E), capacity_factor=2, sequence_length=L)
    assert tokens_per_expert(routing.expert_indices, E).tolist() == [3] * E  # floor(4 * 2 / 5) = 1 of each of 3


@pytest.mark.parametrize("length", [None, L])
def test_taking_every_token_equals_the_dense_mixture(length: int | None) -> None:
    logits = torch.randn(T, E, dtype=torch.float64)
    routing = expert_choice(logits, capacity_factor=E, sequence_length=length)
    assert routing.weights.shape[-1] == (length or T)
    torch.testing.assert_close(dense(routing), softmax(logits), rtol=0, atol=0)
    x, w, move = torch.randn(T, 3, dtype=torch.float64), torch.randn(E, 3, 2, dtype=torch.float64), dropless()
    plan = move.plan(routing)
    rows = loop(move.dispatch(x, routing, plan), plan.groups, w)
    expected = torch.einsum("te,td,edf->tf", softmax(logits), x, w)
    torch.testing.assert_close(move.combine(rows, routing, plan), expected, rtol=1e-12, atol=1e-14)


def test_sequences_do_not_see_each_other_and_batches_do() -> None:
    logits = torch.randn(T, E)
    changed = torch.cat([logits[:L], torch.randn(T - L, E)])
    for length, same in ((L, True), (None, False)):
        first, second = (dense(expert_choice(z, capacity_factor=2, sequence_length=length)) for z in (logits, changed))
        assert torch.equal(first[:L], second[:L]) == same


@pytest.mark.parametrize("length", [None, 6])
def test_padding_changes_nothing(length: int | None) -> None:
    """Padding with NaN in it, in every pool, against the real tokens alone: weights and gradients."""
    real = torch.tensor([True, True, False, True, True, False] * 2)
    logits = torch.randn(T, E, dtype=torch.float64)
    spoiled = logits.masked_fill(~real.unsqueeze(1), torch.nan).requires_grad_()
    alone = logits[real].requires_grad_()
    padded = expert_choice(spoiled, capacity_factor=2, sequence_length=length, token_mask=real.view(2, 6))
    plain = expert_choice(alone, capacity_factor=2, sequence_length=length and 4)
    assert padded.weights.shape[-1] > plain.weights.shape[-1]
    assert torch.equal(tokens_per_expert(padded.expert_indices, E), tokens_per_expert(plain.expert_indices, E))
    assert torch.equal(dense(padded)[real], dense(plain))
    assert (dense(padded)[~real] == 0).all()
    cotangent = torch.randn(T, E, dtype=torch.float64)
    (padded_grad,) = torch.autograd.grad((dense(padded) * cotangent).sum(), spoiled)
    (plain_grad,) = torch.autograd.grad((dense(plain) * cotangent[real]).sum(), alone)
    torch.testing.assert_close(padded_grad[real], plain_grad)
    assert (padded_grad[~real] == 0).all()


def over_tokens(logits: Tensor, count: int, real: Tensor) -> Tensor:
    """Weigh by the softmax over the best tokens of each expert, as pytorch-mixtures, in one pool: (T, E)."""
    z = logits.masked_fill(~real.unsqueeze(1), -torch.inf).T
    values, tokens = torch.topk(z, count)
    return torch.zeros_like(z).scatter(1, tokens, values.softmax(-1)).T


@pytest.mark.parametrize("length", [None, 6])
@pytest.mark.parametrize("padded", [False, True])
def test_a_softmax_over_the_chosen_tokens(length: int | None, padded: bool) -> None:
    """In pools whose logits lie far apart, too, and whatever padding holds: weights and gradients."""
    real = torch.tensor([True, True, False, True, True, True] * 2) if padded else torch.ones(T, dtype=torch.bool)
    logits = torch.randn(T, E) + torch.tensor([0.0, -300.0]).repeat_interleave(6).unsqueeze(1)
    leaf = logits.masked_fill(~real.unsqueeze(1), torch.nan).requires_grad_()
    options = {"capacity_factor": 3, "sequence_length": length, "token_mask": real if padded else None}
    routing = expert_choice(leaf, score=softmax_over_tokens, normalize=True, **options)
    size, plain = length or T, logits.clone().requires_grad_()
    parts = zip(plain.split(size), real.split(size), strict=True)
    expected = torch.cat([over_tokens(z, int(some.sum() * 3 // E), some) for z, some in parts])
    torch.testing.assert_close(dense(routing), expected)
    cotangent = torch.randn(T, E)
    grads = [torch.autograd.grad((y * cotangent).sum(), z)[0] for y, z in ((dense(routing), leaf), (expected, plain))]
    torch.testing.assert_close(*grads)
    # Without normalize: an expert's shares of all real tokens of the pool.
    for score in (softmax_over_tokens, partial(softmax_over_tokens)):
        shares = expert_choice(leaf, score=score, **{**options, "capacity_factor": E})
        torch.testing.assert_close(dense(shares).sum(0), torch.full((E,), T / size))


def test_a_pool_of_padding_has_no_shares() -> None:
    logits, mask = torch.randn(T, E, requires_grad=True), torch.arange(T) < 6
    routing = expert_choice(
        logits, capacity_factor=2, score=softmax_over_tokens, normalize=True, sequence_length=6, token_mask=mask
    )
    assert (routing.weights[1] == 0).all()
    grad = torch.autograd.grad(routing.weights.square().sum(), logits)[0]
    assert grad.isfinite().all()
    assert (grad[6:] == 0).all()


def test_masking_afterwards_takes_padding_out_but_it_has_counted() -> None:
    logits = torch.zeros(4, 1)
    mask = torch.tensor([False, False, True, True])
    logits[:2] = 5.0
    routing = mask_tokens(expert_choice(logits, capacity_factor=0.5, score=sigmoid), mask)
    assert routing.expert_indices.tolist() == [[[-1, -1]]]
    routing = expert_choice(logits, capacity_factor=0.5, score=sigmoid, token_mask=mask)
    assert sorted(routing.token_indices[routing.expert_indices >= 0].tolist()) == [2]


def test_nothing_real_takes_nothing() -> None:
    logits = torch.randn(T, E, requires_grad=True)
    routing = expert_choice(logits, capacity_factor=2, token_mask=torch.zeros(T, dtype=torch.bool), normalize=True)
    assert (routing.expert_indices == -1).all()
    assert (routing.weights == 0).all()
    assert (torch.autograd.grad(routing.weights.sum(), logits)[0] == 0).all()


@pytest.mark.parametrize("length", [None, L])
def test_no_tokens(length: int | None) -> None:
    routing = expert_choice(torch.zeros(0, E), capacity_factor=2, sequence_length=length)
    assert routing.weights.numel() == routing.pool == 0
    assert routing.expert_indices.ndim == 3


def test_bias_changes_nothing_and_noise_decides() -> None:
    logits, noise = torch.randn(T, E), torch.randn(T, E)
    plain, biased = (expert_choice(logits, capacity_factor=1, bias=b) for b in (None, torch.randn(E) * 9))
    assert torch.equal(plain.token_indices, biased.token_indices)
    noisy = expert_choice(NoisyLogits(logits + noise, logits, torch.ones(T, E)), capacity_factor=1)
    assert torch.equal(noisy.weights, expert_choice(logits + noise, capacity_factor=1).weights)


@pytest.mark.parametrize("tokens", [0, 1, 7, 10, 100])
@pytest.mark.parametrize(("factor", "experts"), [(1.1, 1), (2, 8), (0.3, 7), (64, 8)])
@pytest.mark.parametrize(("division", "rounded"), [(operator.floordiv, math.floor), (divide_up, math.ceil)])
@pytest.mark.parametrize("multiple", [1, 4])
def test_capacity_of_numbers_and_tensors(tokens, factor, experts, division, rounded, multiple) -> None:
    share = rounded(round(tokens * factor / experts, 9))
    expected = min(tokens, max(1, math.ceil(share / multiple) * multiple))
    options = {"capacity_factor": factor, "division": division, "multiple_of": multiple}
    assert expert_capacity(tokens, experts, **options) == expected
    assert expert_capacity(torch.tensor([tokens, 0]), experts, **options).tolist() == [expected, 0]


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite(extreme: float) -> None:
    logits = torch.randn(T, E)
    logits[:, 1] = extreme
    logits[3] = extreme
    logits.requires_grad_()
    weights = expert_choice(logits, capacity_factor=1, normalize=True).weights
    assert weights.isfinite().all()
    assert torch.autograd.grad((weights * torch.randn_like(weights)).sum(), logits)[0].isfinite().all()


def test_ties_are_repeatable_and_autocast_changes_nothing() -> None:
    logits = torch.zeros(T, E)
    first = expert_choice(logits, capacity_factor=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = expert_choice(logits, capacity_factor=2)
    assert second.weights.dtype == torch.float32
    for a, b in zip(first[:3], second[:3], strict=True):
        assert torch.equal(a, b)
    assert all(len(set(row)) == len(row) for row in first.token_indices[0].tolist())


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    route = partial(
        expert_choice, capacity_factor=2, sequence_length=L, division=divide_up, multiple_of=2, normalize=True
    )
    logits, mask = torch.randn(T, E, requires_grad=True), torch.arange(T) % 5 != 1
    expected = route(logits, token_mask=mask)
    actual = torch.compile(route, fullgraph=True, backend="aot_eager")(logits, token_mask=mask)
    for a, b in zip(actual[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(r.weights.square().sum(), logits)[0] for r in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.slow
def test_generated_code_computes_the_same_gradient() -> None:
    """At eight experts, Inductor's vectors on the CPU: its gradient of a gather from a transposed softmax is wrong."""
    torch._dynamo.reset()
    route = partial(expert_choice, capacity_factor=2)
    logits = torch.randn(64, 8, requires_grad=True)
    grads = []
    for run in (route, torch.compile(route, fullgraph=True)):
        grads += torch.autograd.grad(run(logits).weights.square().sum(), logits)
    torch.testing.assert_close(*grads)


def test_errors_say_what_was_given() -> None:
    logits = torch.zeros(T, E)
    with pytest.raises(ValueError, match="capacity_factor = 0 and multiple_of = 1; expected a positive, finite factor"):
        expert_choice(logits, capacity_factor=0)
    with pytest.raises(ValueError, match=r"capacity_factor = 1 and multiple_of = 0; expected .* a positive multiple"):
        expert_choice(logits, capacity_factor=1, multiple_of=0)
    with pytest.raises(
        ValueError, match=r"T = 12 tokens cannot be split into .* sequence_length = 5; expected .*divisor"
    ):
        expert_choice(logits, capacity_factor=1, sequence_length=5)
    with pytest.raises(ValueError, match=r"token_mask has 3 elements \(shape \(3,\)\); expected one per token, 12"):
        expert_choice(logits, capacity_factor=1, token_mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"logits have shape \(2, 3, 4\); expected \(T, E\).*Flatten"):
        expert_choice(torch.zeros(2, 3, 4), capacity_factor=1)
