from functools import partial

import pytest
import torch
from torch import Tensor

from moekit.routing import sigmoid, softmax, top_k
from moekit.routing.dynamic_k import threshold, top_p
from moekit.types import NoisyLogits, Routing

T, E = 17, 7
ROUTERS = {
    "top-p": partial(top_p, p=0.5),
    "top-p, budget, normalized": partial(top_p, p=0.55, max_k=3, normalize=True, scale=2.0),
    "threshold": partial(threshold, threshold=0.6, at_least=0),
    "threshold, budget, normalized": partial(threshold, threshold=0.6, max_k=2, normalize=True),
    "threshold of softmax": partial(threshold, threshold=0.2, score=softmax),
}
every_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)


def by_top_p(z: Tensor, bias: Tensor, *, p: float, max_k: int = E) -> tuple[Tensor, list[int]]:
    s, chosen, total = torch.exp(z) / torch.exp(z).sum(), [], 0.0
    for e in sorted(range(E), key=lambda e: -(s + bias)[e].item())[:max_k]:
        if chosen and total >= p:
            break
        chosen.append(e)
        total += s[e].item()
    return s, chosen


def by_threshold(z: Tensor, bias: Tensor, *, threshold, max_k: int = E, at_least: int = 1, score=sigmoid):
    s = torch.exp(z) / torch.exp(z).sum() if score is softmax else 1 / (1 + torch.exp(-z))
    margin = (s + bias - threshold).tolist()
    order = sorted(range(E), key=lambda e: -margin[e])[:max_k]
    return s, [e for i, e in enumerate(order) if i < at_least or margin[e] > 0]


REFERENCES = {top_p: by_top_p, threshold: by_threshold}


def dense(routing: Routing) -> Tensor:
    weights = routing.weights.new_zeros(routing.num_tokens, routing.num_experts + 1)
    index = (routing.token_indices.flatten(), routing.expert_indices.flatten())
    return weights.index_put(index, routing.weights.flatten(), accumulate=True)[:, :-1]


@every_router
@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_choice_and_weights_follow_the_formula(router, spread: float) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(E, dtype=torch.float64) * spread
    routing = router(logits, bias=bias)
    options = dict(router.keywords)
    normalize, scale = options.pop("normalize", False), options.pop("scale", 1.0)
    weights, counts = [], []
    for t, z in enumerate(logits.unbind(0)):
        s, chosen = REFERENCES[router.func](z, bias, **options)
        assert [e for e in routing.expert_indices[t].tolist() if e >= 0] == chosen
        counts.append(len(chosen))
        total = sum(s[e] for e in chosen) if normalize else 1.0
        weights.append(torch.stack([scale * s[e] / total if e in chosen else s[e] * 0 for e in range(E)]))
    assert len(set(counts)) > 1
    assert (routing.weights[routing.expert_indices < 0] == 0).all()
    actual, expected = dense(routing), torch.stack(weights)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    cotangent = torch.randn(T, E, dtype=torch.float64)
    grads = [torch.autograd.grad((y * cotangent).sum(), logits)[0] for y in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@every_router
def test_routing_is_complete(router) -> None:
    routing = router(torch.randn(T, E))
    width = router.keywords.get("max_k", E)
    assert routing.token_indices.tolist() == [[t] * width for t in range(T)]
    assert routing.expert_indices.shape == routing.weights.shape == (T, width)
    assert (routing.num_tokens, routing.num_experts, routing.pool) == (T, E, T * width)
    missing = (routing.expert_indices < 0).int()
    assert (missing.diff(dim=-1) >= 0).all()  # what is missing comes last


def test_hand_written_values() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.04, 0.06], [0.2, 0.2, 0.6]]).log()
    routing = top_p(logits, p=0.7)
    assert routing.expert_indices[:, :2].tolist() == [[0, 1], [0, -1], [2, 0]]
    torch.testing.assert_close(routing.weights[:, :2], torch.tensor([[0.5, 0.3], [0.9, 0.0], [0.6, 0.2]]))
    assert top_p(logits, p=0.7, max_k=1).expert_indices.tolist() == [[0], [0], [2]]
    assert threshold(logits, threshold=0.25, score=softmax).expert_indices.tolist() == [
        [0, 1, -1],
        [0, -1, -1],
        [2, -1, -1],
    ]


def test_at_the_boundary() -> None:
    """Scores that reach p exactly are enough; one that equals the threshold is not above it."""
    scores = torch.tensor([[0.5, 0.25, 0.25]])
    assert top_p(scores, p=0.5, score=torch.clone).expert_indices.tolist() == [[0, -1, -1]]
    assert threshold(scores, threshold=0.25, score=torch.clone).expert_indices.tolist() == [[0, -1, -1]]


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_p_of_one_equals_every_expert(spread: float) -> None:
    """Sharp distributions too, whose running sum in float32 is 1 long before the last expert."""
    logits = torch.randn(T, E) * spread
    routing, plain = top_p(logits, p=1.0), top_k(logits, k=E)
    assert torch.equal(routing.expert_indices, plain.expert_indices)
    assert torch.equal(routing.weights, plain.weights)
    assert torch.equal(dense(routing), softmax(logits))


@pytest.mark.parametrize("k", [1, 3])
def test_a_budget_that_is_used_up_equals_top_k(k: int) -> None:
    logits, bias = torch.randn(T, E), torch.randn(E)
    for score in (softmax, sigmoid):
        options = {"score": score, "normalize": True, "scale": 1.5, "bias": bias}
        plain = top_k(logits, k=k, **options)
        for routing in (
            top_p(logits, p=1.0, max_k=k, **options),
            threshold(logits, threshold=-100.0, max_k=k, **options),
            threshold(logits, threshold=100.0, max_k=k, at_least=k, **options),
        ):
            assert torch.equal(routing.expert_indices, plain.expert_indices)
            assert torch.equal(routing.weights, plain.weights)


def test_p_of_zero_equals_top_1() -> None:
    logits = torch.randn(T, E)
    routing, plain = top_p(logits, p=0.0), top_k(logits, k=1)
    assert torch.equal(routing.expert_indices[:, :1], plain.expert_indices)
    assert (routing.expert_indices[:, 1:] == -1).all()
    assert torch.equal(routing.weights[:, :1], plain.weights)


def test_more_of_p_is_more_experts() -> None:
    logits = torch.randn(200, E)
    counts = [(top_p(logits, p=p).expert_indices >= 0).sum().item() for p in (0.1, 0.3, 0.5, 0.9)]
    assert counts == sorted(set(counts))
    sure = top_p(logits * 20, p=0.5).expert_indices >= 0
    assert sure.sum() < counts[2] / 1.5


def test_threshold_of_each_expert() -> None:
    logits = torch.randn(T, E)
    theta = sigmoid(torch.randn(E))
    routing = threshold(logits, threshold=theta, at_least=0)
    assert torch.equal(dense(routing) > 0, sigmoid(logits) > theta)
    scalar = threshold(logits, threshold=torch.tensor(0.5))
    assert torch.equal(scalar.weights, threshold(logits, threshold=0.5).weights)


def test_a_token_without_any_expert() -> None:
    logits = torch.full((T, E), -3.0, requires_grad=True)
    routing = threshold(logits, threshold=0.5, at_least=0, normalize=True)
    assert (routing.expert_indices == -1).all()
    assert (routing.weights == 0).all()
    (grad,) = torch.autograd.grad((routing.weights * torch.randn(T, E)).sum(), logits)
    assert (grad == 0).all()


@every_router
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite(router, extreme: float) -> None:
    logits = torch.randn(T, E)
    logits[:, 1] = extreme
    logits[3] = extreme
    logits[4, 2:] = -torch.inf
    logits.requires_grad_()
    routing = router(logits)
    assert routing.weights.isfinite().all()
    (grad,) = torch.autograd.grad((routing.weights * torch.randn_like(routing.weights)).sum(), logits)
    assert grad.isfinite().all()


@every_router
def test_no_tokens_ties_and_autocast(router) -> None:
    assert router(torch.zeros(0, E)).weights.shape == (0, router.keywords.get("max_k", E))
    for logits in (torch.zeros(T, E), torch.randn(T, E)):
        expected = router(logits)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = router(logits)
        assert actual.weights.dtype == torch.float32
        assert torch.equal(actual.expert_indices, expected.expert_indices)
        assert torch.equal(actual.weights, expected.weights)


@pytest.mark.parametrize("router", [partial(top_p, p=0.3), partial(threshold, threshold=0.9)])
def test_one_expert_is_taken_by_all(router) -> None:
    assert (router(torch.randn(T, 1)).expert_indices == 0).all()


@every_router
def test_noise_decides(router) -> None:
    logits, noise = torch.randn(T, E), torch.randn(T, E)
    noisy = router(NoisyLogits(logits + noise, logits, torch.ones(T, E)))
    assert torch.equal(noisy.expert_indices, router(logits + noise).expert_indices)


def test_many_experts_cover_p_and_no_more_than_that() -> None:
    """A width that is no power of two, for the running sum in doubling steps."""
    weights = top_p(torch.randn(50, 61, dtype=torch.float64), p=0.5).weights
    sums = weights.sum(-1)
    last = weights.masked_fill(weights == 0, 1.0).amin(-1)
    assert (sums >= 0.5).all()
    assert (sums - last < 0.5).all()


@every_router
def test_compiles_to_one_graph(router) -> None:
    torch._dynamo.reset()
    logits, bias = torch.randn(T, E, requires_grad=True), torch.randn(E) * 0.1
    expected = router(logits, bias=bias)
    actual = torch.compile(router, fullgraph=True, backend="aot_eager")(logits, bias=bias)
    for a, b in zip(actual[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(r.weights.square().sum(), logits)[0] for r in (actual, expected)]
    torch.testing.assert_close(*grads)


def test_errors_say_what_was_given() -> None:
    logits = torch.zeros(T, E)
    with pytest.raises(
        ValueError, match=r"top_p: p = 1.5; expected a share of the scores between 0 and 1, such as 0.4"
    ):
        top_p(logits, p=1.5)
    with pytest.raises(ValueError, match="top_p: k = 8 experts per token were asked of E = 7"):
        top_p(logits, p=0.5, max_k=8)
    with pytest.raises(ValueError, match="threshold: k = 0 experts per token were asked of E = 7"):
        threshold(logits, threshold=0.5, max_k=0)
    with pytest.raises(ValueError, match="threshold: at_least = 3; expected 0 <= at_least <= max_k = 2"):
        threshold(logits, threshold=0.5, max_k=2, at_least=3)
    with pytest.raises(ValueError, match=r"threshold has shape \(3,\); expected a number, or one per expert, \(7,\)"):
        threshold(logits, threshold=torch.zeros(3))
    with pytest.raises(ValueError, match=r"selection bias has shape \(3,\)"):
        top_p(logits, p=0.5, bias=torch.zeros(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_runs_on_cuda_where_determinism_is_demanded() -> None:
    """Where ``torch.cumsum`` raises."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        logits = torch.randn(1000, 64)
        routing = top_p(logits.cuda(), p=0.5)
        assert torch.equal(routing.weights, top_p(logits.cuda(), p=0.5).weights)
    finally:
        torch.use_deterministic_algorithms(before)
    torch.testing.assert_close(routing.weights.cpu(), top_p(logits, p=0.5).weights)


@pytest.mark.parametrize("choose", [partial(top_p, p=0.6), partial(threshold, threshold=0.5)])
def test_what_does_not_exist_weighs_nothing_beside_nan(choose) -> None:
    routing = choose(torch.tensor([[float("nan"), 1.0, 2.0], [0.0, 1.0, 2.0]]), normalize=True)
    missing = routing.expert_indices < 0
    assert missing.any()
    assert (routing.weights[missing] == 0).all()
