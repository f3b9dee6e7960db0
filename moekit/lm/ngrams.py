"""Count-based baselines: what a model must beat to have learned more than which token follows which.

Both score exactly what a language model is scored on: the targets ``sequences[:, 1:]``, each given its predecessor.
The id -1 is padding: no target, and what follows it is none.

References:
    Stanley F. Chen and Joshua Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", Harvard
    TR-10-98, 1998: sections 2.1 (additive smoothing), 2.6 (absolute discounting) and 2.7 (Kneser-Ney).
    Hermann Ney, Ute Essen and Reinhard Kneser, "On Structuring Probabilistic Dependences in Stochastic Language
    Modelling", Computer Speech and Language 8, 1994.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.lm.token_rows import real_targets

_DISCOUNTS = tuple(step / 20 for step in range(2, 20))


class _Pairs(NamedTuple):
    """What training counted, gathered for each (context, target) pair to score. All (num_pairs,) float64."""

    times: Tensor  # how often the pair was seen
    total: Tensor  # how often the context was
    kinds: Tensor  # how many different targets the context had
    unigram: Tensor  # probability of the target
    continuation: Tensor  # the same in proportion to the different contexts of the target


def unigram_loss(train: Tensor, held_out: Tensor, *, vocab_size: int, alpha: float = 1.0) -> float:
    """Score held-out targets by how often each token is a target in training.

    p(t) = (n(t) + alpha) / (n + alpha V), with n(t) the training targets that are t.

    Args:
        train: (num_sequences, seq_len + 1) ints in [0, V), or -1 where there is no token.
        held_out: (any, any + 1) ints in [0, V), or -1.
        vocab_size: V.
        alpha: count added to every token, above 0.

    Returns:
        Mean loss in nats per token.

    Raises:
        ValueError: if ``alpha`` is not above 0, the sequences are no such tensors, or there is no target to score.

    Example:
        >>> train = torch.tensor([[0, 1, 1, 0, 1]])
        >>> round(unigram_loss(train, train, vocab_size=2), 3)  # -(3 log(4/6) + log(2/6)) / 4
        0.579
    """
    _check(train, held_out, vocab_size, alpha)
    probs = _add_alpha(_bincount(_targets(train), vocab_size), alpha)
    return -float(probs[_targets(held_out)].log().mean())


def bigram_loss(train: Tensor, held_out: Tensor, *, vocab_size: int, alpha: float = 1.0) -> float:
    """Score held-out targets by which token they follow, with interpolated absolute discounting.

    With n(c, t) the times that t follows c in training, n(c) their sum and k(c) the number of different t:

        p(t | c) = max(n(c, t) - d, 0) / n(c) + d k(c) / n(c) * q(t),    and q(t) where n(c) = 0

    The discount d and the lower order q are those that score best on every twentieth training sequence, with counts
    from the others; then all of training is counted. q is either the unigram (absolute discounting) or in proportion
    to the number of different contexts of t (Kneser-Ney), both with alpha added. Held-out data choose nothing.

    Args:
        train: (num_sequences, seq_len + 1) ints in [0, V), or -1 where there is no token; at least two sequences
            with targets.
        held_out: (any, any + 1) ints in [0, V), or -1.
        vocab_size: V. Counts take 8 V² bytes.
        alpha: count added to every token of the lower order, above 0.

    Returns:
        Mean loss in nats per token.

    Raises:
        ValueError: if ``alpha`` is not above 0, the sequences are no such tensors, or there is no target to score.

    Example:
        >>> train = torch.tensor([[0, 1, 0, 1, 0, 1, 0]] * 40)
        >>> unigram_loss(train, train, vocab_size=2) > 0.69 > 0.01 > bigram_loss(train, train, vocab_size=2)
        True
    """
    _check(train, held_out, vocab_size, alpha)
    train = train[real_targets(train).any(1)]
    if len(train) < 2:
        raise ValueError(
            f"train has targets in {len(train)} of its sequences; expected at least 2 such, since one is needed to "
            "choose the discount"
        )
    slice_ = torch.arange(len(train)) % 20 == min(19, len(train) - 1)
    chosen_on = _pairs(train[~slice_], train[slice_], vocab_size, alpha)
    discount, kneser_ney = min(
        ((discount, kneser_ney) for kneser_ney in (False, True) for discount in _DISCOUNTS),
        key=lambda choice: _loss(chosen_on, discount=choice[0], kneser_ney=choice[1]),
    )
    return _loss(_pairs(train, held_out, vocab_size, alpha), discount=discount, kneser_ney=kneser_ney)


def _pairs(train: Tensor, scored: Tensor, vocab_size: int, alpha: float) -> _Pairs:
    contexts, targets = _contexts(train), _targets(train)
    counts = _bincount(contexts * vocab_size + targets, vocab_size * vocab_size).view(-1, vocab_size)
    seen = counts > 0
    contexts, targets = _contexts(scored), _targets(scored)
    return _Pairs(
        times=counts[contexts, targets].double(),
        total=counts.sum(1).double()[contexts],
        kinds=seen.sum(1).double()[contexts],
        unigram=_add_alpha(counts.sum(0), alpha)[targets],
        continuation=_add_alpha(seen.sum(0), alpha)[targets],
    )


def _loss(pairs: _Pairs, *, discount: float, kneser_ney: bool) -> float:
    lower = pairs.continuation if kneser_ney else pairs.unigram
    probs = ((pairs.times - discount).clamp(min=0) + discount * pairs.kinds * lower) / pairs.total.clamp(min=1)
    return -float(torch.where(pairs.total > 0, probs, lower).log().mean())


def _targets(sequences: Tensor) -> Tensor:
    """Return what is predicted, (num_targets,) int64."""
    return sequences[:, 1:][real_targets(sequences)].long()


def _contexts(sequences: Tensor) -> Tensor:
    """Return what precedes each target, (num_targets,) int64."""
    return sequences[:, :-1][real_targets(sequences)].long()


def _bincount(ids: Tensor, size: int) -> Tensor:
    return torch.bincount(ids, minlength=size)


def _add_alpha(counts: Tensor, alpha: float) -> Tensor:
    return (counts.double() + alpha) / (float(counts.sum()) + alpha * len(counts))


def _check(train: Tensor, held_out: Tensor, vocab_size: int, alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}; expected a number above 0, or unseen tokens have no probability")
    for name, sequences in (("train", train), ("held_out", held_out)):
        if sequences.ndim != 2 or sequences.shape[0] < 1 or sequences.shape[1] < 2:
            raise ValueError(f"{name} has the shape {tuple(sequences.shape)}; expected (num_sequences, seq_len + 1)")
        low, high = int(sequences.min()), int(sequences.max())
        if low < -1 or high >= vocab_size:
            raise ValueError(
                f"{name} has ids from {low} to {high}; expected ids in [0, {vocab_size}), or -1 for padding"
            )
    if not real_targets(held_out).any():
        raise ValueError("held_out has no target but padding; expected at least one token behind a token to score")
