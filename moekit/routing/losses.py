"""Balancing: losses that are returned, and the selection bias. Each docstring gives the value at perfect balance."""

import torch
from torch import Tensor

from moekit.routing.top_k import Score, softmax
from moekit.segments import tokens_per_expert as count_tokens
from moekit.types import Routing


def load_balance_loss(
    logits: Tensor,
    routing: Routing,
    *,
    token_mask: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    sequence_length: int | None = None,
    score: Score = softmax,
    choices: int | None = None,
) -> Tensor:
    """Compute the Switch / GShard balancing loss E * sum_e f_e P_e of one layer.

    f_e is the share of assignments that went to expert e, counted before any drop and without gradient; P_e is the mean
    score of expert e over real tokens. The loss is **1 at perfect balance** for any k, and E at full collapse.
    It is MegaBlocks' and OpenLM's loss for one layer; Hugging Face's form is K times larger.

    No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) float32.
        routing: the decision made from them.
        token_mask: (T,) bool, True for real tokens. Others count in neither f nor P.
        tokens_per_expert: counts to use for f in place of this call's own, for example summed over micro-batches and
            ranks (the global-batch loss of Qiu et al.): (E,), or (K, E) by choice, of which ``choices`` takes the
            first.
        sequence_length: not used.
        score: what P averages; scores that do not sum to one per token are divided by their sum.
        choices: count only the first so many choices of each token; 1 is GShard's own form. None counts all.

    Returns:
        Scalar float32.

    Raises:
        ValueError: if ``choices`` is given for a routing that is not (T, K).

    Example:
        >>> from moekit.routing import round_robin
        >>> load_balance_loss(torch.zeros(8, 4), round_robin(torch.zeros(8, 4), k=2))
        tensor(1.)

    References:
        Fedus et al., Switch Transformers, 2021, equations 4 to 6, https://arxiv.org/abs/2101.03961
        Lepikhin et al., GShard, 2020, Algorithm 1, https://arxiv.org/abs/2006.16668
        Wang et al., 2024 (sequence form of the scores), https://arxiv.org/abs/2408.15664
        Qiu et al., Demons in the Detail, 2025 (global-batch statistics), https://arxiv.org/abs/2501.11873
    """
    num_experts = logits.shape[-1]
    if tokens_per_expert is None:
        tokens_per_expert = _counts(routing, token_mask, choices)
    elif tokens_per_expert.ndim == 2:
        tokens_per_expert = tokens_per_expert[:choices].sum(0)
    scores = score(logits)
    probs = scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    load = tokens_per_expert.to(probs.dtype)
    load = load / load.sum().clamp_min(1)
    return num_experts * torch.dot(load, _mean_over_tokens(probs, token_mask))


def z_loss(
    logits: Tensor,
    routing: Routing | None = None,
    *,
    token_mask: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    sequence_length: int | None = None,
) -> Tensor:
    """Compute the router z-loss, the mean of (logsumexp_e z)^2: it keeps logits small. (ln E)^2 at zero logits.

    No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) float32.
        routing: not used; here so that every loss has one signature.
        token_mask: (T,) bool, True for real tokens.
        tokens_per_expert: not used.
        sequence_length: not used.

    Returns:
        Scalar float32.

    Example:
        >>> z_loss(torch.zeros(5, 4)).sqrt().exp()
        tensor(4.)

    References:
        Zoph et al., ST-MoE, 2022, equation 5, https://arxiv.org/abs/2202.08906
    """
    return _mean_over_tokens(torch.logsumexp(logits, dim=-1).square(), token_mask)


def update_bias(bias: Tensor, tokens_per_expert: Tensor, *, rate: float) -> Tensor:
    """Move the selection bias one step toward balance: b_e + rate * sign(mean(c) - c_e).

    Call it once per optimizer step, with counts summed over all micro-batches and ranks. This is DeepSeek-V3's rule;
    subtracting the mean of b, as some projects do, changes no selection and is not done.

    Args:
        bias: (E,) float32.
        tokens_per_expert: (E,) counts.
        rate: step size (DeepSeek-V3: 0.001).

    Returns:
        (E,) the new bias; the argument is unchanged.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> update_bias(torch.zeros(3), torch.tensor([4, 1, 1]), rate=0.5)
        tensor([-0.5000,  0.5000,  0.5000])

    References:
        Wang et al., Auxiliary-Loss-Free Load Balancing, 2024, Algorithm 1, https://arxiv.org/abs/2408.15664
    """
    if bias.shape != tokens_per_expert.shape:
        raise ValueError(
            f"update_bias: bias has shape {tuple(bias.shape)} and tokens_per_expert {tuple(tokens_per_expert.shape)}; "
            f"expected one number per expert in both."
        )
    counts = tokens_per_expert.to(bias.dtype)
    return bias + rate * torch.sign(counts.mean() - counts)


def _counts(routing: Routing, token_mask: Tensor | None, choices: int | None) -> Tensor:
    experts, tokens = routing.expert_indices, routing.token_indices
    if choices is not None:
        if experts.ndim != 2:
            raise ValueError(
                f"load_balance_loss: choices={choices} counts first choices of tokens, but the routing has shape "
                f"{tuple(experts.shape)}, not (T, K). Leave choices out for this router."
            )
        experts, tokens = experts[:, :choices], tokens[:, :choices]
    if token_mask is not None:
        experts = experts.masked_fill(~token_mask.flatten().bool()[tokens], -1)
    return count_tokens(experts, routing.num_experts)


def _mean_over_tokens(values: Tensor, token_mask: Tensor | None) -> Tensor:
    if token_mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    mask = token_mask.flatten().bool()
    kept = values.masked_fill(~mask.view(-1, *[1] * (values.ndim - 1)), 0.0)
    return kept.sum(0) / mask.sum().clamp_min(1)
