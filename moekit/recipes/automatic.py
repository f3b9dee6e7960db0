"""Letting a recipe choose its backend: the layer that it composes, as ``auto`` would run it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from moekit.experts import grouped
from moekit.experts.activations import GEGLU, GEGLU_TANH, GELU_MLP, RELU2, RELU_MLP, SWIGLU, Activation
from moekit.recipes.backends import auto, auto_top_k
from moekit.recipes.expert_networks import experts_of
from moekit.recipes.layers import Recipe, expert_layer
from moekit.routing import top_k
from moekit.types import Router

_ACTIVATIONS = (SWIGLU, GEGLU, GEGLU_TANH, GELU_MLP, RELU_MLP, RELU2)


def automatic(recipe: Recipe) -> Recipe:
    """Let a recipe's layer run on what ``auto`` chooses for the device and dtype of its tokens.

    It computes the same, to rounding, with the same plan. Only what nobody has chosen is replaced: a layer composed of
    a dispatcher and one of moekit's expert networks on ``grouped``, the backend of recipes that were given none; and
    with it the router, if it is ``top_k`` of what its kernel knows.

    Args:
        recipe: the method.

    Returns:
        The recipe with another layer, and perhaps another router; unchanged if its layer is of another kind.

    Example:
        >>> from moekit.experts import loop
        >>> from moekit.recipes import mixtral
        >>> automatic(mixtral()).layer.func.__name__
        '_auto'
        >>> slow = mixtral(matmul=loop)
        >>> automatic(slow) is slow
        True
    """
    layer = recipe.layer
    if not isinstance(layer, partial) or set(layer.keywords) != {"dispatcher", "experts"}:
        return recipe
    dispatcher, experts = layer.keywords["dispatcher"], layer.keywords["experts"]
    if layer.args or layer.func is not expert_layer(dispatcher=dispatcher, experts=experts).func:  # type: ignore[attr-defined]
        return recipe
    activation = _activation_of(experts)
    if activation is None:
        return recipe
    return recipe._replace(layer=auto(dispatcher=dispatcher, activation=activation), route=_quick(recipe.route))


def _quick(route: Router) -> Router:
    known = {"k", "score", "normalize", "scale"}
    if not isinstance(route, partial) or route.func is not top_k or route.args or not set(route.keywords) <= known:
        return route
    return partial(auto_top_k, **route.keywords)


def _activation_of(experts: Callable[..., Any]) -> Activation | None:
    """Find the activation whose expert network on ``grouped`` this is."""
    found = _bound(experts)
    for activation in _ACTIVATIONS:
        if found == _bound(partial(experts_of(activation), matmul=grouped)):
            return activation
    return None


def _bound(function: Callable[..., Any]) -> tuple[Any, ...]:
    """Return a partial function's parts, which compare where partial functions themselves do not."""
    return (function.func, function.args, function.keywords) if isinstance(function, partial) else (function, (), {})
