import pytest
import torch

from moekit.lm.configs import load_config
from moekit.lm.model import count_parameters
from moekit.recipes import deepseek_moe, mixtral, olmoe, openlm, switch
from moekit.recipes.language_models import language_model, moe_layers, parameter_table
from moekit.recipes.modules import MoE

# OpenLM's own counts, with an expert bias of D in each of 6 MoE blocks that it allocates and never uses.
TOTAL = {
    ("open_lm_41m", 8): 68_884_704,
    ("open_lm_41m", 32): 164_477_664,
    ("open_lm_41m", 64): 291_934_944,
    ("aphid_neox", 8): 165_443_224,
    ("aphid_neox", 32): 439_855_384,
    ("aphid_neox", 64): 805_738_264,
    ("open_lm_160m", 8): 360_639_744,
    ("open_lm_160m", 32): 1_040_227_584,
    ("open_lm_160m", 64): 1_946_344_704,
}
ACTIVE = {"open_lm_41m": 44_996_832, "aphid_neox": 96_857_752, "open_lm_160m": 190_770_432}
WIDTH = {"open_lm_41m": 288, "aphid_neox": 488, "open_lm_160m": 768}


def meta_model(preset, recipe, **options):
    with torch.device("meta"):
        return language_model(load_config(preset, model_norm="gain_only_layer_norm", **options), recipe)


def tiny(recipe, **options):
    return language_model(load_config("moekit_tiny", **options), recipe)


@pytest.mark.parametrize(("preset", "num_experts"), TOTAL)
def test_parameter_counts_are_openlms_less_the_unused_bias(preset, num_experts):
    model = meta_model(preset, openlm(), moe_freq=2, moe_num_experts=num_experts)
    *parts, total = parameter_table(model)
    assert total.total == count_parameters(model) == TOTAL[preset, num_experts] - 6 * WIDTH[preset]
    assert sum(part.total for part in parts) == total.total
    assert sum(part.active for part in parts) == total.active
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("preset", ACTIVE)
def test_active_counts_are_openlms_less_the_unused_bias(preset):
    model = meta_model(preset, openlm(k=2), moe_freq=2, moe_num_experts=8)
    assert parameter_table(model)[-1].active == ACTIVE[preset] - 6 * WIDTH[preset]


def test_active_parameters_follow_k():
    by_k = {k: parameter_table(tiny(olmoe(k=k), moe_freq=1, moe_num_experts=8)) for k in (1, 2, 8)}
    experts = {k: {row.part: row for row in table}["experts"] for k, table in by_k.items()}
    assert experts[1].active * 8 == experts[2].active * 4 == experts[8].active == experts[8].total
    assert by_k[8][-1].active == by_k[8][-1].total


def test_shared_experts_and_routers_are_active_for_every_token():
    table = {row.part: row for row in parameter_table(tiny(deepseek_moe(k=2), moe_freq=1, moe_num_experts=4))}
    row = table["routers and shared experts"]
    one_expert = table["experts"].total // (2 * 4)
    assert row.total == row.active == 2 * (one_expert + 64 * 4)


def test_a_tied_head_is_counted_once():
    tied, untied = (
        parameter_table(tiny(mixtral(), moe_freq=2, moe_num_experts=4, weight_tying=tying)) for tying in (True, False)
    )
    assert untied[-1].total - tied[-1].total == 512 * 64
    assert {row.part: row.total for row in tied}["output head"] == 0


def test_a_dense_model_has_no_experts():
    model = tiny(mixtral())
    assert list(moe_layers(model)) == []
    table = {row.part: row for row in parameter_table(model)}
    assert table["experts"].total == 0
    assert table["all"].total == table["all"].active == count_parameters(model)


@pytest.mark.parametrize(("freq", "expected"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_moe_freq_chooses_the_layers(freq, expected):
    model = tiny(switch(), n_layers=5, moe_freq=freq, moe_num_experts=4)
    layers = dict(moe_layers(model))
    assert list(layers) == expected
    for index, block in enumerate(model.layers):
        assert isinstance(block.feed_forward, MoE) == (index in expected)
    assert all(layer.num_experts == 4 for layer in layers.values())


def test_the_experts_are_as_wide_as_asked():
    model = language_model(load_config("moekit_tiny", moe_freq=2, moe_num_experts=4), mixtral(), expert_hidden=24)
    assert model.layers[0].feed_forward.experts["up"].shape == (4, 64, 24)


def test_the_model_is_causal_with_a_causal_recipe():
    model = tiny(mixtral(), moe_freq=1, moe_num_experts=4).double()
    ids = torch.randint(512, (2, 12))
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 512
    with torch.no_grad():
        before, after = model(ids).logits, model(other).logits
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])
