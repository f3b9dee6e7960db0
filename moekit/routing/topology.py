"""The topology gate: a limited share of tokens leaves the node."""

import torch
from torch import Tensor

from moekit.checks import flat_mask
from moekit.ratios import ratio_of
from moekit.routing.gates import noisy
from moekit.routing.top_k import check_choice, shifted, token_choice
from moekit.types import Logits, Routing


def topology_limited(
    logits: Logits,
    *,
    k: int = 2,
    num_nodes: int,
    node: int,
    share: float = 0.14,
    token_mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Routing:
    """Choose the k largest logits, but let at most ``share`` of the tokens have experts on other nodes.

    Tokens that would leave the node are ranked by their largest logit among the remote experts they chose. The first
    floor(share * T) keep their choice, and the others take the k best experts of this node. Weights are the softmax
    over the chosen logits. Experts are spread over nodes in blocks: node n has those from n E / num_nodes on.

    FastMoE's gate, for k = 2, decides by first choices alone: below the limit, second choices leave freely, and above
    it, a token that may leave has its first choice and the best local expert.

    **Not causal**: a later token can take an earlier one's leave. No host synchronisation. Deterministic on CUDA; equal
    logits rank by position.

    Args:
        logits: (T, E) float32, for the tokens of this node, with or without noise.
        k: experts per token, 1 <= k <= E / num_nodes.
        num_nodes: nodes that the experts are spread over; it divides E.
        node: the number of this one.
        share: of the tokens that may leave, between 0 and 1.
        token_mask: (T,) bool, or any shape of T elements; True for real tokens. The others take no leave from them, and
            do not count in the share.
        bias: (E,) added to the logits for selection and rank only.

    Returns:
        Routing of shape (T, k); weights sum to one.

    Raises:
        ValueError: if a number is out of range, or a shape or dtype does not fit.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 5.0, 0.0], [0.0, 1.0, 6.0, 0.0]])
        >>> topology_limited(logits, k=1, num_nodes=2, node=0, share=0.5).expert_indices
        tensor([[1],
                [2]])

    References:
        He et al., FasterMoE, PPoPP 2022 (topology-aware gate), https://doi.org/10.1145/3503221.3508418
    """
    logits = noisy(logits)
    check_choice(logits, k, name="topology_limited")
    _check_nodes(logits.shape[1], k, num_nodes, node, share)
    num_tokens, num_experts = logits.shape
    local = torch.arange(num_experts, device=logits.device) // (num_experts // num_nodes) == node  # (E,)
    scores = shifted(logits, bias).detach()
    values, chosen = torch.topk(scores, k, dim=-1)
    at_home = torch.topk(scores.masked_fill(~local, float("-inf")), k, dim=-1).indices
    rank = values.masked_fill(local[chosen], float("-inf")).amax(-1)  # (T,), -inf for a token that stays anyway
    numerator, denominator = ratio_of(share)
    real: int | Tensor = num_tokens
    if token_mask is not None:
        mask = flat_mask(token_mask, num_tokens)
        rank, real = rank.masked_fill(~mask, float("-inf")), mask.sum()
    order = torch.sort(rank, descending=True, stable=True).indices
    turns = torch.arange(num_tokens, device=logits.device)
    may_leave = torch.zeros_like(rank, dtype=torch.bool).scatter(0, order, turns < real * numerator // denominator)
    kept = may_leave | (rank == float("-inf"))
    chosen = chosen.where(kept.unsqueeze(-1), at_home)
    return token_choice(chosen, torch.softmax(logits.gather(-1, chosen), dim=-1), logits)


def over_nodes(
    logits: Logits,
    *,
    k: int = 2,
    num_nodes: int,
    share: float = 0.14,
    token_mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Routing:
    """Route each of ``num_nodes`` even parts of the tokens as those of one node, by ``topology_limited``.

    Not causal. No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) float32, the tokens of node 0 first, with or without noise.
        k: experts per token.
        num_nodes: that the experts, and here the tokens too, are spread over.
        share: of a node's tokens that may leave it.
        token_mask: (T,) bool, or any shape of T elements; see ``topology_limited``.
        bias: (E,) for the selection alone.

    Returns:
        Routing of shape (T, k).

    Raises:
        ValueError: as ``topology_limited``.

    Example:
        >>> over_nodes(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), k=1, num_nodes=2, share=0.0).expert_indices.flatten()
        tensor([0, 1])

    References:
        He et al., FasterMoE, PPoPP 2022 (topology-aware gate), https://doi.org/10.1145/3503221.3508418
    """
    logits = noisy(logits)
    check_choice(logits, k, name="over_nodes")
    _check_nodes(logits.shape[1], k, num_nodes, 0, share)
    masks = [None] * num_nodes if token_mask is None else token_mask.flatten().tensor_split(num_nodes)
    parts = [
        topology_limited(part, k=k, num_nodes=num_nodes, node=node, share=share, token_mask=mask, bias=bias)
        for node, (part, mask) in enumerate(zip(logits.tensor_split(num_nodes), masks, strict=True))
    ]
    chosen = torch.cat([part.expert_indices for part in parts])
    return token_choice(chosen, torch.cat([part.weights for part in parts]), logits)


def _check_nodes(num_experts: int, k: int, num_nodes: int, node: int, share: float) -> None:
    if num_nodes < 1 or num_experts % num_nodes or not 0 <= node < num_nodes:
        raise ValueError(
            f"topology_limited: num_nodes = {num_nodes} and node = {node} were given for E = {num_experts} experts; "
            f"expected a num_nodes that divides E, and 0 <= node < num_nodes."
        )
    if k > num_experts // num_nodes:
        raise ValueError(
            f"topology_limited: k = {k} experts per token, but a node has only {num_experts // num_nodes} of "
            f"E = {num_experts}; a token that must stay needs k of them. Lower k, or spread over fewer nodes."
        )
    if not 0 <= share <= 1:
        raise ValueError(f"topology_limited: share = {share}; expected a number between 0 and 1, such as 0.14.")
