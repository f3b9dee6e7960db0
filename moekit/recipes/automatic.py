"""Letting a recipe choose its backend: the layer that it composes, as ``auto`` would run it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from moekit.experts import grouped
from moekit.experts.activations import GEGLU, GEGLU_TANH, GELU_MLP, RELU2, RELU_MLP, SWIGLU, Activation
from moekit.recipes.backends import auto
from moekit.recipes.expert_networks import experts_of
from moekit.recipes.layers import Recipe, expert_layer

_ACTIVATIONS = (SWIGLU, GEGLU, GEGLU_TANH, GELU_MLP, RELU_MLP, RELU2)


def automatic(recipe: Recipe) -> Recipe:
    """Let a recipe's layer run on what ``auto`` chooses for the device and dtype of its tokens.

    It computes the same, to rounding, with the same plan. Only what nobody has chosen is replaced: a layer composed of
    a dispatcher and one of moekit's expert networks on ``grouped``, the backend of recipes that were given none.

    Args:
        recipe: the method.

    Returns:
        The recipe with another layer; unchanged if its layer is of another kind.

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
    return recipe if activation is None else recipe._replace(layer=auto(dispatcher=dispatcher, activation=activation))


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
