import itertools
import math
import time

import pytest
import torch
import torch.nn.functional as F

from moekit.lm.ngrams import bigram_loss, unigram_loss

V = 6


def chain(num_sequences, length, *, seed, order=V):
    """Draw sequences from a Markov chain, and give its entropy rate and the entropy of its stationary distribution."""
    generator = torch.Generator().manual_seed(7)
    transition = (2 * torch.randn(order, order, generator=generator, dtype=torch.float64)).softmax(1)
    stationary = torch.linalg.matrix_power(transition, 200)[0]
    generator.manual_seed(seed)
    states = [torch.multinomial(stationary, num_sequences, replacement=True, generator=generator)]
    for _ in range(length - 1):
        states.append(torch.multinomial(transition[states[-1]], 1, generator=generator).squeeze(1))
    rate = -(stationary[:, None] * transition * transition.log()).sum()
    return torch.stack(states, 1), float(rate), float(-(stationary * stationary.log()).sum())


def test_losses_approach_the_entropies_of_a_chain():
    train, rate, entropy = chain(3000, 33, seed=0)
    held_out, _, _ = chain(3000, 33, seed=1)
    assert entropy - rate > 0.3
    assert bigram_loss(train, held_out, vocab_size=V) == pytest.approx(rate, abs=0.01)
    assert unigram_loss(train, held_out, vocab_size=V) == pytest.approx(entropy, abs=0.01)


def test_probabilities_sum_to_one():
    train = torch.randint(0, V - 2, (9, 5), generator=torch.Generator().manual_seed(0))  # two tokens are never seen
    train[:, -1] = V - 2  # and one is never a context
    for context in range(V):
        pairs = [torch.tensor([[context, target]]) for target in range(V)]
        assert sum(math.exp(-bigram_loss(train, pair, vocab_size=V)) for pair in pairs) == pytest.approx(1, abs=1e-12)
        assert sum(math.exp(-unigram_loss(train, pair, vocab_size=V)) for pair in pairs) == pytest.approx(1, abs=1e-12)


def test_unigram_by_hand():
    train = torch.tensor([[3, 0, 0, 1]])  # the first token is never a target
    probs = torch.tensor([2.5, 1.5, 0.5, 0.5]) / 5
    held_out = torch.tensor([[0, 3, 1]])
    expected = -float(probs[[3, 1]].log().mean())
    assert unigram_loss(train, held_out, vocab_size=4, alpha=0.5) == pytest.approx(expected, abs=1e-6)


def naive_bigram(train, held_out, *, discount, kneser_ney, vocab_size):
    counts = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
    targets = torch.zeros(vocab_size, dtype=torch.float64)
    for row in train.tolist():
        for c, t in itertools.pairwise(row):
            if t >= 0 and c >= 0:
                targets[t] += 1
                counts[c, t] += 1
    lower = ((counts > 0).sum(0) if kneser_ney else targets).double() + 1
    lower = lower / lower.sum()
    losses = []
    for row in held_out.tolist():
        for c, t in itertools.pairwise(row):
            if t < 0 or c < 0:
                continue
            n = counts[c].sum()
            p = lower[t]
            if n:
                p = max(counts[c, t] - discount, 0) / n + discount * (counts[c] > 0).sum().double() / n * lower[t]
            losses.append(-math.log(p))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("padded", [False, True])
def test_bigram_equals_the_formula_with_the_choice_made_on_training_data(padded):
    train, _, _ = chain(41, 6, seed=0)
    held_out, _, _ = chain(10, 6, seed=1)
    if padded:  # at the end, in the middle, at the start
        for sequences in (train, held_out):
            sequences[::3, 4:] = -1
            sequences[1::5, 2] = -1
            sequences[2::7, 0] = -1
    slice_ = torch.zeros(41, dtype=torch.bool)
    slice_[19::20] = True

    def choose(kneser_ney, discount):
        chosen = {"discount": discount, "kneser_ney": kneser_ney, "vocab_size": V}
        return naive_bigram(train[~slice_], train[slice_], **chosen), chosen

    _, best = min((choose(kn, d / 20) for kn in (False, True) for d in range(2, 20)), key=lambda pair: pair[0])
    expected = naive_bigram(train, held_out, **best)
    assert bigram_loss(train, held_out, vocab_size=V) == pytest.approx(expected, abs=1e-9)
    nothing = torch.full((3, 6), -1)
    assert bigram_loss(torch.cat([nothing, train]), torch.cat([held_out, nothing]), vocab_size=V) == pytest.approx(
        expected, abs=1e-9
    )


def test_smoothing_beats_added_counts_on_scarce_data():
    train, _, _ = chain(60, 20, seed=0, order=40)
    held_out, _, _ = chain(60, 20, seed=1, order=40)
    counts = torch.ones(40, 40, dtype=torch.float64)
    counts.index_put_((train[:, :-1], train[:, 1:]), torch.ones((), dtype=torch.float64), accumulate=True)
    added = F.nll_loss(
        (counts / counts.sum(1, keepdim=True)).log()[held_out[:, :-1].flatten()], held_out[:, 1:].flatten()
    )
    assert bigram_loss(train, held_out, vocab_size=40) < float(added)


def test_padding_is_neither_a_token_nor_the_one_before():
    train = torch.tensor([[3, 0, 0, -1, 1, 2], [-1] * 6, [1, -1, -1, -1, -1, -1]])
    held_out = torch.tensor([[3, 1, -1, 0, 2], [-1, -1, -1, -1, -1]])
    probs = torch.tensor([3.0, 1.0, 2.0, 1.0]) / 7  # of the targets 0, 0 and 2
    expected = -float(probs[[1, 2]].log().mean())
    assert unigram_loss(train, held_out, vocab_size=4) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_any_integer_type(dtype):
    train, _, _ = chain(50, 9, seed=0)
    for loss in (unigram_loss, bigram_loss):
        assert loss(train.to(dtype), train.to(dtype), vocab_size=V) == loss(train, train, vocab_size=V)


@pytest.mark.parametrize("loss", [unigram_loss, bigram_loss])
def test_bad_input(loss):
    good = torch.zeros(4, 3, dtype=torch.int64)
    for train, held_out, message in [
        (good[0], good, r"train has the shape \(3,\); expected \(num_sequences, seq_len \+ 1\)"),
        (good, good[:, :1], r"held_out has the shape \(4, 1\)"),
        (good[:0], good, r"train has the shape \(0, 3\)"),
        (good + 5, good, r"train has ids from 5 to 5; expected ids in \[0, 5\)"),
        (good, good - 2, r"held_out has ids from -2 to -2; expected ids in \[0, 5\), or -1 for padding"),
        (good, good - 1, r"held_out has no target but padding; expected at least one token behind a token to score"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(train, held_out, vocab_size=5)
    with pytest.raises(ValueError, match="alpha is 0; expected a number above 0"):
        loss(good, good, vocab_size=5, alpha=0)


def test_bigram_needs_two_sequences():
    two = torch.tensor([[0, 0, 1], [1, -1, -1]])
    for train in (two[:1], two):
        with pytest.raises(ValueError, match="train has targets in 1 of its sequences; expected at least 2 such"):
            bigram_loss(train, two, vocab_size=2)


def test_a_million_tokens_are_fast():
    train = torch.randint(0, 1024, (8000, 129), generator=torch.Generator().manual_seed(0))
    start = time.process_time()
    bigram_loss(train, train[:400], vocab_size=1024)
    assert time.process_time() - start < 5


def test_what_is_added_to_counts_of_contexts_is_alpha_too():
    """A pair that nobody saw: the lower order decides, which is Kneser-Ney's here."""
    train = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1]] * 20)
    loss = bigram_loss(train, torch.tensor([[3, 2]]), vocab_size=4, alpha=0.5)
    assert loss == pytest.approx(math.log(8), abs=1e-5)
