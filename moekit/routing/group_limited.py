"""Group-limited choice: the experts of a token come from its best few groups of experts, such as those of a node."""

import torch
from torch import Tensor

from moekit.routing.gates import noisy
from moekit.routing.top_k import Score, check_choice, scored, shifted, softmax, token_choice, weights_at
from moekit.types import Logits, Routing


def group_limited(
    logits: Logits,
    *,
    k: int,
    num_groups: int,
    groups_kept: int,
    group_top: int = 2,
    masked: float = -torch.inf,
    score: Score = softmax,
    normalize: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Routing:
    """Keep a token's best groups of experts, then take its k best experts of those.

    Groups are runs of E / J experts. G_j = sum of the ``group_top`` largest s + b of group j; the experts of all but
    the ``groups_kept`` best groups get the value ``masked``; S = topK of that; g = scale * s_S, optionally over its
    sum. With one group this is ``top_k``. The published forms:

    - DeepSeek-V3's report, TorchTitan and transformers 5.24: sigmoid, bias, ``group_top=2``, ``masked=-inf``,
      ``normalize=True``.
    - NeMo AutoModel, and transformers before: the same with ``masked=0``. With a negative bias an expert of a kept
      group can then lose to a masked one, so that more groups are used than are kept.
    - Megatron-LM: ``group_top=k // groups_kept``, ``masked=-inf``.
    - DeepSeek-V2: softmax, no bias, ``group_top=1``, ``masked=0``, ``normalize=False``.

    Causal. No host synchronisation. Deterministic on CUDA; ties are broken as ``torch.topk`` breaks them.

    Args:
        logits: (T, E) float32, with or without noise.
        k: experts per token, 1 <= k <= groups_kept * E / num_groups.
        num_groups: J, a divisor of E.
        groups_kept: groups that a token may use, 1 <= groups_kept <= J.
        group_top: experts that speak for their group, 1 <= group_top <= E / J.
        masked: what the experts of other groups count in the choice.
        score: (T, E) logits -> (T, E) scores.
        normalize: divide a token's weights by their sum.
        scale: factor on the weights (DeepSeek's routed scaling factor).
        bias: (E,) added to the scores for the choice of groups and of experts, never to the weights.

    Returns:
        Routing of shape (T, k).

    Raises:
        ValueError: if the numbers of experts and groups do not fit each other, or a shape or dtype does not fit.

    Example:
        >>> logits = torch.tensor([[5.0, 0.0, 4.0, 4.0]])
        >>> group_limited(logits, k=2, num_groups=2, groups_kept=1, score=torch.sigmoid).expert_indices
        tensor([[2, 3]])

    References:
        DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, section 2.1.2 (node-limited routing),
            https://arxiv.org/abs/2412.19437
        DeepSeek-AI, DeepSeek-V2, 2024 (device-limited routing), https://arxiv.org/abs/2405.04434
    """
    logits = noisy(logits)
    check_choice(logits, k, name="group_limited")
    _check_groups(logits.shape[1], k, num_groups=num_groups, groups_kept=groups_kept, group_top=group_top)
    scores = scored(score, logits)
    selection = shifted(scores.detach(), bias)
    kept = _kept_experts(selection, num_groups=num_groups, groups_kept=groups_kept, group_top=group_top)
    expert_indices = torch.topk(selection.masked_fill(~kept, masked), k, dim=-1).indices
    return token_choice(expert_indices, weights_at(scores, expert_indices, normalize=normalize, scale=scale), logits)


def _kept_experts(selection: Tensor, *, num_groups: int, groups_kept: int, group_top: int) -> Tensor:
    """Return (T, E) bool, the experts of each token's best groups."""
    by_group = selection.unflatten(-1, (num_groups, -1))  # (T, J, E/J)
    group_scores = torch.topk(by_group, group_top, dim=-1).values.sum(-1)  # (T, J)
    best = torch.topk(group_scores, groups_kept, dim=-1).indices
    kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, best, True)
    return kept.unsqueeze(-1).expand_as(by_group).flatten(1)


def _check_groups(num_experts: int, k: int, *, num_groups: int, groups_kept: int, group_top: int) -> None:
    if num_groups < 1 or num_experts % num_groups or not 1 <= groups_kept <= num_groups:
        raise ValueError(
            f"group_limited: groups_kept = {groups_kept} of num_groups = {num_groups} groups of E = {num_experts} "
            f"experts; expected num_groups to divide E, and 1 <= groups_kept <= num_groups."
        )
    size = num_experts // num_groups
    if not 1 <= group_top <= size or k > groups_kept * size:
        most = max(group_top, -(-k // groups_kept))
        raise ValueError(
            f"group_limited: group_top = {group_top} and k = {k}, but a group has {size} experts and {groups_kept} "
            f"groups are kept; expected 1 <= group_top <= {size} and k <= {groups_kept * size}. Lower them, keep more "
            f"groups, or raise the number of experts (--moe-num-experts) to {num_groups * most} or more."
        )
