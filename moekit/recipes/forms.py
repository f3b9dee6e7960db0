"""What a recipe is made of: which form of a loss or capacity a result was computed with, and whether two are one."""

import inspect
import reprlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from moekit.ratios import ratio_of
from moekit.recipes.layers import Recipe
from moekit.types import Ratio


def bound(function: Callable[..., Any]) -> tuple[Callable[..., Any], dict[Any, Any]]:
    """Take a function bound to arguments apart; defaults count as bound.

    Args:
        function: bound or not.

    Returns:
        The function itself, and name, or position, to what it is bound to.

    Example:
        >>> from moekit.routing import relu_choice
        >>> bound(partial(relu_choice, normalize=True))[1]["normalize"]
        True
    """
    function, arguments = taken_apart(function)
    return function, _defaults(function) | arguments


def is_same(one: Any, other: Any) -> bool:
    """Say whether two values, or functions bound to values, are known to do the same; ``partial`` knows only itself.

    Args:
        one: a function or a value.
        other: likewise.

    Returns:
        Whether they do; False where nobody knows.

    Example:
        >>> from moekit.routing import top_k
        >>> is_same(partial(top_k, k=2, order=1.0), partial(top_k, k=2)), is_same(partial(top_k, k=1), top_k)
        (True, False)
    """
    if one is other:
        return True
    if isinstance(one, int | float | Ratio) and isinstance(other, int | float | Ratio):
        exact = isinstance(one, Ratio) or isinstance(other, Ratio)
        return ratio_of(one) == ratio_of(other) if exact else one == other
    if isinstance(one, str) and isinstance(other, str):
        return one == other
    if isinstance(one, tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(is_same, one, other))
    if not (callable(one) and callable(other)):
        return False
    (function, arguments), (others_function, others_arguments) = taken_apart(one), taken_apart(other)
    if function is not others_function:
        return False
    defaults = _defaults(function)
    arguments, others_arguments = defaults | arguments, defaults | others_arguments
    return arguments.keys() == others_arguments.keys() and all(
        is_same(value, others_arguments[name]) for name, value in arguments.items()
    )


def form_of(function: Callable[..., Any]) -> str:
    """Name a function and what it is bound to, defaults too, but for what is None: a call gives that, or nobody.

    Args:
        function: a stage or a loss.

    Returns:
        As a call is written.

    Example:
        >>> from moekit.dispatch import padded
        >>> form_of(padded(capacity_factor=1.25).plan)
        'padded_plan(priority=by_position, capacity_factor=1.25)'
    """
    named, arguments = bound(function)
    given = ", ".join(f"{name}={_value(value)}" for name, value in arguments.items() if value is not None)
    return f"{getattr(named, '__name__', None) or type(named).__name__}{f'({given})' if given else ''}"


def method_of(recipe: Recipe, *, evaluation: Recipe | None = None, loss_scope: str | None = None) -> dict[str, Any]:
    """Say which gate, router, plan and losses a recipe has, for a file of results.

    Args:
        recipe: as it is trained.
        evaluation: as it is scored.
        loss_scope: whose load the losses balance, as ``--moe-loss-scope`` says it.

    Returns:
        What JSON holds: the forms of the stages, and each loss with its coefficient, the name of the router's state
        where that is it, and None where the loss is only reported.

    Example:
        >>> from moekit.recipes import mixtral
        >>> method_of(mixtral())["losses"]["load_balance"]["coefficient"]
        0.02
    """
    weights: dict[str, Any] = {name: float(number) for name, number in recipe.coefficients.items()}  # of any kind
    if recipe.state is not None and recipe.state.scales:
        weights[recipe.state.scales] = recipe.state.name
    losses = {name: {"form": form_of(loss), "coefficient": weights.get(name)} for name, loss in recipe.losses.items()}
    found = {**_stages(recipe), "gate": form_of(recipe.gate), "losses": losses, "loss_scope": loss_scope}
    return found if evaluation is None else {**found, "evaluation": _stages(evaluation)}


def taken_apart(function: Callable[..., Any]) -> tuple[Callable[..., Any], dict[Any, Any]]:
    """Take a function bound to arguments apart; defaults do not count.

    Args:
        function: bound or not.

    Returns:
        The function itself, and name, or position, to what it was bound to.

    Example:
        >>> from moekit.routing import top_k
        >>> taken_apart(partial(partial(top_k, k=2), k=1))[1]
        {'k': 1}
    """
    arguments: dict[Any, Any] = {}
    while isinstance(function, partial):
        arguments = {**dict(enumerate(function.args)), **function.keywords, **arguments}
        function = function.func
    return function, arguments


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """List the parameters of a function, of a module those of its forward; None if it tells nothing of itself."""
    signature = signature_of(function)
    return None if signature is None else list(signature.parameters.values())


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return how a function is called itself, whatever it wraps; of a module, its forward. None if it does not tell."""
    try:
        called = function.forward if isinstance(function, nn.Module) else function
        return inspect.signature(called, follow_wrapped=False)
    except (TypeError, ValueError):
        return None


def _defaults(function: Callable[..., Any]) -> dict[Any, Any]:
    return {p.name: p.default for p in parameters_of(function) or () if p.default is not p.empty}


def _stages(recipe: Recipe) -> dict[str, Any]:
    return {"route": form_of(recipe.route), "plan": form_of(recipe.plan)}


def _value(value: Any) -> str:
    if callable(value):
        return form_of(value)
    return str(value) if isinstance(value, int | float | str | tuple) else reprlib.repr(value)
