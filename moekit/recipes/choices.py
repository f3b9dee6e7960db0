"""What a recipe's router chooses from, asked without a model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moekit.recipes.forms import taken_apart
from moekit.recipes.layers import Recipe
from moekit.routing import clean
from moekit.routing.token_rounding import rounding_of
from moekit.types import Logits, Routing, SoftRouting


def num_choices(recipe: Recipe, num_experts: int) -> int:
    """Count the experts that a router chooses from: the networks and the simple ones.

    Args:
        recipe: the method.
        num_experts: E.

    Returns:
        How many.

    Example:
        >>> from moekit.recipes import moe_plus_plus
        >>> num_choices(moe_plus_plus(), 8)
        12
    """
    return num_experts + (0 if recipe.simple is None else recipe.simple.number)


def undecided_logits(recipe: Recipe, num_experts: int, num_tokens: int) -> Logits:
    """Return what a recipe's gate, freshly drawn, makes of tokens of zeros, on the CPU.

    Draws from torch's global generator.

    Args:
        recipe: the method.
        num_experts: E.
        num_tokens: T.

    Returns:
        Logits of T tokens, as wide as the router takes them.

    Example:
        >>> from moekit.recipes import mixtral
        >>> undecided_logits(mixtral(), 8, 3).shape
        torch.Size([3, 8])
    """
    return _logits(recipe, num_experts, torch.zeros(num_tokens, 8, device="cpu"))


def experts_per_token(recipe: Recipe, num_experts: int, *, sequence_length: int | None = None) -> float:
    """Ask a recipe's router how many experts a token gets, the shared ones not counted.

    Args:
        recipe: the method.
        num_experts: E.
        sequence_length: tokens to ask it about, which matters where experts or slots choose; None takes 1,024.

    Returns:
        Assignments per token, simple experts included: at most, where a router chooses their number; in the mean, where
        loads are rounded to tiles. For a soft router, slots per token.

    Raises:
        ValueError: if the router returns no routing, one to experts that there are not, or rows in another order than
            tokens.

    Example:
        >>> from moekit.recipes import mixtral
        >>> experts_per_token(mixtral(k=2), 8)
        2.0
    """
    num_tokens = 1024 if sequence_length is None else sequence_length
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        routing = _routed(recipe, undecided_logits(recipe, num_experts, num_tokens), num_experts)
        drawn = torch.randn(num_tokens, 8, device="cpu")  # nearly every expert is somebody's choice
        decided = _routed(recipe, _logits(recipe, num_experts, drawn), num_experts)
    if isinstance(routing, SoftRouting):
        pools, _, experts, slots = routing.dispatch_weights.shape
        return pools * experts * slots / num_tokens
    if not isinstance(routing, Routing):
        raise ValueError(
            f"the router {place_of(recipe.route)} returned {routing!r}; expected a moekit.types.Routing. A "
            "router maps logits (T, E) to one"
        )
    last = num_choices(recipe, num_experts) - 1
    chosen = torch.cat([each.expert_indices.flatten() for each in (routing, decided) if isinstance(each, Routing)])
    if chosen.numel() and not -1 <= int(chosen.min()) <= int(chosen.max()) <= last:
        raise ValueError(
            f"the router {place_of(recipe.route)} chose experts from {int(chosen.min())} to {int(chosen.max())} of "
            f"{last + 1}; expected 0 to {last}, or -1 for none."
        )
    for each in (routing, decided):
        if isinstance(each, Routing):
            check_order(recipe, each)
    rounding = rounding_of(recipe.route)
    if rounding is not None:  # so few tokens, of one mind, would be rounded to none or to many
        return experts_per_token(recipe._replace(route=rounding[0]), num_experts, sequence_length=sequence_length)
    chosen = routing.expert_indices
    # A list is made longer than what it holds.
    return (chosen.numel() if chosen.ndim > 1 else int((chosen >= 0).sum())) / num_tokens


def chooses_how_many(recipe: Recipe, num_experts: int) -> bool:
    """Say whether tokens get fewer networks than ``experts_per_token`` says, some of them or all.

    Args:
        recipe: the method.
        num_experts: E.

    Returns:
        True where a router leaves choices of 1,024 random tokens open, or has simple experts to choose.

    Example:
        >>> from moekit.recipes import dynamic_k, mixtral
        >>> chooses_how_many(dynamic_k(), 8), chooses_how_many(mixtral(), 8)
        (True, False)
    """
    if recipe.simple is not None:
        return True
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        logits = _logits(recipe, num_experts, torch.randn(1024, 8, device="cpu"))
        routing = _routed(recipe, logits, num_experts)
    if not isinstance(routing, Routing) or routing.expert_indices.ndim != 2:
        return False
    return bool((routing.expert_indices < 0).any())


def has_rows_of_tokens(recipe: Recipe, num_experts: int) -> bool:
    """Say whether what a recipe's expert layer gets of its router is a row of choices for each token, (T, K).

    Args:
        recipe: the method.
        num_experts: E.

    Returns:
        False where experts choose, or the routing is a list. The tokens of a soft router are its slots.

    Example:
        >>> from moekit.recipes import expert_choice, mixtral
        >>> has_rows_of_tokens(mixtral(), 8), has_rows_of_tokens(expert_choice(), 8)
        (True, False)
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        routing = _routed(recipe, undecided_logits(recipe, num_experts, 1024), num_experts)
    return isinstance(routing, SoftRouting) or (isinstance(routing, Routing) and routing.expert_indices.ndim == 2)


def check_order(recipe: Recipe, routing: Routing) -> None:
    """Refuse a routing whose rows are not those of the tokens in order, which layers would compute wrongly.

    Args:
        recipe: whose router made it.
        routing: of token choice, with two axes, or any other, which lists its tokens as it likes.

    Raises:
        ValueError: if an assignment of row t is of another token.

    Example:
        >>> from moekit.recipes import mixtral
        >>> check_order(mixtral(), mixtral().route(torch.zeros(3, 8)))
    """
    tokens, experts = routing.token_indices, routing.expert_indices
    if experts.ndim != 2:
        return
    rows = torch.arange(routing.num_tokens, device=tokens.device).unsqueeze(1)
    if experts.shape[0] != routing.num_tokens or bool(((tokens != rows) & (experts >= 0)).any()):
        raise ValueError(
            f"the router {place_of(recipe.route)} returned rows in another order than the {routing.num_tokens} tokens'"
            "; expected token_indices[t] = t, as the routing has two axes (T, K). Bring the rows into order, or return "
            "a list: flatten token_indices, expert_indices and weights to one axis."
        )


def _logits(recipe: Recipe, num_experts: int, tokens: Tensor) -> Logits:
    gate = recipe.init_gate(tokens.shape[1], num_choices(recipe, num_experts), device="cpu")
    return recipe.gate(tokens, gate)


def _routed(recipe: Recipe, logits: Logits, num_experts: int) -> object:
    num_tokens = clean(logits).shape[0]
    state = None if recipe.state is None else recipe.state.init(num_choices(recipe, num_experts), device="cpu")
    ids = torch.zeros(num_tokens, dtype=torch.int64, device="cpu")
    known: dict[str, Any] = {"token_ids": ids, "token_mask": None, "sequence_length": num_tokens, "bias": None}
    known |= {} if recipe.state is None else {recipe.state.name: state}
    return recipe.route(logits, bias=known["bias"], **{name: known[name] for name in recipe.needs if name in known})


def place_of(function: Callable[..., object]) -> str:
    """Say what a function is called, and the file that it is in.

    Args:
        function: bound or not.

    Returns:
        As "NAME of FILE".

    Example:
        >>> place_of(place_of).startswith("place_of of ")
        True
    """
    function = taken_apart(function)[0]
    code = getattr(function, "__code__", None)
    if code is not None:
        return f"{function.__name__} of {code.co_filename}"
    return f"the module {type(function).__name__}" if isinstance(function, nn.Module) else repr(function)
