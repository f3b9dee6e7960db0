"""What recipes are made of, in words and as a table."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moekit.recipes.choices import experts_per_token
from moekit.recipes.expert_layers import parts_of
from moekit.recipes.layers import Recipe
from moekit.routing import round_robin

_MANY_EXPERTS = 64  # enough for every recipe's own default of experts per token


def recipe_table(makers: dict[str, Callable[..., Recipe]]) -> Any:
    """Lay recipes out with their own default settings.

    Args:
        makers: name to the function that makes the recipe.

    Returns:
        A ``rich.table.Table``.

    Example:
        >>> from moekit.recipes.names import RECIPES
        >>> recipe_table({"mixtral": RECIPES["mixtral"]}).row_count
        1
    """
    from rich.table import Table

    table = Table(title="recipes, with their own defaults", title_justify="left")
    for heading in ("--recipe", "k", "causal", "capacity", "parts", "losses"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("--recipe", "losses"))
    for name, make in makers.items():
        recipe = make()
        losses = [f"{recipe.coefficients.get(loss, 0):g} {loss}" for loss in recipe.losses]
        table.add_row(
            name,
            f"{experts_per_token(recipe, _MANY_EXPERTS):g}",
            "yes" if recipe.causal else "no",
            capacity_words(recipe),
            ", ".join(_parts(recipe)),
            "\n".join([*losses, *([f"state: {recipe.state.name}"] if recipe.state else [])]),
        )
    return table


def _parts(recipe: Recipe) -> list[str]:
    """Name the functions that a recipe is made of: gate, router, experts, and what comes beside them."""
    layer: Any = recipe.layer
    while (parts := parts_of(layer)) is None and isinstance(layer, partial) and "layer" in layer.keywords:
        layer = layer.keywords["layer"]
    experts = [_function_name(layer if parts is None else parts.experts)]
    beside = [f"{recipe.shared.number} shared{', gated' if recipe.shared.gated else ''}"] if recipe.shared else []
    beside += [f"{recipe.simple.number} simple"] if recipe.simple else []
    return [_function_name(recipe.gate), _function_name(recipe.route), *experts, *beside]


def _function_name(function: Any) -> str:
    """Name a function, also one whose arguments are bound; of a wrapper, with the name of what it wraps."""
    if not isinstance(function, partial):
        return str(getattr(function, "__name__", type(function).__name__)).removeprefix("_")
    wrapped = [_function_name(each) for each in function.args if callable(each)]
    return _function_name(function.func) + (f"({', '.join(wrapped)})" if wrapped else "")


def capacity_words(recipe: Recipe) -> str:
    """Find a recipe's capacity factor out, from what its plan does with a balanced routing.

    Args:
        recipe: the method.

    Returns:
        "dropless", or the rows per expert as a multiple of the balanced load.

    Example:
        >>> from moekit.recipes.names import RECIPES
        >>> capacity_words(RECIPES["openlm"]()), capacity_words(RECIPES["mixtral"]())
        ('1.25', 'dropless')
    """
    routing = round_robin(torch.zeros(100 * _MANY_EXPERTS, _MANY_EXPERTS, device="cpu"), k=2)  # 200 rows each
    capacity = recipe.plan(routing).groups.capacity
    return "dropless" if capacity is None else f"{capacity / 200:g}"
