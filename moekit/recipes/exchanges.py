"""How the MoE layers of a run are spread over ranks: names become strategies here, and nowhere else."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from moekit.dispatch import dropless_plan
from moekit.parallel import (
    Grid,
    Layout,
    ProcessGroup,
    all_gather,
    all_to_all,
    chunked,
    group_of,
    in_order,
    plan_together,
    replicated,
    spread_experts,
    static_all_to_all,
    static_routing,
    tensor_parallel,
    with_positions,
)
from moekit.recipes.choices import has_rows_of_tokens, place_of
from moekit.recipes.layers import Recipe
from moekit.recipes.settings import ParallelSettings
from moekit.types import DispatchPlan, ExpertLayer, Routing


class Exchange(Protocol):
    """A strategy that spreads experts over the ranks of a group."""

    def __call__(self, layer: ExpertLayer, *, group: ProcessGroup, return_group: ProcessGroup | None) -> ExpertLayer:
        """Wrap an expert layer."""
        ...


def _by_gathering(layer: ExpertLayer, *, group: ProcessGroup, return_group: ProcessGroup | None) -> ExpertLayer:
    return all_gather(layer, group=group)


def _make_exchange(settings: ParallelSettings) -> Exchange:
    """Turn ``--moe-exchange`` into a strategy."""
    exchanges: dict[str, Exchange] = {
        "all_to_all": all_to_all,
        "all_gather": _by_gathering,
        "static": partial(static_all_to_all, capacity_factor=settings.moe_exchange_capacity_factor),
    }
    return exchanges[settings.moe_exchange]


def make_layout(
    settings: ParallelSettings, world_size: int, *, num_experts: int, hidden: int, ranks_per_node: int
) -> Layout:
    """Lay the experts of a run out over its ranks.

    Args:
        settings: of the launch.
        world_size: ranks.
        num_experts: E of each MoE layer; 0 for a dense model.
        hidden: F of each expert.
        ranks_per_node: ranks that a node has.

    Returns:
        Layout; every rank holds all experts unless ``--moe-expert-model-parallelism`` is given.

    Raises:
        ValueError: if a degree does not divide what it splits.

    Example:
        >>> given = ParallelSettings(moe_expert_model_parallelism=True)
        >>> make_layout(given, 8, num_experts=4, hidden=1952, ranks_per_node=8).hidden
        2
    """
    if not settings.moe_expert_model_parallelism or not num_experts:
        return replicated(world_size, max(num_experts, 1))
    return spread_experts(
        world_size,
        num_experts,
        hidden,
        expert_ranks=settings.moe_expert_ranks,
        hidden_ranks=settings.moe_hidden_ranks,
        ranks_per_node=ranks_per_node if settings.moe_hierarchical_exchange else None,
    )


def spread_recipe(
    recipe: Recipe, grid: Grid, settings: ParallelSettings, *, block: int, evaluates: bool = False
) -> Recipe:
    """Wrap the layer of a recipe in the strategies of a run.

    Args:
        recipe: the method; with a capacity limit, tokens of all ranks that exchange compete, in the order that one
            process would have them in.
        grid: of all ranks; where no tokens travel the recipe stays as it is.
        settings: of the launch.
        block: tokens of a sequence, by which a batch is dealt to the ranks.
        evaluates: drop nothing in the exchange, and let ranks have any numbers of tokens; a recipe that keeps its
            capacity limit then takes them rank by rank.

    Returns:
        Recipe.

    Raises:
        ValueError: if a capacity limit would count within a slice of the tokens, or their routing cannot be sliced.
    """
    layout = grid.layout
    if not layout.exchanges:
        return recipe
    if evaluates and settings.moe_exchange == "static":
        settings = replace(settings, moe_exchange="all_to_all")
    limited = recipe.plan is not dropless_plan
    static = settings.moe_exchange == "static"
    layer = _spread_layer(recipe.layer, grid, _make_exchange(settings), equal=static)
    if settings.moe_exchange_chunks > 1:
        check_slices(recipe, layout, settings)
        layer = chunked(layer, num_chunks=settings.moe_exchange_chunks)
    plan = recipe.plan
    if limited:
        rank, num_ranks, dealt = grid.world.rank, grid.world.size, None if evaluates else block
        layer = in_order(layer, rank=rank, num_ranks=num_ranks, block=dealt)
        together = plan_together(plan, group=group_of(grid.tokens, "together"), equal=not evaluates)
        ordered = partial(with_positions, rank=rank, num_ranks=num_ranks, block=dealt)
        plan = partial(_after, edit=ordered, plan=together)
    if static and layout.experts > 1:  # where hidden dimensions alone are split, no exchange leaves tokens behind
        factor, ranks = settings.moe_exchange_capacity_factor, layout.experts
        plan = partial(_after, edit=partial(static_routing, num_ranks=ranks, capacity_factor=factor), plan=plan)
    return recipe._replace(layer=layer, plan=plan)


def check_slices(recipe: Recipe, layout: Layout, settings: ParallelSettings) -> None:
    """Refuse slices of the tokens under a capacity limit, and of a routing that is not (T, K).

    Args:
        recipe: the method.
        layout: of all ranks.
        settings: of the launch.

    Raises:
        ValueError: if a limit would count within a slice, or the routing has no row for each token.
    """
    if not layout.exchanges or settings.moe_exchange_chunks == 1:
        return
    if not has_rows_of_tokens(recipe, layout.num_experts):
        raise ValueError(
            f"--moe-exchange-chunks {settings.moe_exchange_chunks} slices the choices of tokens, (T, K), and the "
            f"router {place_of(recipe.route)} returns none. Leave the flag out, or take a router by which tokens choose"
        )
    if recipe.plan is not dropless_plan:
        raise ValueError(
            f"--moe-exchange-chunks {settings.moe_exchange_chunks}: a capacity limit would count within each "
            "slice, and drop other tokens than one process does. Give --moe-capacity-factor 0, or leave it out"
        )


def _spread_layer(layer: ExpertLayer, grid: Grid, exchange: Exchange, *, equal: bool = False) -> ExpertLayer:
    """Nest the strategies that a layout asks for: hidden dimension inside, then experts of a node, then nodes.

    ``equal`` says that ranks which share a hidden dimension have as many tokens and assignments as each other, also
    behind the exchange, so that nobody needs to ask.
    """
    layout = grid.layout
    if layout.hidden > 1:
        layer = tensor_parallel(layer, group=group_of(grid.experts, "hidden"), equal=equal)
    for name, size in (("experts", layout.experts), ("nodes", layout.nodes)):
        if size > 1:
            layer = exchange(layer, group=group_of(grid.exchange, name), return_group=grid.returns.get(name))
    return layer


def _after(
    routing: Routing, *, edit: Callable[[Routing], Routing], plan: Callable[[Routing], DispatchPlan]
) -> DispatchPlan:
    return plan(edit(routing))
