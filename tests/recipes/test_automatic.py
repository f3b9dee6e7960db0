"""Recipes that choose their backend: which layers are replaced, by what, and that the numbers stay."""

from functools import partial

import pytest
import torch

from moekit.dispatch import by_weight, dropless, padded
from moekit.experts import (
    INPUTS,
    BiasedGatedParams,
    BiasedMlpParams,
    batched,
    biased_gated,
    biased_mlp,
    clamped_swiglu,
    geglu,
    gelu_mlp,
    grouped,
    loop,
    relu2,
    relu_mlp,
    swiglu,
)
from moekit.experts.activations import (
    CLAMPED_SWIGLU,
    GEGLU,
    GEGLU_TANH,
    GELU_MLP,
    RELU2,
    RELU_MLP,
    SWIGLU,
    Activation,
)
from moekit.experts.tile_files import layer_tiles, table_text
from moekit.experts.tile_tables import entry_of
from moekit.experts.tiles import LayerSize, ruled_tiles
from moekit.recipes import MoE, expert_layer, gpt_oss, mixtral, olmoe, openlm, switch
from moekit.recipes.automatic import automatic, tiles_of, why_not_on_kernels
from moekit.recipes.backends import auto, auto_top_k
from moekit.recipes.expert_layers import recompute
from moekit.recipes.expert_networks import ACTIVATIONS, experts_of
from moekit.recipes.names import RECIPES, find_recipe
from moekit.recipes.settings import ModelSettings
from moekit.recipes.setup import make_evaluation_recipe, make_recipe
from moekit.routing import expert_choice, top_k

CASES = {"openlm": (openlm(), GELU_MLP), "switch": (switch(), RELU_MLP), "olmoe": (olmoe(k=2), SWIGLU)}


@pytest.mark.parametrize("name", CASES)
def test_plan_and_activation_stay_and_so_does_what_is_computed(name: str) -> None:
    recipe, activation = CASES[name]
    fast = automatic(recipe)
    assert fast.layer.keywords["activation"] == activation
    assert fast.layer.keywords["dispatcher"] is recipe.layer.keywords["dispatcher"]
    assert fast._replace(layer=recipe.layer, route=recipe.route) == recipe
    assert (fast.route.func, fast.route.keywords) == (auto_top_k, recipe.route.keywords)
    torch.manual_seed(0)
    moe = MoE(8, 4, recipe, hidden=12, dtype=torch.float64)
    x = torch.randn(33, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for each in (recipe, fast):
        moe.recipe = each
        y = moe(x).y
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *moe.parameters()])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_computes_what_it_did(name: str) -> None:
    recipe = find_recipe(name, vocab_size=16)
    fast = automatic(recipe)
    assert fast.layer is not recipe.layer
    torch.manual_seed(0)
    moe = MoE(6, 64, recipe, hidden=4, dtype=torch.float64)
    x = torch.randn(2, 40, 6, dtype=torch.float64, requires_grad=True)
    ids = {"token_ids": torch.randint(16, (2, 40))} if "token_ids" in recipe.needs else {}
    leaves, results = {"x": x, **dict(moe.named_parameters())}, []
    for each in (recipe, fast):
        moe.recipe = each
        torch.manual_seed(1)  # of routers that draw
        y = moe(x, **ids).y
        grads = torch.autograd.grad(y.square().sum(), list(leaves.values()), allow_unused=True)
        results.append({"y": y, **dict(zip(leaves, grads, strict=True))})
    for part, expected in results[0].items():
        torch.testing.assert_close(results[1][part], expected, msg=lambda text, part=part: f"{part}: {text}")


def test_what_somebody_chose_stays() -> None:
    own = partial(mixtral().layer)  # a function of the user's
    kept = [mixtral(matmul=loop), openlm(matmul=batched), mixtral()._replace(layer=lambda x, routing, params: x)]
    kept += [mixtral()._replace(layer=recompute(own)), automatic(mixtral())]
    other = expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=grouped, another=1))
    kept.append(mixtral()._replace(layer=other))
    for recipe in kept:
        assert automatic(recipe) is recipe


def test_a_router_that_its_kernel_does_not_know_stays() -> None:
    for route in (partial(top_k, k=2, normalize=True, order=2.0), expert_choice, partial(partial(top_k), 1, k=2)):
        assert automatic(mixtral()._replace(route=route)).route is route


def test_a_router_with_defaults_written_out_is_known() -> None:
    route = partial(top_k, k=2, normalize=True, order=1.0, bias=None)
    quick = automatic(mixtral()._replace(route=route)).route
    assert (quick.func, quick.keywords) == (auto_top_k, {"k": 2, "normalize": True})


def test_a_dispatcher_of_the_users_is_taken_along() -> None:
    tight = padded(capacity_factor=0.5, priority=by_weight)
    recipe = mixtral()._replace(layer=expert_layer(dispatcher=tight, experts=partial(swiglu, matmul=grouped)))
    assert automatic(recipe).layer.keywords["dispatcher"] is tight


def test_a_run_s_recipes_are_automatic_in_training_and_in_evaluation() -> None:
    settings = ModelSettings()
    for recipe in (make_recipe(settings), make_evaluation_recipe(settings)):
        assert recipe.layer.keywords["activation"] == GELU_MLP
    assert make_recipe(settings).plan is not make_evaluation_recipe(settings).plan


def test_a_layer_is_made_by_what_is_given() -> None:
    settings, choose = ModelSettings(recipe="openlm"), partial(auto, keep=INPUTS)
    recipes = [automatic(olmoe(), choose=choose)]
    recipes += [make(settings, choose=choose) for make in (make_recipe, make_evaluation_recipe)]
    recipes.append(make_evaluation_recipe(ModelSettings(recipe="router:sigmoid_bias"), choose=choose))
    for recipe in recipes:
        assert recipe.layer.func is auto().func
        assert recipe.layer.keywords["keep"] == INPUTS
    assert automatic(olmoe()).layer.keywords["keep"] != INPUTS


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_why_a_recipe_is_not_on_the_kernels(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        "moekit.recipes.automatic.why_not_fused",
        lambda device, dtype, *, dispatcher: asked.append((device, dispatcher)) or "a reason",
    )
    recipe = automatic(openlm())
    assert why_not_on_kernels(recipe, CUDA) == "a reason"
    assert asked == [(CUDA, recipe.layer.keywords["dispatcher"])]
    for own in (mixtral(matmul=loop), mixtral()._replace(layer=lambda x, routing, params: x)):
        assert why_not_on_kernels(automatic(own), CUDA) == "the recipe has a layer or a backend of its own"


def test_tiles_are_those_of_the_file(tmp_path) -> None:
    size = LayerSize(torch.bfloat16, 131072, 64, 2048, 1024, gated=True, capability=9)
    low = type(ruled_tiles(size))(*(tile._replace(m=64, k=64, specialized=False) for tile in ruled_tiles(size)))
    path = tmp_path / "tiles.json"
    path.write_text(table_text([entry_of(size, low, origin="a test")]))
    assert tiles_of(path, flag="--tiles")(size) == low != layer_tiles(size)
    assert tiles_of(None, flag="--tiles") is layer_tiles


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            r"^--tiles \S+/t\.json: No such file or directory; expected a file that .* Give one, or leave --tiles out",
        ),
        (
            b"\xff\xfe",
            r"^--tiles \S+/t\.json: no UTF-8 text: .* or remove it and let moekit tune --write make it again",
        ),
        (b"{", r"^--tiles \S+/t\.json: no JSON: .* or remove it and let moekit tune --write make it again\.$"),
        (b'{"format": "moekit tiles 1", "entries": []}', r"^--tiles \S+/t\.json, format: .*; expected \"moekit tiles"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_its_flag(tmp_path, content, message) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tiles_of(path, flag="--tiles")


@pytest.mark.parametrize("activation", [*ACTIVATIONS, CLAMPED_SWIGLU])
@pytest.mark.parametrize("biased", [False, True])
def test_every_expert_network_is_known_with_biases_and_without(activation, biased: bool) -> None:
    kind = None if not biased else BiasedGatedParams if activation.gated else BiasedMlpParams
    networks = [partial(experts_of(activation, kind), matmul=matmul) for matmul in (grouped, loop)]
    known, slow = (mixtral()._replace(layer=expert_layer(dispatcher=dropless(), experts=each)) for each in networks)
    assert automatic(known).layer.keywords["activation"] == activation
    assert automatic(slow) is slow


@pytest.mark.parametrize(
    ("experts", "activation"),
    [
        (swiglu, SWIGLU),
        (geglu, GEGLU),
        (partial(geglu, approximate="none"), GEGLU),
        (partial(geglu, approximate="tanh"), GEGLU_TANH),
        (gelu_mlp, GELU_MLP),
        (partial(gelu_mlp, approximate="tanh"), GELU_MLP),
        (partial(clamped_swiglu, limit=7.0), CLAMPED_SWIGLU),
        (clamped_swiglu, CLAMPED_SWIGLU),
        (partial(gelu_mlp, approximate="none"), Activation("gelu", gated=False)),
        (relu_mlp, RELU_MLP),
        (relu2, RELU2),
        (partial(biased_gated, activation=torch.nn.functional.relu), Activation("relu", gated=True)),
        (partial(biased_mlp, activation=torch.nn.functional.gelu), Activation("gelu", gated=False)),
    ],
)
def test_networks_are_known_by_the_activation_that_they_compute(experts, activation) -> None:
    recipe = mixtral()._replace(layer=expert_layer(dispatcher=dropless(), experts=partial(experts, matmul=grouped)))
    assert automatic(recipe).layer.keywords["activation"] == activation


def test_a_module_whose_tiles_are_of_a_file_is_saved_and_loaded(tmp_path) -> None:
    size = LayerSize(torch.bfloat16, 131072, 64, 2048, 1024, gated=True, capability=9)
    (tmp_path / "tiles.json").write_text(table_text([entry_of(size, ruled_tiles(size), origin="a test")]))
    tiles = tiles_of(tmp_path / "tiles.json", flag="--tiles")
    moe = MoE(8, 4, automatic(mixtral(), choose=partial(auto, tiles=tiles)), hidden=12)
    assert tiles(size) == ruled_tiles(size)  # remembered, which is not saved
    torch.save(moe, tmp_path / "moe.pt")
    again, x = torch.load(tmp_path / "moe.pt", weights_only=False), torch.randn(5, 8)
    assert torch.equal(again(x).y, moe(x).y)
    assert again.recipe.layer.keywords["tiles"](size) == tiles(size)


def test_steepness_and_limit_of_clamped_experts_are_taken_along() -> None:
    assert automatic(gpt_oss(alpha=1.5, limit=3.0)).layer.keywords["activation"] == CLAMPED_SWIGLU._replace(
        alpha=1.5, limit=3.0
    )
