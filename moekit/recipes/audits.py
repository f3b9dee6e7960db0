"""The causality audit of whole recipes: router, plan, and what the router remembers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moekit.dispatch import gather_rows, scatter_rows
from moekit.recipes.choices import check_order, num_choices, undecided_logits
from moekit.recipes.layers import Recipe, routing_of_networks
from moekit.recipes.recipe_checks import check_same_plan
from moekit.routing import Causality, causality, clean
from moekit.types import Dispatcher, DispatchPlan, Routing


def audit(recipe: Recipe, num_experts: int, **options: Any) -> Causality:
    """Find out by intervention whether a recipe's outputs depend on later tokens, or on other sequences.

    The router runs on drawn logits, behind no gate, and the plan decides who is dropped; experts work row by row in any
    recipe, and are replaced by known maps. See ``moekit.routing.causality``. Leaves torch's generator as it
    was. Torch uses one thread meanwhile, in the whole process; its number of threads is as before when this ends, also
    by an error. Audits of several threads at a time would each put back what another one set.

    Args:
        recipe: the method, before any parallel strategy.
        num_experts: E.
        options: of ``causality``: ``sequences``, ``length``, ``trials``, ``seed``.

    Returns:
        Causality.

    Raises:
        ValueError: if the recipe's plan is not its layer's, or carries an assignment out twice, or its router's rows
            are not those of the tokens in order.

    Example:
        >>> from moekit.recipes import gshard, mixtral
        >>> audit(mixtral(), 8).leaks, audit(gshard(), 8).leaks
        (False, True)
    """
    check_same_plan(recipe)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        width = clean(undecided_logits(recipe, num_experts, 1)).shape[1]
    choices = num_choices(recipe, num_experts)
    inputs = {} if recipe.state is None else {recipe.state.name: recipe.state.init(choices, device="cpu")}
    needs = tuple(name for name in recipe.needs if name != "token_mask")
    dispatcher = Dispatcher(partial(_plan, recipe=recipe), gather_rows, scatter_rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny: more threads only wait for each other
    try:
        reaches = {name: value for name, value in inputs.items() if name == "bias" or name in needs}
        route: Callable[..., Any] = recipe.route
        if "token_mask" in recipe.needs:
            route = partial(route, token_mask=None)
        return causality(route, dispatcher, num_experts=width, needs=needs, inputs=reaches, **options)
    finally:
        torch.set_num_threads(threads)


def _plan(routing: Routing, *, recipe: Recipe) -> DispatchPlan:
    check_order(recipe, routing)
    plan = recipe.plan(routing_of_networks(routing, recipe))
    carried = plan.assignments[plan.assignments >= 0]
    if len(carried.unique()) < len(carried):
        raise ValueError(
            "the recipe's plan carries an assignment out more than once; expected each once at most. A priority has to "
            "return the number of every assignment of the flattened routing, in another order."
        )
    return plan
