import json
from dataclasses import replace

import pytest
import torch

from moekit.lm.configs import read_config
from moekit.recipes.choices import experts_per_token
from moekit.recipes.names import users_fault
from moekit.recipes.settings import ModelSettings
from moekit.recipes.setup import (
    check_model,
    make_config,
    make_evaluation_recipe,
    make_recipe,
    overridden_flags,
    resolved_model,
)


def own_file(tmp_path, **keys):
    path = tmp_path / "shape.json"
    path.write_text(json.dumps({**read_config("moekit_tiny"), **keys}), encoding="utf-8")
    return str(path)


# The model's shape.


def test_flags_reach_the_config():
    config = make_config(ModelSettings(preset="open_lm_41m", moe_freq=3, moe_num_experts=16))
    assert (config.moe_freq, config.moe_num_experts) == (3, 16)
    assert config.model_norm == "gain_only_layer_norm"


def test_every_flag_of_the_shape_reaches_the_config(tmp_path):
    flags = {"model_norm": "rms_norm", "qk_norm": True, "positional_embedding_type": "none", "ffn_type": "gelu"}
    path = tmp_path / "plain.json"
    path.write_text(json.dumps({key: value for key, value in read_config("moekit_tiny").items() if key not in flags}))
    config = make_config(ModelSettings(preset=str(path), **flags))
    assert {name: getattr(config, name) for name in flags} == flags


def test_moe_freq_zero_makes_a_dense_model():
    config = make_config(ModelSettings(preset="moekit_tiny", moe_freq=0, moe_num_experts=16))
    assert not any(config.is_moe_layer(index) for index in range(config.n_layers))


def test_keys_of_the_file_win_over_flags(tmp_path):
    shape = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 16, "vocab_size": 64}
    shape |= {"post_embed_norm": False, "weight_tying": False, "moe_freq": 1, "model_norm": "rms_norm"}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(shape))
    config = make_config(ModelSettings(preset=str(path), moe_freq=2, moe_num_experts=4, model_norm="layer_norm"))
    assert config.moe_freq == 1
    assert config.model_norm == "rms_norm"
    assert config.moe_num_experts == 4  # not in the file


def test_bad_shapes_are_explained(tmp_path):
    with pytest.raises(ValueError, match="unknown preset 'moekit_tinny'; did you mean 'moekit_tiny'"):
        make_config(ModelSettings(preset="moekit_tinny"))
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        make_config(ModelSettings(preset=str(tmp_path / "absent.json")))
    with pytest.raises(ValueError, match="moe_top_k is 9, expected between 1 and moe_num_experts = 8"):
        make_config(ModelSettings(preset="moekit_tiny", moe_num_experts=8, moe_top_k=9))


def test_a_file_may_make_a_model_moe_whose_flags_say_dense(tmp_path):
    config = make_config(ModelSettings(preset=own_file(tmp_path, moe_freq=1), moe_freq=0, moe_num_experts=4))
    assert (config.moe_freq, config.moe_num_experts) == (1, 4)


@pytest.mark.parametrize(
    ("keys", "flags", "lines"),
    [
        ({}, {"moe_freq": 0, "moe_num_experts": 16, "qk_norm": True}, []),
        ({"moe_freq": 1, "moe_num_experts": 4}, {}, []),  # what was not given cannot be in vain
        ({"moe_freq": 1, "moe_num_experts": 4}, {"moe_freq": 1, "moe_num_experts": 4}, []),
        (
            {"moe_freq": 1, "moe_num_experts": 4, "moe_loss_weight": 0.5, "qk_norm": False},
            {"moe_freq": 0, "moe_num_experts": 16, "moe_loss_weight": 0.1, "qk_norm": True},
            [
                "--qk-norm has no effect: model FILE says qk_norm False",
                "--moe-freq 0 has no effect: model FILE says moe_freq 1",
                "--moe-num-experts 16 has no effect: model FILE says moe_num_experts 4",
                "--moe-loss-weight 0.1 has no effect: model FILE says moe_loss_weight 0.5",
            ],
        ),
        (
            {"moe_freq": 0},
            {"moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": 0.1},
            [
                "--moe-num-experts 4 has no effect: model FILE says moe_freq 0",
                "--moe-top-k 2 has no effect: model FILE says moe_freq 0",
                "--moe-loss-weight 0.1 has no effect: model FILE says moe_freq 0",
            ],
        ),
    ],
)
def test_flags_that_the_file_overrides_are_named(tmp_path, keys, flags, lines):
    path = own_file(tmp_path, **keys)
    mend = ", and its keys win. Leave it out, or take the key out of the file"
    expected = [line.replace("FILE", path) + mend for line in lines]
    assert overridden_flags(ModelSettings(preset=path, **flags)) == expected


def test_settings_that_are_resolved_are_those_of_the_model_that_is_made(tmp_path):
    keys = {"moe_freq": 1, "moe_num_experts": 4, "moe_top_k": 3, "qk_norm": True}
    path = own_file(tmp_path, **keys)
    found = resolved_model(ModelSettings(preset=path, moe_freq=0, moe_num_experts=16, moe_capacity_factor=2.0))
    assert {name: getattr(found, name) for name in keys} == keys
    assert (found.moe_capacity_factor, found.moe_loss_weight) == (2.0, 0.1)
    dense = resolved_model(ModelSettings(preset=own_file(tmp_path, moe_freq=0), moe_top_k=3, moe_loss_weight=0.1))
    assert (dense.moe_freq, dense.moe_top_k, dense.moe_capacity_factor, dense.moe_loss_weight) == (0, None, None, None)


# Shape and method together.


@pytest.mark.parametrize(
    ("recipe", "experts", "message"),
    [
        ("mixtrl", 8, "unknown recipe 'mixtrl'; did you mean 'mixtral'"),
        ("deepseek_v3", 6, "recipe deepseek_v3 does not fit --moe-num-experts 6: group_limited: "),
        ("gshard", 1, r"recipe gshard does not fit --moe-num-experts 1: .* asked of E = 1 experts"),
    ],
)
def test_a_method_that_does_not_fit_is_told_from_the_settings(recipe, experts, message):
    with pytest.raises(ValueError, match=message):
        check_model(ModelSettings(preset="moekit_tiny", recipe=recipe, moe_num_experts=experts))


def test_a_dense_file_wins_over_what_it_says_of_the_method_too(tmp_path):
    path = own_file(tmp_path, moe_freq=0, moe_top_k=3)
    assert resolved_model(ModelSettings(preset=path)).moe_top_k is None
    [line] = overridden_flags(ModelSettings(preset=path, moe_capacity_factor=0.0))
    assert line.startswith("--moe-capacity-factor 0.0 has no effect")


def test_two_experts_leave_the_choice_to_the_recipe():
    settings = ModelSettings(preset="moekit_tiny", recipe="olmoe", moe_num_experts=2)
    assert resolved_model(settings).moe_top_k == make_recipe(settings).route.keywords["k"] == 2


def test_a_method_is_asked_as_it_is_scored_and_for_a_sequence(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from moekit.recipes import mixtral\n"
        "from moekit.routing import top_k\n"
        "def route(logits, *, bias=None):\n"
        "    assert logits.shape[0] == 64\n"
        "    return top_k(logits, k=2)\n"
        "def mine(*, training=True):\n"
        "    return mixtral()._replace(route=route) if training else mixtral(k=99)\n"
    )
    with pytest.raises(ValueError, match=r"does not fit --moe-num-experts 8: .*99"):
        check_model(ModelSettings(preset="moekit_tiny", recipe=f"{path}:mine"))


def test_one_expert_is_enough_for_a_method_that_takes_one():
    check_model(ModelSettings(preset="moekit_tiny", recipe="switch", moe_num_experts=1))


def test_one_expert_is_enough_for_a_method_that_would_take_two():
    settings = ModelSettings(preset="moekit_tiny", moe_num_experts=1)
    check_model(settings)
    assert make_recipe(settings).route.keywords["k"] == make_evaluation_recipe(settings).route.keywords["k"] == 1
    assert resolved_model(settings).moe_top_k == 1
    with pytest.raises(ValueError, match="moe_top_k is 2, expected between 1 and moe_num_experts = 1"):
        check_model(replace(settings, moe_top_k=2))


TIGHT = """
from functools import partial
from moekit.dispatch import by_weight, padded
from moekit.experts import batched, swiglu
from moekit.recipes import expert_layer, mixtral

def mine(k=2, capacity_factor=1.0):
    tight = padded(capacity_factor=capacity_factor, priority=by_weight)
    layer = expert_layer(dispatcher=tight, experts=partial(swiglu, matmul=batched))
    return mixtral(k=k)._replace(layer=layer, plan=tight.plan)
"""


def test_a_layer_that_cannot_be_scored_is_refused_before_it_is_trained(tmp_path):
    """Evaluation drops nothing, and ``batched`` takes equal groups alone."""
    path = tmp_path / "mine.py"
    path.write_text(TIGHT)
    message = (
        r"mine, tried on shapes alone .* as it is scored, .*capacity_factor=0.*: batched: the groups have no common"
    )
    with pytest.raises(ValueError, match=message):
        check_model(ModelSettings(preset="moekit_tiny", recipe=f"{path}:mine"))
    path.write_text(TIGHT.replace("tight = padded(capacity_factor=capacity_factor", "tight = padded(capacity_factor=0"))
    with pytest.raises(ValueError, match=r"tried on shapes alone .* as it trains: batched: the groups have no common"):
        check_model(ModelSettings(preset="moekit_tiny", recipe=f"{path}:mine"))
    path.write_text(TIGHT.replace("batched", "grouped"))
    state = torch.get_rng_state()
    check_model(ModelSettings(preset="moekit_tiny", recipe=f"{path}:mine"))
    assert torch.equal(state, torch.get_rng_state())
    path.write_text(TIGHT.replace("matmul=batched)", "matmul=lambda *given: print(given[0].item()))"))
    check_model(ModelSettings(preset="moekit_tiny", recipe=f"{path}:mine"))  # nothing is known of what reads tensors


OBSERVING = """
import torch
from moekit.recipes import mixtral
from moekit.routing import selection_bias

def recipe(observe):
    return mixtral()._replace(state=selection_bias(rate=0.1)._replace(observe=observe))

unmasked = lambda: recipe(lambda logits, routing, state: torch.zeros(8))
named = lambda: recipe(lambda logits, routing, state, *, token_mask=None: {"load": 1})
table = lambda: recipe(lambda logits, routing, state, *, token_mask=None: logits)
"""


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("unmasked", r"takes no token_mask; expected observe\(logits, routing, state, token_mask=None\)"),
        ("named", r"state\.observe returned \{'load': 1\}; expected a tensor \(n,\), which is added up"),
        ("table", r"state\.observe returned a tensor \(.*, 8\); expected a tensor \(n,\), which is added up"),
    ],
)
def test_what_a_state_observes_is_tried_before_it_is_trained(tmp_path, recipe, words):
    path = tmp_path / "mine.py"
    path.write_text(OBSERVING)
    with pytest.raises(ValueError, match=words):
        check_model(ModelSettings(preset="moekit_tiny", recipe=f"{path}:{recipe}"))


def test_a_dense_model_asks_no_router():
    check_model(ModelSettings(preset="moekit_tiny", recipe="deepseek_v3", moe_freq=0, moe_num_experts=6))


def test_a_fault_in_a_users_router_stays_the_users(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from moekit.recipes import mixtral\n\n\ndef route(logits, bias=None):\n    raise ValueError('mine')\n\n\n"
        "recipe = mixtral()._replace(route=route)\n"
    )
    name = f"{path}:recipe"
    with pytest.raises(ValueError, match=r"^mine$") as caught:
        check_model(ModelSettings(preset="moekit_tiny", recipe=name))
    assert "raised ValueError: mine (line 5)" in users_fault(name, caught.value)


# The recipe.


def test_flags_reach_the_recipe():
    recipe = make_recipe(ModelSettings(recipe="openlm", moe_top_k=3, moe_capacity_factor=0))
    assert experts_per_token(recipe, 8) == 3
    routing = recipe.route(torch.ones(10, 8))  # all tokens want the same experts
    assert (recipe.plan(routing).assignments >= 0).sum() == 30


def test_the_loss_weight_changes_one_coefficient():
    plain, weighted = (make_recipe(ModelSettings(recipe="olmoe", moe_loss_weight=w)) for w in (None, 0.0))
    assert plain.coefficients == {"load_balance": 0.01, "z": 0.001}
    assert weighted.coefficients == {"load_balance": 0.0, "z": 0.001}


def test_a_loss_weight_needs_a_loss(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from moekit.recipes import mixtral\nrecipe = mixtral()._replace(losses={}, coefficients={})\n")
    message = r"--moe-loss-weight is 0\.1, but recipe .*mine\.py:recipe has no loss named load_balance \(it has: none\)"
    with pytest.raises(ValueError, match=message):
        make_recipe(ModelSettings(recipe=f"{path}:recipe", moe_loss_weight=0.1))


def test_moe_keys_of_the_models_file_win_over_flags(tmp_path):
    path = own_file(tmp_path, moe_top_k=3, moe_capacity_factor=0, moe_loss_weight=0.5)
    recipe = make_recipe(ModelSettings(preset=path, recipe="openlm", moe_top_k=1, moe_loss_weight=0.1))
    routing = recipe.route(torch.zeros(4, 8))
    assert routing.expert_indices.shape == (4, 3)
    assert recipe.plan(routing).groups.capacity is None
    assert recipe.coefficients == {"load_balance": 0.5}


@pytest.mark.parametrize(("recipe", "k"), [("openlm", 3), ("switch", None), ("gshard", None), ("mixtral", 3)])
def test_evaluation_drops_nothing_and_routes_as_training(tmp_path, recipe, k):
    settings = ModelSettings(recipe=recipe, moe_top_k=k)
    training, evaluation = make_recipe(settings), make_evaluation_recipe(settings)
    torch.default_generator.manual_seed(1)
    routing = evaluation.route(torch.ones(40, 8))  # all tokens want the same experts
    torch.default_generator.manual_seed(1)
    assert torch.equal(routing.expert_indices, training.route(torch.ones(40, 8)).expert_indices)
    rows = evaluation.plan(routing).assignments
    assert (rows >= 0).sum() == (routing.expert_indices >= 0).sum()
    dropped = (training.plan(routing).assignments >= 0).sum() < (rows >= 0).sum()
    assert dropped == (recipe != "mixtral")


def test_keys_of_the_file_reach_the_recipe_of_evaluation(tmp_path):
    path = own_file(tmp_path, moe_top_k=3, moe_capacity_factor=0.5)
    recipe = make_evaluation_recipe(ModelSettings(preset=path, recipe="openlm", moe_top_k=1))
    routing = recipe.route(torch.ones(4, 8))
    assert routing.expert_indices.shape == (4, 3)
    assert (recipe.plan(routing).assignments >= 0).sum() == 12
