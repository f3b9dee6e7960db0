"""What routers remember: first value, what they observe in parts of a batch, and the step they take."""

import pytest
import torch

from moekit.routing import fixed_table, hash_table, quantile_bias, quantile_duals, selection_bias, top_k, update_bias
from moekit.segments import tokens_per_expert

T, E, K = 29, 6, 2


def test_a_selection_bias_observes_loads_that_add_up():
    state, logits = selection_bias(rate=0.25), torch.randn(T, E)
    bias = state.init(E)
    parts = [state.observe(part, top_k(part, k=K), bias) for part in logits.split(11)]
    counts = tokens_per_expert(top_k(logits, k=K).expert_indices, E)
    assert torch.equal(sum(parts), counts.double())
    assert torch.equal(state.update(bias, sum(parts)), 0.25 * torch.sign(counts.float().mean() - counts))
    assert not bias.any()


def test_a_selection_bias_hands_on_what_else_its_step_takes():
    bias, loads = torch.tensor([0.5, 0.25, -0.25]), torch.tensor([9.0, 3.0, 0.0], dtype=torch.float64)
    for options in ({}, {"center": True}, {"limit": 0.375}, {"center": True, "limit": 0.125}):
        found = selection_bias(rate=0.25, **options).update(bias, loads)
        assert torch.equal(found, update_bias(bias, loads, rate=0.25, **options))


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


def test_a_table_is_drawn_from_its_seed_and_stays():
    state = fixed_table(vocab_size=50, k=K, seed=3)
    assert torch.equal(state.init(E), hash_table(50, E, k=K, seed=3))
    assert state.update is None
    assert state.observe is None
