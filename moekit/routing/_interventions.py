"""Tokens that an audit draws, and the output of a router and a dispatcher on them, with known maps for experts."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.types import Dispatcher, Routing, SoftRouting

WIDTH = 4  # of the tokens that travel; each expert scales and shifts every entry by numbers of its own

Draw = Callable[[int, int, torch.Generator], Tensor]


class Tokens(NamedTuple):
    """Tokens as a router and a dispatcher see them.

    Attributes:
        logits: (T, E) float64.
        x: (T, D) float64.
        token_ids: (T,) int64.
    """

    logits: Tensor
    x: Tensor
    token_ids: Tensor


def draw_tokens(
    draw: Draw, num_tokens: int, num_experts: int, *, vocab_size: int, generator: torch.Generator
) -> Tokens:
    """Draw tokens with one kind of logits."""
    return Tokens(
        draw(num_tokens, num_experts, generator),
        torch.randn(num_tokens, WIDTH, dtype=torch.float64, generator=generator),
        torch.randint(vocab_size, (num_tokens,), generator=generator),
    )


def replaced(tokens: Tokens, others: Tokens, where: Tensor) -> Tokens:
    """Take the others' tokens where ``where`` (T,) is true."""
    logits, x, token_ids = (
        torch.where(where.view(-1, *[1] * (old.ndim - 1)), new, old) for old, new in zip(tokens, others, strict=True)
    )
    return Tokens(logits, x, token_ids)


def output_of(
    tokens: Tokens, router: Callable[..., Any], dispatcher: Dispatcher | None, *, keywords: Mapping[str, Any], seed: int
) -> Tensor:
    """Run a composition of a router and a dispatcher on tokens, with the same random numbers for the same seed.

    Args:
        tokens: of T tokens.
        router: logits -> routing.
        dispatcher: or None, to drop nothing.
        keywords: for the router; a ``token_ids`` among them stands for those of the tokens.
        seed: of what the router draws.

    Returns:
        (T, D) float64.
    """
    keywords = {**keywords, "token_ids": tokens.token_ids} if "token_ids" in keywords else keywords
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        routing = router(tokens.logits, **keywords)
        if isinstance(routing, SoftRouting):
            return _mix(tokens.x, routing)
        if dispatcher is None:
            return _sum(tokens.x, routing)
        plan = dispatcher.plan(routing)
        rows = dispatcher.dispatch(tokens.x, routing, plan)  # (R, D)
        ends = plan.groups.sizes.cumsum(0, dtype=torch.int64)
        experts = torch.searchsorted(ends, torch.arange(rows.shape[0]), right=True)
        rows = _expert(rows, experts, len(ends) + 1)  # rows past the last group belong to nobody: any map will do
        return dispatcher.combine(rows, routing, plan)


def _sum(x: Tensor, routing: Routing) -> Tensor:
    """Add up every token's weighted experts, dropping nothing."""
    tokens, experts, weights = (part.flatten() for part in routing[:3])
    weights = weights.to(x.dtype).masked_fill(experts < 0, 0.0).unsqueeze(1)
    return torch.zeros_like(x).index_add(
        0, tokens, weights * _expert(x[tokens], experts.clamp_min(0), routing.num_experts)
    )


def _mix(x: Tensor, routing: SoftRouting) -> Tensor:
    """Mix every pool's tokens into slots, (G, E, S, D), run the experts, and mix back."""
    dispatch, combine = routing.dispatch_weights.to(x.dtype), routing.combine_weights.to(x.dtype)  # (G, T/G, E, S)
    slots = torch.einsum("gtes,gtd->gesd", dispatch, x.view(*dispatch.shape[:2], -1))
    experts = torch.arange(dispatch.shape[2]).unsqueeze(1).expand(slots.shape[:3])
    return torch.einsum("gtes,gesd->gtd", combine, _expert(slots, experts, dispatch.shape[2])).reshape(x.shape)


def _expert(rows: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Scale and shift each row (..., D) by the numbers of its expert (...), entry by entry."""
    numbers = torch.arange(num_experts * WIDTH, dtype=rows.dtype).view(num_experts, WIDTH)
    scale, shift = (0.1 + (numbers * step) % 1.0 for step in (0.618034, 0.754878))  # far from each other, for any E
    return rows * scale[experts] + shift[experts]


# How logits can be, each (T, E, generator) -> (T, E) float64.


def ordinary(num_tokens: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """Draw unlike logits."""
    return torch.randn(num_tokens, num_experts, dtype=torch.float64, generator=generator)


def skewed(num_tokens: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """Let some experts be preferred on average."""
    order = torch.randperm(num_experts, generator=generator)
    return ordinary(num_tokens, num_experts, generator) + 4.0 * order / num_experts


def tied(num_tokens: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """Draw many equal logits."""
    return torch.randint(-1, 2, (num_tokens, num_experts), generator=generator).double()


def confident(num_tokens: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """Draw logits far apart."""
    return 10.0 * ordinary(num_tokens, num_experts, generator)


def crowded(num_tokens: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """Let nearly all tokens prefer the same expert."""
    favourite = torch.randint(num_experts, (), generator=generator)
    return ordinary(num_tokens, num_experts, generator) + 5.0 * (torch.arange(num_experts) == favourite)


def contested(num_tokens: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """Give all tokens the same expert, half of them as their second choice."""
    logits, experts = crowded(num_tokens, num_experts, generator), torch.arange(num_experts)
    best = torch.randint(2 * num_experts, (num_tokens, 1), generator=generator)  # half of them are no expert
    return logits + 9.0 * (experts == best)


def negative(num_tokens: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """Draw negative logits only."""
    return -ordinary(num_tokens, num_experts, generator).abs() - 0.1


DRAWS: tuple[Draw, ...] = (ordinary, skewed, tied, confident, crowded, contested, negative)
