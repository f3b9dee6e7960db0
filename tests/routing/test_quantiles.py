from functools import partial

import pytest
import torch
from torch import Tensor

from moekit.routing import sigmoid, softmax, top_k
from moekit.routing.quantiles import quantile_balanced, quantile_bias, quantile_duals
from moekit.segments import tokens_per_expert
from moekit.types import NoisyLogits

T, E, K = 23, 5, 2


def reference_duals(logits: Tensor, duals: Tensor, k: int) -> list[float]:
    rows, beta, new = logits.tolist(), duals.tolist(), []
    alpha = [sorted((z - b for z, b in zip(row, beta, strict=True)), reverse=True)[k] for row in rows]
    for e in range(len(beta)):
        gains = sorted((row[e] - a for row, a in zip(rows, alpha, strict=True)), reverse=True)
        new.append(gains[len(rows) * k // len(beta)])
    return new


@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), [(23, 5, 2), (1, 5, 1), (3, 8, 2), (40, 4, 3), (6, 2, 1)])
def test_duals_follow_the_formula(num_tokens: int, num_experts: int, k: int) -> None:
    logits = torch.randn(num_tokens, num_experts, dtype=torch.float64)
    duals = torch.randn(num_experts, dtype=torch.float64)
    expected = torch.tensor(reference_duals(logits, duals, k), dtype=torch.float64)
    assert torch.equal(quantile_duals(logits, duals, k=k), expected)
    everyone = torch.ones(num_tokens, dtype=torch.bool)
    assert torch.equal(quantile_duals(logits, duals, k=k, token_mask=everyone), expected)


@pytest.mark.parametrize("score", [softmax, sigmoid])
@pytest.mark.parametrize("normalize", [False, True])
def test_choice_and_weights_follow_the_formula(score, normalize: bool) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    duals = torch.randn(E, dtype=torch.float64)
    routing = quantile_balanced(logits, k=K, score=score, normalize=normalize, scale=1.5, bias=-duals)
    for t, row in enumerate((logits - duals).tolist()):
        assert routing.expert_indices[t].tolist() == sorted(range(E), key=lambda e: -row[e])[:K]
    weights = score(logits).gather(1, routing.expert_indices)
    weights = 1.5 * (weights / weights.sum(-1, keepdim=True) if normalize else weights)
    torch.testing.assert_close(routing.weights, weights)
    cotangent = torch.randn(T, K, dtype=torch.float64)
    grads = [torch.autograd.grad((w * cotangent).sum(), logits)[0] for w in (routing.weights, weights)]
    torch.testing.assert_close(*grads)


def test_without_duals_it_is_top_k_and_with_every_expert_the_dense_mixture() -> None:
    logits = torch.randn(T, E)
    routing, plain = quantile_balanced(logits, k=K), top_k(logits, k=K)
    assert torch.equal(routing.expert_indices, plain.expert_indices)
    assert torch.equal(routing.weights, plain.weights)
    routing = quantile_balanced(logits, k=E, bias=torch.randn(E))
    assert torch.equal(torch.zeros_like(logits).scatter(1, routing.expert_indices, routing.weights), softmax(logits))


def test_duals_balance_a_collapsed_router() -> None:
    logits = torch.randn(512, 8) + torch.linspace(0, 6, 8)
    duals, violations = torch.zeros(8), []
    for _ in range(12):
        load = tokens_per_expert(quantile_balanced(logits, k=2, bias=-duals).expert_indices, 8)
        violations.append(load.max().item() / 128 - 1)
        duals = quantile_duals(logits, duals, k=2)
    assert violations[0] > 2
    assert violations[-1] < 0.1


def test_a_common_shift_of_the_duals_chooses_the_same() -> None:
    logits, duals = torch.randn(T, E, dtype=torch.float64), torch.randn(E, dtype=torch.float64)
    first, second = (quantile_balanced(logits, k=K, bias=-d).expert_indices for d in (duals, duals - duals.mean()))
    assert torch.equal(first, second)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 100.0])
def test_padding_changes_nothing(bad: float) -> None:
    logits, duals = torch.randn(T, E), torch.randn(E)
    real = torch.arange(T) % 3 != 0
    spoiled = logits.masked_fill(~real.unsqueeze(1), bad)
    expected = quantile_duals(logits[real], duals, k=K)
    assert torch.equal(quantile_duals(spoiled, duals, k=K, token_mask=real.view(1, T)), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_where_nothing_can_move_the_duals_stay(masked: bool) -> None:
    duals = torch.randn(E)
    options = {"token_mask": torch.zeros(T, dtype=torch.bool)} if masked else {}
    logits = torch.randn(T, E) if masked else torch.zeros(0, E)
    kept = quantile_duals(logits, duals, k=K, **options)
    assert torch.equal(kept, duals)
    kept += 1
    assert not torch.equal(kept, duals)
    assert torch.equal(quantile_duals(torch.randn(T, E), duals, k=E), duals)
    assert quantile_balanced(torch.zeros(0, E), k=K).weights.shape == (0, K)


def test_duals_keep_their_dtype_and_carry_no_gradient() -> None:
    logits = torch.randn(T, E, requires_grad=True)
    duals = quantile_duals(logits, torch.zeros(E, dtype=torch.float64), k=K)
    assert duals.dtype == torch.float64
    assert not duals.requires_grad


def test_noise_decides_the_choice_and_stays_out_of_the_duals() -> None:
    logits, noise, duals = torch.randn(T, E), torch.randn(T, E), torch.zeros(E)
    noisy = NoisyLogits(logits + noise, logits, torch.ones(T, E))
    chosen = quantile_balanced(noisy, k=K).expert_indices
    assert torch.equal(chosen, quantile_balanced(logits + noise, k=K).expert_indices)
    assert torch.equal(quantile_duals(noisy, duals, k=K), quantile_duals(logits, duals, k=K))


def test_autocast_and_repetition_change_nothing() -> None:
    logits, duals = torch.randn(T, E), torch.randn(E)
    expected, moved = quantile_balanced(logits, k=K, bias=-duals), quantile_duals(logits, duals, k=K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = quantile_balanced(logits, k=K, bias=-duals)
        assert torch.equal(quantile_duals(logits, duals, k=K), moved)
    assert actual.weights.dtype == moved.dtype == torch.float32
    assert torch.equal(actual.expert_indices, expected.expert_indices)
    assert torch.equal(actual.weights, expected.weights)


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite(extreme: float) -> None:
    logits = torch.randn(T, E)
    logits[:, 1] = extreme
    logits[3] = extreme
    logits.requires_grad_()
    assert quantile_duals(logits, torch.zeros(E), k=K).isfinite().all()
    weights = quantile_balanced(logits, k=K, normalize=True, bias=torch.randn(E)).weights
    assert torch.autograd.grad((weights * torch.randn(T, K)).sum(), logits)[0].isfinite().all()


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()

    def step(logits: Tensor, duals: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        routing = quantile_balanced(logits, k=K, bias=-duals)
        return routing.expert_indices, routing.weights, quantile_duals(logits, duals, k=K, token_mask=mask)

    logits = torch.randn(T, E, requires_grad=True)
    inputs = (logits, torch.randn(E), torch.arange(T) % 5 != 1)
    expected = step(*inputs)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(w.square().sum(), logits)[0] for _, w, _ in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("call", "name"), [(quantile_balanced, "quantile_balanced"), (quantile_duals, "quantile_duals")]
)
def test_errors_say_what_was_given(call, name: str) -> None:
    if call is quantile_duals:
        call = partial(quantile_duals, duals=torch.zeros(E))
        with pytest.raises(
            ValueError, match=r"selection bias has shape \(3,\); expected one number per expert, \(5,\)"
        ):
            quantile_duals(torch.zeros(T, E), torch.zeros(3), k=1)
    with pytest.raises(ValueError, match=f"{name}: k = 6 experts per token were asked of E = 5"):
        call(torch.zeros(T, E), k=6)


@pytest.mark.parametrize("masked", [False, True])
def test_a_quantile_bias_takes_the_mean_of_its_parts_by_their_tokens(masked):
    state, logits = quantile_bias(k=K), torch.randn(T, E)
    mask = torch.rand(T) < 0.7 if masked else torch.ones(T, dtype=torch.bool)
    bias = 0.1 * torch.randn(E)
    sums, expected = torch.zeros(E + 1, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for part, real in zip(logits.split(11), mask.split(11), strict=True):
        sums += state.observe(part, None, bias, token_mask=real if masked else None)
        expected -= real.sum() * quantile_duals(part[real], -bias, k=K).double()
    found = state.update(bias, sums)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (expected / mask.sum()).float())
    assert torch.equal(state.update(bias, torch.zeros(E + 1, dtype=torch.float64)), bias)


def test_a_quantile_bias_evens_the_load_out():
    state, bias = quantile_bias(k=K), torch.zeros(E)
    logits = torch.randn(2000, E) + 2 * torch.arange(E)
    for _ in range(30):
        bias = state.update(bias, state.observe(logits, None, bias))
    load = tokens_per_expert(top_k(logits, k=K, score=lambda z: z, bias=bias).expert_indices, E)
    assert load.max() <= 1.05 * 2000 * K / E
