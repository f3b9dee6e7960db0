"""What a change of routing moved: the router weight that it dropped and added."""

from typing import NamedTuple

import torch
from torch import Tensor

from moekit.routing.scopes import weights_by_expert
from moekit.types import Routing


class MovedMass(NamedTuple):
    """How much router weight a change of routing moved, as shares of all weight before.

    Attributes:
        dropped: scalar, the weight of the assignments that are gone.
        added: scalar, the weight of those that are new.
    """

    dropped: Tensor
    added: Tensor


@torch.no_grad()
def moved_mass(before: Routing, after: Routing) -> MovedMass:
    """Measure what share of the router's weight a change of routing dropped and added.

    No gradient. No host synchronisation: the caller decides when to read the numbers. Deterministic on CUDA where a
    token has an expert once.

    Args:
        before: any routing over T tokens and E experts.
        after: another one, such as ``round_tokens`` of it.

    Returns:
        MovedMass; zeros where there is no weight before.

    Raises:
        ValueError: if they are not over the same tokens and experts.

    Example:
        >>> from moekit.routing import round_tokens, top_k
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        >>> chosen = top_k(logits, k=1)
        >>> moved_mass(chosen, round_tokens(logits, chosen, tile=2, rounding=torch.floor)).dropped
        tensor(0.3333)
    """
    if (before.num_tokens, before.num_experts) != (after.num_tokens, after.num_experts):
        raise ValueError(
            f"moved_mass: the routings are over {before.num_tokens} and {after.num_tokens} tokens, "
            f"{before.num_experts} and {after.num_experts} experts; expected two routings of the same "
            f"tokens to the same experts."
        )
    old, new = weights_by_expert(before), weights_by_expert(after)
    total = old.sum()
    dropped = old.masked_fill(_exists(after), 0.0).sum()
    added = new.masked_fill(_exists(before), 0.0).sum()
    scale = torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, total))
    return MovedMass(dropped * scale, added * scale)


def _exists(routing: Routing) -> Tensor:
    """Return (T, E) bool, the pairs that a routing has."""
    pairs, num_pairs = _pairs(routing)
    exists = torch.zeros(num_pairs + 1, dtype=torch.bool, device=pairs.device).scatter(0, pairs, True)
    return exists[:-1].view(routing.num_tokens, routing.num_experts)


def _pairs(routing: Routing) -> tuple[Tensor, int]:
    """Number the assignments (N,) by t * E + e; those that do not exist get T * E, the number past the end."""
    experts = routing.expert_indices.flatten()
    end = routing.num_tokens * routing.num_experts
    pairs = routing.token_indices.flatten() * routing.num_experts + experts
    return torch.where(experts < 0, end, pairs), end
