import itertools
import math

import pytest
import torch

from moekit.lm import bootstrap
from moekit.lm.bootstrap import Interval, bootstrap_interval


@pytest.fixture(autouse=True)
def _one_thread():
    before = (
        torch.get_num_threads()
    )  # thousands of small operations, each waiting for a second thread on a busy machine
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(n: int, seed: int = 0) -> torch.Tensor:
    return 3 + torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def share_covering(truth: float, samples, **options) -> float:
    """Return how many of the intervals of (values, weights) pairs hold the true value."""
    intervals = [
        bootstrap_interval(*pair, **{"resamples": 500, "seed": seed, "blocks": len(pair[0]), **options})
        for seed, pair in enumerate(samples)
    ]  # a seed each: with one for all, the errors of the quantiles would not average out
    return sum(low <= truth <= high for low, high in intervals) / len(intervals)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_intervals_hold_the_mean_of_normal_data_as_often_as_they_say(confidence):
    share = share_covering(3.0, [(normal(80, seed), None) for seed in range(600)], confidence=confidence)
    deviation = math.sqrt(confidence * (1 - confidence) / 600)
    assert abs(share - confidence) < 4 * deviation  # four standard deviations of the share itself


def test_intervals_hold_a_ratio_whose_weights_vary():
    # Long sequences have a lower loss per token, so that the mean over sequences, 3.75, is not the ratio, 3.
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(2, (300, 100), generator=generator) * 60.0 + 20
    values = weights * torch.where(weights > 50, 2.5, 5.0) + 10 * torch.randn(300, 100, generator=generator)
    share = share_covering(3.0, zip(values, weights, strict=True))
    assert 0.9 < share < 0.985


@pytest.mark.parametrize(("confidence", "z"), [(0.5, 0.67449), (0.95, 1.95996)])
def test_bounds_are_near_the_analytic_ones(confidence, z):
    values = normal(3000)
    low, high = bootstrap_interval(values, blocks=3000, confidence=confidence, resamples=6000)
    error = values.std().item() / math.sqrt(3000)
    assert (low - values.mean().item()) / error == pytest.approx(-z, abs=0.12)
    assert (high - values.mean().item()) / error == pytest.approx(z, abs=0.12)


def test_bounds_of_a_ratio_are_near_those_of_the_delta_method():
    weights = torch.randint(1, 100, (3000,)).double()
    values = weights * (2 + torch.rand(3000, dtype=torch.float64)) + 30
    ratio = values.sum() / weights.sum()
    error = ((values - ratio * weights).square().sum().sqrt() / weights.sum()).item()
    low, high = bootstrap_interval(values, weights, blocks=3000, resamples=6000)
    assert (low - ratio.item()) / error == pytest.approx(-1.96, abs=0.12)
    assert (high - ratio.item()) / error == pytest.approx(1.96, abs=0.12)


def documents(seed: int, count: int = 200, length: int = 8) -> torch.Tensor:
    """Return sequences of documents, in order: each document has a level of its own."""
    return (
        normal(count, seed).unsqueeze(1) + 0.3 * (normal(count * length, seed + 10_000) - 3).view(count, -1)
    ).flatten()


def test_intervals_hold_the_mean_where_neighbours_are_of_one_document():
    samples = [(documents(seed), None) for seed in range(300)]
    assert 0.89 < share_covering(3.0, samples, blocks=32) < 0.98
    assert share_covering(3.0, samples[:40]) < 0.75  # one by one, as if sequences were independent


@pytest.mark.parametrize("n", [33, 64, 1000])
def test_blocks_are_stretches_of_nearly_one_length(n):
    values, sizes = normal(n), [len(part) for part in torch.arange(n).tensor_split(32)]
    weights = torch.arange(1.0, n + 1)
    blocks = bootstrap._by_block(torch.stack([values, torch.ones(n)], dim=1), 32)
    assert sorted(blocks[:, 1].tolist()) == sorted(sizes)
    starts = [0, *blocks[:, 1].cumsum(0).long().tolist()]
    sums = [[part[low:high].sum() for low, high in itertools.pairwise(starts)] for part in (values, weights)]
    expected = bootstrap_interval(torch.stack(sums[0]), torch.stack(sums[1]))
    assert bootstrap_interval(values, weights) == pytest.approx(tuple(expected), rel=1e-12)


def test_no_more_sequences_than_blocks_are_taken_one_by_one():
    values = normal(32)
    assert bootstrap_interval(values) == bootstrap_interval(values, blocks=1000)
    assert bootstrap_interval(values) != bootstrap_interval(values, blocks=31)


def test_two_sequences_have_the_exact_distribution():
    # Means 0, 1/2 and 1 with probability 1/4, 1/2 and 1/4: a quarter below is the border, so look at both sides of it.
    values = torch.tensor([0.0, 1.0])
    assert bootstrap_interval(values, confidence=0.4, resamples=20_000) == Interval(0.5, 0.5)
    assert bootstrap_interval(values, confidence=0.6, resamples=20_000) == Interval(0.0, 1.0)


def test_without_weights_each_sequence_counts_once():
    values = normal(50)
    assert bootstrap_interval(values) == bootstrap_interval(values, torch.ones(50))
    low, high = bootstrap_interval(values, torch.full((50,), 4))
    assert (4 * low, 4 * high) == pytest.approx(tuple(bootstrap_interval(values)), rel=1e-12)


def test_a_seed_gives_one_interval_and_another_seed_another():
    values = normal(50)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_torch_s_random_state_is_neither_read_nor_changed():
    values = normal(50)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = bootstrap_interval(values)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert bootstrap_interval(values) == first


@pytest.mark.parametrize("draws", [1, 50, 170, 5001])
def test_drawing_in_smaller_pieces_changes_nothing(monkeypatch, draws):
    values, weights = normal(50), torch.arange(1, 51)
    whole = bootstrap_interval(values, weights, blocks=50, resamples=101)
    monkeypatch.setattr(bootstrap, "_DRAWS", draws)
    assert bootstrap_interval(values, weights, blocks=50, resamples=101) == pytest.approx(whole, rel=1e-12)


def test_no_more_is_drawn_at_once_than_the_limit(monkeypatch):
    drawn, randint = [], torch.randint

    def spy(n, size, **options):
        drawn.append(math.prod(size))
        return randint(n, size, **options)

    monkeypatch.setattr(torch, "randint", spy)
    bootstrap_interval(torch.rand(5000), blocks=5000, resamples=500)
    assert sum(drawn) == 5000 * 500
    assert max(drawn) <= bootstrap._DRAWS


@pytest.mark.parametrize("value", [2.7, 0.1, -3.0])
def test_one_sequence_is_its_own_interval(value):
    assert bootstrap_interval(torch.tensor([value], dtype=torch.float64)) == Interval(value, value)
    assert bootstrap_interval(torch.tensor([value * 8], dtype=torch.float64), torch.tensor([8])).low == value


def test_float32_sums_are_added_in_float64():
    value = 1 + 2**-23  # the next float32 after 1, whose multiples float32 cannot hold
    assert bootstrap_interval(torch.full((2000,), value), resamples=20) == Interval(value, value)


@pytest.mark.parametrize(
    ("values", "weights", "options", "message"),
    [
        ([], None, {}, r"values are \(0,\) and weights \(0,\); expected \(n,\) in both.*at least one sequence"),
        ([[1.0]], None, {}, r"values are \(1, 1\)"),
        ([1.0, 2.0], [1.0], {}, r"values are \(2,\) and weights \(1,\); expected \(n,\) in both"),
        ([1.0, float("nan")], None, {}, r"values\[1\] is nan; expected finite numbers: look at that sequence"),
        ([float("inf"), 1.0], None, {}, r"values\[0\] is inf"),
        ([1.0, 2.0], [1.0, float("nan")], {}, r"weights\[1\] is nan; expected positive finite"),
        ([1.0, 2.0], [0.0, 1.0], {}, r"weights\[0\] is 0.0.*Leave out sequences without a scored token"),
        ([1.0, 2.0], [1.0, float("inf")], {}, r"weights\[1\] is inf"),
        ([1.0], None, {"blocks": 0}, "blocks is 0; expected at least 1"),
        ([1.0], None, {"confidence": 95}, "confidence is 95; expected more than 0 and less than 1, for example 0.95"),
        ([1.0], None, {"confidence": 0.0}, "confidence is 0.0"),
        ([1.0], None, {"resamples": 0}, "resamples is 0; expected at least 1"),
    ],
)
def test_what_makes_no_sense_is_an_error(values, weights, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(torch.tensor(values), None if weights is None else torch.tensor(weights), **options)
