import errno
import json
import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from small_runs import SEQ_LEN, files, markov_sequences, numbers, unflatten

from moekit.lm.checkpoints import checkpoint_folder, read_state
from moekit.lm.openlm_checkpoints import to_openlm, write_openlm
from moekit.lm.shards import shard_bytes, write_shards
from moekit.lm.tensor_files import write_safetensors
from moekit.lm.tokenizers import ByteTokenizer, save_tokenizer
from moekit.lm.trackers import read_metrics
from moekit.parallel import one_process
from moekit.recipes import runs, scoring
from moekit.recipes.construction import make_model
from moekit.recipes.export import export
from moekit.recipes.precisions import resolved_precision
from moekit.recipes.saving import load_weights
from moekit.recipes.train import main

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def trained(program):
    """The checkpoint of a run of 4 steps."""
    return checkpoint_folder(program("--steps", "4", "--recipe", "openlm", name="trained"), 4)


def model_of(checkpoint):
    model, recipe, _ = make_model(unflatten(read_state(checkpoint)["settings"]), one_process())
    load_weights(model, checkpoint, one_process())
    return model, recipe


@pytest.fixture
def score(tmp_path):
    """Run the program without training data; return the lines that it added to results.jsonl."""

    def run(checkpoint, *flags, name="scores"):
        path = checkpoint.parent / "results.jsonl"
        before = len(path.read_text().splitlines()) if path.exists() else 0
        fixed = ["--model", "moekit_tiny", "--precision", "fp32", "--batch-size", "4"]
        main([*fixed, "--resume", str(checkpoint), "--logs", str(tmp_path / "logs"), "--name", name, *flags])
        return [json.loads(line) for line in path.read_text().splitlines()[before:]]

    return run


def tar(path, rows, *, key="json"):
    """Write a bare tar, without a manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shard_bytes(rows.tolist(), first=0))
    return str(path)


def loss_of(checkpoint, rows):
    """Compute the loss of some rows one after the other, without the program."""
    model, recipe = model_of(checkpoint)
    model.eval()
    rows = rows.to(next(model.parameters()).device)
    for module in model.modules():
        if hasattr(module, "recipe"):
            module.recipe = recipe
    with torch.no_grad():
        nats = [F.cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction="sum").double() for row in rows]
    return (torch.stack(nats).sum() / (len(rows) * SEQ_LEN)).item()


def test_what_cannot_be_made_is_told_before_data_are_read(trained, score, monkeypatch):
    monkeypatch.setattr(runs, "make_corpus", lambda *arguments, **options: pytest.fail("data are read"))
    with pytest.raises(SystemExit, match="unknown recipe 'mixtrl'"):
        score(trained, "--val-data", "absent.tar", "--recipe", "mixtrl")


def test_tars_are_scored_alone(trained, score, tmp_path, capsys):
    rows = markov_sequences(7, first=0, seed=9)
    location = tar(tmp_path / "val" / "held.tar", rows)
    before = files(trained)
    [line] = score(trained, "--val-data", location)
    assert line["checkpoint_path"] == str(trained)
    assert (line["model"], line["val_data"], line["name"]) == ("moekit_tiny", location, "held")
    assert (line["step"], line["sequences"], line["tokens"]) == (4, 7, 7 * SEQ_LEN)
    assert line["loss"] == pytest.approx(loss_of(trained, rows), rel=1e-5)
    assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
    assert line["loss_low"] < line["loss"] < line["loss_high"]
    assert (line["bits_per_byte"], line["skipped_data"]) == (None, {})
    [layer] = line["layers"]
    assert sum(layer["load"]) == pytest.approx(1)
    assert layer["drop_rate"] == 0.0, "evaluation drops nothing"
    assert files(trained) == before
    text = capsys.readouterr().out
    assert "validation, nats per token" in text
    assert "expert load in validation" in text
    folder = tmp_path / "logs" / "scores"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "params.txt", "results.json"]
    own = json.loads((folder / "results.json").read_text())
    assert own["validation"]["held"]["loss"] == line["loss"]
    traced = ("checkpoint_path", "step", "train_tokens")
    assert [own[name] for name in traced] == [line[name] for name in traced] == [str(trained), 4, 4 * 256]


def test_several_sets_and_braces_are_scored_each_by_itself(trained, score, tmp_path):
    parts = [markov_sequences(3, first=0, seed=seed) for seed in (1, 2, 3)]
    for number, part in enumerate(parts):
        tar(tmp_path / "val" / f"{number:03d}.tar", part)
    braces = str(tmp_path / "val" / "{000..001}.tar")
    manifest = str(write_shards(tmp_path / "listed", parts[2]))
    lines = score(trained, "--val-manifest", manifest, "--val-data", braces, str(tmp_path / "val" / "002.tar"))
    assert [line["val_data"] for line in lines] == [manifest, braces, str(tmp_path / "val" / "002.tar")]
    assert [line["sequences"] for line in lines] == [3, 6, 3]
    assert len({line["name"] for line in lines}) == 3
    assert lines[0]["loss"] == lines[2]["loss"] == pytest.approx(loss_of(trained, parts[2]), rel=1e-5)
    assert lines[1]["loss"] == pytest.approx(loss_of(trained, torch.cat(parts[:2])), rel=1e-5)


def test_the_extension_of_the_members_can_be_said(trained, score, tmp_path):
    location = tar(tmp_path / "held.tar", markov_sequences(3, first=0, seed=1))
    [line] = score(trained, "--val-data", location, "--val-data-key", "json")
    assert line["sequences"] == 3
    with pytest.raises(SystemExit, match=r"train_moe\.py: .*held\.tar"):
        score(trained, "--val-data", location, "--val-data-key", "txt")
    both = score(trained, "--val-data", location, location, "--val-data-key", "json", "json")
    assert [each["loss"] for each in both] == [line["loss"]] * 2


@pytest.mark.parametrize("recipe", ["openlm", "deepseek_moe"])
def test_the_batch_size_does_not_matter(program, score, tmp_path, recipe):
    # openlm trains with a tight capacity limit here, which is no part of a score; deepseek_moe has a selection bias.
    flags = ["--recipe", recipe, *(["--moe-capacity-factor", "0.5"] if recipe == "openlm" else [])]
    checkpoint = checkpoint_folder(program("--steps", "2", *flags), 2)
    location = tar(tmp_path / "held.tar", markov_sequences(11, first=0, seed=4))
    lines = [
        score(checkpoint, "--val-data", location, "--batch-size", str(size), *flags, name=f"by{size}")[0]
        for size in (1, 3, 8)
    ]
    for line in lines[1:]:
        assert line["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)
        assert (line["sequences"], line["tokens"]) == (11, 11 * SEQ_LEN)
        assert line["layers"][0]["load"] == pytest.approx(lines[0]["layers"][0]["load"])
        assert line["layers"][0]["drop_rate"] == 0.0


def test_a_dense_model_is_scored(program, score, tmp_path, capsys):
    checkpoint = checkpoint_folder(program("--steps", "2", "--moe-freq", "0"), 2)
    rows = markov_sequences(3, first=0, seed=1)
    capsys.readouterr()
    [line] = score(checkpoint, "--val-data", tar(tmp_path / "held.tar", rows), "--moe-freq", "0")
    assert line["layers"] == []
    model, _ = model_of(checkpoint)
    with torch.no_grad():
        expected = F.cross_entropy(model.cpu()(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
    assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert "expert load" not in capsys.readouterr().out


def test_bits_per_byte_need_the_tokenizer_beside_the_data(trained, score, tmp_path):
    rows = markov_sequences(3, first=97, seed=1)  # letters
    location = tar(tmp_path / "val" / "held.tar", rows)
    [without] = score(trained, "--val-data", location)
    save_tokenizer(ByteTokenizer(), tmp_path / "val" / "tokenizer.json")
    [line] = score(trained, "--val-data", location, name="b")
    assert without["bits_per_byte"] is None
    assert line["loss"] == without["loss"]
    assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2)), "a byte a token"


def test_a_part_of_the_data_can_be_scored(trained, score, tmp_path):
    rows = markov_sequences(9, first=0, seed=1)
    [line] = score(trained, "--val-data", tar(tmp_path / "a.tar", rows), "--val-num-samples", str(3 * SEQ_LEN - 5))
    assert line["sequences"] == 3, "tokens, rounded up to whole sequences"
    assert line["loss"] == pytest.approx(loss_of(trained, rows[:3]), rel=1e-5)


def test_validations_on_the_way_score_no_more_than_was_asked(program):
    folder = program("--steps", "2", "--val-num-samples", str(3 * SEQ_LEN))
    last = read_metrics(folder / "metrics.jsonl")[-1]["validation"]
    results = json.loads((folder / "results.json").read_text())["validation"]
    assert [scores["sequences"] for scores in results.values()] == [3, 3]
    assert last == {name: scores["loss"] for name, scores in results.items()}


@pytest.mark.parametrize("kind", ["pt", "safetensors", "run", "latest"])
def test_every_kind_of_checkpoint_is_scored_the_same(trained, score, tmp_path, kind):
    location = tar(tmp_path / "val.tar", markov_sequences(5, first=0, seed=1))
    [ours] = score(trained, "--val-data", location)
    model, _ = model_of(trained)
    if kind == "pt":
        theirs = to_openlm(model.state_dict(), config=model.config)
        path = write_openlm(tmp_path / "epoch_3.pt", {f"module.{n}": t for n, t in theirs.items()}, epoch=3, step=9)
        [line] = score(path, "--val-data", location, name="b")
    elif kind == "safetensors":
        path = write_safetensors(tmp_path / "a.safetensors", model.state_dict())
        [line] = score(path, "--val-data", location, name="b")
    else:
        words = [str(trained.parents[1])] if kind == "run" else ["latest"]
        main(["--model", "moekit_tiny", "--precision", "fp32", "--batch-size", "4", "--val-data", location,
              "--logs", str(tmp_path / "logs"), "--name", "trained", "--resume", *words])  # fmt: skip
        line, path = json.loads((trained.parent / "results.jsonl").read_text().splitlines()[-1]), trained
    assert line["loss"] == ours["loss"]
    assert line["step"] == {"pt": 9, "safetensors": None}.get(kind, 4)
    assert line["checkpoint_path"] == str(path)


def test_lines_of_results_add_up(program, score, tmp_path):
    folder = program("--steps", "2")
    checkpoint = checkpoint_folder(folder, 2)
    lines = [json.loads(line) for line in (folder / "checkpoints" / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["prose", "code"], "the run has scored itself at its end"
    assert [(line["step"], line["train_tokens"]) for line in lines] == [(2, 512)] * 2
    [own] = score(checkpoint, "--val-manifest", lines[0]["val_data"])
    assert own["loss"] == lines[0]["loss"], "the same whether by the run or alone"
    assert own["train_tokens"] == lines[0]["train_tokens"]
    results = json.loads((folder / "results.json").read_text())["validation"]
    assert results["prose"]["loss"] == own["loss"]
    path = folder / "checkpoints" / "results.jsonl"
    text = path.read_text()
    assert text.count("\n") == 3
    path.write_text(text[:-9])  # as a full disk leaves it
    score(checkpoint, "--val-manifest", lines[0]["val_data"], name="again")
    assert path.read_text() == text[:-9] + "\n" + text.splitlines(keepends=True)[-1]


def test_lines_of_results_say_their_precision(program, score, shards):
    """One checkpoint in two precisions has two losses, and lines that differ in nothing else that names them."""
    checkpoint = checkpoint_folder(program("--steps", "2"), 2)
    data = ["--val-manifest", str(shards.validation[0])]
    auto = resolved_precision("auto", one_process().device)
    for given, said in (("fp32", "fp32"), ("bf16", "bf16"), ("auto", auto)):
        [line] = score(checkpoint, *data, "--precision", given, name=given)
        assert line["precision"] == said
    lines = read_metrics(checkpoint.parent / "results.jsonl")
    assert [line["precision"] for line in lines] == ["fp32", "fp32", "fp32", "bf16", auto], "and so does a run's end"
    assert lines[2]["loss"] != lines[3]["loss"]


def test_scoring_leaves_a_runs_own_files_alone(program, shards, tmp_path):
    """Scoring under the run's name, as OpenLM's users do, must not change what the run is continued with."""
    folder = program("--steps", "3", "--seed", "5")
    (folder / "checkpoints" / "results.jsonl").unlink()
    before = files(folder)
    main(["--model", "moekit_tiny", "--precision", "fp32", "--val-manifest", str(shards.validation[0]),
          "--logs", str(tmp_path / "logs"), "--name", "a", "--resume", "latest"])  # fmt: skip
    after = files(folder)
    assert {str(path) for path in after if after[path] != before.get(path)} == {"checkpoints/results.jsonl"}


def test_weights_of_another_model_are_scored_with_a_warning(trained, score, tmp_path, capsys):
    location = tar(tmp_path / "a.tar", markov_sequences(2, first=0, seed=1))
    [line] = score(trained, "--val-data", location, "--moe-capacity-factor", "4", "--moe-loss-weight", "0.5")
    assert (line["recipe"], line["moe_top_k"]) == ("openlm", 2)
    assert "warning" not in capsys.readouterr().out
    [line] = score(trained, "--val-data", location, "--moe-top-k", "1", "--ffn-type", "geglu")
    assert (line["recipe"], line["moe_top_k"]) == ("openlm", 1)
    assert (
        "warning: these weights were trained with --ffn-type swiglu, --moe-top-k 2, and this launch has --ffn-type "
        "geglu, --moe-top-k 1\n"
    ) in capsys.readouterr().out


def test_exported_weights_of_another_method_are_scored_with_a_warning(trained, score, tmp_path, capsys, shards):
    path = export(trained, tmp_path / "weights.safetensors")
    data = ["--val-manifest", str(shards.validation[0])]
    [line] = score(path, *data, "--recipe", "openlm")
    assert line["step"] == 4
    assert "warning" not in capsys.readouterr().out
    score(path, *data, "--recipe", "openlm", "--moe-top-k", "1", name="others")
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: these weights were trained with --moe-top-k 2, and this launch has --moe-top-k 1" in said


def test_text_beside_tensors_of_others_says_nothing_and_a_damaged_one_is_named(trained, score, tmp_path, shards):
    model, _ = model_of(trained)
    data, path = ["--val-manifest", str(shards.validation[0]), "--recipe", "openlm"], tmp_path / "a.safetensors"
    for metadata in (None, {"step": "9", "settings": '{"recipe": "mixtral"}'}):
        write_safetensors(path, model.state_dict(), metadata=metadata)
        assert [line["step"] for line in score(path, *data)] == [None]
    for damaged in ("{", "[" * 100_000):
        write_safetensors(path, model.state_dict(), metadata={"moekit": "0", "step": damaged})
        with pytest.raises(
            SystemExit, match=r"a\.safetensors: its metadata are no JSON: .*\. Export the checkpoint ag"
        ):
            score(path, *data)


def test_scores_are_kept_where_there_is_a_place_for_them(trained, tmp_path, capsys, shards, monkeypatch):
    """Beside somebody else's checkpoint, or in a full or closed folder of one's own, there may be none."""
    closed: list[str] = []

    def refuse(function):
        def write(path, *arguments, **options):
            if str(path).startswith(tuple(closed)):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return function(path, *arguments, **options)

        return write

    monkeypatch.setattr(scoring, "append_results", refuse(scoring.append_results))
    monkeypatch.setattr(scoring, "write_config", refuse(scoring.write_config))
    words = ["--model", "moekit_tiny", "--precision", "fp32", "--batch-size", "4", "--recipe", "openlm"]
    words += ["--resume", str(trained), "--logs", str(tmp_path / "mine"), "--val-manifest", str(shards.validation[0])]
    beside, own = trained.parent / "results.jsonl", tmp_path / "mine" / "s" / "results.json"
    lines = beside.read_text()
    closed[:] = [str(trained)]
    (tmp_path / "c.json").write_text('{"lr_cooldown_end": 1e-4, "derived": ["lr_cooldown_end"]}')
    main([*words, "--name", "s", "--config", str(tmp_path / "c.json")])
    assert json.loads((own.parent / "config.json").read_text())["derived"] == ["lr_cooldown_end", "qk_norm"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"warning: {beside} cannot be written: Read-only file system" in said
    assert said.endswith(f"results: {own}")
    assert json.loads(own.read_text())["validation"]
    assert beside.read_text() == lines
    closed[:] = [str(tmp_path / "mine")]
    main([*words, "--name", "t"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"warning: {own.parent.with_name('t') / 'results.json'} cannot be written" in said
    assert said.endswith(f"results: {beside}")
    assert len(beside.read_text()) > len(lines)
    closed.append(str(trained))
    with pytest.raises(SystemExit, match="Read-only file system"):
        main([*words, "--name", "u"])


def test_there_must_be_something_to_score(trained, score, tmp_path, capsys):
    location = tar(tmp_path / "a.tar", markov_sequences(2, first=0, seed=1))
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "moekit_tiny", "--val-data", location])
    assert "give --resume CHECKPOINT to evaluate one" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    with pytest.raises(SystemExit, match=r"step_00000009: there is no such checkpoint"):
        score(trained.with_name("step_00000009"), "--val-data", location)
    with pytest.raises(SystemExit, match=r"expected .* of shape .*found shape .*model flags"):
        score(trained, "--val-data", location, "--moe-num-experts", "4")
    with pytest.raises(SystemExit, match=rf"--val-data {tmp_path}: {tmp_path} is a folder; expected a tar"):
        score(trained, "--val-data", str(tmp_path))
    with pytest.raises(SystemExit, match=r"absent\.tar"):
        score(trained, "--val-data", str(tmp_path / "absent.tar"))
    with pytest.raises(SystemExit, match=r"--resume latest: .*has no checkpoint|no such checkpoint"):
        main(["--model", "moekit_tiny", "--val-data", location, "--resume", "latest", "--name", "none",
              "--logs", str(tmp_path / "logs")])  # fmt: skip


def test_bad_validation_data_stop_or_are_counted(trained, score, tmp_path):
    rows = markov_sequences(5, first=0, seed=1)
    rows[2, 7] = 600
    location = tar(tmp_path / "held.tar", rows)
    with pytest.raises(SystemExit) as stopped:
        score(trained, "--val-data", location)
    message = str(stopped.value)
    assert "held.tar" in message
    assert "has the id 600 at position 7; expected ids in [0, 512)" in message
    assert message.endswith("add --on-bad-data skip")
    [line] = score(trained, "--val-data", location, "--on-bad-data", "skip", name="b")
    assert (line["sequences"], line["skipped_data"]) == (4, {"id outside vocabulary": 1})
    assert line["loss"] == pytest.approx(loss_of(trained, rows[[0, 1, 3, 4]]), rel=1e-5)


def test_validations_on_the_way_change_nothing(program):
    often = program("--val-every-n-steps", "1", "--recipe", "gshard", name="a")
    never = program("--val-every-n-steps", "100", "--recipe", "gshard", name="b")
    without = [
        [{k: v for k, v in line.items() if "validation" not in k} for line in numbers(a)] for a in (often, never)
    ]
    assert without[0] == without[1]
    assert sum("validation" in line for line in numbers(often)) == 8


def test_a_checkpoint_that_moved_is_scored_where_it_is(trained, score, tmp_path):
    moved = shutil.copytree(trained, tmp_path / "elsewhere" / "final")
    [line] = score(moved, "--val-data", tar(tmp_path / "a.tar", markov_sequences(2, first=0, seed=1)))
    assert line["checkpoint_path"] == str(moved)
    assert (tmp_path / "elsewhere" / "results.jsonl").exists()
