"""The obvious MoE: one token and one choice at a time, in Python loops over float64. It imports nothing from moekit.

Everything is written from the formulas of the papers and is differentiable by autograd, so that it is the measure of
outputs and of every gradient.
"""

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import NamedTuple

import torch
from torch import Tensor


class Assignment(NamedTuple):
    """One (token, expert) pair: token t's choice number ``choice``, with its combine weight (a scalar)."""

    token: int
    choice: int
    expert: int
    weight: Tensor


# Scores of one token's logits z (E,), and the router formulas over them.


def softmax(z: Tensor) -> Tensor:
    exponentials = torch.exp(z - z.detach().max())
    return exponentials / exponentials.sum()


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def best(scores: Tensor, k: int) -> list[int]:
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda e: -values[e])[:k]


def weights_at(
    z: Tensor, experts: Sequence[int], *, score: Callable = softmax, normalize: bool = False, scale: float = 1.0
) -> list[Tensor]:
    scores = score(z)
    weights = [scores[e] for e in experts]
    total = sum(weights) if normalize else 1.0
    return [scale * weight / total for weight in weights]


def softmax_over_chosen(z: Tensor, experts: Sequence[int]) -> list[Tensor]:
    exponentials = [torch.exp(z[e]) for e in experts]
    return [value / sum(exponentials) for value in exponentials]


def route(logits: Tensor, choose: Callable, weigh: Callable) -> list[Assignment]:
    """Assign every token: ``choose(z, t)`` gives its experts, -1 for none, ``weigh(z, experts)`` their weights."""
    assignments = []
    for t, z in enumerate(logits.unbind(0)):
        experts = choose(z, t)
        assignments += [Assignment(t, i, e, w) for i, (e, w) in enumerate(zip(experts, weigh(z, experts), strict=True))]
    return assignments


# Capacity: who keeps a place.


def capacity(num_tokens: int, k: int, num_experts: int, factor: float) -> int:
    return max(1, int(Decimal(str(factor)) * k * num_tokens // num_experts))


def in_order(assignments: list[Assignment], priority: str) -> list[Assignment]:
    largest: dict[int, float] = {}
    for a in assignments:
        largest[a.token] = max(largest.get(a.token, 0.0), float(a.weight.detach()) if a.expert >= 0 else 0.0)
    keys = {
        "by_position": lambda a: (a.token, a.choice),
        "by_choice": lambda a: (a.choice, a.token),
        "by_weight": lambda a: (a.choice, -largest[a.token], a.token),
    }
    return sorted(assignments, key=keys[priority])


def keep(assignments: list[Assignment], *, limit: int | None = None, priority: str = "by_position") -> list[Assignment]:
    """Serve assignments in order of priority until their expert has ``limit`` rows; None keeps all that exist."""
    taken: dict[int, int] = {}
    kept = []
    for a in in_order(assignments, priority):
        if a.expert < 0 or (limit is not None and taken.get(a.expert, 0) >= limit):
            continue
        taken[a.expert] = taken.get(a.expert, 0) + 1
        kept.append(a)
    return kept


# Experts: one row x (D,) through one expert's matrices.


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    a = x @ gate
    return (a * sigmoid(a) * (x @ up)) @ down


def geglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    a = x @ gate
    return (a * (1 + torch.erf(a / math.sqrt(2))) / 2 * (x @ up)) @ down


def gelu_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    a = x @ up
    return (a / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))) @ down


def relu_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    a = x @ up
    return (a * (a > 0)) @ down


def relu2(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    a = x @ up
    return (a * a * (a > 0)) @ down


# The layer and its losses.


def moe(x: Tensor, kept: list[Assignment], ffn: Callable, params: Sequence[Tensor]) -> Tensor:
    """Sum each token's experts: x (T, D), params (E, ., .) each -> (T, D)."""
    experts = list(zip(*(w.unbind(0) for w in params), strict=True))
    tokens = x.unbind(0)
    y = [torch.zeros_like(token) for token in tokens]
    for a in kept:
        y[a.token] = y[a.token] + a.weight * ffn(tokens[a.token], *experts[a.expert])
    return torch.stack(y) if y else torch.zeros_like(x)


def load_balance(
    logits: Tensor, assignments: list[Assignment], *, score: Callable = softmax, choices: int | None = None
) -> Tensor:
    """E * sum_e (share of assignments) * (mean share of the scores)."""
    num_tokens, num_experts = logits.shape
    counted = [a.expert for a in assignments if a.expert >= 0 and (choices is None or a.choice < choices)]
    loss = logits.new_zeros(())
    for e in range(num_experts):
        mean = sum(score(z)[e] / score(z).sum() for z in logits.unbind(0)) / num_tokens
        loss = loss + num_experts * counted.count(e) / len(counted) * mean
    return loss


def z_loss(logits: Tensor) -> Tensor:
    return sum(torch.log(torch.exp(z).sum()) ** 2 for z in logits.unbind(0)) / logits.shape[0]
