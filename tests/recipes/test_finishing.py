"""What a run says and writes at its end."""

import json
import re
import types

import pytest
from rich.console import Console
from small_runs import SEQ_LEN

from moekit.lm.trackers import read_metrics
from moekit.parallel import one_process
from moekit.recipes import finishing, recording, report
from moekit.recipes.finishing import Trained, _counted_words
from moekit.recipes.saving import Progress


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        (Trained(1000, 4.0, whole=True), "1,000 tokens in 7 s of training, 250 tokens/s"),
        (
            Trained(900, 4.0, whole=True),
            "1,000 tokens by its steps, 900 of them trained on, in 7 s of training, 225 tokens/s",
        ),
        (
            Trained(500, 2.0, whole=False),
            "1,000 tokens by its steps, 7 s of training; this launch trained on 500 in 2 s, 250 tokens/s",
        ),
        (
            Trained(0, 0.0, whole=False),
            "1,000 tokens by its steps, 7 s of training; this launch trained on 0 in 0 s",
        ),
    ],
)
def test_tokens_and_seconds_are_those_of_the_run_and_the_speed_is_that_of_the_launch(trained, words):
    assert _counted_words(1000, 7.0, trained) == words


def test_the_end_of_a_run_tells_what_it_was(program, monkeypatch, capsys):
    """One that goes on from another program's, scored with a recipe of its own, on a device whose peak is known."""

    def missing(*_):
        raise OSError("the disk is gone")

    def undrawn(*_):
        raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.29' not found")

    before = Progress(step=3, seconds=1000.0, trained_tokens=None)
    monkeypatch.setattr("moekit.recipes.train.restore", lambda *_: before)
    monkeypatch.setattr(recording, "_PEAK", {recording.device_name(one_process().device): 1e12})
    monkeypatch.setattr(report, "simple_scores", missing)
    monkeypatch.setattr(report, "draw", undrawn)
    folder = program("--steps", "5", "--recipe", "switch", "--moe-loss-scope", "micro-batch")
    results, tokens = json.loads((folder / "results.json").read_text()), 5 * 4 * SEQ_LEN
    assert (results["tokens"], results["trained_tokens"]) == (tokens, None)
    assert results["step"] == 5
    assert 1000 < results["seconds"] < 1100
    method = results["method"]
    assert method["loss_scope"] == "micro-batch"
    assert method["plan"] != method["evaluation"]["plan"]  # a limit in training alone

    lines = read_metrics(folder / "checkpoints" / "results.jsonl")
    assert {(line["step"], line["train_tokens"]) for line in lines} == {(5, None)}  # not what steps come to
    assert {line["name"] for line in lines} == results["validation"].keys()

    said = " ".join(capsys.readouterr().out.split())
    total, active = results["parameters"], results["active_parameters"]
    assert f"{total:,} parameters, {active:,} active per token; {tokens:,} tokens by its steps, 10" in said
    assert active < total
    assert "no bigrams and unigrams beside the scores: the disk is gone" in said
    assert "picture: none: libstdc++.so.6: version `GLIBCXX_3.4.29' not found" in said
    found = re.search(r"trained on 512 in \d+ s, ([\d,]+) tokens/s, MFU ([\d.]+)%", said)
    assert found is not None, said
    flops = 6 * (active - 512 * 64) + 12 * 2 * SEQ_LEN * 64
    assert float(found[2]) == pytest.approx(flops * int(found[1].replace(",", "")) / 1e10, abs=0.06)


def test_a_launch_that_trains_nothing_says_nothing_of_its_use_of_the_device(program, monkeypatch, capsys):
    """As one that resumes a finished run, also where it is known what the device can do at most."""
    monkeypatch.setattr(recording, "_PEAK", {recording.device_name(one_process().device): 1e12})
    program("--steps", "2")
    assert "tokens/s, MFU " in " ".join(capsys.readouterr().out.split())
    program("--steps", "2", "--resume", "latest")
    said = " ".join(capsys.readouterr().out.split())
    assert "this launch trained on 0 in 0 s" in said
    assert "MFU" not in said


def ends(folder):
    """Read what the ends of a run left: names to contents."""
    return {path.name: path.read_bytes() for pattern in ("results*", "run*.png") for path in folder.glob(pattern)}


def test_a_run_that_goes_on_past_its_end_has_no_results_until_the_next(program, picture, interrupt_after, capsys):
    folder = program("--steps", "3")
    first = ends(folder)
    assert json.loads(first["results.json"])["step"] == 3
    assert first.keys() == {"results.json", "run.png"}

    program("--steps", "3", "--resume", "latest")  # nothing is left to train
    again = ends(folder)
    assert again.keys() == first.keys()
    assert "set aside" not in capsys.readouterr().out

    interrupt_after(4)
    program("--steps", "6", "--resume", "latest")
    said = capsys.readouterr().out
    aside = {"results_1.json": again["results.json"], "run_1.png": again["run.png"]}
    assert "results.json was set aside as results_1.json: the run goes on past that end\n" in said
    assert ends(folder) == aside

    program("--steps", "6", "--resume", "latest")
    after = ends(folder)
    assert json.loads(after["results.json"])["step"] == 6
    assert after.keys() == {*first, *aside}
    assert {name: after[name] for name in aside} == aside
    lines = read_metrics(folder / "checkpoints" / "results.jsonl")
    assert {line["step"] for line in lines} == {3, 6}


def test_earlier_results_are_not_written_over_and_only_rank_0_sets_them_aside(program):
    folder = program("--steps", "1")
    content = (folder / "results.json").read_bytes()
    (folder / "run_1.png").write_bytes(b"of a launch that was killed between the two")
    here = one_process()

    def set_aside(world):
        run = types.SimpleNamespace(folder=folder, world=world)
        finishing.set_results_aside(run, Console(quiet=True))
        return ends(folder)

    (folder / "run.png").write_bytes(b"a picture")
    before = ends(folder)
    assert set_aside(here._replace(rank=1, size=2)) == before
    expected = {"results_2.json": content, "run_2.png": b"a picture", "run_1.png": before["run_1.png"]}
    assert set_aside(here) == expected
    assert set_aside(here) == expected, "there is nothing more to set aside"


def test_samples_are_written_by_the_recipe_of_evaluation(program, monkeypatch):
    seen, runs, evaluating = [], [], finishing.evaluating

    def noted(model, recipe):
        seen.append(recipe)
        return evaluating(model, recipe)

    def finish(run, console, **given):
        runs.append(run)
        readable = run._replace(corpus=run.corpus._replace(tokenizer=object()))
        finishing.finish(readable, console, **given)

    monkeypatch.setattr(finishing, "evaluating", noted)
    monkeypatch.setattr(report, "print_samples", lambda *_: None)
    monkeypatch.setattr("moekit.recipes.train.finish", finish)
    program("--steps", "1", "--recipe", "switch")
    assert seen == [run.evaluation_recipe for run in runs]
    assert seen[0] is not None
