from functools import partial

import pytest
import torch

from moekit.parallel import Grid, Layout, World, all_gather, all_to_all, collectives, make_grid, one_process, replicated
from moekit.recipes import exchanges, expert_choice, mixtral, openlm, soft_moe, sonic_token_rounding
from moekit.recipes.exchanges import _make_exchange, _spread_layer, make_layout, spread_recipe
from moekit.recipes.settings import ParallelSettings

SPREAD = ParallelSettings(moe_expert_model_parallelism=True)


@pytest.fixture
def grids(monkeypatch):
    """Make grids whose groups are pairs of a mesh's name and an axis, so that strategies can be made on one process."""
    monkeypatch.setattr(exchanges, "group_of", lambda mesh, name: (mesh, name))

    def grid(layout: Layout, rank: int = 0) -> Grid:
        world = World(rank, layout.world_size, torch.device("cpu"))
        return Grid(
            world, layout, "dense", "experts", "tokens", "exchange", {"experts": "back", "nodes": "back of nodes"}
        )

    return grid


def nested(layer) -> list[tuple]:
    """Take strategies apart, from the outermost: each with its arguments but for the layer inside."""
    found = []
    while isinstance(layer, partial) and "layer" in layer.keywords:
        rest = {key: value for key, value in layer.keywords.items() if key != "layer"}
        found.append((layer.func.__name__, rest))
        layer = layer.keywords["layer"]
    return [*found, layer]


def settings_of(**given) -> ParallelSettings:
    return ParallelSettings(moe_expert_model_parallelism=True, **given)


def laid_out(given: ParallelSettings, ranks: int, *, num_experts=8, hidden=1952, ranks_per_node=8) -> Layout:
    return make_layout(given, ranks, num_experts=num_experts, hidden=hidden, ranks_per_node=ranks_per_node)


@pytest.mark.parametrize(
    ("given", "ranks", "grid"),
    [
        ({}, 8, (1, 1, 1, 8)),
        ({}, 16, (1, 2, 1, 8)),  # hierarchical only if asked for
        ({"moe_expert_ranks": 2}, 8, (4, 1, 1, 2)),
        ({"moe_expert_ranks": 2, "moe_hidden_ranks": 4}, 8, (1, 4, 1, 2)),
        ({"moe_hierarchical_exchange": True}, 8, (1, 1, 1, 8)),
    ],
)
def test_flags_lay_the_experts_out(given, ranks, grid):
    assert laid_out(settings_of(**given), ranks) == Layout(8, *grid)


def test_a_hierarchical_exchange_spans_nodes():
    assert laid_out(settings_of(moe_hierarchical_exchange=True), 8, ranks_per_node=4) == Layout(8, nodes=2, experts=4)
    assert laid_out(SPREAD, 8, ranks_per_node=4) == Layout(8, experts=8)


@pytest.mark.parametrize(("given", "experts"), [(ParallelSettings(), 8), (SPREAD, 0), (ParallelSettings(fsdp=True), 8)])
def test_every_rank_holds_all_unless_experts_are_spread(given, experts):
    assert laid_out(given, 8, num_experts=experts) == replicated(8, max(experts, 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"moe_expert_ranks": 3}, r"expert_ranks \(--moe-expert-ranks\) is 3, which does not divide 8, the experts"),
        (
            {"moe_hidden_ranks": 3},
            r"hidden_ranks \(--moe-hidden-ranks\) is 3, which does not divide 1952, the hidden units",
        ),
        ({"moe_hierarchical_exchange": True}, "ranks_per_node is 3, which does not divide 8, the ranks that share"),
    ],
)
def test_degrees_that_do_not_divide_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        laid_out(settings_of(**given), 8, ranks_per_node=3)


def test_names_become_strategies():
    layer, group, other = object(), object(), object()
    assert _make_exchange(SPREAD) is all_to_all
    gathered = _make_exchange(settings_of(moe_exchange="all_gather"))(layer, group=group, return_group=other)
    assert nested(gathered) == nested(all_gather(layer, group=group))
    static = settings_of(moe_exchange="static", moe_exchange_capacity_factor=1.5)
    [(name, options), inner] = nested(_make_exchange(static)(layer, group=group, return_group=other))
    assert (name, options["capacity_factor"]) == ("_static_all_to_all", (3, 2))
    assert (options["group"], options["return_group"]) == (group, other)
    assert inner is layer


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), -1.0])
def test_a_static_exchange_without_a_capacity_is_refused(grids, factor):
    given = settings_of(moe_exchange="static", moe_exchange_capacity_factor=factor)
    with pytest.raises(ValueError, match=f"capacity_factor = {factor}; expected a positive, finite number"):
        spread_recipe(mixtral(), grids(Layout(8, experts=4)), given, block=4)


@pytest.mark.parametrize("evaluates", [False, True])
def test_one_process_leaves_a_recipe_as_it_is(evaluates):
    for recipe in (mixtral(), openlm()):
        for given in (SPREAD, settings_of(moe_exchange_chunks=3), settings_of(moe_exchange="static")):
            grid = make_grid(one_process(), replicated(1, 8))
            assert spread_recipe(recipe, grid, given, block=4, evaluates=evaluates) is recipe


def test_replicas_leave_a_recipe_as_it_is(grids):
    recipe = openlm()
    assert spread_recipe(recipe, grids(replicated(4, 8)), ParallelSettings(fsdp=True), block=4) is recipe


SENT = {"send": collectives.exchange, "send_back": collectives.exchange}
EXPERTS = ("_all_to_all", {"group": ("exchange", "experts"), "return_group": "back", **SENT})
NODES = ("_all_to_all", {"group": ("exchange", "nodes"), "return_group": "back of nodes", **SENT})
HIDDEN = ("_tensor_parallel", {"group": ("experts", "hidden"), "equal": False})


@pytest.mark.parametrize(
    ("layout", "strategies"),
    [
        (Layout(8, experts=4), [EXPERTS]),
        (Layout(8, nodes=2), [NODES]),
        (Layout(8, nodes=2, experts=4), [NODES, EXPERTS]),
        (Layout(8, hidden=2), [HIDDEN]),
        (Layout(8, replicas=3, hidden=2, nodes=2, experts=4), [NODES, EXPERTS, HIDDEN]),
        (Layout(8, replicas=3, hidden=2, experts=8), [EXPERTS, HIDDEN]),
    ],
)
def test_strategies_are_nested_hidden_inside_nodes_outside(grids, layout, strategies):
    layer = object()
    assert nested(_spread_layer(layer, grids(layout), all_to_all)) == [*strategies, layer]
    recipe = mixtral()
    spread = spread_recipe(recipe, grids(layout), SPREAD, block=4)
    assert nested(spread.layer)[: len(strategies)] == strategies
    assert spread == recipe._replace(layer=spread.layer)  # dropless: the plan is that of one process


def test_slices_are_outside_of_exchanges(grids):
    recipe = mixtral()
    spread = spread_recipe(recipe, grids(Layout(8, experts=4)), settings_of(moe_exchange_chunks=3), block=4)
    (name, options), exchange, *_ = nested(spread.layer)
    assert (name, options["num_chunks"], exchange) == ("_chunked", 3, EXPERTS)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_capacity_limit_counts_in_the_order_of_one_process(grids, rank):
    layout = Layout(8, replicas=2, experts=4)
    recipe = openlm(capacity_factor=1.25)
    spread = spread_recipe(recipe, grids(layout, rank), SPREAD, block=16)
    order, exchange, *_ = nested(spread.layer)
    assert order == ("_in_order", {"rank": rank, "num_ranks": 8, "block": 16})
    assert exchange == EXPERTS
    given = spread.plan.keywords
    assert given["edit"].keywords == {"rank": rank, "num_ranks": 8, "block": 16}
    assert given["plan"].keywords == {"plan": recipe.plan, "group": ("tokens", "together"), "equal": True}


def test_a_limit_that_evaluation_keeps_takes_any_number_of_tokens(grids):
    spread = spread_recipe(openlm(), grids(Layout(8, experts=4)), SPREAD, block=16, evaluates=True)
    assert nested(spread.layer)[0] == ("_in_order", {"rank": 0, "num_ranks": 4, "block": None})
    assert spread.plan.keywords["plan"].keywords["equal"] is False


def test_slices_with_a_capacity_limit_are_refused(grids):
    message = (
        "--moe-exchange-chunks 2: a capacity limit would count within each slice, and drop other tokens than one "
        "process does. Give --moe-capacity-factor 0, or leave it out"
    )
    with pytest.raises(ValueError, match=message):
        spread_recipe(openlm(), grids(Layout(8, experts=4)), settings_of(moe_exchange_chunks=2), block=4)


@pytest.mark.parametrize("recipe", [expert_choice(), sonic_token_rounding()])
def test_slices_of_a_routing_without_rows_of_tokens_are_refused(grids, recipe):
    chunks, layout = settings_of(moe_exchange_chunks=2), Layout(8, experts=4)
    with pytest.raises(ValueError, match=r"--moe-exchange-chunks 2 slices .* and the router .* returns none\. Leave"):
        spread_recipe(recipe, grids(layout), chunks, block=4)
    assert spread_recipe(soft_moe(), grids(layout), chunks, block=4) != soft_moe()  # slots are rows


def test_evaluation_turns_a_static_exchange_into_one_that_drops_nothing(grids):
    given = settings_of(moe_exchange="static", moe_exchange_capacity_factor=0.5)
    trained, scored = (
        spread_recipe(mixtral(), grids(Layout(8, experts=4)), given, block=4, evaluates=evaluates)
        for evaluates in (False, True)
    )
    assert nested(trained.layer)[0][0] == "_static_all_to_all"
    assert nested(trained.layer)[0][1]["capacity_factor"] == (1, 2)
    assert nested(scored.layer)[0] == EXPERTS
    assert scored.plan is mixtral().plan
    edit = trained.plan.keywords["edit"]
    assert edit.keywords == {"num_ranks": 4, "capacity_factor": 0.5}
    assert given.moe_exchange == "static"


def test_nobody_asks_for_sizes_behind_a_static_exchange(grids):
    """Ranks that share a hidden dimension have as many tokens as each other, so the device need not be read."""
    given, layout = settings_of(moe_exchange="static"), Layout(8, hidden=2, experts=4)
    for recipe in (mixtral(), openlm()):
        trained, scored = (
            dict(nested(spread_recipe(recipe, grids(layout), given, block=4, evaluates=evaluates).layer)[:-1])
            for evaluates in (False, True)
        )
        assert trained["_tensor_parallel"] == {**HIDDEN[1], "equal": True}
        assert scored["_tensor_parallel"] == HIDDEN[1]


def test_a_static_exchange_over_one_rank_leaves_nothing_behind(grids):
    """The hidden dimension alone is split: there is no exchange, and the plan is that of one process."""
    given = settings_of(moe_exchange="static", moe_exchange_capacity_factor=0.25)
    spread = spread_recipe(mixtral(), grids(Layout(8, hidden=2)), given, block=4)
    assert spread.plan is mixtral().plan


@pytest.mark.parametrize("exchange", ["all_to_all", "all_gather"])
def test_evaluation_keeps_other_exchanges(grids, exchange):
    layers = [
        spread_recipe(
            mixtral(), grids(Layout(8, experts=4)), settings_of(moe_exchange=exchange), block=4, evaluates=evaluates
        ).layer
        for evaluates in (False, True)
    ]
    assert nested(layers[0])[0] == nested(layers[1])[0]
    assert nested(layers[0])[0][0] == {"all_to_all": "_all_to_all", "all_gather": "_all_gather"}[exchange]
