import dataclasses
import json

import pytest
import torch

from moekit.lm.configs import ModelConfig, load_config, preset_names, read_config
from moekit.lm.model import LanguageModel, count_parameters

SHAPE = {
    "hidden_dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "seq_len": 8,
    "vocab_size": 10,
    "post_embed_norm": False,
    "weight_tying": False,
}

# hidden, layers, heads
TABLE = {
    ("open_lm_11m", "quark_neox"): (96, 12, 12),
    ("open_lm_11m_v2",): (96, 8, 4),
    ("open_lm_25m", "atom_neox"): (192, 12, 12),
    ("open_lm_41m",): (288, 12, 12),
    ("open_lm_79m_v2",): (512, 8, 4),
    ("open_lm_87m", "aphid_neox"): (488, 12, 12),
    ("open_lm_154m_v2",): (576, 24, 8),
    ("open_lm_160m", "ant_neox"): (768, 12, 12),
    ("open_lm_410m", "potato_neox"): (1024, 24, 16),
    ("open_lm_411m_v2",): (1024, 24, 8),
    ("open_lm_830m", "marmot_neox"): (1536, 24, 16),
    ("open_lm_1b", "m1b_neox"): (2048, 24, 16),
    ("open_lm_3b", "g3b_neox"): (2560, 32, 32),
    ("open_lm_7b", "l7b_neox"): (4096, 32, 32),
}


@pytest.mark.parametrize(("names", "shape"), TABLE.items(), ids=lambda value: value[0])
def test_openlm_presets_have_the_published_shape(names, shape):
    hidden_dim, n_layers, n_heads = shape
    expected = ModelConfig(
        hidden_dim=hidden_dim,
        n_layers=n_layers,
        n_heads=n_heads,
        seq_len=2048,
        vocab_size=50432,
        post_embed_norm=False,
        weight_tying=False,
    )
    assert [load_config(name) for name in names] == [expected] * len(names)


def test_presets_that_differ_from_the_rest():
    assert load_config("m1b_tiktoken") == load_config("open_lm_1b", vocab_size=50304)
    assert load_config("open_lm_1b_old") == load_config("open_lm_1b", positional_embedding_type="head_rotary")
    assert load_config("open_lm_test_tiny") == dataclasses.replace(load_config("open_lm_1b"), **SHAPE | {
        "seq_len": 16, "vocab_size": 16})  # fmt: skip
    llama = load_config("llama2_7b")
    assert (llama.seq_len, llama.vocab_size, llama.model_norm) == (4096, 32000, "rms_norm")
    assert (llama.positional_embedding_type, llama.ffn_type) == ("llama_rotary", "swiglu")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds_on_the_meta_device(name):
    with torch.device("meta"):
        model = LanguageModel(load_config(name))
    assert count_parameters(model) > 0


@pytest.mark.parametrize(
    ("name", "expected"), [("open_lm_41m", 40_999_968), ("aphid_neox", 87_461_800), ("open_lm_160m", 162_417_408)]
)
def test_parameter_counts_equal_the_openlm_table(name, expected):
    """With gain-only norms and without qk-norm, which is how the table was counted."""
    with torch.device("meta"):
        model = LanguageModel(load_config(name, model_norm="gain_only_layer_norm"))
    assert count_parameters(model) == expected


def test_path_defaults_and_overrides(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({**SHAPE, "ffn_type": "gelu"}))
    config = load_config(path, defaults={"ffn_type": "geglu", "qk_norm": True}, vocab_size=99)
    assert config == ModelConfig(**{**SHAPE, "ffn_type": "gelu", "qk_norm": True, "vocab_size": 99})


def test_config_survives_json(tmp_path):
    config = load_config("moekit_tiny", moe_freq=2, moe_num_experts=4)
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    assert load_config(str(path)) == config


def test_unknown_preset_lists_near_matches_and_all_names():
    with pytest.raises(ValueError, match=r"unknown preset 'aphid_noex'; did you mean 'aphid_neox'.*Known:") as caught:
        load_config("aphid_noex")
    assert all(name in str(caught.value) for name in preset_names())


def test_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no model config at nowhere\.json.*preset"):
        load_config("nowhere.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"own\.json is no JSON"),
        ("[1]", r"own\.json holds a JSON list, expected an object"),
        ('{"hidden_dims": 3}', r"own\.json: unknown model config key 'hidden_dims'; did you mean 'hidden_dim'"),
        ('{"hidden_dim": 3}', r"own\.json lacks the required keys n_layers, n_heads"),
        (json.dumps({**SHAPE, "n_layers": 0}), r"own\.json: n_layers is 0, expected at least 1"),
    ],
)
def test_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_unknown_override_and_default_name_the_key():
    with pytest.raises(ValueError, match="overrides: unknown model config key 'layers'"):
        load_config("moekit_tiny", layers=3)
    with pytest.raises(ValueError, match="defaults: unknown model config key 'qknorm'; did you mean 'qk_norm'"):
        load_config("moekit_tiny", defaults={"qknorm": True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": "16"}, r"hidden_dim is '16' \(str\), expected int"),
        ({"n_layers": True}, r"n_layers is True \(bool\), expected int"),
        ({"qk_norm": 1}, r"qk_norm is 1 \(int\), expected bool"),
        ({"moe_num_experts": 1.5}, r"moe_num_experts is 1.5 \(float\), expected int \| None"),
        ({"vocab_size": 0}, "vocab_size is 0, expected at least 1"),
        ({"n_heads": 32}, "n_heads is 32, more than hidden_dim 16"),
        ({"n_heads": 3}, r"must be even, but it is 16 // 3 = 5.*'none'"),
        ({"model_norm": "rms"}, "unknown norm .*'rms_norm'"),
        ({"ffn_type": "relu"}, "unknown dense feed-forward .*'gelu'"),
        ({"positional_embedding_type": "alibi"}, "unknown position embedding"),
        ({"moe_freq": -1}, "moe_freq is -1"),
        ({"moe_freq": 2}, "moe_freq is 2, so moe_num_experts is needed"),
        ({"moe_freq": 2, "moe_num_experts": 0}, "moe_num_experts is 0, expected at least 1"),
    ],
)
def test_bad_value_is_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SHAPE, **changes})


METHOD = {"moe_top_k": 2, "moe_capacity_factor": 1, "moe_loss_weight": 0.1}


def test_what_a_file_says_of_the_moe_layers_is_read_and_is_no_shape(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({**SHAPE, **METHOD}))
    assert read_config(path) == {**SHAPE, **METHOD}
    assert load_config(path) == ModelConfig(**SHAPE)
    for where, options in (("overrides", METHOD), ("defaults", {"defaults": METHOD})):
        with pytest.raises(ValueError, match=f"{where}: moe_top_k is of the MoE layers' method"):
            load_config(path, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_top_k": 0}, r"own\.json: moe_top_k is 0, expected at least 1"),
        ({"moe_top_k": 1.5}, r"moe_top_k is 1.5 \(float\), expected int"),
        ({"moe_top_k": None}, r"moe_top_k is None \(NoneType\), expected int"),
        ({"moe_capacity_factor": -0.5}, "moe_capacity_factor is -0.5, expected a finite number that is not negative"),
        ({"moe_capacity_factor": True}, r"moe_capacity_factor is True \(bool\), expected float"),
        ({"moe_capacity_factor": float("nan")}, "moe_capacity_factor is nan, expected a finite number"),
        ({"moe_loss_weight": -1}, "moe_loss_weight is -1, expected"),
        ({"moe_loss_weight": float("inf")}, "moe_loss_weight is inf, expected"),
    ],
)
def test_what_a_file_says_of_the_moe_layers_is_in_range(tmp_path, changes, message):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({**SHAPE, **changes}))
    with pytest.raises(ValueError, match=message):
        read_config(path)


@pytest.mark.parametrize(("freq", "expected"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_moe_layers(freq, expected):
    config = ModelConfig(**{**SHAPE, "n_layers": 5}, moe_freq=freq, moe_num_experts=4)
    assert [i for i in range(5) if config.is_moe_layer(i)] == expected
