"""What every dispatcher and every layer refuses, whatever runs it."""

import reprlib
from typing import Any

import torch
from torch import Tensor

from moekit.types import Dispatcher, Routing


def check_routing(name: str, routing: Any) -> None:
    """Refuse what is no sparse routing, and one whose parts do not fit each other.

    Args:
        name: of the caller, for the message.
        routing: of any shape.

    Raises:
        ValueError: if it is no ``Routing``; if weights, experts, tokens and positions are not of one shape; if experts,
            tokens or positions are not int64; if it has two axes, and the first is not T; if ``most`` is below 0. What
            is in them is not read: that would wait for the device.

    Example:
        >>> from moekit.routing import top_k
        >>> routing = top_k(torch.zeros(3, 4), k=2)
        >>> check_routing("a layer", routing)
        >>> check_routing("a layer", routing._replace(weights=torch.ones(3, 1)))
        Traceback (most recent call last):
        ValueError: a layer: the routing has weights (3, 1), experts (3, 2) and tokens (3, 2); expected one shape. \
Give every assignment a weight, an expert and a token.
    """
    if not isinstance(routing, Routing):
        raise ValueError(
            f"{name}: the routing is a {type(routing).__name__}; expected a Routing, as token-choice and expert-choice "
            f"routers return. A SoftRouting goes with the layer of moekit.recipes.soft_moe()."
        )
    experts, tokens, shape = routing.expert_indices, routing.token_indices, routing.weights.shape
    if not shape == experts.shape == tokens.shape:
        raise ValueError(
            f"{name}: the routing has weights {tuple(shape)}, experts {tuple(experts.shape)} and tokens "
            f"{tuple(tokens.shape)}; expected one shape. Give every assignment a weight, an expert and a token."
        )
    if not experts.dtype == tokens.dtype == torch.int64:
        raise ValueError(
            f"{name}: the routing has experts of {experts.dtype} and tokens of {tokens.dtype}; expected torch.int64. "
            f"Convert them by .long()."
        )
    if routing.most is not None and routing.most < 0:
        raise ValueError(f"{name}: the routing has most = {routing.most}; expected None, or a number not below 0.")
    positions = routing.positions
    if positions is not None and (positions.shape != shape or positions.dtype != torch.int64):
        raise ValueError(
            f"{name}: the routing has positions {tuple(positions.shape)} of {positions.dtype}, and weights "
            f"{tuple(shape)}; expected one shape, and torch.int64. Give every assignment its place, as with_positions "
            f"of moekit.parallel does, or none."
        )
    if len(shape) == 2 and shape[0] != routing.num_tokens:
        raise ValueError(
            f"{name}: the routing has shape {tuple(shape)} over {routing.num_tokens} tokens; two axes mean (T, K), the "
            f"choices of each token. Flatten the parts of any other routing to (N,)."
        )


def check_tokens(name: str, x: Tensor, routing: Any) -> None:
    """Refuse a routing, and tokens that it was not made for, as every layer does that moves them.

    Args:
        name: of the caller, for the message.
        x: (T, D).
        routing: of T tokens.

    Raises:
        ValueError: as ``check_routing``; if ``x`` is not (T, D) with the routing's T.

    Example:
        >>> from moekit.routing import top_k
        >>> check_tokens("a strategy", torch.ones(4, 2), top_k(torch.zeros(3, 4), k=2))
        Traceback (most recent call last):
        ValueError: a strategy: x has shape (4, 2); expected (3, width): T, the tokens of the routing. Pass the tensor \
that this routing was made for, flattened to two axes.
    """
    check_routing(name, routing)
    check_rows(f"{name}: x", x, routing.num_tokens, "T, the tokens of the routing", made="this routing was")


def check_rows(name: str, rows: Tensor, expected: int, meaning: str, *, made: str) -> None:
    """Refuse a tensor that is not (R, width) with the R that is expected.

    Args:
        name: of the caller and the tensor, for the message.
        rows: (R, width).
        expected: R.
        meaning: of R, in words.
        made: what the tensor was to be made for, and "was" or "were".

    Raises:
        ValueError: if it is anything else.

    Example:
        >>> check_rows("mix: x", torch.ones(3), 3, "T, the tokens", made="this routing was")
        Traceback (most recent call last):
        ValueError: mix: x has shape (3,); expected (3, width): T, the tokens. Pass the tensor that this routing was \
made for, flattened to two axes.
    """
    if rows.ndim != 2 or rows.shape[0] != expected:
        raise ValueError(
            f"{name} has shape {tuple(rows.shape)}; expected ({expected}, width): {meaning}. Pass the tensor that "
            f"{made} made for, flattened to two axes."
        )


def check_plan(name: str, plan: Any) -> None:
    """Refuse a plan that is no function, as a dispatcher in place of its plan.

    Args:
        name: of the caller, for the message.
        plan: routing -> DispatchPlan.

    Raises:
        ValueError: if it cannot be called.

    Example:
        >>> check_plan("a layer", 1.25)
        Traceback (most recent call last):
        ValueError: a layer: plan is 1.25; expected a function routing -> DispatchPlan. Pass that of a dispatcher, as \
padded(capacity_factor=1.25).plan.
    """
    if not callable(plan):
        given = "a Dispatcher" if isinstance(plan, Dispatcher) else reprlib.repr(plan)
        raise ValueError(
            f"{name}: plan is {given}; expected a function routing -> DispatchPlan. Pass that of a dispatcher, as "
            f"padded(capacity_factor=1.25).plan."
        )


def check_devices(name: str, *tensors: Tensor | None) -> None:
    """Refuse tensors of several devices, which a kernel would read as if they were of one.

    Args:
        name: of the caller, for the message.
        tensors: all that it reads, or None.

    Raises:
        ValueError: if they are on several devices.

    Example:
        >>> check_devices("a layer", torch.ones(1), torch.ones(1, device="meta"))
        Traceback (most recent call last):
        ValueError: a layer: its tensors are on cpu and meta; expected one device. Move tokens, routing and parameters \
to the same one.
    """
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(
            f"{name}: its tensors are on {' and '.join(sorted(map(str, devices)))}; expected one device. Move tokens, "
            f"routing and parameters to the same one."
        )


def check_shape(name: str, tensor: Tensor, expected: torch.Size, meaning: str) -> None:
    """Refuse a tensor of another shape than that of the tokens it tells something of.

    Args:
        name: of the tensor, for the message.
        tensor: of any shape.
        expected: the shape it should have.
        meaning: of that shape, in words.

    Raises:
        ValueError: if it has another.

    Example:
        >>> check_shape("token_ids", torch.ones(2), torch.Size([3]), "one for each token")
        Traceback (most recent call last):
        ValueError: token_ids has the shape (2,); expected (3,), one for each token.
    """
    if tensor.shape != expected:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; expected {tuple(expected)}, {meaning}.")


def check_token_mask(mask: Tensor, expected: torch.Size, meaning: str) -> None:
    """Refuse a mask of tokens that is not bool, or of another shape than theirs.

    Args:
        mask: of any shape.
        expected: the shape it should have.
        meaning: of that shape, in words.

    Raises:
        ValueError: if it has another shape.
        TypeError: if it is not bool, for 0 and 1 of other dtypes do not select.

    Example:
        >>> check_token_mask(torch.ones(3), torch.Size([3]), "one for each token")
        Traceback (most recent call last):
        TypeError: token_mask is torch.float32, expected bool, True for real tokens: token_mask.bool()
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"token_mask is {mask.dtype}, expected bool, True for real tokens: token_mask.bool()")
    check_shape("token_mask", mask, expected, meaning)


def flat_mask(token_mask: Tensor, num_tokens: int) -> Tensor:
    """Return a mask of tokens as (T,) bool.

    Args:
        token_mask: of any shape of T elements; True, or what is not zero, for real tokens.
        num_tokens: T.

    Returns:
        (T,) bool.

    Raises:
        ValueError: if it has another number of elements.

    Example:
        >>> flat_mask(torch.tensor([[1, 0], [1, 1]]), 4)
        tensor([ True, False,  True,  True])
    """
    if token_mask.numel() != num_tokens:
        raise ValueError(
            f"token_mask has {token_mask.numel()} elements (shape {tuple(token_mask.shape)}); expected one per token, "
            f"{num_tokens}."
        )
    return token_mask.flatten().bool()
