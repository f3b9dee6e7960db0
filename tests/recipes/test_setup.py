import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moekit.lm.configs import read_config
from moekit.lm.shards import write_shards
from moekit.lm.tokenizers import ByteTokenizer
from moekit.recipes import setup
from moekit.recipes.names import experts_per_token
from moekit.recipes.settings import DataSettings, ModelSettings
from moekit.recipes.setup import Corpus, Domain, autocast, make_config, make_corpus, make_recipe, uses_bfloat16

TINY = make_config(ModelSettings(preset="moekit_tiny"))


def corpus(settings, config=TINY):
    return make_corpus(settings, config, say=lambda text: pytest.fail(f"nothing takes time, but it said {text!r}"))


def test_flags_reach_the_config():
    config = make_config(ModelSettings(preset="open_lm_41m", moe_freq=3, moe_num_experts=16, moe_top_k=4))
    assert (config.moe_freq, config.moe_num_experts, config.moe_top_k) == (3, 16, 4)
    assert config.model_norm == "gain_only_layer_norm"


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


def test_named_manifests_become_domains(shards):
    found = corpus(DataSettings(dataset_manifest=shards.train, val_manifest=shards.validation))
    assert found.domains == (
        Domain("prose", shards.train[0], shards.validation[0]),
        Domain("code", shards.train[1], shards.validation[1]),
    )
    assert found.weights == (1.0, 1.0)
    assert found.tokenizer is None
    assert found.token_bytes() is None


def test_folders_of_one_name_are_numbered_and_validation_may_lack(tmp_path):
    manifests = tuple(
        write_shards(tmp_path / name / "train", torch.zeros(2, 65, dtype=torch.int64)) for name in ("prose", "code")
    )
    found = corpus(DataSettings(dataset_manifest=manifests, train_data_mix_weights=(3, 1)))
    assert [domain.name for domain in found.domains] == ["train-0", "train-1"]
    assert [domain.validation for domain in found.domains] == [None, None]
    assert found.weights == (3, 1)


def test_a_missing_manifest_is_explained(shards, tmp_path):
    absent = tmp_path / "absent.jsonl"
    message = r"there is no manifest at .*absent\.jsonl\. Expected a manifest\.jsonl .*write_shards"
    with pytest.raises(FileNotFoundError, match=message):
        corpus(DataSettings(dataset_manifest=(shards.train[0], absent)))
    with pytest.raises(FileNotFoundError, match=message):
        corpus(DataSettings(dataset_manifest=shards.train[:1], val_manifest=(absent,)))
    with pytest.raises(FileNotFoundError, match="there is no manifest at"):
        corpus(DataSettings(dataset_manifest=(shards.train[0].parent,)))


def test_counts_of_manifests_and_weights_must_agree(shards):
    with pytest.raises(ValueError, match="1 validation manifests were given for 2 sources; expected one each"):
        corpus(DataSettings(dataset_manifest=shards.train, val_manifest=shards.validation[:1]))
    with pytest.raises(ValueError, match=r"has 3 numbers for 2 sources \(prose, code\); expected one each"):
        corpus(DataSettings(dataset_manifest=shards.train, train_data_mix_weights=(1, 2, 3)))


def test_sequences_of_another_length_than_the_models_are_refused(shards, tmp_path):
    short = write_shards(tmp_path, torch.zeros(2, 33, dtype=torch.int64))
    message = r"have 33 tokens; expected 65, one more than the model's seq_len. Choose a --preset with seq_len 32"
    with pytest.raises(ValueError, match=message):
        corpus(DataSettings(dataset_manifest=(short,)))
    with pytest.raises(ValueError, match=message):
        corpus(DataSettings(dataset_manifest=shards.train[:1], val_manifest=(short,)))


@pytest.fixture
def prepared(monkeypatch):
    """Stand in for the embedded corpora; returns the calls of ``prepare``."""
    calls = []

    names = reversed(list(setup.MIXING_WEIGHTS))
    domains = {name: Domain(name, Path(name) / "train", Path(name) / "val") for name in names}

    def prepare(**options):
        calls.append(options)
        options["progress"]("preparing")
        return SimpleNamespace(domains=domains, tokenizer=ByteTokenizer())

    monkeypatch.setattr(setup, "prepare", prepare)
    return calls


def test_without_manifests_the_embedded_domains_are_prepared(prepared):
    said = []
    found = make_corpus(DataSettings(), TINY, say=said.append)
    assert said == ["preparing"]
    assert prepared[0]["tokenizer_name"] == "bpe-512"
    assert prepared[0]["seq_len"] == 64
    weights = dict(zip((domain.name for domain in found.domains), found.weights, strict=True))
    assert weights == dict(setup.MIXING_WEIGHTS)
    assert sorted(weights.values()) == [0.275, 0.725]
    bytes_of = found.token_bytes()
    assert bytes_of is not None
    assert bytes_of[1:].tolist() == [1] * 256


def test_the_tokenizer_can_be_named(prepared):
    make_corpus(DataSettings(tokenizer="byte"), TINY, say=lambda text: None)
    assert prepared[0]["tokenizer_name"] == "byte"


def test_weights_of_the_embedded_domains_are_counted_too(prepared):
    with pytest.raises(ValueError, match="has 1 numbers for 2 sources"):
        make_corpus(DataSettings(train_data_mix_weights=(1,)), TINY, say=lambda text: None)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(prepared, tmp_path):
    config = make_config(ModelSettings(preset="moekit_tiny"))
    small = type(config)(**{**vars(config), "vocab_size": 200})
    message = "tokenizer byte has 257 ids, the model's vocabulary 200; expected no more. Choose --tokenizer bpe-200"
    with pytest.raises(ValueError, match=message):
        make_corpus(DataSettings(tokenizer="byte"), small, say=lambda text: None)


def test_a_corpus_without_tokenizer_has_no_bytes():
    assert Corpus((), (), None).token_bytes() is None


@pytest.mark.parametrize(("amx", "expected"), [(True, True), (False, False)])
def test_auto_precision_asks_the_hardware(monkeypatch, amx, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    cpu = torch.device("cpu")
    assert uses_bfloat16("auto", cpu) is expected
    assert uses_bfloat16("amp_bfloat16", cpu)
    assert not uses_bfloat16("fp32", cpu)
    assert uses_bfloat16("auto", torch.device("cuda"))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("amp_bfloat16", torch.bfloat16)])
def test_autocast_does_what_the_precision_says(precision, dtype):
    with autocast(precision, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_moe_keys_of_the_models_file_win_over_flags(tmp_path: Path) -> None:
    keys = {"moe_top_k": 3, "moe_capacity_factor": 0, "moe_loss_weight": 0.5}
    path = tmp_path / "shape.json"
    path.write_text(json.dumps({**read_config("moekit_tiny"), **keys}), encoding="utf-8")
    recipe = make_recipe(ModelSettings(preset=str(path), recipe="openlm", moe_top_k=1, moe_loss_weight=0.1))
    routing = recipe.route(torch.zeros(4, 8))
    assert routing.expert_indices.shape == (4, 3)
    assert recipe.plan(routing).groups.capacity is None
    assert recipe.coefficients == {"load_balance": 0.5}
