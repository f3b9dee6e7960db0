"""The order of tokens among those of other ranks, which decides whom a capacity limit drops."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from moekit.types import ExpertLayer, Routing

_FAR = 2**40  # more assignments than a rank ever has


def in_order(layer: ExpertLayer, *, rank: int, num_ranks: int, block: int | None = None) -> ExpertLayer:
    """Give every assignment its place among those of all ranks, for the capacity limit of ``layer`` behind exchanges.

    Without it, tokens are in the order in which they arrive, which is by rank behind one exchange, and by local rank,
    then node, behind a hierarchical one.

    Causal if the layer is. No host synchronisation beyond the layer's. Deterministic on CUDA if the layer is.

    Args:
        layer: the outermost strategy.
        rank: of this process.
        num_ranks: that tokens are spread over.
        block: consecutive tokens that are dealt to the ranks in turn, as sequences of a batch are: the order is first
            block of rank 0, first of rank 1, ..., second of rank 0, ... None: all of rank 0, then all of rank 1, ...

    Returns:
        ExpertLayer.

    Raises:
        ValueError: when called, if the tokens are no whole number of blocks.

    Example:
        >>> from moekit.routing import round_robin
        >>> show = lambda x, routing, params: routing.positions.flatten()
        >>> layer = in_order(show, rank=1, num_ranks=2, block=2)
        >>> layer(torch.ones(4, 1), round_robin(torch.zeros(4, 2), k=1), None)
        tensor([2, 3, 6, 7])
    """
    return partial(_in_order, layer=layer, rank=rank, num_ranks=num_ranks, block=block)


def _in_order(
    x: Tensor, routing: Routing, params: Any, *, layer: ExpertLayer, rank: int, num_ranks: int, block: int | None
) -> Tensor:
    return layer(x, with_positions(routing, rank=rank, num_ranks=num_ranks, block=block), params)


def with_positions(routing: Routing, *, rank: int, num_ranks: int, block: int | None = None) -> Routing:
    """Fill in the ``positions`` of a routing; see ``in_order``.

    Args:
        routing: any.
        rank: of this process.
        num_ranks: that tokens are spread over.
        block: consecutive tokens that are dealt to the ranks in turn.

    Returns:
        The routing.

    Raises:
        ValueError: if the tokens are no whole number of blocks.

    Example:
        >>> from moekit.routing import round_robin
        >>> with_positions(round_robin(torch.zeros(1, 2), k=2), rank=1, num_ranks=2, block=1).positions
        tensor([[2, 3]])
    """
    shape = routing.expert_indices.shape
    places = torch.arange(routing.expert_indices.numel(), device=routing.expert_indices.device)
    if block is None:
        places = places + rank * _FAR
    else:
        size = _block_size(routing, block)
        places = (places // size * num_ranks + rank) * size + places % size
    return routing._replace(positions=places.view(shape))


def _block_size(routing: Routing, block: int) -> int:
    """Return how many assignments a block of tokens has."""
    num_blocks, rest = divmod(routing.num_tokens, block)
    assignments = routing.expert_indices.numel()
    if rest or assignments % max(num_blocks, 1):
        raise ValueError(
            f"in_order: {routing.num_tokens} tokens with {assignments} assignments are no whole number of blocks of "
            f"{block} tokens; expected a multiple"
        )
    return max(assignments // max(num_blocks, 1), 1)
