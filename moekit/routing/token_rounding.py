"""Token rounding: every expert's load becomes a multiple of the rows that a kernel computes at once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.routing.gates import noisy
from moekit.routing.top_k import Score, softmax
from moekit.segments import exclusive_cumsum, sort_by_expert, tokens_per_expert
from moekit.types import Logits, Router, Routing


class MovedMass(NamedTuple):
    """How much router weight a change of routing moved, as shares of all weight before.

    Attributes:
        dropped: scalar, the weight of the assignments that are gone.
        added: scalar, the weight of those that are new.
    """

    dropped: Tensor
    added: Tensor


def token_rounding(
    route: Router, *, tile: int, rounding: Callable[[Tensor], Tensor] = torch.round, score: Score = softmax
) -> Router:
    """Wrap a token-choice router so that expert loads are multiples of ``tile``; see ``round_tokens``.

    For training. At evaluation the paper takes the router that is wrapped. A selection bias goes to that one; what is
    added to all scores of an expert alike does not change which tokens it takes besides.

    Not causal: who keeps an expert, and whom it takes besides, depends on all tokens of the batch. No host
    synchronisation if ``route`` has none. Deterministic on CUDA if ``route`` is.

    Args:
        route: (logits, bias=, ...) -> Routing of shape (T, K).
        tile: rows of a tile, >= 1.
        rounding: ``torch.round``, ``torch.ceil`` or ``torch.floor``, of loads in tiles.
        score: (T, E) logits -> (T, E) scores, for the tokens that an expert takes besides.

    Returns:
        Router, which passes on what it is called with.

    Raises:
        ValueError: when called, if the tile is not positive or the routing is not (T, K).

    Example:
        >>> from moekit.routing import top_k
        >>> router = token_rounding(partial(top_k, k=1), tile=2, rounding=torch.ceil)
        >>> tokens_per_expert(router(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])).expert_indices, 2)
        tensor([3, 0])

    References:
        Guo et al., SonicMoE, 2025 (token rounding), https://arxiv.org/abs/2512.14080
    """
    return partial(_route_and_round, route, tile=tile, rounding=rounding, score=score)


def round_tokens(
    logits: Logits,
    routing: Routing,
    *,
    tile: int,
    rounding: Callable[[Tensor], Tensor] = torch.round,
    score: Score = softmax,
) -> Routing:
    """Change a routing so that expert e has r_e = tile * rounding(c_e / tile) of its c_e assignments, at most T.

    Expert e ranks the tokens that chose it first, by their weight, then all others by score(z), and keeps the first
    r_e. So it loses its lightest assignments, or takes fewer than ``tile`` tokens besides. What stays keeps its weight,
    which is not normalised again; a token that is taken besides gets its score. With ``top_k(..., normalize=True)``
    and softmax scores this is the form of the authors' benchmark. With ``tile=1`` nothing changes.

    Where r_e would pass T, the tokens there are, it is T and no multiple. ``mask_tokens`` behind it takes padding out
    and leaves other loads, too.

    Not causal. No host synchronisation. Deterministic on CUDA; ``torch.round`` rounds halves to even.

    Args:
        logits: (T, E) float32, with or without noise.
        routing: of shape (T, K), with or without missing assignments.
        tile: rows of a tile, >= 1.
        rounding: (E,) loads in tiles -> whole numbers less than 1 away.
        score: (T, E) logits -> (T, E) scores.

    Returns:
        Routing of shape (N,): first the assignments of ``routing`` in their order, then those besides by expert; -1 for
        those that do not exist. N = T * K + E * min(b, T), where b is as many as ``rounding`` may add to a load:
        tile // 2 for ``torch.round``, 0 for ``torch.floor``, tile - 1 for any other.

    Raises:
        ValueError: if the tile is not positive, or the routing is not (T, K).

    Example:
        >>> from moekit.routing import top_k
        >>> logits = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
        >>> round_tokens(logits, top_k(logits, k=1), tile=2).expert_indices
        tensor([ 0, 0, 0, -1, -1])
        >>> round_tokens(logits, top_k(logits, k=1), tile=2, rounding=torch.floor).expert_indices
        tensor([-1,  0,  0])

    References:
        Guo et al., SonicMoE, 2025 (token rounding), https://arxiv.org/abs/2512.14080
        SonicMoE, benchmarks/moe-token-rounding.py, https://github.com/Dao-AILab/sonic-moe
    """
    logits = noisy(logits)
    _check(routing, tile)
    experts, num_experts = routing.expert_indices.flatten(), routing.num_experts
    loads = tokens_per_expert(experts, num_experts)  # (E,)
    rounded = (rounding(loads.double() / tile) * tile).to(torch.int64).clamp(0, routing.num_tokens)
    kept = _ranks(routing) < torch.cat([rounded, rounded.new_zeros(1)])[experts]  # -1 takes the last entry, 0
    num_besides = min(_most_besides(tile, rounding), routing.num_tokens)
    tokens, weights = _besides(logits, routing, num_besides, score=score)  # (E, num_besides)
    wanted = torch.arange(num_besides, device=logits.device) < (rounded - loads).unsqueeze(-1)
    others = torch.arange(num_experts, device=logits.device).unsqueeze(-1).where(wanted, -1)
    return Routing(
        token_indices=torch.cat([routing.token_indices.flatten(), tokens.flatten()]),
        expert_indices=torch.cat([experts.masked_fill(~kept, -1), others.flatten()]),
        weights=torch.cat(
            [
                routing.weights.flatten().masked_fill(~kept, 0.0),
                weights.masked_fill(~wanted, 0.0).flatten().to(routing.weights.dtype),
            ]
        ),
        num_tokens=routing.num_tokens,
        num_experts=num_experts,
        pool=experts.shape[0] + tokens.numel(),
    )


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
        >>> from moekit.routing import top_k
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
    old, new = _dense_weights(before), _dense_weights(after)
    total = old.sum()
    dropped = old.masked_fill(_exists(after), 0.0).sum()
    added = new.masked_fill(_exists(before), 0.0).sum()
    scale = torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, total))
    return MovedMass(dropped * scale, added * scale)


def _route_and_round(
    route: Router, logits: Logits, *, tile: int, rounding: Any, score: Score, bias: Tensor | None = None, **needs: Any
) -> Routing:
    routing = route(logits, bias=bias, **needs)
    if not isinstance(routing, Routing):
        raise ValueError(
            f"token_rounding: the router returned a {type(routing).__name__}; expected a Routing of shape (T, K), as "
            f"token-choice routers return."
        )
    return round_tokens(logits, routing, tile=tile, rounding=rounding, score=score)


def _ranks(routing: Routing) -> Tensor:
    """Return (N,) int64, how many assignments of the same expert are heavier; earlier ones win ties."""
    experts, weights = routing.expert_indices.flatten(), routing.weights.detach().flatten()
    by_weight = torch.sort(weights, descending=True, stable=True).indices
    order, sizes = sort_by_expert(experts[by_weight], routing.num_experts)
    order = by_weight[order]
    firsts = torch.cat([exclusive_cumsum(sizes), sizes.sum().view(1)])  # -1 takes the last entry
    places = torch.arange(order.shape[0], device=order.device) - firsts[experts[order]]
    return torch.empty_like(places).scatter_(0, order, places)


def _most_besides(tile: int, rounding: Callable[[Tensor], Tensor]) -> int:
    if rounding is torch.floor:
        return 0
    return tile // 2 if rounding is torch.round else tile - 1


def _besides(logits: Tensor, routing: Routing, count: int, *, score: Score) -> tuple[Tensor, Tensor]:
    """Return the tokens (E, count) that did not choose expert e and that it scores highest, and their scores."""
    scores = score(logits)
    chosen = _exists(routing)  # (T, E)
    preference = scores.detach().masked_fill(chosen, -torch.inf).T  # (E, T)
    tokens = torch.topk(preference, count, dim=-1).indices
    return tokens, scores.T.gather(-1, tokens)


def _exists(routing: Routing) -> Tensor:
    """Return (T, E) bool, the pairs that a routing has."""
    pairs, num_pairs = _pairs(routing)
    exists = torch.zeros(num_pairs + 1, dtype=torch.bool, device=pairs.device).scatter(0, pairs, True)
    return exists[:-1].view(routing.num_tokens, routing.num_experts)


def _dense_weights(routing: Routing) -> Tensor:
    """Return (T, E), the weight of each pair, 0 for those that a routing does not have."""
    pairs, num_pairs = _pairs(routing)
    weights = routing.weights.new_zeros(num_pairs + 1).index_add(0, pairs, routing.weights.flatten())
    return weights[:-1].view(routing.num_tokens, routing.num_experts)


def _pairs(routing: Routing) -> tuple[Tensor, int]:
    """Number the assignments (N,) by t * E + e; those that do not exist get T * E, the number past the end."""
    experts = routing.expert_indices.flatten()
    end = routing.num_tokens * routing.num_experts
    pairs = routing.token_indices.flatten() * routing.num_experts + experts
    return torch.where(experts < 0, end, pairs), end


def _check(routing: Routing, tile: int) -> None:
    if tile < 1:
        raise ValueError(f"token_rounding: tile = {tile}; expected the rows of a GEMM tile, >= 1, such as 128.")
    if routing.expert_indices.ndim != 2:
        raise ValueError(
            f"token_rounding: the routing has shape {tuple(routing.expert_indices.shape)}; expected (T, K), as "
            f"token-choice routers return."
        )
