from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moekit.routing import sigmoid, softmax, top_k
from moekit.routing.sinkhorn import sinkhorn, sinkhorn_scales
from moekit.segments import tokens_per_expert
from moekit.types import NoisyLogits

T, E, K = 24, 5, 2


def reference(logits: Tensor, *, tolerance: float = 1e-4, limit: int = 1000) -> tuple[Tensor, Tensor, int]:
    """The loop as it is published, which reads the error at each step: balanced scores, d1 and the steps."""
    cost = torch.exp(logits)
    d1, steps = torch.ones_like(cost[0]), 0
    while True:
        d0 = 1 / (cost.shape[0] * ((d1 * cost).sum(1) + 1e-8))
        new = 1 / (cost.shape[1] * ((d0.unsqueeze(1) * cost).sum(0) + 1e-8))
        error, d1, steps = (new - d1).abs().mean().item(), new, steps + 1
        if error <= tolerance or steps == limit:
            return d1 * cost * d0.unsqueeze(1), d1, steps


def drawn(spread: float, *, tilt: float = 0.0) -> Tensor:
    return torch.randn(T, E, dtype=torch.float64) * spread + torch.linspace(0, tilt, E, dtype=torch.float64)


@pytest.mark.parametrize(("spread", "tilt"), [(0.1, 0), (1, 0), (1, 3), (2, 1)])
def test_scales_stand_still_where_the_loop_ends(spread: float, tilt: float) -> None:
    logits = drawn(spread, tilt=tilt)
    _, expected, steps = reference(logits)
    assert 1 < steps < 30
    # Where the loop stops matters: one step less or more is another number.
    for wrong in (steps - 1, steps + 1):
        fixed = sinkhorn_scales(logits, num_iterations=wrong, tolerance=0)
        assert (fixed - expected).abs().max() > 1e-9
    for enough in (steps, 30, 100):
        # Not closer, as the 1e-8 of the formula is here relative to a token's largest exponential.
        torch.testing.assert_close(sinkhorn_scales(logits, num_iterations=enough), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        sinkhorn_scales(logits, num_iterations=steps, tolerance=0), sinkhorn_scales(logits), rtol=0, atol=0
    )


@pytest.mark.parametrize("k", [1, K, E])
def test_choice_and_weights_follow_the_formula(k: int) -> None:
    logits = drawn(1, tilt=2).requires_grad_()
    routing = sinkhorn(logits, k=k)
    balanced, _, _ = reference(logits.detach())
    expected = [sorted(range(E), key=lambda e: -row[e])[:k] for row in balanced.tolist()]
    assert routing.expert_indices.tolist() == expected
    score = sigmoid if k == 1 else softmax
    weights = score(logits).gather(1, torch.tensor(expected))
    torch.testing.assert_close(routing.weights, weights)
    cotangent = torch.randn(T, k, dtype=torch.float64)
    grads = [torch.autograd.grad((w * cotangent).sum(), logits)[0] for w in (routing.weights, weights)]
    torch.testing.assert_close(*grads)


def test_score_may_be_chosen() -> None:
    logits = drawn(1)
    assert torch.equal(
        sinkhorn(logits, k=2, score=sigmoid).weights.detach(),
        sigmoid(logits).gather(1, sinkhorn(logits, k=2).expert_indices),
    )


def test_balanced_scores_have_even_sums() -> None:
    logits = drawn(1, tilt=3)
    scales = sinkhorn_scales(logits, num_iterations=200, tolerance=0)
    balanced = softmax(logits + scales.log()) / T  # every row sums to 1 / T
    torch.testing.assert_close(balanced.sum(0), torch.full((E,), 1 / E, dtype=torch.float64), rtol=1e-5, atol=0)


def test_load_is_more_even_than_the_greedy_choice() -> None:
    logits = torch.randn(512, 8) + torch.linspace(0, 3, 8)

    def violation(balanced: bool) -> float:
        load = tokens_per_expert(sinkhorn(logits, k=1, balanced=balanced).expert_indices, 8)
        return load.max().item() / 64 - 1

    assert violation(balanced=False) > 2
    assert violation(balanced=True) < 0.35


@pytest.mark.parametrize("k", [1, K])
def test_at_evaluation_it_is_plain_top_k(k: int) -> None:
    logits = torch.randn(T, E)
    greedy, plain = sinkhorn(logits, k=k, balanced=False), top_k(logits, k=k, score=sigmoid if k == 1 else softmax)
    assert torch.equal(greedy.expert_indices, plain.expert_indices)
    assert torch.equal(greedy.weights, plain.weights)


def test_every_expert_equals_the_dense_mixture() -> None:
    logits = drawn(1)
    routing = sinkhorn(logits, k=E)
    dense = torch.zeros_like(logits).scatter(1, routing.expert_indices, routing.weights)
    assert torch.equal(dense, softmax(logits))


def test_a_later_token_matters_when_balanced_alone() -> None:
    logits = torch.randn(T, E)
    changed = logits.clone()
    changed[T // 2 :] = torch.tensor([8.0, 0, 0, 0, 0])
    for balanced in (True, False):
        first, second = (sinkhorn(z, k=1, balanced=balanced).expert_indices[: T // 2] for z in (logits, changed))
        assert torch.equal(first, second) == (not balanced)


def test_padding_changes_nothing() -> None:
    logits = drawn(1, tilt=1)
    real = torch.arange(T) % 3 != 0
    spoiled = logits.masked_fill(~real.unsqueeze(1), torch.nan)
    torch.testing.assert_close(sinkhorn_scales(spoiled, token_mask=real.view(4, 6)), sinkhorn_scales(logits[real]))
    masked = sinkhorn(logits, k=K, token_mask=real)
    assert torch.equal(masked.expert_indices[real], sinkhorn(logits[real], k=K).expert_indices)


def test_nothing_real_leaves_the_scales_at_one() -> None:
    assert sinkhorn_scales(drawn(1), token_mask=torch.zeros(T, dtype=torch.bool)).tolist() == [1.0] * E
    assert sinkhorn_scales(torch.zeros(0, E)).tolist() == [1.0] * E
    assert sinkhorn(torch.zeros(0, E), k=K).weights.shape == (0, K)
    assert (sinkhorn(torch.randn(3, 1), k=1).expert_indices == 0).all()


def test_bias_shifts_the_selection_and_noise_decides() -> None:
    logits, noise = torch.randn(T, E), torch.randn(T, E)
    routing = sinkhorn(logits, k=2, bias=torch.tensor([0.0, 0, 0, 0, 99]))
    assert (routing.expert_indices[:, 0] == 4).all()
    assert torch.equal(routing.weights, softmax(logits).gather(1, routing.expert_indices))
    noisy = sinkhorn(NoisyLogits(logits + noise, logits, torch.ones(T, E)), k=2)
    assert torch.equal(noisy.expert_indices, sinkhorn(logits + noise, k=2).expert_indices)


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite(extreme: float) -> None:
    logits = torch.randn(T, E)
    logits[:, 1] = extreme
    logits[3] = extreme
    logits.requires_grad_()
    assert sinkhorn_scales(logits.detach()).isfinite().all()
    routing = sinkhorn(logits, k=K)
    assert routing.weights.isfinite().all()
    assert torch.autograd.grad((routing.weights * torch.randn(T, K)).sum(), logits)[0].isfinite().all()


def test_a_shift_of_a_token_changes_nothing() -> None:
    logits = drawn(1)
    shifts = torch.linspace(-500, 500, T, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(sinkhorn_scales(logits + shifts), sinkhorn_scales(logits))


def test_scales_of_many_tokens_are_exact() -> None:
    logits = torch.randn(1_000_003, 2, generator=torch.Generator().manual_seed(0))
    scales, expected = (sinkhorn_scales(z, num_iterations=2, tolerance=0.0) for z in (logits, logits.double()))
    torch.testing.assert_close(scales.double(), expected, rtol=3e-6, atol=0.0)


def test_autocast_and_repetition_change_nothing() -> None:
    logits = torch.randn(T, E)
    expected, scales = sinkhorn(logits, k=K), sinkhorn_scales(logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = sinkhorn(logits, k=K)
        assert torch.equal(sinkhorn_scales(logits), scales)
    assert actual.weights.dtype == scales.dtype == torch.float32
    assert torch.equal(actual.expert_indices, expected.expert_indices)
    assert torch.equal(actual.weights, expected.weights)


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    route = partial(sinkhorn, k=K, num_iterations=8)
    logits, mask = torch.randn(T, E, requires_grad=True), torch.arange(T) % 5 != 1
    expected = route(logits, token_mask=mask)
    actual = torch.compile(route, fullgraph=True, backend="aot_eager")(logits, token_mask=mask)
    for a, b in zip(actual[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(r.weights.square().sum(), logits)[0] for r in (actual, expected)]
    torch.testing.assert_close(*grads)


def test_errors_say_what_was_given() -> None:
    logits = torch.zeros(T, E)
    with pytest.raises(ValueError, match="sinkhorn: k = 6 experts per token were asked of E = 5"):
        sinkhorn(logits, k=6)
    with pytest.raises(ValueError, match=r"num_iterations = 0 and tolerance = 0.0001; expected at least 1 .*30 steps"):
        sinkhorn(logits, k=1, num_iterations=0)
    with pytest.raises(ValueError, match="num_iterations = 30 and tolerance = nan; expected at least 1"):
        sinkhorn_scales(logits, tolerance=float("nan"))
    with pytest.raises(ValueError, match=r"selection bias has shape \(3,\); expected one number per expert, \(5,\)"):
        sinkhorn(logits, k=1, bias=torch.zeros(3))


@pytest.mark.parametrize("num_tokens", [6, 5000])  # in one product, and in blocks
def test_checkpointing_that_keeps_products_takes_it(num_tokens: int) -> None:
    """It refuses a product that is changed in place afterwards, as torch does to that of a vector and a matrix."""

    def policy(context: object, operator: object, *_: object, **__: object) -> CheckpointPolicy:
        kept = operator is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    logits = torch.randn(num_tokens, 4, generator=torch.Generator().manual_seed(0))
    gradients = []
    for options in ({}, {"context_fn": partial(create_selective_checkpoint_contexts, policy)}):
        leaf = logits.clone().requires_grad_()
        weights = checkpoint(lambda z: sinkhorn(z * 1.0, k=2).weights, leaf, use_reentrant=False, **options)
        gradients.append(torch.autograd.grad(weights.square().sum(), leaf)[0])
    assert torch.equal(*gradients)
