"""The balancing loss within each sequence."""

from torch import Tensor

from moekit.routing.losses import balance_of_pools, shares
from moekit.routing.scopes import (
    Scope,
    check_decision,
    counts_of_pools,
    each_sequence,
    hidden_logits,
    ignores_counts,
    real_tokens,
    sums_of_pools,
)
from moekit.routing.top_k import Score, softmax
from moekit.types import Logits, Routing


@ignores_counts
def sequence_balance_loss(
    logits: Logits,
    routing: Routing,
    *,
    token_mask: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    sequence_length: int | None = None,
    score: Score = softmax,
    choices: int | None = None,
    per_token: float | None = None,
    scope: Scope = each_sequence,
) -> Tensor:
    """Compute the balancing loss of every sequence by itself, and average over tokens: mean_i E * sum_e f_e(i) P_e(i).

    f(i) and P(i) are taken over the real tokens of sequence i, so that a batch whose sequences each collapse on another
    expert, and which as a whole is balanced, still pays. **1 at perfect balance within every sequence** for any k.
    DeepSeek-V3 takes it with ``score=sigmoid`` and a coefficient of 0.0001.

    A sequence counts by its real tokens, so where all have as many, as in pretraining, each counts the same. (The paper
    takes them one by one.) It thus makes no difference how a step is cut into micro-batches.

    No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) float32, sequences one after the other; of logits with noise, the scores leave the noise out.
        routing: the decision made from them.
        token_mask: (T,) bool, True for real tokens. Others count in neither f nor P.
        tokens_per_expert: ignored: counts of a larger batch say nothing about one sequence.
        sequence_length: how many consecutive tokens make a sequence.
        score: what P averages; scores that do not sum to one per token are divided by their sum (equation 19).
        choices: count only the first so many choices of each token; None counts all.
        per_token: assignments per token that count as one, see ``load_balance_loss``.
        scope: the split into pools, for another one than sequences.

    Returns:
        Scalar float32.

    Raises:
        ValueError: if the length was not given, T is not a multiple of it, or the logits are in half precision; if the
            routing is not of their tokens and experts.

    Example:
        >>> import torch
        >>> from moekit.routing import load_balance_loss, top_k
        >>> logits = 50.0 * torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]])  # two sequences of two tokens
        >>> routing = top_k(logits, k=1)
        >>> load_balance_loss(logits, routing), sequence_balance_loss(logits, routing, sequence_length=2)
        (tensor(1.), tensor(2.))

    References:
        DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, equations 17 to 20, https://arxiv.org/abs/2412.19437
    """
    check_decision("sequence_balance_loss", logits, routing)
    counts = counts_of_pools(routing, token_mask, choices=choices, scope=scope, sequence_length=sequence_length)
    scores = shares(hidden_logits("sequence_balance_loss", logits, token_mask), score)
    sums = sums_of_pools(scores, token_mask, scope=scope, sequence_length=sequence_length)  # (pools, E)
    real = real_tokens(scores, token_mask, scope=scope, sequence_length=sequence_length)
    return balance_of_pools(counts, sums, real, per_token=per_token)
