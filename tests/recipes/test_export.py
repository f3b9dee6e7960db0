import dataclasses
import json
import os
import re
import resource
import signal
import stat
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open

from moekit.lm.checkpoint_checksums import file_checksums, write_checksums
from moekit.lm.checkpoints import checkpoint_folder, save_checkpoint
from moekit.lm.configs import OF_METHOD, ModelConfig
from moekit.lm.openlm_checkpoints import from_openlm, read_openlm
from moekit.lm.tensor_files import read_safetensors, write_safetensors
from moekit.parallel import one_process
from moekit.recipes import hash_layer
from moekit.recipes.export import export, main
from moekit.recipes.language_models import language_model
from moekit.recipes.names import find_recipe
from moekit.recipes.settings import ModelSettings, TrainSettings
from moekit.recipes.setup import make_config, make_recipe
from moekit.recipes.stored_settings import flat_settings
from moekit.recipes.trained import model_of
from moekit.recipes.weights import load_weights

SHAPE = {
    "hidden_dim": 16, "n_layers": 3, "n_heads": 2, "seq_len": 8, "vocab_size": 24,
    "post_embed_norm": True, "weight_tying": False, "model_norm": "gain_only_layer_norm",
}  # fmt: skip
IDS = torch.arange(12).reshape(2, 6)


def make_run(tmp_path, *, recipe="openlm", name="a", step=7, **shape):
    """Write a checkpoint of a model with random weights; return its folder and the model."""
    preset = tmp_path / "shape.json"
    preset.write_text(json.dumps({**SHAPE, **shape}))
    freq = shape.get("moe_freq", 2)
    config = ModelConfig(**{**SHAPE, "moe_freq": freq, "moe_num_experts": 4 if freq else None, **shape})
    model = language_model(config, find_recipe(recipe))
    tensors = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    settings = {"model": str(preset), "moe_freq": freq, "moe_num_experts": 4, "recipe": recipe, "lr": 0.1, "name": name}
    state = {"step": step, "epoch": 2, "settings": settings}
    return save_checkpoint(checkpoint_folder(tmp_path / name, step), tensors, state), model


@pytest.mark.parametrize("tied", [False, True])
def test_an_openlm_file_loads_into_the_same_model(tied, tmp_path):
    folder, model = make_run(tmp_path, weight_tying=tied)
    path = export(folder, tmp_path / "epoch_2.pt")
    found = read_openlm(path)
    assert (found.epoch, found.step, found.name) == (2, 7, "a")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    again = language_model(model.config, find_recipe("openlm"))
    again.load_state_dict(from_openlm(found.state_dict, expected=shapes, config=model.config))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    shared = found.state_dict["tok_embeddings.weight"].data_ptr() == found.state_dict["output.weight"].data_ptr()
    assert shared == tied


@pytest.mark.parametrize("recipe", ["openlm", "mixtral", "deepseek_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_safetensors_file_loads_into_the_same_model(recipe, tied, tmp_path):
    folder, model = make_run(tmp_path, recipe=recipe, weight_tying=tied)
    found = read_safetensors(export(folder, tmp_path / "a.safetensors"))
    assert found.keys() == model.state_dict().keys()
    again = language_model(model.config, find_recipe(recipe))
    again.load_state_dict(found)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert (found["tok_embeddings.weight"] is found["output.weight"]) == tied


def test_a_table_of_integers_is_read_back_and_is_not_taken_for_weights(tmp_path):
    config = ModelConfig(**{**SHAPE, "moe_freq": 1, "moe_num_experts": 4})
    model, again = (language_model(config, hash_layer(vocab_size=24)) for _ in range(2))
    tables = [name for name, each in model.state_dict().items() if each.dtype == torch.int64]
    assert len(tables) == 3
    for name in tables:
        again.state_dict()[name].zero_()
    load_weights(again, write_safetensors(tmp_path / "a.safetensors", model.state_dict()), one_process())
    assert all(torch.equal(each, model.state_dict()[name]) for name, each in again.state_dict().items())
    spoiled = {**model.state_dict(), tables[0]: model.state_dict()[tables[0]].float()}
    with pytest.raises(ValueError, match=r"table is torch\.float32; expected integers"):
        load_weights(again, write_safetensors(tmp_path / "b.safetensors", spoiled), one_process())


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_others_may_read_a_file_as_the_process_lets_them(name, tmp_path):
    folder, _ = make_run(tmp_path)
    before = os.umask(0o027)
    try:
        path = export(folder, tmp_path / name)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_metadata_say_what_model_it_is(tmp_path):
    folder, model = make_run(tmp_path)
    with safe_open(export(folder, tmp_path / "a.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert ModelConfig(**json.loads(metadata["config"])) == model.config
    assert json.loads(metadata["settings"])["lr"] == 0.1
    assert json.loads(metadata["step"]) == 7


def test_the_metadata_say_nothing_of_the_method_but_in_the_settings(tmp_path):
    preset = tmp_path / "own.json"
    preset.write_text(json.dumps({**SHAPE, "moe_capacity_factor": 2.0}))
    settings = ModelSettings(preset=str(preset), recipe="switch", moe_num_experts=4, moe_loss_weight=0.5)
    model = language_model(make_config(settings), make_recipe(settings))
    tensors = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    state = {"step": 1, "settings": flat_settings(TrainSettings(model=settings))}
    folder = save_checkpoint(checkpoint_folder(tmp_path / "a", 1), tensors, state)
    with safe_open(export(folder, tmp_path / "a.safetensors"), framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    assert config.keys() == {each.name for each in dataclasses.fields(ModelConfig)}
    assert not config.keys() & set(OF_METHOD)
    assert (config["moe_freq"], config["moe_num_experts"]) == (settings.moe_freq, 4)


def test_a_run_folder_gives_its_newest_checkpoint(tmp_path):
    make_run(tmp_path, step=7)
    make_run(tmp_path, step=12)
    assert read_openlm(export(tmp_path / "a", tmp_path / "a.pt")).step == 12


def test_a_dense_model_of_any_recipe_is_openlms(tmp_path):
    folder, _ = make_run(tmp_path, recipe="mixtral", moe_freq=0)
    assert "layers.0.feed_forward.w12.weight" in read_openlm(export(folder, tmp_path / "a.pt")).state_dict


@pytest.mark.parametrize("recipe", ["switch", "gshard", "mixtral", "deepseek_moe"])
def test_what_openlm_would_misread_is_refused_before_anything_is_written(recipe, tmp_path):
    folder, _ = make_run(tmp_path, recipe=recipe)
    with pytest.raises(ValueError, match=rf"no layout for the recipe {recipe}: .*Export to a \.safetensors file"):
        export(folder, tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()


def test_a_file_that_is_there_is_replaced_on_demand_only(tmp_path):
    folder, _ = make_run(tmp_path)
    path = tmp_path / "a.pt"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"a\.pt is there already; .*--overwrite"):
        export(folder, path)
    assert path.read_text() == "precious"
    export(folder, path, overwrite=True)
    assert read_openlm(path).step == 7
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        export(folder, tmp_path / "folder.pt", overwrite=True)


@pytest.mark.parametrize(
    ("to", "error", "words"),
    [
        ("a.bin", ValueError, r"--to is .*a\.bin; expected a name that ends in \.pt or \.safetensors"),
        ("no/such/a.pt", FileNotFoundError, r"there is no folder .*such to write a\.pt into"),
    ],
)
def test_places_that_cannot_be_written_are_refused(to, error, words, tmp_path):
    folder, _ = make_run(tmp_path)
    with pytest.raises(error, match=words):
        export(folder, tmp_path / to)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("shape", [{}, {"vocab_size": 40000}])
def test_a_full_disk_leaves_no_file_and_is_told_by_its_cause(name, shape, tmp_path):
    folder, _ = make_run(tmp_path, **shape)
    (tmp_path / "out").mkdir()
    with most_bytes_in_a_file(8000), pytest.raises(SystemExit) as error:
        main([str(folder), "--to", str(tmp_path / "out" / name)])
    assert {"File too large", name} <= set(re.findall(rf"File too large|{name}", str(error.value))), error.value
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_link_is_written_through_and_a_dangling_one_is_there_already(name, tmp_path):
    folder, _ = make_run(tmp_path)
    file, link = tmp_path / f"file-{name}", tmp_path / name
    file.write_text("old")
    link.symlink_to(file)
    export(folder, link, overwrite=True)
    assert link.is_symlink()
    assert file.read_bytes()[:3] != b"old"
    file.unlink()
    with pytest.raises(FileExistsError, match="is there already; choose another name, or replace"):
        export(folder, link)
    assert export(folder, link, overwrite=True) == link
    assert file.is_file()
    link.unlink()
    link.symlink_to(tmp_path / "gone" / name)
    with pytest.raises(FileNotFoundError, match=rf"there is no folder {tmp_path}/gone to write {name} into"):
        export(folder, link, overwrite=True)


@contextmanager
def most_bytes_in_a_file(number):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_sigterm_leaves_no_half_of_a_file(suffix, tmp_path, monkeypatch):
    folder, _ = make_run(tmp_path)

    def mine(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, mine)  # Python's own would end the tests
    monkeypatch.setattr("moekit.lm.files.os.fsync", lambda _: [signal.raise_signal(signal.SIGTERM) for _ in range(2)])
    (tmp_path / "to").mkdir()
    try:
        with pytest.raises(SystemExit) as ended:
            main([str(folder), "--to", str(tmp_path / f"to/a{suffix}")])
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 128 + signal.SIGTERM
    assert not list((tmp_path / "to").iterdir())


def test_exports_under_two_names_have_the_same_bytes(tmp_path):
    folder, _ = make_run(tmp_path)
    assert export(folder, tmp_path / "a.pt").read_bytes() == export(folder, tmp_path / "b.pt").read_bytes()


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        export(tmp_path, tmp_path / "a.pt")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="has no complete checkpoint yet"):
        export(tmp_path, tmp_path / "a.pt")


def test_a_checkpoint_without_settings_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path / "step_00000001", {"w": torch.ones(1)}, {"step": 1})
    with pytest.raises(ValueError, match="holds no settings of its model"):
        model_of(folder)


def test_code_that_a_checkpoint_names_runs_only_if_the_caller_names_it(tmp_path):
    folder, model = make_run(tmp_path)
    code, trace = tmp_path / "mine.py", tmp_path / "trace"
    code.write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nfrom moekit.recipes import openlm\nmake = openlm\n"
    )
    state = json.loads((folder / "state.json").read_text())
    state["settings"]["recipe"] = f"{code}:make"
    (folder / "state.json").write_text(json.dumps(state))
    write_checksums(folder, file_checksums(folder))
    with pytest.raises(ValueError, match=r"is code in a file\. If it is yours, say so with --recipe .*mine\.py:make"):
        export(folder, tmp_path / "a.safetensors")
    assert not trace.exists()
    found = read_safetensors(export(folder, tmp_path / "a.safetensors", recipe=f"{code}:make"))
    assert trace.exists()
    assert torch.equal(found["norm.weight"], model.norm.weight)


def test_the_model_has_no_weights_and_old_settings_are_understood(tmp_path):
    folder, model = make_run(tmp_path)
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"model":', '"preset":'))
    found = model_of(folder)
    assert all(tensor.is_meta for tensor in found.state_dict().values())
    assert found.config == model.config


def test_the_program(tmp_path, capsys):
    folder, _ = make_run(tmp_path)
    path = tmp_path / "a.pt"
    main([str(folder), "--to", str(path)])
    assert capsys.readouterr().out == f"{path}: {path.stat().st_size:,} bytes\n"
    with pytest.raises(SystemExit, match=r"^moekit export: .*is there already"):
        main([str(folder), "--to", str(path)])
    main([str(folder), "--to", str(path), "--overwrite"])


def test_a_missing_package_ends_the_program_with_a_message(tmp_path, monkeypatch):
    folder, _ = make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(SystemExit, match=r"moekit export: .*moekit\[export\]"):
        main([str(folder), "--to", str(tmp_path / "a.safetensors")])
