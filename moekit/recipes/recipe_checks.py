"""What a recipe of a user's is refused for before anything runs: parts that do not belong together."""

import reprlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from moekit.dispatch import dropless_plan
from moekit.experts import fused_cpu, fused_layer
from moekit.recipes.choices import place_of
from moekit.recipes.expert_layers import limited
from moekit.recipes.forms import form_of, is_same, parameters_of, signature_of, taken_apart
from moekit.recipes.layers import Recipe, check_needs
from moekit.types import Dispatcher, DispatchPlan, ExpertLayer, RouterState, Routing, SimpleExperts

Plan = Callable[[Routing], DispatchPlan]

# What the layers are partials of: those that drop nothing, and those that keep a plan.
_DROPLESS: Any = fused_layer().func  # type: ignore[attr-defined]
_WITH_PLAN: tuple[Any, ...] = (fused_cpu(plan=dropless_plan).func, limited(fused_layer(), plan=dropless_plan).func)  # type: ignore[attr-defined]


def check_same_plan(recipe: Recipe) -> None:
    """Check that a recipe's plan is the one that its layer makes: the audit, drop rates and exchanges go by it.

    Args:
        recipe: the method. Of a layer that is none of moekit's, or a parallel strategy, nothing is known.

    Raises:
        ValueError: if it is another one.

    Example:
        >>> from moekit.dispatch import padded
        >>> from moekit.experts import batched, swiglu
        >>> from moekit.recipes import expert_layer, mixtral
        >>> tight = padded(capacity_factor=1.0)
        >>> layer = expert_layer(dispatcher=tight, experts=partial(swiglu, matmul=batched))
        >>> check_same_plan(mixtral()._replace(layer=layer, plan=tight.plan))
    """
    made = _plan_made_by(recipe.layer)
    if made is not None and not is_same(made, recipe.plan):
        apart = ", made by itself" if form_of(made) == form_of(recipe.plan) else ""
        raise ValueError(
            f"the recipe's layer plans by {form_of(made)}, and recipe.plan is {form_of(recipe.plan)}{apart}, by which "
            f"leaks are looked for, drops counted and ranks made to agree; expected the same. Replace both: "
            f"recipe._replace(layer=..., plan=dispatcher.plan)."
        )


def _check_stages(recipe: Recipe) -> None:
    """Check that each part of a recipe is of its kind, and that the router is handed what it remembers."""
    for name in ("gate", "route", "layer", "init", "plan", "init_gate"):
        stage = getattr(recipe, name)
        if not callable(stage):
            hint = _OF_DISPATCHERS.get(name, "") if isinstance(stage, Dispatcher) else ""
            raise ValueError(f"recipe.{name} is a {type(stage).__name__}; expected a function.{hint}")
    for name in ("losses", "coefficients"):
        given = getattr(recipe, name)
        if not isinstance(given, Mapping):
            raise ValueError(f"recipe.{name} is a {type(given).__name__}; expected a mapping, by the names of losses.")
    for name, kind in (("state", RouterState), ("simple", SimpleExperts)):
        if not isinstance(given := getattr(recipe, name), kind | None):
            raise ValueError(f"recipe.{name} is a {type(given).__name__}; expected {kind.__name__}, or None.")
    state = () if recipe.state is None else (recipe.state.name,)
    check_needs(recipe.needs, {"token_ids", "token_mask", "sequence_length", *state})
    for name in state:
        if name not in ("bias", *recipe.needs) and name in _required(recipe.route):
            raise ValueError(
                f"the router {place_of(recipe.route)} needs {name!r}, what the recipe's state is called, and gets what "
                f"recipe.needs lists; expected it there: recipe._replace(needs={(*recipe.needs, name)})."
            )
    _check_bound("router", recipe.route, ("bias", *recipe.needs))
    for name, loss in recipe.losses.items():
        if not callable(loss):
            raise ValueError(f"the loss {name!r} of the recipe is {reprlib.repr(loss)}; expected a function.")
        _check_bound("loss", loss, ("token_mask", "sequence_length"))


def _check_bound(kind: str, function: Callable[..., Any], handed: Collection[str]) -> None:
    """Refuse a function bound to what a layer hands it in every call, by which the bound value would be lost."""
    lost = [name for name, value in taken_apart(function)[1].items() if name in handed and value is not None]
    if lost:
        raise ValueError(
            f"the {kind} {place_of(function)} is bound to {' and '.join(lost)}, which a layer hands it in every call, "
            f"so that what it is bound to would be lost. Hand it to the layer (token_mask=; state= for a bias or what "
            f"else a router remembers; x as (B, L, D) for the sequence length), or bind it in a function of your own."
        )


_OF_DISPATCHERS = {
    "layer": " Of a dispatcher make one by expert_layer(dispatcher=..., experts=...).",
    "plan": " Of a dispatcher take its plan, dispatcher.plan.",
}


def check_observation(observed: Any) -> None:
    """Check that what a router's state observed adds up over micro-batches and ranks.

    Args:
        observed: what the ``observe`` of the state returned.

    Raises:
        ValueError: if it is no tensor (n,).

    Example:
        >>> import torch
        >>> check_observation(torch.ones(8))
    """
    if isinstance(observed, Tensor) and observed.ndim == 1:
        return
    found = f"a tensor {tuple(observed.shape)}" if isinstance(observed, Tensor) else reprlib.repr(observed)
    raise ValueError(
        f"state.observe returned {found}; expected a tensor (n,), which is added up over micro-batches and ranks. "
        f"Flatten it, or join several by torch.cat; recipe.state.update takes it apart."
    )


def check_calls(recipe: Recipe) -> None:
    """Check that gate, router and losses take what a layer calls them with, such as what a recipe needs.

    And that its state, if it has one, observes what a trainer calls it with.

    Args:
        recipe: the method.

    Raises:
        ValueError: if it does not.

    Example:
        >>> from moekit.recipes import mixtral
        >>> from moekit.dispatch import dropless
        >>> check_calls(mixtral()._replace(plan=dropless()))
        Traceback (most recent call last):
        ValueError: recipe.plan is a Dispatcher; expected a function. Of a dispatcher take its plan, dispatcher.plan.
    """
    _check_stages(recipe)
    state = recipe.state
    if state is not None and state.observe is not None and (missing := _not_taken(state.observe, ("token_mask",))):
        raise ValueError(
            f"the observe of the state {state.name!r}, {place_of(state.observe)}, takes no {missing}; expected "
            f"observe(logits, routing, state, token_mask=None), as a trainer calls it."
        )
    if not _takes_two(recipe.gate):
        raise ValueError(
            f"the gate {place_of(recipe.gate)} does not take two arguments; expected gate(x, params), x (T, D), and "
            f"params what recipe.init_gate returns, which the layer learns. One without is lambda x, params: gate(x)."
        )
    if missing := _not_taken(recipe.route, ("bias", *recipe.needs)):
        raise ValueError(
            f"the router {place_of(recipe.route)} takes no {missing}; expected route(logits, bias=None"
            f"{''.join(f', {name}=...' for name in recipe.needs)}), as a layer calls it."
        )
    if unmet := _unmet(recipe.route, ("bias", *recipe.needs)):
        raise ValueError(
            f"the router {place_of(recipe.route)} wants {unmet}, which no layer gives it; bind it by partial, or name "
            f"it in recipe.needs if it is one of token_ids, token_mask and sequence_length or the recipe's state."
        )
    for name, loss in recipe.losses.items():
        _check_loss(name, loss)


def _check_loss(name: str, loss: Callable[..., Any]) -> None:
    given = ("token_mask", "sequence_length")
    if missing := _not_taken(loss, given):
        raise ValueError(
            f"the loss {name!r}, {place_of(loss)}, takes no {missing}; expected loss(logits, routing, "
            f"token_mask=None, sequence_length=None), as a layer calls it."
        )
    if unmet := _unmet(loss, given):
        raise ValueError(
            f"the loss {name!r}, {place_of(loss)}, wants {unmet}, which no layer gives it: losses see logits and "
            f"routing, and not the recipe's state. Bind it by partial."
        )


def _takes_two(function: Callable[..., Any]) -> bool:
    """Say whether a function can be called with two arguments by position; of one that tells nothing of itself, yes."""
    signature = signature_of(function)
    try:
        if signature is not None:
            signature.bind(None, None)
    except TypeError:
        return False
    return True


def _not_taken(function: Callable[..., Any], names: Collection[str]) -> str:
    """Name the arguments that a call gives and a function does not take; none if it tells nothing of itself."""
    parameters = parameters_of(function)
    if parameters is None or any(each.kind is each.VAR_KEYWORD for each in parameters):
        return ""
    taken = {each.name for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)}
    return " and no ".join(name for name in dict.fromkeys(names) if name not in taken)


def _unmet(function: Callable[..., Any], given: Collection[str]) -> str:
    """Name the keywords without which a function cannot be called, and which are not among those that are given."""
    wanted = [each for each in parameters_of(function) or () if each.kind is each.KEYWORD_ONLY]
    return " and ".join(each.name for each in wanted if each.default is each.empty and each.name not in given)


def _required(function: Callable[..., Any]) -> set[str]:
    """Name the arguments without which a function cannot be called."""
    parameters = parameters_of(function) or ()
    return {each.name for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD}


def _plan_made_by(layer: ExpertLayer | None) -> Plan | None:
    while isinstance(layer, partial):
        if layer.func is _DROPLESS:
            return dropless_plan
        if layer.func in _WITH_PLAN:
            return layer.keywords["plan"]
        place = getattr(layer.func, "__module__", None) or ""
        if not place.startswith("moekit.") or place.startswith("moekit.parallel"):  # whose plan is of several ranks
            return None
        if isinstance(found := layer.keywords.get("dispatcher"), Dispatcher):
            return found.plan
        layer = layer.keywords.get("layer")  # of a wrapper, as ``recompute``
    return None
