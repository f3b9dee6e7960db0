"""What a recipe is made of, in words: which form of a loss or capacity a result was computed with."""

import inspect
import reprlib
from collections.abc import Callable
from functools import partial
from typing import Any

from moekit.recipes.layers import Recipe


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
    arguments: dict[Any, Any] = {}
    while isinstance(function, partial):
        arguments = {**dict(enumerate(function.args)), **function.keywords, **arguments}
        function = function.func
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # of a function that tells nothing of itself
        return function, arguments
    return function, {p.name: p.default for p in parameters if p.default is not p.empty} | arguments


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
        What JSON holds: the forms of the stages, and each loss with its coefficient, None where it is only reported.

    Example:
        >>> from moekit.recipes import mixtral
        >>> method_of(mixtral())["losses"]["load_balance"]["coefficient"]
        0.02
    """
    losses = {
        name: {"form": form_of(loss), "coefficient": recipe.coefficients.get(name)}
        for name, loss in recipe.losses.items()
    }
    found = {**_stages(recipe), "gate": form_of(recipe.gate), "losses": losses, "loss_scope": loss_scope}
    return found if evaluation is None else {**found, "evaluation": _stages(evaluation)}


def _stages(recipe: Recipe) -> dict[str, Any]:
    return {"route": form_of(recipe.route), "plan": form_of(recipe.plan)}


def _value(value: Any) -> str:
    if callable(value):
        return form_of(value)
    return str(value) if isinstance(value, int | float | str | tuple) else reprlib.repr(value)
