import math

import pytest
import torch

from moekit.routing import quantile_bias, selection_bias, sigmoid, top_k, update_bias
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


def test_bias_moves_one_step_against_the_load() -> None:
    bias = torch.tensor([0.5, 0.0, 0.0, 0.0])
    moved = update_bias(bias, torch.tensor([9, 3, 0, 0]), rate=0.1)
    torch.testing.assert_close(moved, torch.tensor([0.4, 0.0, 0.1, 0.1]))
    assert bias[0] == 0.5  # the argument is left alone


def test_bias_moves_by_counts_that_float32_cannot_tell_apart() -> None:
    counts = torch.tensor([2**24 + 1, 2**24, 2**24 - 1, 2**24], dtype=torch.int64)
    for given in (counts, counts.double()):
        moved = update_bias(torch.zeros(4), given, rate=0.5)
        assert moved.dtype == torch.float32
        assert moved.tolist() == [-0.5, 0.0, 0.5, 0.0]


def test_bias_drives_a_collapsed_router_to_balance() -> None:
    logits = torch.randn(512, 8) + torch.linspace(0, 4, 8)
    bias = torch.zeros(8)

    def violation() -> float:
        load = tokens_per_expert(top_k(logits, k=2, score=sigmoid, bias=bias).expert_indices, 8).float()
        return (load.max() / load.mean() - 1).item()

    assert violation() > 1.5
    for _ in range(400):
        counts = tokens_per_expert(top_k(logits, k=2, score=sigmoid, bias=bias).expert_indices, 8)
        bias = update_bias(bias, counts, rate=0.002)
    assert violation() < 0.2


def test_a_centred_bias_has_mean_zero_and_the_same_choices() -> None:
    logits, counts, bias = torch.randn(64, 8), torch.randint(50, (8,)), torch.randn(8)
    plain, centred = update_bias(bias, counts, rate=0.3), update_bias(bias, counts, rate=0.3, center=True)
    assert plain.mean().abs() > 0.1
    torch.testing.assert_close(centred, plain - plain.mean())
    torch.testing.assert_close(
        top_k(logits, k=3, bias=centred).expert_indices, top_k(logits, k=3, bias=plain).expert_indices
    )


def test_a_limit_clamps_after_centring() -> None:
    bias = torch.tensor([9.0, 3.0, 3.0, 1.0])
    moved = update_bias(bias, torch.tensor([1, 1, 1, 1]), rate=0.1, center=True, limit=2.0)
    torch.testing.assert_close(moved, torch.tensor([2.0, -1.0, -1.0, -2.0]))
    torch.testing.assert_close(
        update_bias(bias, torch.tensor([1, 1, 1, 1]), rate=0.1, limit=2.0), torch.tensor([2.0, 2.0, 2.0, 1.0])
    )


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_must_be_positive(limit: float) -> None:
    with pytest.raises(ValueError, match=r"update_bias: limit = .*; expected a positive number, or None"):
        update_bias(torch.zeros(3), torch.zeros(3), rate=0.1, limit=limit)


def test_bias_and_counts_must_match() -> None:
    with pytest.raises(ValueError, match=r"update_bias: bias has shape \(3,\) and tokens_per_expert \(4,\); expected"):
        update_bias(torch.zeros(3), torch.zeros(4), rate=0.1)


@pytest.mark.parametrize("state", [selection_bias(rate=0.001), quantile_bias(k=1)], ids=["load", "quantile"])
def test_its_steps_do_not_vanish_where_the_default_dtype_is_narrow(state) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        bias = state.init(3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert bias.dtype is torch.float32
