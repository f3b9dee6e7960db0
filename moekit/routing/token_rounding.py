"""Token rounding: every expert's load becomes a multiple of the rows that a kernel computes at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moekit.checks import check_devices, check_routing
from moekit.operators import HAS_TRITON
from moekit.routing.gates import check_precision, noisy
from moekit.routing.top_k import Score, scored, softmax
from moekit.segments import exclusive_cumsum, sort_by_expert
from moekit.types import Logits, Router, Routing


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
        >>> from moekit.segments import tokens_per_expert
        >>> router = token_rounding(partial(top_k, k=1), tile=2, rounding=torch.ceil)
        >>> tokens_per_expert(router(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])).expert_indices, 2)
        tensor([3, 0])

    References:
        Guo et al., SonicMoE, 2025 (token rounding), https://arxiv.org/abs/2512.14080
    """
    return partial(_route_and_round, route, tile=tile, rounding=rounding, score=score)


def rounding_of(route: Router) -> tuple[Router, int] | None:
    """Take a router of ``token_rounding`` apart.

    Args:
        route: any.

    Returns:
        The router that it wraps, and the tile; None if it rounds nothing.

    Example:
        >>> from moekit.routing import top_k
        >>> rounding_of(token_rounding(partial(top_k, k=1), tile=2))[1], rounding_of(partial(top_k, k=1))
        (2, None)
    """
    if not isinstance(route, partial) or route.func is not _route_and_round:
        return None
    return route.args[0], route.keywords["tile"]


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
    and softmax scores this is the form of the authors' benchmark at commit cbcb12a. With ``tile=1`` nothing changes.

    Of assignments of one weight the earlier stay, and of tokens of one score the earlier are taken. NaN counts as
    infinity, and a score of -infinity as the lowest finite number.

    Where r_e would pass T, the tokens there are, it is T and no multiple. ``mask_tokens`` behind it takes padding out
    and leaves other loads, too.

    Not causal. No host synchronisation. Deterministic on CUDA; ``torch.round`` rounds halves to even. On CUDA the
    selections are Triton kernels where weights and scores are float32, and give the same routing as the CPU.

    Args:
        logits: (T, E) float32, with or without noise.
        routing: of shape (T, K), with or without missing assignments.
        tile: rows of a tile, >= 1.
        rounding: (E,) loads in tiles -> whole numbers less than 1 away.
        score: (T, E) logits -> (T, E) scores.

    Returns:
        Routing of shape (N,): first the assignments of ``routing`` in their order, then those besides by expert, the
        tokens of each in ascending order; -1 for those that do not exist. N = T * K + E * min(b, T), where b is as many
        as ``rounding`` may add to a load: tile // 2 for ``torch.round``, 0 for ``torch.floor``, tile - 1 for any other.

    Raises:
        ValueError: if the tile is not positive, the routing is not (T, K), logits and routing do not fit each other, or
            the logits are in half precision.

    Example:
        >>> from moekit.routing import top_k
        >>> logits = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
        >>> round_tokens(logits, top_k(logits, k=1), tile=2).expert_indices
        tensor([ 0, 0, 0, -1, -1])
        >>> round_tokens(logits, top_k(logits, k=1), tile=2, rounding=torch.floor).expert_indices
        tensor([-1,  0,  0])

    References:
        Guo et al., SonicMoE, 2025 (token rounding), https://arxiv.org/abs/2512.14080
        SonicMoE, commit cbcb12a, benchmarks/moe-token-rounding.py, https://github.com/Dao-AILab/sonic-moe
    """
    logits = noisy(logits)
    _check(logits, routing, tile, rounding)
    experts, num_experts = routing.expert_indices.flatten(), routing.num_experts
    order, loads = sort_by_expert(experts, num_experts)
    rounded = (rounding(loads.double() / tile) * tile).to(torch.int64).clamp(0, routing.num_tokens)  # (E,)
    kept = _heaviest(routing.weights.detach().flatten(), order, loads, limits=rounded)
    counts, num_besides = rounded - loads, min(_most_besides(tile, rounding), routing.num_tokens)
    scores = scored(score, logits)
    tokens = _besides(scores.detach(), routing.expert_indices, counts, number=num_besides)  # (E, num_besides)
    takers = torch.arange(num_experts, device=tokens.device).unsqueeze(-1).expand_as(tokens)
    missing = torch.cat([kept, _places(counts, num_besides).flatten()]).logical_not_()
    weights = torch.cat([routing.weights.flatten(), scores.gather(0, tokens.T).T.flatten().to(routing.weights.dtype)])
    return Routing(
        token_indices=torch.cat([routing.token_indices.flatten(), tokens.flatten()]),
        expert_indices=torch.cat([experts, takers.flatten()]).masked_fill_(missing, -1),
        weights=weights.masked_fill_(missing, 0.0),
        num_tokens=routing.num_tokens,
        num_experts=num_experts,
        pool=experts.shape[0] + tokens.numel(),
    )


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


def _heaviest(weights: Tensor, order: Tensor, sizes: Tensor, *, limits: Tensor) -> Tensor:
    """Say which assignments (N,) are among the limits[e] heaviest of their expert; earlier ones win ties.

    ``order`` (N,) and ``sizes`` (E,) are what ``sort_by_expert`` returns; those that do not exist are not kept.
    """
    if _has_kernels(weights):
        from moekit.routing import _rounding_triton

        return _rounding_triton.heaviest(weights, order, sizes, limits)
    num_experts, places = sizes.shape[0], torch.arange(order.shape[0], device=order.device)
    owners = torch.searchsorted(sizes.cumsum(0), places, right=True)  # of the places; E behind the last expert
    numbers = weights[order].nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    by_weight = torch.sort(numbers, descending=True, stable=True).indices
    by_expert, _ = sort_by_expert(owners[by_weight].where(owners[by_weight] < num_experts, -1), num_experts)
    firsts, ends = (torch.cat([each, each.new_zeros(1)]) for each in (exclusive_cumsum(sizes), limits))
    is_kept = places - firsts[owners] < ends[owners]
    return torch.empty_like(is_kept).scatter(0, order[by_weight[by_expert]], is_kept)


def _most_besides(tile: int, rounding: Callable[[Tensor], Tensor]) -> int:
    if rounding is torch.floor:
        return 0
    return tile // 2 if rounding is torch.round else tile - 1


def _besides(scores: Tensor, experts: Tensor, counts: Tensor, *, number: int) -> Tensor:
    """Return (E, number) int64: for expert e the counts[e] tokens it scores highest of those that did not choose it.

    They are in ascending order; earlier ones win ties. Zeros fill up the rest. ``experts`` (T, K) holds the choices.
    """
    if _has_kernels(scores):
        from moekit.routing import _rounding_triton

        return _rounding_triton.besides(scores, experts, counts, number)
    num_tokens, num_experts = scores.shape
    if number == 0:
        return experts.new_empty(num_experts, 0)
    chosen = torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool, device=scores.device)
    chosen = chosen.scatter(1, experts.where(experts >= 0, num_experts), True)[:, :-1]
    # Whatever its score, a token that did not choose the expert comes before one that did.
    finite = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(scores.dtype).min)
    preference = finite.masked_fill_(chosen, -torch.inf).T.contiguous()  # (E, T)
    last = torch.topk(preference, number).values.gather(-1, counts.clamp(1, number).unsqueeze(-1) - 1)
    tokens = torch.arange(num_tokens, device=scores.device)
    # Those above the last one that is wanted, then its equals; ``topk`` itself breaks ties in no stated way.
    ranks = torch.where(preference > last, tokens, tokens + num_tokens).masked_fill_(preference < last, 2 * num_tokens)
    first = torch.topk(ranks, number, largest=False).values % num_tokens
    wanted = _places(counts, number)
    return first.masked_fill(~wanted, num_tokens).sort(-1).values.masked_fill(~wanted, 0)


def _places(counts: Tensor, number: int) -> Tensor:
    """Return (E, number) bool, True for the first counts[e] places of expert e."""
    return torch.arange(number, device=counts.device) < counts.unsqueeze(-1)


def _has_kernels(values: Tensor) -> bool:
    return values.is_cuda and values.dtype == torch.float32 and HAS_TRITON


def _check(logits: Tensor, routing: Routing, tile: int, rounding: Any) -> None:
    check_routing("token_rounding", routing)
    check_devices("token_rounding", logits, *routing[:3])
    check_precision("token_rounding", logits)
    if tile < 1:
        raise ValueError(f"token_rounding: tile = {tile}; expected the rows of a GEMM tile, >= 1, such as 128.")
    if not callable(rounding):
        raise ValueError(
            f"token_rounding: rounding = {rounding!r}; expected a function of loads in tiles, such as torch.round."
        )
    if routing.expert_indices.ndim != 2:
        raise ValueError(
            f"token_rounding: the routing has shape {tuple(routing.expert_indices.shape)}; expected (T, K), as "
            f"token-choice routers return."
        )
    if logits.shape != (routing.num_tokens, routing.num_experts):
        raise ValueError(
            f"token_rounding: the logits have shape {tuple(logits.shape)}, and the routing is over "
            f"{routing.num_tokens} tokens and {routing.num_experts} experts; expected (T, E), the logits that it was "
            f"made of."
        )
