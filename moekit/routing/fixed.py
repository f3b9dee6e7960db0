"""Fixed routers: the choice does not depend on the logits. Controls for ablations, and balanced loads for benchmarks.

Their weights are still the scores of the chosen experts, so that the router keeps a gradient and the only thing that
changes against ``top_k`` is who is chosen. All of them accept, and ignore, a selection bias. Noise is there for the
choice, so of logits with noise they take those without.
"""

from functools import partial

import torch
from torch import Tensor

from moekit.routing.gates import clean
from moekit.routing.top_k import Score, check_choice, scored, softmax, token_choice, weights_at
from moekit.types import Logits, RouterState, Routing


def hash_choice(
    logits: Logits,
    *,
    token_ids: Tensor,
    table: Tensor,
    score: Score = softmax,
    normalize: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Routing:
    """Look the experts of each token up by its vocabulary id: S_t = table[id_t], g = scale * s_S.

    Causal. No host synchronisation. Deterministic on CUDA. Ids are not checked, since that would read them, but for
    what the CPU itself notices: one below zero counts from the end of the table, as any index of a tensor, so padding
    of -1 needs a ``token_mask``.

    Args:
        logits: (T, E) float32, with or without noise; only the weights depend on them, without.
        token_ids: (T,) or any shape of T elements, int64 in [0, V).
        table: (V, K) int64 in [0, E), for example from ``hash_table``.
        score: (T, E) logits -> (T, E) scores.
        normalize: divide a token's weights by their sum.
        scale: factor on the weights (DeepSeek's routed scaling factor).
        bias: ignored; the choice is fixed.

    Returns:
        Routing of shape (T, K).

    Raises:
        ValueError: if the number of ids is not T, or the table is wider than E; on a CPU, not compiled, if an
            id is not in the table.

    Example:
        >>> table = torch.tensor([[0], [2]])
        >>> hash_choice(torch.zeros(3, 4), token_ids=torch.tensor([1, 0, 1]), table=table).expert_indices.flatten()
        tensor([2, 0, 2])

    References:
        Roller et al., Hash Layers for Large Sparse Models, 2021, https://arxiv.org/abs/2106.04426
    """
    logits = clean(logits)
    check_choice(logits, table.shape[-1], name="hash_choice")
    if token_ids.numel() != logits.shape[0]:
        raise ValueError(
            f"hash_choice: {token_ids.numel()} token ids were given for T = {logits.shape[0]} tokens; expected one "
            f"vocabulary id per row of the logits."
        )
    try:
        chosen = table[token_ids.flatten()]
    except IndexError as error:  # on a CPU; a CUDA device would have to be waited for
        raise ValueError(
            f"hash_choice: the table has experts for {table.shape[0]} token ids, and there is one beyond ({error}); "
            f"expected one row for each id of the vocabulary. Make it for so many: hash_layer(vocab_size=...)."
        ) from error
    return _chosen(chosen, logits, score=score, normalize=normalize, scale=scale)


def hash_table(vocab_size: int, num_experts: int, *, k: int, seed: int = 0) -> Tensor:
    """Draw a table of k different experts per vocabulary id.

    Args:
        vocab_size: V.
        num_experts: E.
        k: experts per id.
        seed: of the draw; the global generator is not touched.

    Returns:
        (V, k) int64 in [0, E).

    Raises:
        ValueError: if k is not between 1 and E.

    Example:
        >>> hash_table(100, 8, k=2).shape
        torch.Size([100, 2])
    """
    check_choice(torch.empty(0, num_experts, dtype=torch.float32), k, name="hash_table")
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(vocab_size, num_experts, generator=generator).argsort(-1)[:, :k].contiguous()


def fixed_table(*, vocab_size: int, k: int, seed: int = 0) -> RouterState:
    """Make the state of a hash layer: a table of k experts for each vocabulary id, which stays as it is.

    Args:
        vocab_size: V.
        k: experts per id.
        seed: of the draw.

    Returns:
        RouterState, a (V, k) int64 tensor named ``table``.

    Example:
        >>> fixed_table(vocab_size=100, k=1).init(8).shape
        torch.Size([100, 1])

    References:
        Roller et al., Hash Layers for Large Sparse Models, 2021, https://arxiv.org/abs/2106.04426
    """
    return RouterState("table", partial(_table, vocab_size=vocab_size, k=k, seed=seed))


def random_choice(
    logits: Logits, *, k: int, score: Score = softmax, normalize: bool = False, bias: Tensor | None = None
) -> Routing:
    """Choose k different experts uniformly at random, anew at every call, from torch's global generator.

    Causal. No host synchronisation. Deterministic for a given seed.

    Args:
        logits: (T, E) float32, with or without noise; only the weights depend on them, without.
        k: experts per token, 1 <= k <= E.
        score: (T, E) logits -> (T, E) scores.
        normalize: divide a token's weights by their sum.
        bias: ignored; the choice does not depend on scores.

    Returns:
        Routing of shape (T, k).

    Raises:
        ValueError: if k is not between 1 and E.

    Example:
        >>> random_choice(torch.zeros(5, 4), k=2).expert_indices.shape
        torch.Size([5, 2])
    """
    logits = clean(logits)
    check_choice(logits, k, name="random_choice")
    expert_indices = torch.topk(torch.rand_like(logits), k, dim=-1).indices
    return _chosen(expert_indices, logits, score=score, normalize=normalize)


def round_robin(
    logits: Logits, *, k: int, score: Score = softmax, normalize: bool = False, bias: Tensor | None = None
) -> Routing:
    """Deal assignments out in turn: assignment n goes to expert n mod E, so that loads differ by at most one.

    Causal. No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) float32, with or without noise; only the weights depend on them, without.
        k: experts per token, 1 <= k <= E.
        score: (T, E) logits -> (T, E) scores.
        normalize: divide a token's weights by their sum.
        bias: ignored; the choice does not depend on scores.

    Returns:
        Routing of shape (T, k).

    Raises:
        ValueError: if k is not between 1 and E.

    Example:
        >>> round_robin(torch.zeros(3, 4), k=2).expert_indices
        tensor([[0, 1],
                [2, 3],
                [0, 1]])
    """
    logits = clean(logits)
    check_choice(logits, k, name="round_robin")
    num_tokens, num_experts = logits.shape
    expert_indices = torch.arange(num_tokens * k, device=logits.device).view(num_tokens, k) % num_experts
    return _chosen(expert_indices, logits, score=score, normalize=normalize)


def _chosen(expert_indices: Tensor, logits: Tensor, *, score: Score, normalize: bool, scale: float = 1.0) -> Routing:
    weights = weights_at(scored(score, logits), expert_indices, normalize=normalize, scale=scale)
    return token_choice(expert_indices, weights, logits)


def _table(num_experts: int, *, vocab_size: int, k: int, seed: int, device: torch.device | str | None = None) -> Tensor:
    return hash_table(vocab_size, num_experts, k=k, seed=seed).to(device)
