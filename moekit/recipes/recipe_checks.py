"""What a recipe of a user's is refused for before anything runs: parts that do not belong together."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from moekit.dispatch import dropless_plan
from moekit.experts import fused_cpu, fused_layer
from moekit.ratios import ratio_of
from moekit.recipes.choices import place_of
from moekit.recipes.forms import bound, form_of
from moekit.recipes.layers import Recipe, limited
from moekit.types import Dispatcher, DispatchPlan, ExpertLayer, Ratio, Routing

Plan = Callable[[Routing], DispatchPlan]


def check_plan(recipe: Recipe) -> None:
    """Check that a recipe's plan is the one that its layer makes: the audit, drop rates and exchanges go by it.

    Args:
        recipe: before any parallel strategy. Of a layer that is none of moekit's, nothing is known.

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
    if made is not None and not _is_same(made, recipe.plan):
        raise ValueError(
            f"the recipe's layer plans by {form_of(made)}, and recipe.plan is {form_of(recipe.plan)}, by which leaks "
            f"are looked for, drops counted and ranks made to agree; expected the same. Replace both: "
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
        parameters = inspect.signature(recipe.route, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # of a function that tells nothing of itself
        return
    taken = {each.name for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)}
    missing = [name for name in dict.fromkeys(("bias", *recipe.needs)) if name not in taken]
    if missing and not any(each.kind is each.VAR_KEYWORD for each in parameters):
        raise ValueError(
            f"the router {place_of(recipe.route)} takes no {' and no '.join(missing)}; expected route(logits, bias=None"
            f"{''.join(f', {name}=...' for name in recipe.needs)}), as a layer calls it."
        )


def _plan_made_by(layer: ExpertLayer | None) -> Plan | None:
    while isinstance(layer, partial):
        if layer.func is fused_layer().func:  # type: ignore[attr-defined]
            return dropless_plan
        if layer.func in (fused_cpu(plan=dropless_plan).func, limited(fused_layer(), plan=dropless_plan).func):  # type: ignore[attr-defined]
            return layer.keywords["plan"]
        if isinstance(layer.keywords.get("dispatcher"), Dispatcher):
            return layer.keywords["dispatcher"].plan
        layer = layer.keywords.get("layer")  # of a wrapper, as ``recompute``
    return None


def _is_same(one: Any, other: Any) -> bool:
    """Say whether two values, or functions bound to values, are known to do the same."""
    if one is other:
        return True
    if isinstance(one, int | float | Ratio) and isinstance(other, int | float | Ratio):
        return ratio_of(one) == ratio_of(other)
    if not (callable(one) and callable(other)):
        return False
    (function, options), (others_function, others_options) = bound(one), bound(other)
    return (
        function is others_function
        and options.keys() == others_options.keys()
        and all(_is_same(value, others_options[name]) for name, value in options.items())
    )
