"""Scopes: over which tokens a balancing loss asks for balance, each as a function that splits the tokens into pools.

A loss computes one number per pool and averages them over the real tokens: a pool counts by how many it holds, so that
micro-batches, weighed by theirs, add up to the same. A smaller scope is a stronger wish: balance within every sequence
implies balance of the batch, and not the other way round.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from moekit.checks import flat_mask
from moekit.routing.gates import check_precision, clean
from moekit.segments import tokens_per_expert as count_tokens
from moekit.types import Logits, Routing

Scope = Callable[[Tensor, int | None], Tensor]
AnyLoss = TypeVar("AnyLoss", bound=Callable[..., Tensor])


def ignores_counts(loss: AnyLoss) -> AnyLoss:
    """Mark a loss whose value is the same for any ``tokens_per_expert``, so that training need not count them for it.

    Args:
        loss: to mark, for example by writing this as its decorator.

    Returns:
        The loss.

    Example:
        >>> from moekit.routing import load_balance_loss, z_loss
        >>> uses_counts(load_balance_loss), uses_counts(z_loss)
        (True, False)
    """
    vars(loss)["ignores_counts"] = loss  # itself: functools.wraps copies attributes to what may well use counts
    return loss


def uses_counts(loss: Callable[..., Tensor]) -> bool:
    """Return whether a loss may depend on ``tokens_per_expert``: unless it, or what it is partial of, is marked.

    Args:
        loss: the loss, or a ``functools.partial`` of it.

    Example:
        >>> from moekit.routing import z_loss
        >>> uses_counts(partial(z_loss)), uses_counts(lambda *given, **options: z_loss(*given, **options))
        (False, True)
    """
    plain: Any = loss
    while isinstance(plain, partial):
        plain = plain.func
    return getattr(plain, "ignores_counts", None) is not plain


def whole_batch(values: Tensor, sequence_length: int | None = None) -> Tensor:
    """Take all tokens of the micro-batch as one pool: (T, ...) to (1, T, ...).

    Args:
        values: (T, ...), one entry per token.
        sequence_length: not used.

    Returns:
        (1, T, ...).

    Example:
        >>> whole_batch(torch.arange(6)).tolist()
        [[0, 1, 2, 3, 4, 5]]
    """
    return values.unsqueeze(0)


def each_sequence(values: Tensor, sequence_length: int | None = None) -> Tensor:
    """Take each sequence as a pool of its own: (T, ...) to (T / length, length, ...).

    Args:
        values: (T, ...), one entry per token, sequences one after the other.
        sequence_length: how many consecutive tokens make a sequence.

    Returns:
        (T / length, length, ...).

    Raises:
        ValueError: if the length was not given, or T is not a multiple of it.

    Example:
        >>> each_sequence(torch.arange(6), 3).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    if sequence_length is None or sequence_length < 1:
        raise ValueError(
            f"each_sequence: sequence_length = {sequence_length}; expected how many consecutive tokens make a "
            f"sequence, at least 1. Pass sequence_length= to the loss, or take the scope whole_batch."
        )
    if values.shape[0] % sequence_length:
        raise ValueError(
            f"each_sequence: T = {values.shape[0]} tokens are no whole number of sequences of {sequence_length}; "
            f"expected a multiple. Pad the last sequence and mask the padding with token_mask."
        )
    return values.reshape(values.shape[0] // sequence_length, sequence_length, *values.shape[1:])


def each_token(values: Tensor, sequence_length: int | None = None) -> Tensor:
    """Take each token as a pool of its own: (T, ...) to (T, 1, ...).

    Args:
        values: (T, ...), one entry per token.
        sequence_length: not used.

    Returns:
        (T, 1, ...).

    Example:
        >>> each_token(torch.arange(3)).tolist()
        [[0], [1], [2]]
    """
    return values.unsqueeze(1)


def hidden(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Put zeros into the rows of padding tokens, so that not even a NaN there reaches a value or a gradient.

    Args:
        values: (T, ...).
        token_mask: (T,) bool, or any shape of T elements, True for real tokens; None hides nothing.

    Returns:
        (T, ...).

    Example:
        >>> hidden(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    if token_mask is None:
        return values
    return values.masked_fill(~flat_mask(token_mask, len(values)).view(-1, *[1] * (values.ndim - 1)), 0.0)


def hidden_logits(name: str, logits: Logits, token_mask: Tensor | None) -> Tensor:
    """Return what a loss reads of logits: those without noise, with zeros in the rows of padding tokens.

    Args:
        name: of the loss, for the message.
        logits: (T, E), with or without noise.
        token_mask: (T,) bool, or any shape of T elements, True for real tokens; None hides nothing.

    Returns:
        (T, E).

    Raises:
        ValueError: if they are neither float32 nor float64.

    Example:
        >>> hidden_logits("z_loss", torch.ones(2, 1), torch.tensor([True, False])).flatten()
        tensor([1., 0.])
    """
    plain = clean(logits)
    check_precision(name, plain)
    return hidden(plain, token_mask)


def check_decision(name: str, logits: Logits, routing: Routing) -> None:
    """Refuse a routing that was not made from these logits: of other tokens, other experts, or slots.

    Args:
        name: of the loss, for the message.
        logits: (T, E), with or without noise.
        routing: the decision.

    Raises:
        ValueError: if the routing is not one of T tokens over E experts.

    Example:
        >>> from moekit.routing import round_robin
        >>> check_decision("a loss", torch.zeros(4, 3), round_robin(torch.zeros(4, 3), k=1))
        >>> check_decision("a loss", torch.zeros(4, 6), round_robin(torch.zeros(4, 3), k=1))
        Traceback (most recent call last):
        ValueError: a loss: the logits have shape (4, 6), and the routing (T, E) = (4, 3); expected one shape. Pass \
the routing that was made from these logits; slots of soft routing are equally loaded, and take no such loss.
    """
    shape, routed = tuple(clean(logits).shape), (routing.num_tokens, routing.num_experts)
    if shape != routed:
        raise ValueError(
            f"{name}: the logits have shape {shape}, and the routing (T, E) = {routed}; expected one shape. Pass the "
            f"routing that was made from these logits; slots of soft routing are equally loaded, and take no such loss."
        )


def real_tokens(
    values: Tensor, token_mask: Tensor | None, *, scope: Scope = whole_batch, sequence_length: int | None = None
) -> Tensor:
    """Count the real tokens of each pool.

    Args:
        values: (T, ...), for the number of tokens and the device.
        token_mask: (T,) bool, True for real tokens; None takes all for real.
        scope: the split into pools.
        sequence_length: for the scope.

    Returns:
        (pools,) int64.

    Example:
        >>> real_tokens(torch.zeros(4, 2), torch.tensor([1, 1, 1, 0]), scope=each_sequence, sequence_length=2)
        tensor([2, 1])
    """
    ones = torch.ones(values.shape[0], dtype=torch.int64, device=values.device)
    return scope(hidden(ones, token_mask), sequence_length).sum(1)


def sums_of_pools(
    values: Tensor, token_mask: Tensor | None, *, scope: Scope = whole_batch, sequence_length: int | None = None
) -> Tensor:
    """Add up a number, or a row of numbers, over the real tokens of each pool.

    Args:
        values: (T, ...).
        token_mask: (T,) bool, True for real tokens.
        scope: the split into pools.
        sequence_length: for the scope.

    Returns:
        (pools, ...).

    Example:
        >>> sums_of_pools(torch.tensor([1.0, 2.0, 4.0, 8.0]), None, scope=each_sequence, sequence_length=2)
        tensor([ 3., 12.])
    """
    return scope(hidden(values, token_mask), sequence_length).sum(1)


def check_choices(choices: int | None) -> None:
    """Refuse a number of first choices that would count none, or leave out the last.

    Args:
        choices: of each token; None is all.

    Raises:
        ValueError: if it is no positive number.

    Example:
        >>> check_choices(0)
        Traceback (most recent call last):
        ValueError: choices = 0 first choices of a token are to count; expected at least 1, or None for all.
    """
    if choices is not None and choices < 1:
        raise ValueError(
            f"choices = {choices} first choices of a token are to count; expected at least 1, or None for all."
        )


def counts_of_pools(
    routing: Routing,
    token_mask: Tensor | None,
    *,
    choices: int | None = None,
    scope: Scope = whole_batch,
    sequence_length: int | None = None,
) -> Tensor:
    """Count the assignments of each expert in each pool, those of padding tokens left out.

    Args:
        routing: any routing.
        token_mask: (T,) bool, True for real tokens.
        choices: count only the first so many choices of each token; None counts all.
        scope: the split into pools.
        sequence_length: for the scope.

    Returns:
        (pools, E) int64, without gradient.

    Raises:
        ValueError: if ``choices`` is given for a routing that is not (T, K), or is no positive number.

    Example:
        >>> from moekit.routing import round_robin
        >>> routing = round_robin(torch.zeros(4, 3), k=1)
        >>> counts_of_pools(routing, None, scope=each_sequence, sequence_length=2)
        tensor([[1, 1, 0],
                [1, 0, 1]])
    """
    check_choices(choices)
    experts, tokens = routing.expert_indices, routing.token_indices
    if choices is not None:
        if experts.ndim != 2:
            raise ValueError(
                f"choices={choices} counts first choices of tokens, but the routing has shape "
                f"{tuple(experts.shape)}, not (T, K). Leave choices out for this router."
            )
        experts, tokens = experts[:, :choices], tokens[:, :choices]
    if token_mask is not None:
        experts = experts.masked_fill(~flat_mask(token_mask, routing.num_tokens)[tokens], -1)
    pools = scope(torch.arange(routing.num_tokens, device=experts.device), sequence_length)  # (pools, tokens of each)
    if pools.shape[0] == 1:
        return count_tokens(experts, routing.num_experts).unsqueeze(0)
    numbers = torch.arange(pools.shape[0], device=experts.device).unsqueeze(1).expand_as(pools)
    pool_of_token = torch.empty_like(pools.flatten()).scatter(0, pools.flatten(), numbers.flatten())
    keys = torch.where(experts < 0, -1, pool_of_token[tokens] * routing.num_experts + experts)
    return count_tokens(keys, pools.shape[0] * routing.num_experts).view(pools.shape[0], routing.num_experts)


def weights_by_expert(routing: Routing) -> Tensor:
    """Spread the weights of a routing over the experts.

    Args:
        routing: any; it has each pair of a token and an expert once at most, so that no order of additions matters.

    Returns:
        (T, E), of the dtype of the weights; 0 for the pairs that the routing does not have.

    Example:
        >>> from moekit.routing import round_robin
        >>> weights_by_expert(round_robin(torch.zeros(2, 3), k=1, normalize=True))
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    num_tokens, num_experts = routing.num_tokens, routing.num_experts
    experts = torch.where(routing.expert_indices < 0, num_experts, routing.expert_indices)  # a column to be cut off
    cells = (routing.token_indices * (num_experts + 1) + experts).flatten()
    table = routing.weights.new_zeros(num_tokens * (num_experts + 1))
    return table.scatter_add(0, cells, routing.weights.flatten()).view(num_tokens, num_experts + 1)[:, :num_experts]


def mean_of_pools(losses: Tensor, real: Tensor, *, masked: bool = True) -> Tensor:
    """Average a loss over the real tokens, each with the loss of its pool; zero if there is none.

    Args:
        losses: (pools,).
        real: (pools,) integers, the real tokens of each.
        masked: whether ``real`` may differ from pool to pool. Without a mask all are one constant, whose sum over pools
            of a size that varies Triton 3.6 does not compile.

    Returns:
        Scalar.

    Example:
        >>> mean_of_pools(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([4, 2, 0]))
        tensor(1.6667)
    """
    losses = losses.masked_fill(real == 0, 0.0)
    if not masked and len(losses):
        return losses.mean()
    return (losses * real).sum() / real.sum().clamp_min(1)
