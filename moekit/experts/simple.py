"""Experts that cost next to nothing: one gives zero, one the token itself, one a mixture of it with a learned vector.

They have the expert numbers after the E real ones, in this order: null, copy, constant. They are applied where the
tokens are, and nothing is dispatched to them: ``without_simple`` makes the routing that the real experts get.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.autocast import outside_autocast
from moekit.types import Routing, SimpleExperts


class NoSimpleParams(NamedTuple):
    """The parameters of null and copy experts, which have none."""


class SimpleExpertParams(NamedTuple):
    """Parameters of J constant experts.

    Attributes:
        vectors: (J, D), the vector v of each.
        mix: (J, D, 2), from the token to the logits of its two shares.

    Example:
        >>> params = SimpleExpertParams(torch.zeros(3, 4), torch.zeros(3, 4, 2))
        >>> [w.shape for w in params] == [w.shape for w in init_simple(4, constants=3)]
        True
    """

    vectors: Tensor
    mix: Tensor


def simple_experts(
    x: Tensor,
    routing: Routing,
    params: SimpleExpertParams | NoSimpleParams,
    *,
    num_experts: int,
    null: int = 1,
    copy: int = 1,
) -> Tensor:
    """Sum a token's simple experts, weighted.

    A null expert is 0, a copy expert x, and a constant expert a_1 x + a_2 v with a = softmax(x W_c). Assignments
    to real experts count for nothing here. In float32 (float64 for float64 tokens) even inside autocast.

    Causal. No host synchronisation. Deterministic on CUDA.

    Args:
        x: (T, D).
        routing: of shape (T, K), over all experts.
        params: of the constant experts; their number is the length of ``vectors``.
        num_experts: E, the real ones, which have the numbers below.
        null: how many null experts.
        copy: how many copy experts.

    Returns:
        (T, D), the dtype of ``x``.

    Raises:
        ValueError: if the routing is not (T, K), or the numbers of experts do not add up to those of the routing.

    Example:
        >>> from moekit.routing import round_robin
        >>> routing = round_robin(torch.zeros(3, 3), k=1, normalize=True)  # a real expert, null, copy
        >>> simple_experts(torch.ones(3, 1), routing, NoSimpleParams(), num_experts=1).flatten()
        tensor([0., 0., 1.])

    References:
        Jin et al., MoE++, 2024, section 3.1, https://arxiv.org/abs/2410.07348
        Meituan, LongCat-Flash Technical Report, 2025 (copy experts alone), https://arxiv.org/abs/2509.01322
    """
    constants = params.vectors.shape[0] if isinstance(params, SimpleExpertParams) else 0
    _check_numbers(routing, (num_experts, null, copy, constants))
    tokens = x.to(torch.promote_types(x.dtype, torch.float32))
    with outside_autocast(x.device.type):
        y = _weight_within(routing, num_experts + null, copy).to(tokens.dtype) * tokens
        if isinstance(params, SimpleExpertParams):
            weights = _weights_of(routing, num_experts + null + copy, constants).to(tokens.dtype)  # (T, J)
            y = y + _constant_experts(tokens, weights, params)
    return y.to(x.dtype)


def init_simple(
    dim: int,
    *,
    constants: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SimpleExpertParams | NoSimpleParams:
    """Draw the parameters of constant experts: vectors from N(0, 1), as MoE++'s released code, and shares about equal.

    Args:
        dim: D.
        constants: J, how many constant experts; with none there are no parameters.
        generator: of the draw; None takes torch's global one.
        device: as in torch.empty.
        dtype: as in torch.empty.

    Returns:
        SimpleExpertParams, or NoSimpleParams.

    Example:
        >>> init_simple(16, constants=2).mix.shape
        torch.Size([2, 16, 2])
    """
    if constants == 0:
        return NoSimpleParams()
    vectors = torch.empty(constants, dim, device=device, dtype=dtype).normal_(generator=generator)
    mix = torch.empty(constants, dim, 2, device=device, dtype=dtype).normal_(std=dim**-0.5, generator=generator)
    return SimpleExpertParams(vectors, mix)


def simple(*, null: int = 1, copy: int = 1, constants: int = 2) -> SimpleExperts:
    """Make the simple experts of a recipe.

    Args:
        null: how many null experts.
        copy: how many copy experts.
        constants: how many constant experts.

    Returns:
        SimpleExperts.

    Raises:
        ValueError: if a number is negative.

    Example:
        >>> simple().number
        4
    """
    if min(null, copy, constants) < 0:
        raise ValueError(f"simple: null = {null}, copy = {copy}, constants = {constants}; expected numbers >= 0.")
    apply = partial(simple_experts, null=null, copy=copy)
    return SimpleExperts(null + copy + constants, apply, partial(init_simple, constants=constants))


def _constant_experts(x: Tensor, weights: Tensor, params: SimpleExpertParams) -> Tensor:
    """Sum a_1 x + a_2 v over experts, with ``weights`` (T, J), without making (T, J, D)."""
    shares = torch.softmax(torch.einsum("td,jda->tja", x, params.mix.to(x.dtype)), dim=-1)  # (T, J, 2)
    of_token, of_vector = (weights.unsqueeze(-1) * shares).unbind(-1)
    return of_token.sum(-1, keepdim=True) * x + of_vector @ params.vectors.to(x.dtype)


def _weight_within(routing: Routing, first: int, number: int) -> Tensor:
    """Sum a token's weights for all of ``number`` experts from ``first`` on, (T, 1), however many they are."""
    experts = routing.expert_indices
    return routing.weights.masked_fill((experts < first) | (experts >= first + number), 0.0).sum(1, keepdim=True)


def _weights_of(routing: Routing, first: int, number: int) -> Tensor:
    """Sum a token's weights for each of ``number`` experts from ``first`` on, (T, number)."""
    experts = torch.arange(first, first + number, device=routing.weights.device)
    chosen = routing.expert_indices.unsqueeze(-1) == experts  # (T, K, number)
    return routing.weights.unsqueeze(-1).masked_fill(~chosen, 0.0).sum(1)


def _check_numbers(routing: Routing, numbers: tuple[int, int, int, int]) -> None:
    if routing.expert_indices.ndim != 2:
        raise ValueError(
            f"simple_experts: the routing has shape {tuple(routing.expert_indices.shape)}; expected (T, K). Use a "
            f"token-choice router."
        )
    if sum(numbers) != routing.num_experts:
        raise ValueError(
            f"simple_experts: {numbers[0]} real, {numbers[1]} null, {numbers[2]} copy and {numbers[3]} constant "
            f"experts are {sum(numbers)}, but the routing has {routing.num_experts}. Give the gate that many outputs."
        )
