from functools import partial

import pytest
import torch

from moekit.routing import (
    expert_choice,
    group_limited,
    importance_loss,
    load_balance_loss,
    quantile_balanced,
    round_robin,
    round_tokens,
    sigmoid,
    sigmoid_of_top_k,
    sinkhorn,
    softmax,
    softmax_of_top_k,
    threshold,
    top_k,
    top_p,
    weights_at,
)

T, E, K = 11, 6, 3
ROUTERS = {
    "softmax": partial(top_k, k=K),
    "normalized": partial(top_k, k=K, normalize=True),
    "sigmoid": partial(top_k, k=K, score=sigmoid),
    "sigmoid normalized": partial(top_k, k=K, score=sigmoid, normalize=True),
    "softmax of top k": partial(softmax_of_top_k, k=K),
    "sigmoid of top k": partial(sigmoid_of_top_k, k=K),
}
every_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)


@every_router
def test_routing_is_complete(router) -> None:
    routing = router(torch.randn(T, E))
    assert routing.token_indices.tolist() == [[t] * K for t in range(T)]
    assert routing.expert_indices.shape == routing.weights.shape == (T, K)
    assert (routing.num_tokens, routing.num_experts, routing.pool) == (T, E, routing.expert_indices.numel())
    assert routing.expert_indices.dtype == routing.token_indices.dtype == torch.int64
    assert routing.weights.dtype == torch.float32


@every_router
def test_weights_stay_float32_inside_autocast(router) -> None:
    logits = torch.randn(T, E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = router(logits).weights
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, router(logits).weights, rtol=0, atol=0)


@every_router
def test_choices_fall_in_weight(router) -> None:
    weights = router(torch.randn(T, E)).weights
    assert (weights.diff(dim=-1) <= 0).all()


def test_hand_written_values() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).log1p()  # softmax: 0.1, 0.4, 0.2, 0.3
    routing = top_k(logits, k=2)
    assert routing.expert_indices.tolist() == [[1, 3]]
    torch.testing.assert_close(routing.weights, torch.tensor([[0.4, 0.3]]))
    torch.testing.assert_close(top_k(logits, k=2, normalize=True).weights, torch.tensor([[4 / 7, 3 / 7]]))
    torch.testing.assert_close(top_k(logits, k=2, normalize=True, scale=2.5).weights, torch.tensor([[10 / 7, 7.5 / 7]]))
    torch.testing.assert_close(top_k(logits, k=2, score=sigmoid).weights, torch.tensor([[4 / 5, 3 / 4]]))
    torch.testing.assert_close(softmax_of_top_k(logits, k=2).weights, torch.tensor([[4 / 7, 3 / 7]]))


def test_softmax_of_top_k_equals_normalized_top_k() -> None:
    logits = torch.randn(T, E, dtype=torch.float64)
    before, after = top_k(logits, k=K, normalize=True), softmax_of_top_k(logits, k=K)
    assert torch.equal(before.expert_indices, after.expert_indices)
    torch.testing.assert_close(before.weights, after.weights)


def test_one_normalized_choice_is_constant_and_trains_no_router() -> None:
    logits = torch.randn(T, E, requires_grad=True)
    weights = top_k(logits, k=1, normalize=True).weights
    assert (weights == 1).all()
    (grad,) = torch.autograd.grad((weights * torch.randn(T, 1)).sum(), logits)
    assert grad.abs().max() < 1e-6


def test_sigmoid_of_top_k_equals_top_k_of_sigmoid_where_scores_differ() -> None:
    logits = torch.randn(T, E, dtype=torch.float64)
    before, after = top_k(logits, k=K, score=sigmoid), sigmoid_of_top_k(logits, k=K)
    assert torch.equal(before.expert_indices, after.expert_indices)
    torch.testing.assert_close(before.weights, after.weights)
    large = torch.tensor([[30.0, 50.0, 40.0], [-120.0, -110.0, -130.0]])
    assert sigmoid_of_top_k(large, k=2).expert_indices.tolist() == [[1, 2], [1, 0]]


@pytest.mark.parametrize(
    "router", [top_k, partial(top_k, score=sigmoid, normalize=True), softmax_of_top_k, sigmoid_of_top_k]
)
def test_bias_shifts_the_selection_and_never_the_weights(router) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 100.0], dtype=torch.float64, requires_grad=True)
    routing = router(logits, k=2, bias=bias)
    assert (routing.expert_indices[:, 0] == 5).all()
    unbiased = router(logits, k=E).weights  # every expert's weight before normalisation, up to a common factor
    everyone = router(logits, k=E).expert_indices
    position = (everyone.unsqueeze(1) == routing.expert_indices.unsqueeze(2)).int().argmax(-1)
    expected = unbiased.gather(1, position)
    torch.testing.assert_close(
        routing.weights / routing.weights.sum(-1, keepdim=True), expected / expected.sum(-1, keepdim=True)
    )
    assert torch.autograd.grad(routing.weights.sum(), bias, allow_unused=True) == (None,)


def test_bias_of_zero_changes_nothing() -> None:
    logits = torch.randn(T, E)
    biased, plain = top_k(logits, k=K, bias=torch.zeros(E)), top_k(logits, k=K)
    assert torch.equal(biased.expert_indices, plain.expert_indices)
    assert torch.equal(biased.weights, plain.weights)


@every_router
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite(router, extreme: float) -> None:
    logits = torch.randn(T, E)
    logits[:, 2] = extreme
    logits[3] = extreme
    logits[4] = torch.tensor([extreme, -extreme] * (E // 2))
    logits.requires_grad_()
    routing = router(logits)
    assert routing.weights.isfinite().all()
    (grad,) = torch.autograd.grad((routing.weights * torch.randn(T, K)).sum(), logits)
    assert grad.isfinite().all()
    # Scores that underflow tie, so that only the first choice is certain.
    first = logits.detach().gather(1, routing.expert_indices[:, :1])
    assert torch.equal(first, logits.detach().amax(-1, keepdim=True))


@every_router
def test_experts_at_minus_infinity_are_not_chosen(router) -> None:
    logits = torch.randn(T, E)
    logits[:, :2] = -torch.inf
    logits.requires_grad_()
    routing = router(logits)
    assert (routing.expert_indices >= 2).all()
    (grad,) = torch.autograd.grad((routing.weights * torch.randn(T, K)).sum(), logits)
    assert grad.isfinite().all()
    assert (grad[:, :2] == 0).all()


@every_router
def test_fewer_finite_logits_than_choices(router) -> None:
    logits = torch.full((2, E), -torch.inf)
    logits[:, 4] = 1.0
    logits.requires_grad_()
    routing = router(logits)
    assert (routing.expert_indices[:, 0] == 4).all()
    assert routing.weights.isfinite().all()
    assert (routing.weights[:, 1:] == 0).all()
    (grad,) = torch.autograd.grad((routing.weights * torch.randn(2, K)).sum(), logits)
    assert grad.isfinite().all()


@pytest.mark.parametrize("value", [-80.0, -200.0, -1e4])
@pytest.mark.parametrize("normalize", [False, True])
def test_sigmoid_scores_that_underflow(value: float, normalize: bool) -> None:
    logits = torch.full((T, E), value, requires_grad=True)
    weights = top_k(logits, k=K, score=sigmoid, normalize=normalize).weights
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    (grad,) = torch.autograd.grad((weights * torch.randn(T, K)).sum(), logits)
    assert grad.isfinite().all()


def test_no_tokens() -> None:
    assert top_k(torch.zeros(0, E), k=K).weights.shape == (0, K)
    assert softmax_of_top_k(torch.zeros(0, E), k=K).expert_indices.shape == (0, K)


def test_weights_at_reads_off_any_choice() -> None:
    scores, experts = softmax(torch.randn(T, E)), torch.randint(E, (T, K))
    assert torch.equal(weights_at(scores, experts), scores.gather(1, experts))
    torch.testing.assert_close(weights_at(scores, experts, normalize=True, scale=3.0).sum(-1), torch.full((T,), 3.0))


@pytest.mark.parametrize(
    ("router", "name"),
    [(top_k, "top_k"), (softmax_of_top_k, "softmax_of_top_k"), (sigmoid_of_top_k, "sigmoid_of_top_k")],
)
@pytest.mark.parametrize("k", [0, -1, E + 1])
def test_a_bad_k_says_so(router, name: str, k: int) -> None:
    message = rf"{name}: k = {k} experts per token were asked of E = {E} experts; expected 1 <= k <= E.*--moe-top-k"
    with pytest.raises(ValueError, match=message):
        router(torch.zeros(T, E), k=k)


@pytest.mark.parametrize("router", [top_k, softmax_of_top_k, sigmoid_of_top_k])
def test_shapes_that_do_not_fit(router) -> None:
    with pytest.raises(ValueError, match=r"logits have shape \(2, 3, 4\); expected \(T, E\).*Flatten"):
        router(torch.zeros(2, 3, 4), k=1)
    with pytest.raises(ValueError, match=r"selection bias has shape \(3,\); expected one number per expert, \(4,\)"):
        router(torch.zeros(2, 4), k=1, bias=torch.zeros(3))


@pytest.mark.parametrize("order", [1.0, 2.0, 3.5, float("inf")])
def test_weights_are_divided_by_a_norm_of_any_order(order: float) -> None:
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    chosen = logits.softmax(-1).topk(3, dim=-1).values
    power = (
        chosen.amax(-1, keepdim=True) if order == float("inf") else (chosen**order).sum(-1, keepdim=True) ** (1 / order)
    )
    found = top_k(logits, k=3, normalize=True, order=order).weights
    torch.testing.assert_close(found, chosen / power)
    cotangent = torch.randn_like(found)
    torch.testing.assert_close(
        *(torch.autograd.grad((w * cotangent).sum(), logits, retain_graph=True)[0] for w in (found, chosen / power))
    )


@pytest.mark.parametrize(
    "call",
    [
        partial(top_k, k=2, score="sigmoid"),
        partial(top_p, p=0.5, score="sigmoid"),
        partial(threshold, threshold=0.5, score="sigmoid"),
        partial(round_robin, k=1, score="sigmoid"),
        partial(expert_choice, capacity_factor=1.0, score="sigmoid"),
        partial(group_limited, k=1, num_groups=2, groups_kept=1, score="sigmoid"),
        partial(sinkhorn, k=1, score="sigmoid"),
        partial(quantile_balanced, k=1, score="sigmoid"),
        lambda logits: load_balance_loss(logits, top_k(logits, k=1), score="sigmoid"),
        lambda logits: importance_loss(logits, top_k(logits, k=1), score="sigmoid"),
        lambda logits: round_tokens(logits, top_k(logits, k=1), tile=2, score="sigmoid"),
    ],
)
def test_a_score_that_is_no_function_is_refused_in_words(call) -> None:
    with pytest.raises(ValueError, match=r"score = 'sigmoid'; expected a function .* such as moekit.routing.sigmoid"):
        call(torch.zeros(4, 4))
