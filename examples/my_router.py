"""A router in a user's own file: a token takes a second expert only where that one comes close to the first."""

from functools import partial

from torch import Tensor

from moekit.recipes import Recipe, mixtral
from moekit.routing import top_k
from moekit.types import Routing


def threshold(logits: Tensor, *, k: int, share: float = 0.5, bias: Tensor | None = None) -> Routing:
    """Take of the k best experts those with at least ``share`` of the best one's probability; weights sum to one."""
    routing = top_k(logits, k=k, bias=bias)
    weights = routing.weights  # (T, k)
    kept = weights >= share * weights.amax(-1, keepdim=True)
    weights = weights * kept
    return routing._replace(
        expert_indices=routing.expert_indices.where(kept, -1),  # -1: this assignment does not exist
        weights=weights / weights.sum(-1, keepdim=True),
    )


def my_moe(k: int = 2) -> Recipe:
    """Compose Mixtral's layer with this router."""
    return mixtral()._replace(route=partial(threshold, k=k))
