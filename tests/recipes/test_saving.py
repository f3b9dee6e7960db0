import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from rich.console import Console
from small_runs import differing, files, losses, numbers, tensors_of, unflatten, words, write_state
from torch import nn

from moekit import __version__
from moekit.lm import folder_locks
from moekit.lm.checkpoints import checkpoint_folder, latest_checkpoint, read_state
from moekit.lm.configs import load_config, read_config
from moekit.lm.folder_locks import FolderLock
from moekit.lm.model import LanguageModel
from moekit.lm.openlm_checkpoints import to_openlm, write_openlm
from moekit.lm.openlm_names import TIED, openlm_name
from moekit.lm.tensor_files import write_safetensors
from moekit.parallel import one_process
from moekit.recipes import saving, train
from moekit.recipes.configuration import parse_settings
from moekit.recipes.construction import make_model
from moekit.recipes.export import export
from moekit.recipes.language_models import moe_layers
from moekit.recipes.runs import set_up
from moekit.recipes.saving import Progress, _check_progress, find_checkpoint, load_weights
from moekit.recipes.settings import ModelSettings, OptimizerSettings
from moekit.recipes.train import main
from moekit.recipes.trained import trained_model

pytestmark = pytest.mark.usefixtures("quick")
DROPLESS = ("--moe-capacity-factor", "0")


def names_in(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def steps_in(folder):
    return [int(name.removeprefix("step_")) for name in names_in(folder)]


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ([], [8]),
        (["--save-every-n-steps", "3"], [3, 6, 8]),
        (["--save-every-n-steps", "4"], [4, 8]),
        (["--save-every-n-steps", "2", "--keep-checkpoints", "3"], [4, 6, 8]),
        (["--save-every-n-steps", "3", "--delete-previous-checkpoint"], [8]),
    ],
)
def test_checkpoints_are_saved_and_kept_as_asked(program, flags, steps):
    folder = program(*flags)
    assert steps_in(folder) == steps
    assert [read_state(checkpoint_folder(folder, step))["step"] for step in steps] == steps


# 11 sequences of 64 tokens are an epoch; 3 epochs are 33 sequences, 8 steps of 4.
EPOCHS = ("--train-num-samples", str(11 * 64 + 63), "--epochs", "3")


@pytest.mark.parametrize(
    ("flags", "epochs"),
    [
        ([], {2: 1, 5: 2, 8: 3}),
        (["--save-frequency", "2"], {5: 2, 8: 3}),
        (["--save-frequency", "5"], {8: 3}),
        (["--save-every-n-steps", "3"], {2: 1, 3: 1, 5: 2, 6: 2, 8: 3}),
    ],
)
def test_checkpoints_are_saved_at_the_ends_of_epochs(program, flags, epochs):
    folder = program(*EPOCHS, *flags)
    found = {step: read_state(checkpoint_folder(folder, step))["epoch"] for step in steps_in(folder)}
    assert found == epochs
    metrics = numbers(folder)
    assert [line["epoch"] for line in metrics] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert [line["seen_steps_epoch"] for line in metrics] == [1, 2, 1, 2, 3, 1, 2, 3]
    assert [line["expected_steps_epoch"] for line in metrics] == [2, 2, 3, 3, 3, 3, 3, 3]
    assert [line["step"] for line in metrics if "validation" in line] == [2, 5, 8], "each epoch ends with a validation"


def test_a_checkpoint_is_found_by_the_name_that_openlm_gives_it(program, capsys):
    folder = program(*EPOCHS, "--save-every-n-steps", "3")
    checkpoints = folder / "checkpoints"
    # Of those that have seen two epochs, 5 is the end of epoch 2; 6 is inside epoch 3.
    assert find_checkpoint(str(checkpoints / "epoch_1.pt")) == checkpoint_folder(folder, 2)
    assert find_checkpoint(str(checkpoints / "epoch_2.pt")) == checkpoint_folder(folder, 5)
    assert find_checkpoint(str(checkpoints / "epoch_3.pt")) == checkpoint_folder(folder, 8)
    with pytest.raises(FileNotFoundError, match=r"epoch_4\.pt: there is no such checkpoint\. Expected a folder"):
        find_checkpoint(str(checkpoints / "epoch_4.pt"))
    capsys.readouterr()
    other = program(*EPOCHS, "--resume", str(checkpoints / "epoch_2.pt"), name="b")
    assert "step_00000005: step 5" in capsys.readouterr().out
    assert numbers(other) == numbers(folder)[5:]


def test_epochs_that_end_with_one_step_share_its_checkpoint(program):
    """One sequence is an epoch; of eight, seven end with the first step of four sequences."""
    folder = program("--train-num-samples", "64", "--epochs", "8", "--save-frequency", "4")
    assert steps_in(folder) == [1, 2]  # the first for epoch 4
    for epoch in range(1, 9):
        name = folder / "checkpoints" / f"epoch_{epoch}.pt"
        assert find_checkpoint(str(name)) == checkpoint_folder(folder, 2 if epoch == 8 else 1)
    for none in (0, 9):
        with pytest.raises(FileNotFoundError, match=rf"epoch_{none}\.pt: there is no such checkpoint"):
            find_checkpoint(str(folder / "checkpoints" / f"epoch_{none}.pt"))


def test_a_checkpoint_of_an_older_version_is_found_by_its_last_epoch(program):
    folder = program("--steps", "1")
    saved = checkpoint_folder(folder, 1)
    state = read_state(saved)
    assert state.pop("ends_epochs") == [1]
    for said, found in (({"epoch": 3, "ends_epoch": True}, True), ({"epoch": 3, "ends_epoch": False}, False)):
        write_state(saved, state | said)
        if found:
            assert find_checkpoint(str(folder / "checkpoints" / "epoch_3")) == saved
        else:
            with pytest.raises(FileNotFoundError):
                find_checkpoint(str(folder / "checkpoints" / "epoch_3"))
    write_state(saved, state | {"ends_epochs": 3})  # a damaged one
    with pytest.raises(FileNotFoundError):
        find_checkpoint(str(folder / "checkpoints" / "epoch_3"))


def test_a_run_folder_names_its_newest_checkpoint(program, tmp_path):
    folder = program("--save-every-n-steps", "3")
    assert find_checkpoint(str(folder)) == checkpoint_folder(folder, 8)
    assert find_checkpoint(str(checkpoint_folder(folder, 3))) == checkpoint_folder(folder, 3)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*logs/a: expected a folder step_NNNNNNNN"):
        find_checkpoint(str(folder))
    (folder / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"logs/a has no complete checkpoint yet; expected a folder step_NNNN"):
        find_checkpoint(str(folder))


def test_a_run_that_goes_on_as_another_model_says_so(program, capsys):
    program("--steps", "2")
    assert "warning" not in capsys.readouterr().out
    program("--steps", "3", "--resume", "latest")
    assert "warning: these weights" not in capsys.readouterr().out
    program("--steps", "4", "--resume", "latest", "--moe-top-k", "1")
    assert (
        "step 3\nwarning: these weights were trained with --moe-top-k 2, and this launch has --moe-top-k 1\n"
        in capsys.readouterr().out
    )


def test_the_file_of_a_model_may_change_once_it_is_trained(program, tmp_path, capsys, monkeypatch):
    shape = {**read_config("moekit_tiny"), "n_heads": 4}
    path = tmp_path / "m.json"
    path.write_text(json.dumps({**shape, "moe_top_k": 1}))
    monkeypatch.chdir(tmp_path)
    folder = program("--steps", "2", "--model", "m.json")
    path.write_text(json.dumps({**shape, "n_heads": 8}))
    assert trained_model(folder).config.n_heads == 4
    [(_, moe)] = moe_layers(trained_model(folder))
    assert moe(torch.zeros(1, 3, shape["hidden_dim"])).routing.weights.shape == (3, 1)
    path.rename(tmp_path / "other.json")
    weights = export(folder, tmp_path / "a.safetensors")
    capsys.readouterr()
    for resume, name in (("latest", "a"), (str(weights), "b")):
        program("--steps", "3", "--model", "other.json", "--resume", resume, name=name)
        said = " ".join(capsys.readouterr().out.split())
        assert re.search(r"warning: these weights were trained with .*moe-top-k 1.* and this launch has .*-k 2", said)
        assert re.search(
            r"warning: these weights were trained with .*n.heads 4.* and this launch has .*n.heads 8", said
        )


def test_going_back_to_an_older_checkpoint_repeats_the_run(program):
    folder = program("--save-every-n-steps", "3", "--log-data")
    before, lines, data = (
        tensors_of(checkpoint_folder(folder, 8)),
        numbers(folder),
        (folder / "data.jsonl").read_bytes(),
    )
    flags = ["--save-every-n-steps", "3", "--log-data", "--keep-checkpoints", "1"]
    program(*flags, "--resume", str(checkpoint_folder(folder, 3)))
    assert numbers(folder) == lines
    assert (folder / "data.jsonl").read_bytes() == data
    assert differing(before, tensors_of(checkpoint_folder(folder, 8))) == []
    assert names_in(folder) == ["abandoned_step_00000006", "abandoned_step_00000008", "step_00000008"]


def test_a_damaged_checkpoint_is_not_resumed(program, tmp_path):
    folder = program("--save-every-n-steps", "4")
    path = checkpoint_folder(folder, 8) / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = files(folder)
    with pytest.raises(SystemExit, match=r"step_00000008 is damaged: .*checksum.* Resume from an older one"):
        program("--resume", str(path.parent), "--steps", "9")
    assert files(folder) == before
    path.write_bytes(content[:100])
    with pytest.warns(UserWarning, match=r"skipping .*step_00000008: its file __0_0\.distcp is missing or cut short"):
        program("--resume", "latest")
    assert [line["step"] for line in numbers(folder)] == list(range(1, 9))


def test_a_checkpoint_that_does_not_count_tokens_goes_on_without_a_count(program):
    folder = program("--steps", "3")
    checkpoint = checkpoint_folder(folder, 3)
    state = read_state(checkpoint)
    assert state.pop("trained_tokens") == 3 * 256
    write_state(checkpoint, state)
    program("--steps", "4", "--resume", "latest")
    results = json.loads((folder / "results.json").read_text())
    assert (results["tokens"], results["trained_tokens"]) == (4 * 256, None)
    assert read_state(checkpoint_folder(folder, 4))["trained_tokens"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": 2.0},
        {"step": True},
        {"seconds": -0.5},
        {"seconds": math.nan},
        {"seconds": math.inf},
        {"seconds": "1"},
        {"skipped_steps": None},
        {"skipped_data": [1]},
        {"skipped_data": {"short sequence": -1}},
        {"trained_tokens": -1},
    ],
)
def test_progress_that_is_none_is_refused(tmp_path, change):
    whole = Progress(step=2, seconds=1, skipped_data={"short sequence": 1}, trained_tokens=None)
    _check_progress(whole, tmp_path)
    with pytest.raises(ValueError, match=r"is damaged: its state says .*; expected numbers of at least 0"):
        _check_progress(whole._replace(**change), tmp_path)


def test_a_checkpoint_of_another_version_is_refused(program):
    folder = program("--steps", "3")
    checkpoint = checkpoint_folder(folder, 3)
    state = read_state(checkpoint)
    del state["skipped_steps"], state["moekit"]
    write_state(checkpoint, state)
    message = r"step_00000003 lacks 'skipped_steps'; it is of another version of moekit \(it names {}, this is {}\)"
    for version in ("0.0.7", None):
        write_state(checkpoint, state if version is None else state | {"moekit": version})
        with pytest.raises(SystemExit, match=message.format(version or "none", __version__)):
            program("--steps", "3", "--resume", "latest")


@pytest.mark.filterwarnings("ignore:skipping")
def test_checkpoints_from_before_checksums_are_not_called_none(program):
    folder = program("--steps", "2")
    checkpoint = checkpoint_folder(folder, 2)
    assert read_state(checkpoint)["moekit"] == __version__
    (checkpoint / "checksums.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of the run .*logs/a can be read: .*without checksums"):
        find_checkpoint(str(folder))
    with pytest.raises(SystemExit, match=r"is incomplete, damaged or without checksums, .*go on with the version that"):
        program("--steps", "2", "--resume", "latest")


@pytest.fixture
def trained(program):
    """A run of 4 steps of 8, as all of its checkpoint's tensors, its folder and its model."""
    folder = program("--save-every-n-steps", "4", *DROPLESS, name="trained")
    checkpoint = checkpoint_folder(folder, 4)
    model, _, _ = make_model(unflatten(read_state(checkpoint)["settings"]), one_process())
    load_weights(model, checkpoint, one_process())
    return folder, model, tensors_of(checkpoint)


def as_openlm(path, model: LanguageModel, *, prefix="module.", epoch=1, step=4):
    theirs = to_openlm(model.state_dict(), config=model.config)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_openlm(path, {f"{prefix}{name}": tensor for name, tensor in theirs.items()}, epoch=epoch, step=step)


def openlm_optimizer(path, tensors):
    """Write AdamW's state as OpenLM does with FSDP: by the names of its parameters."""
    state = {}
    for name in [name.removeprefix("model.") for name in tensors if name.startswith("model.")]:
        entry = {kind: tensors[f"optimizer.{kind}.{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
        if name.endswith("gate"):  # MegaBlocks' router is the transpose of our gate
            entry = {kind: tensor.T.contiguous() if tensor.ndim else tensor for kind, tensor in entry.items()}
        state[openlm_name(name)] = entry
    torch.save({"epoch": 1, "name": "a", "optimizer": {"state": state, "param_groups": []}}, path)


def test_training_goes_on_from_openlms_weights_with_a_fresh_optimizer(program, trained, tmp_path, capsys):
    _, model, _ = trained
    path = as_openlm(tmp_path / "openlm" / "epoch_1.pt", model)
    folder = program("--resume", str(path), *DROPLESS, name="b")
    said = " ".join(capsys.readouterr().out.split())
    assert "epoch_1.pt; the optimizer and the schedule start anew; the data start at their beginning" in said
    metrics = numbers(folder)
    assert [line["step"] for line in metrics] == list(range(1, 9))
    fresh = losses(numbers(program(*DROPLESS, name="c")))
    assert metrics[0]["loss"] < fresh[0] - 0.5, "the weights are those of the file"
    assert latest_checkpoint(folder) == checkpoint_folder(folder, 8)


def test_training_goes_on_from_openlms_optimizer_as_if_it_were_ours(program, trained, shards, tmp_path, capsys):
    folder, model, tensors = trained
    path = as_openlm(tmp_path / "openlm" / "epoch_1.pt", model)
    openlm_optimizer(path.with_name("optimizer_1.pt"), tensors)
    found = program("--resume", str(path), *DROPLESS, "--save-every-n-steps", "5", name="b")
    assert "with its optimizer's state, at step 4; the data start at their" in " ".join(capsys.readouterr().out.split())
    assert [line["step"] for line in numbers(found)] == [5, 6, 7, 8]
    assert [line["lr"] for line in numbers(found)] == [line["lr"] for line in numbers(folder)][4:]
    # Our own checkpoint, put at the beginning of the data, must take the same step.
    copy = shutil.copytree(checkpoint_folder(folder, 4), tmp_path / "copy")
    start = set_up(parse_settings(words(shards, tmp_path / "logs", *DROPLESS, name="new")), one_process(), Console())
    write_state(copy, read_state(copy) | {"stream": start.stream.state_dict()})
    ours = program("--resume", str(copy), *DROPLESS, "--save-every-n-steps", "5", name="c")
    assert numbers(found)[0] == numbers(ours)[0]
    pair = [tensors_of(checkpoint_folder(run, 5)) for run in (found, ours)]
    assert [name for name in differing(*pair) if not name.startswith("rng")] == []


def test_fewer_steps_than_openlms_optimizer_has_taken_is_an_error(program, trained, tmp_path):
    _, model, tensors = trained
    path = as_openlm(tmp_path / "openlm" / "epoch_1.pt", model)
    openlm_optimizer(path.with_name("optimizer_1.pt"), tensors)
    message = r"epoch_1\.pt is, by its optimizer's state, of step 4, but the run has 3 steps; expected at least as many"
    with pytest.raises(SystemExit, match=message):
        program("--resume", str(path), *DROPLESS, "--steps", "3", name="b")
    assert not (tmp_path / "logs" / "b").exists()
    program("--resume", str(path), *DROPLESS, "--steps", "4", name="b")  # ends at once, with its validation


@pytest.mark.parametrize(
    ("suffix", "counts", "step"),
    [("pt", (3.0, 5.0), 5), ("pt", (5.0, 3.0), 5), ("pt", (), 0), ("pt", None, 0), ("safetensors", (3.0,), 0)],
)
@pytest.mark.parametrize("tied", [False, True])
def test_how_far_another_program_was_is_what_its_optimizer_has_counted(monkeypatch, suffix, counts, step, tied):
    """The most of all parameters: an expert without tokens may have taken fewer steps. Nobody knows the tokens."""
    asked, model = [], nn.Linear(1, 2)
    model.config = SimpleNamespace(weight_tying=tied)
    optimizer = torch.optim.AdamW(model.parameters())

    def moments(path, *, expected, weight_tying):
        asked.append((path.name, {name: tuple(shape) for name, shape in expected.items()}, weight_tying))
        names = ("optimizer.step.weight", "optimizer.step.bias")
        return counts and {name: torch.tensor(count) for name, count in zip(names, counts, strict=True)}

    def loaded(*given):
        asked.append(given)
        return {}

    monkeypatch.setattr(saving, "load_weights", loaded)
    monkeypatch.setattr(saving, "read_openlm_optimizer", moments)
    run, path = SimpleNamespace(model=model, world=one_process(), optimizer=optimizer), Path(f"epoch_1.{suffix}")
    run.budget, run.settings = (
        SimpleNamespace(steps=5),
        SimpleNamespace(model=ModelSettings(), optimizer=OptimizerSettings()),
    )
    progress = saving._restore_weights(run, path, Console(quiet=True))
    reads = [(path.name, {"weight": (2, 1), "bias": (2,)}, tied)] if suffix == "pt" else []
    assert asked == [(model, path, run.world), *reads]
    assert progress == Progress(step=step, trained_tokens=None if step else 0)
    for parameter, count in zip(model.parameters(), (step and counts) or (0, 0), strict=True):
        assert optimizer.state[parameter]["step"] == count


def test_training_goes_on_from_safetensors(program, trained, tmp_path, capsys):
    _, model, _ = trained
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, model.state_dict())
    folder = program("--resume", str(path), *DROPLESS, name="b")
    assert "weights.safetensors; the optimizer and the schedule start anew" in " ".join(capsys.readouterr().out.split())
    from_openlm = program("--resume", str(as_openlm(tmp_path / "epoch_1.pt", model)), *DROPLESS, name="c")
    assert numbers(folder) == numbers(from_openlm), "the same weights in two formats"


def test_weights_that_were_trained_by_another_method_are_warned_of_from_safetensors(program, tmp_path, capsys):
    path = export(latest_checkpoint(program("--steps", "2", "--recipe", "mixtral")), tmp_path / "a.safetensors")
    program("--resume", str(path), "--steps", "2", "--recipe", "mixtral", name="b")
    assert "warning: these weights" not in capsys.readouterr().out
    program("--resume", str(path), "--steps", "2", "--recipe", "olmoe", name="c")
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"warning: these weights were trained with .*--recipe mixtral.* launch has .*--recipe olmoe", said)


def test_openlms_weights_under_another_recipe_are_warned_of(program, trained, tmp_path, capsys):
    path = str(as_openlm(tmp_path / "epoch_1.pt", trained[1]))
    for recipe in ("openlm", "switch"):
        program("--resume", path, "--steps", "1", "--recipe", recipe, name=recipe)
        said = " ".join(capsys.readouterr().out.split())
        words = "warning: these weights were trained with --recipe openlm, and this launch has --recipe switch"
        assert (words in said) == (recipe == "switch")


@pytest.mark.parametrize("kind", ["pt", "safetensors", "folder"])
def test_weights_are_the_same_from_every_format(trained, tmp_path, kind):
    folder, model, _ = trained
    if kind == "pt":
        path = as_openlm(tmp_path / "epoch_7.pt", model, epoch=7, step=70)
    elif kind == "safetensors":
        path = tmp_path / "a.safetensors"
        write_safetensors(path, model.state_dict())
    else:
        path = checkpoint_folder(folder, 4)
    other, _, _ = make_model(unflatten(read_state(checkpoint_folder(folder, 4))["settings"]), one_process())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    state = load_weights(other, path, one_process())
    assert differing(model.state_dict(), other.state_dict()) == []
    assert state.get("step") == {"pt": 70, "safetensors": None, "folder": 4}[kind]


@pytest.mark.parametrize("kind", ["folder", "pt", "safetensors", "foreign"])
def test_two_matrices_do_not_become_one_that_is_tied(trained, tmp_path, kind):
    """Which of the two was lost depended on the kind of file."""
    folder, model, _ = trained
    path = checkpoint_folder(folder, 4)
    if kind == "pt":
        path = as_openlm(tmp_path / "epoch_7.pt", model)
    elif kind == "safetensors":
        path = export(path, tmp_path / "a.safetensors")
    elif kind == "foreign":
        path = write_safetensors(tmp_path / "a.safetensors", model.state_dict())
    tied = tmp_path / "tied.json"
    tied.write_text(json.dumps({**read_config("moekit_tiny"), "weight_tying": True}))
    settings = unflatten({**read_state(checkpoint_folder(folder, 4))["settings"], "model": str(tied)})
    other, _, _ = make_model(settings, one_process())
    with pytest.raises(
        ValueError, match=r"ties .*tok_emb.* and .*output\.weight, but in .* they differ; .*Choose a --model"
    ):
        load_weights(other, path, one_process())


@pytest.mark.parametrize("left_out", [(), ("output.weight",), ("tok_embeddings.weight",)])
def test_of_tied_weights_a_file_may_hold_one(tmp_path, left_out):
    model, again = (LanguageModel(load_config("moekit_tiny", weight_tying=True)) for _ in range(2))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in left_out}
    load_weights(again, write_safetensors(tmp_path / "a.safetensors", tensors), one_process())
    assert differing(model.state_dict(), again.state_dict()) == []


def test_tied_weights_that_a_file_lacks_are_missed(tmp_path):
    model = LanguageModel(load_config("moekit_tiny", weight_tying=True))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in TIED}
    path = write_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"the file lacks tok_embeddings\.weight, output\.weight"):
        load_weights(model, path, one_process())


def test_weights_of_another_model_are_refused(program, trained, tmp_path):
    _, model, _ = trained
    path = as_openlm(tmp_path / "epoch_1.pt", model)
    with pytest.raises(SystemExit, match=r"expected .*router|router.*expected|shape"):
        program("--resume", str(path), "--moe-num-experts", "4", name="b")
    assert not (tmp_path / "logs" / "b").exists()


def test_a_file_that_is_no_checkpoint_is_refused(program, tmp_path):
    path = tmp_path / "epoch_1.pt"
    path.write_bytes(b"nothing")
    with pytest.raises(SystemExit, match=r"epoch_1\.pt"):
        program("--resume", str(path))
    assert not (tmp_path / "logs").exists()


def test_a_finished_run_is_not_saved_again(program):
    folder = program("--steps", "3")
    before = checkpoint_folder(folder, 3).stat().st_mtime_ns
    program("--steps", "3", "--resume", "latest")
    assert checkpoint_folder(folder, 3).stat().st_mtime_ns == before


def test_what_a_killed_launch_left_is_removed_before_anything_is_written(program, monkeypatch):
    folder = program("--steps", "3")
    for name in (".step_00000006.unfinished", ".step_00000001.removed"):
        (folder / "checkpoints" / name).mkdir()
        (folder / "checkpoints" / name / "__0_0.distcp").write_bytes(b"half")
    seen, write_config = [], train.write_config

    def noted(*given, **named):
        seen.append(names_in(folder))
        return write_config(*given, **named)

    monkeypatch.setattr(train, "write_config", noted)
    program("--steps", "3", "--resume", "latest")
    assert seen == [["step_00000003"]]


def test_a_resumed_run_goes_on_with_its_loss_scale(program):
    flags = ("--precision", "amp", "--steps", "3")
    whole = program(*flags, "--save-every-n-steps", "2")
    other = program(*flags, "--resume", str(checkpoint_folder(whole, 2)), name="b")
    expected, found = (read_state(checkpoint_folder(run, 3))["scaler"] for run in (whole, other))
    assert found == expected
    assert expected["_growth_tracker"] > 1  # steps since the scale was changed: a new scaler has seen one


def test_a_loss_scale_is_handed_on_by_launches_without_one(program):
    flags = ("--save-every-n-steps", "2", "--precision")
    folder = program("--steps", "2", *flags, "amp")
    for steps in ("4", "5"):
        program("--steps", steps, *flags, "fp32", "--resume", "latest")
    kept = read_state(checkpoint_folder(folder, 2))["scaler"]
    assert all(read_state(checkpoint_folder(folder, step))["scaler"] == kept for step in (4, 5))
    program("--steps", "6", *flags, "amp", "--resume", "latest")
    found = read_state(checkpoint_folder(folder, 6))["scaler"]
    assert found == kept | {"_growth_tracker": kept["_growth_tracker"] + 1}


def test_a_run_leaves_fp16_only_with_an_eps_that_hides_the_second_moments_that_were_lost(program, capsys):
    half = program("--precision", "fp16", "--eps", "1e-4", "--steps", "2")
    checkpoint = str(checkpoint_folder(half, 2))
    moments = [tensor for name, tensor in tensors_of(Path(checkpoint)).items() if "exp_avg_sq" in name]
    assert any((tensor == 0).any() for tensor in moments)
    with pytest.raises(SystemExit, match=r"--precision fp16 and --eps 0\.0001: its second moments.*Give --eps 0\.0001"):
        program("--steps", "3", "--resume", checkpoint, name="b")
    program("--steps", "3", "--resume", checkpoint, "--eps", "1e-4", name="c")
    assert "second moments" not in capsys.readouterr().out


def test_a_run_that_goes_on_in_fp16_says_which_second_moments_are_lost(program, capsys):
    whole = program("--steps", "2")
    program(
        "--steps", "3", "--resume", str(checkpoint_folder(whole, 2)), "--precision", "fp16", "--eps", "1e-4", name="b"
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "was not trained in fp16: second moments below 6e-08 become zero in fp16" in said
    program("--steps", "4", "--resume", "latest", "--precision", "fp16", "--eps", "1e-4", name="b")
    assert "second moments" not in capsys.readouterr().out


@pytest.fixture
def impatient(monkeypatch):
    """Refuse a locked folder at once."""
    monkeypatch.setattr(folder_locks, "PATIENCE", 0)


def free(folder):
    """Say whether a folder can be locked, and let go of it."""
    lock = FolderLock(folder, flag="--name")
    try:
        lock.take()
    except BlockingIOError:
        return False
    lock.let_go()
    return True


def test_a_second_launch_of_a_run_is_refused(program, shards, impatient):
    folder = program("--steps", "4", "--save-every-n-steps", "2")
    (folder / "checkpoints" / ".step_00000006.unfinished").mkdir()  # the first launch writes it
    first = FolderLock(folder, flag="--name")
    first.take()
    names, before = names_in(folder), files(folder)
    holder = rf"process {os.getpid()} of \S+|another process"  # the second where the system does not tell
    message = rf"logs/a: ({holder}) works in this folder; .*Wait until it has ended, end it, or choose another --n"
    for resume in ("latest", str(checkpoint_folder(folder, 2))):
        with pytest.raises(SystemExit, match=message):
            program("--resume", resume)
    assert (names_in(folder), files(folder)) == (names, before)
    program("--resume", str(checkpoint_folder(folder, 4)), name="b")  # another folder is free, and so is scoring
    validation = str(shards.validation[0].with_name("00000000.tar"))
    main(["--model", "moekit_tiny", "--precision", "fp32", "--resume", str(folder), "--val-data", validation,
          "--logs", str(folder.parent), "--name", "scored"])  # fmt: skip
    first.let_go()
    program("--resume", "latest")
    assert [line["step"] for line in numbers(folder)] == list(range(1, 9))


def test_a_run_is_locked_while_it_trains_and_free_when_it_has_ended(program, impatient, monkeypatch, tmp_path):
    folder, seen, loop = tmp_path / "logs" / "a", [], train.loop

    def noted(*given, **named):
        seen.append(free(folder))
        return loop(*given, **named)

    monkeypatch.setattr(train, "loop", noted)
    program("--steps", "2")
    assert free(folder)
    with pytest.raises(SystemExit, match="not finite") as diverged:
        program("--lr", "1e30", "--warmup", "0", "--steps", "4", "--resume", "latest")
    assert free(folder)
    with pytest.raises(SystemExit, match="but the run has 1 steps") as refused:
        program("--steps", "1", "--resume", "latest")
    assert free(folder)
    assert seen == [False, False]
    assert diverged.tb is not None, "the frames of the runs that failed are there still"
    assert refused.tb is not None


HOLDER = """
import os, sys, time
from moekit.lm.folder_locks import FolderLock
lock = FolderLock(sys.argv[1], flag="--name")
lock.take()
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(60)
"""


def test_a_killed_process_keeps_no_lock_though_its_worker_lives(tmp_path, impatient):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        worker = int(holder.stdout.readline())
        try:
            assert not free(tmp_path / "a")
            holder.kill()
            holder.wait()
            assert free(tmp_path / "a")
            os.kill(worker, 0)
        finally:
            holder.kill()
            os.kill(worker, signal.SIGKILL)


def test_a_launch_that_is_about_to_end_is_waited_for(tmp_path):
    first, second = FolderLock(tmp_path / "a", flag="--name"), FolderLock(tmp_path / "a", flag="--name")
    first.take()
    threading.Timer(0.3, first.let_go).start()
    second.take()
    second.take()  # it has it already
    second.let_go()


def test_a_folder_that_is_removed_while_it_is_asked_for_is_asked_for_again(tmp_path, monkeypatch):
    """pathlib sees it, asks whether it is a folder, and it is gone."""
    mkdir, asked = Path.mkdir, []

    def late(path, *given, **options):
        asked.append(path)
        if len(asked) == 1:
            raise FileExistsError(path)
        mkdir(path, *given, **options)

    monkeypatch.setattr(Path, "mkdir", late)
    with FolderLock(tmp_path / "a", flag="--name"):
        assert asked[:2] == [tmp_path / "a"] * 2
    (tmp_path / "b").write_text("a file")
    with pytest.raises(FileExistsError):
        FolderLock(tmp_path / "b", flag="--name").take()


def test_a_folder_for_a_lock_alone_does_not_stay_whoever_made_it(tmp_path):
    for is_left in (True, False):
        (tmp_path / "a").mkdir(exist_ok=True)
        with FolderLock(tmp_path / "a", flag="--name", is_left=is_left):
            pass
        assert (tmp_path / "a").exists() is is_left


def test_a_run_that_began_and_ended_meanwhile_is_not_mixed_with_another(program, shards, tmp_path, monkeypatch):
    """Its folder was free when the second launch named it."""
    take, line = FolderLock.take, words(shards, tmp_path / "logs", "--steps", "2", name="a")

    def late(lock):
        monkeypatch.setattr(FolderLock, "take", take)
        main(line)
        take(lock)

    monkeypatch.setattr(FolderLock, "take", late)
    with pytest.raises(SystemExit, match=r"logs/a holds a run already; go on with it by --resume latest, or choose"):
        main([*line, "--seed", "5"])
    assert json.loads((tmp_path / "logs" / "a" / "config.json").read_text())["seed"] != 5


def test_an_error_before_the_first_step_leaves_no_lock(program, monkeypatch, tmp_path, impatient):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "config.json")

    monkeypatch.setattr(train, "write_config", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        program("--steps", "2")
    monkeypatch.undo()
    assert free(tmp_path / "logs" / "a")


def test_a_place_that_cannot_be_written_to_is_named(program, monkeypatch):
    def closed(lock):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(lock.folder))

    message = (
        r"--logs: \S+/logs/a cannot be made or cleared \(Permission denied\); expected a place that can be written"
    )
    for name, part, way in ((FolderLock, "take", closed), (os, "access", lambda *_, **__: False)):
        with monkeypatch.context() as patch:
            patch.setattr(name, part, way)
            with pytest.raises(SystemExit, match=message):
                program("--steps", "2")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, None])
def test_where_there_are_no_locks_a_run_goes_on_without(tmp_path, monkeypatch, number):
    def fail(*arguments):
        raise OSError(number, "no locks")

    if number is None:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", fail)
    first, second = FolderLock(tmp_path / "a", flag="--name"), FolderLock(tmp_path / "a", flag="--name")
    first.take()
    second.take()
    second.let_go()
    first.let_go()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_a_failing_launch_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    locked_by, calls = folder_locks._locked_by, []

    def removed_first(descriptor):
        if not calls:
            (tmp_path / "a").rmdir()
        calls.append(descriptor)
        return locked_by(descriptor)

    monkeypatch.setattr(folder_locks, "_locked_by", removed_first)
    lock = FolderLock(tmp_path / "a", flag="--name")
    lock.take()
    assert len(calls) == 2
    monkeypatch.setattr(folder_locks, "PATIENCE", 0)
    assert not free(tmp_path / "a")


@pytest.mark.distributed
def test_all_ranks_hear_of_a_refusal(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # there may be one card for both
    lock = FolderLock(tmp_path / "a", flag="--name")
    lock.take()
    line = words(shards, tmp_path, "--recipe", "mixtral", "--resume", "latest")
    for [ended] in run_ranks("launches:run_commands", 2, [line], limit=30):
        assert "works in this folder" in str(ended.message)
    assert list((tmp_path / "a").iterdir()) == []


def test_a_folder_without_a_checkpoint_is_told_by_its_whole_path(program, monkeypatch, tmp_path, capsys):
    """Relative logs are another folder where the launch is from another place."""
    monkeypatch.chdir(tmp_path)
    program("--steps", "1", "--logs", "runs", "--resume", "latest")
    said = capsys.readouterr().out
    assert f"--resume latest: {tmp_path / 'runs' / 'a'} has no checkpoint yet, so the run starts\n" in said
