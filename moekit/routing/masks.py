"""Wrappers and edits of a routing: leave tokens or choices out."""

import torch
from torch import Tensor

from moekit.checks import flat_mask
from moekit.types import Routing


def mask_tokens(routing: Routing, token_mask: Tensor) -> Routing:
    """Take the assignments of padding tokens out of a routing: they reach no expert and take nobody's place.

    The capacity itself follows ``routing.pool``, a number known without reading the device, and stays as it is: padding
    counts in it, so that appending masked tokens makes room under a capacity limit. Causal. No host synchronisation.
    Deterministic on CUDA.

    Args:
        routing: any routing.
        token_mask: (T,) bool, or any shape of T elements; True for real tokens.

    Returns:
        The routing with expert -1 and weight 0 for the assignments of masked tokens.

    Raises:
        ValueError: if the mask has another number of elements than T.

    Example:
        >>> from moekit.routing import round_robin
        >>> mask_tokens(round_robin(torch.zeros(2, 4), k=2), torch.tensor([True, False])).expert_indices
        tensor([[ 0,  1],
                [-1, -1]])
    """
    return _keep(routing, flat_mask(token_mask, routing.num_tokens)[routing.token_indices])


def random_second(routing: Routing) -> Routing:
    """Keep a token's second expert with probability min(1, 2 g_2), GShard's random routing.

    Draws from torch's global generator. The weights of what is kept are unchanged. Causal. No host synchronisation.
    Deterministic for a given seed.

    Args:
        routing: of shape (T, 2), a token's weights summing to one.

    Returns:
        The routing with some second choices taken out (-1).

    Raises:
        ValueError: if the routing is not of two choices per token.

    Example:
        >>> from moekit.routing import top_k
        >>> random_second(top_k(torch.zeros(3, 4), k=2, normalize=True)).expert_indices.ge(0).all()
        tensor(True)

    References:
        Lepikhin et al., GShard, 2020, section 2.2 and Algorithm 1 line 17, https://arxiv.org/abs/2006.16668
    """
    if routing.expert_indices.ndim != 2 or routing.expert_indices.shape[1] != 2:
        raise ValueError(
            f"random_second: the routing has shape {tuple(routing.expert_indices.shape)}; expected (T, 2). "
            f"Use it behind a router with k = 2."
        )
    weights = routing.weights.detach()
    kept = torch.stack([torch.ones_like(weights[:, 0]), 2 * weights[:, 1]], dim=1)
    return _keep(routing, torch.rand_like(weights) < kept)


def _keep(routing: Routing, kept: Tensor) -> Routing:
    experts = routing.expert_indices.masked_fill(~kept, -1)
    weights = routing.weights.masked_fill(~kept, 0.0)
    # Spelled out: torch 2.11 cannot compile a model that returns what ``_replace`` made.
    return Routing(routing.token_indices, experts, weights, *routing[3:])
