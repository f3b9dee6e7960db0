"""What a recipe of a user's is refused for before anything runs: parts that do not belong together."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from moekit.dispatch import dropless_plan
from moekit.recipes.choices import place_of
from moekit.recipes.layers import Recipe
from moekit.types import DispatchPlan, ExpertLayer, Routing


def check_plan(recipe: Recipe) -> None:
    """Check that a recipe's plan is the one that its layer makes: the audit, drop rates and exchanges go by it.

    Args:
        recipe: before any parallel strategy, whose layer is composed of a dispatcher or has a plan of its own; of
            another layer nothing is known.

    Raises:
        ValueError: if it is another one.

    Example:
        >>> from moekit.dispatch import padded
        >>> from moekit.experts import batched, swiglu
        >>> from moekit.recipes import expert_layer, mixtral
        >>> tight = padded(capacity_factor=1.0)
        >>> layer = expert_layer(dispatcher=tight, experts=partial(swiglu, matmul=batched))
        >>> check_plan(mixtral()._replace(layer=layer, plan=tight.plan))
    """
    made = _plan_made_by(recipe.layer)
    if made is not None and _parts(made) != _parts(recipe.plan):
        raise ValueError(
            f"the recipe's layer plans by {_words(made)}, and recipe.plan is {_words(recipe.plan)}, by which leaks are "
            f"looked for, drops counted and ranks made to agree; expected the same. Replace both: "
            f"recipe._replace(layer=..., plan=dispatcher.plan)."
        )


def check_router(recipe: Recipe) -> None:
    """Check that a recipe's router takes what a layer calls it with: ``bias``, and what the recipe says it needs.

    Args:
        recipe: the method.

    Raises:
        ValueError: if it does not.

    Example:
        >>> from moekit.recipes import mixtral
        >>> check_router(mixtral())
    """
    try:
        parameters = inspect.signature(recipe.route).parameters
    except (TypeError, ValueError):  # of a function that tells nothing of itself
        return
    missing = [name for name in ("bias", *recipe.needs) if name not in parameters]
    if missing and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        raise ValueError(
            f"the router {place_of(recipe.route)} takes no {' and no '.join(missing)}; expected route(logits, bias=None"
            f"{''.join(f', {name}=...' for name in recipe.needs)}), as a layer calls it."
        )


def _plan_made_by(layer: ExpertLayer) -> Callable[[Routing], DispatchPlan] | None:
    keywords = layer.keywords if isinstance(layer, partial) else {}
    if "plan" in keywords:
        return keywords["plan"]
    if "dispatcher" in keywords:
        return dropless_plan if keywords["dispatcher"] is None else keywords["dispatcher"].plan
    return None


def _parts(function: Callable[..., Any]) -> tuple[Any, ...]:
    return (function.func, function.args, function.keywords) if isinstance(function, partial) else (function, (), {})


def _words(plan: Callable[..., Any]) -> str:
    function, _, keywords = _parts(plan)
    given = ", ".join(f"{name}={_words(value) if callable(value) else value!r}" for name, value in keywords.items())
    return f"{getattr(function, '__name__', repr(function))}{f'({given})' if given else ''}"
