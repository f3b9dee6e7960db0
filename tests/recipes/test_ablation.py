"""The ablation of routers: its runs, what it does not do twice, and its table."""

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import tyro
from rich.console import Console
from small_runs import numbers

from moekit.lm.configs import read_config
from moekit.lm.signals import StopRequest
from moekit.lm.trackers import read_metrics
from moekit.recipes import ablation, ablation_runs, evaluate
from moekit.recipes.ablation import AblationSettings, labelled, main, plan
from moekit.recipes.ablation_runs import make_jobs
from moekit.recipes.ablation_summaries import loads
from moekit.recipes.audits import audit
from moekit.recipes.names import find_recipe
from moekit.recipes.precisions import autocast
from moekit.recipes.settings import TrainSettings
from moekit.recipes.sources import read_set
from moekit.recipes.steps import split_ids
from moekit.routing import Causality
from moekit.segments import tokens_per_expert

pytestmark = pytest.mark.usefixtures("quick")
RECIPE = """
from moekit.recipes import mixtral, switch


def mine():
    return mixtral(k=3)


def tight(*, training=True):
    return switch(capacity_factor=0.5 if training else 0.0)


def broken():
    raise RuntimeError("no such luck")
"""
NULL = """
from moekit.recipes import moe_plus_plus
from moekit.routing import top_k


def half_null():
    def route(logits, *, bias=None):
        routing = top_k(logits[:, :8], k=2)
        experts = routing.expert_indices.clone()
        experts[:, 1] = 8
        return routing._replace(expert_indices=experts, num_experts=12)

    return moe_plus_plus()._replace(route=route)
"""


@pytest.fixture
def ablate(shards, tmp_path, monkeypatch) -> Callable[..., Path]:
    """Run the program on small shards, and return its folder."""
    monkeypatch.setenv("COLUMNS", "180")
    monkeypatch.setattr("moekit.recipes.train.audit", lambda recipe, experts: Causality())  # a warning to nobody
    monkeypatch.setattr(ablation_runs, "audit", partial(audit, trials=7, length=16))
    given = ["--model", "moekit_tiny", "--batch-size", "4", "--precision", "fp32", *shards.flags]

    def run(*words: str, rest: tuple[str, ...] = (), folder: str = "a") -> Path:
        main(["--steps", "3", "--folder", str(tmp_path / folder), *words, "--", *given, *rest])
        return tmp_path / folder

    return run


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(RECIPE)
    return path


def test_it_writes_and_prints_a_row_for_each_router(ablate, recipe_file, capsys):
    from matplotlib import image

    folder = ablate("--routers", "top_k,expert_choice,sinkhorn", "--recipe", f"{recipe_file}:tight")
    labels = ["top_k", "expert_choice", "sinkhorn", "recipe-tight"]
    lines = read_metrics(folder / "results.jsonl")
    assert [(line["router"], line["seed"]) for line in lines] == [(label, seed) for seed in (0, 1) for label in labels]
    assert lines[3]["recipe"] == f"{recipe_file}:tight"
    assert [line["experts_per_token"] for line in lines[:4]] == [2.0, 2.0, 2.0, 1.0]
    assert [line["leaks"] for line in lines[:3]] == [
        {"training": leaks, "evaluation": sees} for leaks, sees in ((False, False), (True, True), (True, False))
    ]
    assert lines[0]["drop_rate"] == 0 < lines[3]["drop_rate"]
    assert lines[0]["steps"] == lines[0]["step"] == 3
    assert lines[0]["tokens"] == 3 * 4 * 64
    assert lines[0]["validation"]["prose"]["loss"] != lines[4]["validation"]["prose"]["loss"]
    assert len({line["validation"]["code"]["loss"] for line in lines}) == len(lines)

    table = (folder / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| router", "| ---", *(f"| {label}" for label in labels)]
    assert rows[0].split(" | ")[1:4] == ["prose", "code", "vs top_k"]
    assert [row.split(" | ")[-2] for row in rows[2:]] == ["yes", "no", "evaluation", "yes"]
    assert r"\* not comparable" in table
    assert image.imread(folder / "ablation.png").std() > 0.05

    text = capsys.readouterr().out
    assert "[1/8] top_k, seed 0: prose " in text
    for words in (*labels, "mean ± half the range over 2 seeds", "* not comparable", f"table: {folder / 'table.md'}"):
        assert words in text
    runs = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert runs == sorted(f"{label}-seed{seed}" for label in labels for seed in (0, 1))
    assert not list(folder.glob("*/checkpoints"))
    assert not list(folder.glob("*/run.png"))


def test_load_and_experts_per_token_are_of_all_tokens_that_are_scored(ablate, monkeypatch):
    """Of 5 sequences of each set, which are two batches; a router that chooses how many experts a token has."""
    counts, record = [], ablation_runs.record

    def counted(run, console, **given):
        for each in run.corpus.validation:
            batches = read_set(each, run.settings.data, run.model.config, batch_size=4, tokens=320)
            device, precision = run.world.device, run.settings.optimizer.precision
            parts = [split_ids(batch.batch.ids.to(device)) for batch in batches]
            scoring = evaluate.evaluating(run.model, run.evaluation_recipe)
            with torch.no_grad(), scoring, autocast(precision, device):
                layers = [run.model(inputs, token_mask=mask).layers for inputs, _, mask in parts]
            chosen = [torch.stack([tokens_per_expert(one.routing.expert_indices, 8) for one in of]) for of in layers]
            assert len(chosen) == 2
            counts.append(torch.stack(chosen).sum(0).cpu())
        record(run, console, **given)

    monkeypatch.setattr(ablation_runs, "record", counted)
    folder = ablate("--routers", "relu", "--seeds", "1", rest=("--val-num-samples", "320", "--moe-freq", "1"))
    prose, code = counts  # (MoE layers, E) each
    assert not torch.equal(prose, code)
    [line] = read_metrics(folder / "results.jsonl")
    assert line["experts_per_token"] == (prose + code).sum().item() / (2 * 320 * len(prose))
    assert [layer["tokens"] for layer in line["validation"]["code"]["layers"]] == [320] * len(code)
    expected = (prose + code) / (prose + code).sum(1, keepdim=True)
    torch.testing.assert_close(torch.tensor(loads(line)), expected)


def test_what_another_process_finished_before_the_folder_was_free_is_not_done_again(ablate, monkeypatch):
    folder = ablate("--routers", "top_k", "--seeds", "1")
    results, claimed = folder / "top_k-seed0" / "results.json", ablation_runs.claimed
    text = results.read_text()
    results.unlink()

    @contextmanager
    def late(*given):
        with claimed(*given) as own:
            results.write_text(text)
            yield own

    kept = results.parent / "checkpoints" / "step_00000001"
    kept.mkdir(parents=True)
    monkeypatch.setattr(ablation_runs, "claimed", late)
    monkeypatch.setattr(ablation_runs, "train", lambda *args, **options: pytest.fail("it was trained again"))
    ablate("--routers", "top_k", "--seeds", "1")
    assert results.read_text() == text
    assert kept.exists()  # the other process was told to


def test_what_is_done_is_not_done_again(ablate, monkeypatch):
    folder = ablate("--routers", "top_k", "--seeds", "1")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"}
    monkeypatch.setattr(ablation_runs, "train", lambda *args, **options: pytest.fail("it was trained again"))
    ablate("--routers", "top_k", "--seeds", "1")
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        ablate("--routers", "top_k", "--seeds", "2")


def test_a_line_that_was_lost_comes_back(ablate):
    folder = ablate("--routers", "top_k,switch", "--seeds", "1")
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text(lines[0])
    ablate("--routers", "top_k,switch", "--seeds", "1")
    assert (folder / "results.jsonl").read_text() == "".join(lines)


def test_a_run_whose_folder_was_removed_leaves_no_line(ablate, capsys):
    """As after a change of a router's code: its folder is removed, and the run is done again."""
    folder = ablate("--routers", "top_k,switch", "--seeds", "1")
    path = folder / "results.jsonl"
    top_k, _ = path.read_text().splitlines(keepends=True)
    shutil.rmtree(folder / "switch-seed0")
    capsys.readouterr()
    ablate("--routers", "top_k", "--seeds", "1")
    assert path.read_text() == top_k
    assert f"{path}: 1 of its lines went with the folders of their runs\n" in capsys.readouterr().out
    old = json.loads(top_k) | {"seconds": 1e6}
    path.write_text(json.dumps(old) + "\n")  # another process has done it again meanwhile
    ablate("--routers", "top_k", "--seeds", "1")
    assert path.read_text() == top_k
    assert "of its lines went" not in capsys.readouterr().out


def test_experts_per_token_are_networks_and_simple_experts_are_not_dead(ablate, recipe_file):
    recipe_file.write_text(NULL)
    folder = ablate("--recipe", f"{recipe_file}:half_null", "--routers", "top_k", "--seeds", "1")
    top_k, half = read_metrics(folder / "results.jsonl")
    assert (top_k["experts_per_token"], half["experts_per_token"]) == (2.0, 1.0)
    for each in half["validation"].values():
        for layer in each["layers"]:
            assert layer["load"][8:] == [0.5, 0.0, 0.0, 0.0]  # the copy and the constants have no token
            assert (layer["simple_experts"], layer["assignments"]) == (4, 2 * layer["tokens"])
            assert layer["dead_experts"] == layer["load"][:8].count(0.0)
    [row] = [row for row in (folder / "table.md").read_text().splitlines() if row.startswith("| recipe-half_null")]
    assert row.split(" | ")[4] == "1.00"


@pytest.mark.parametrize(("every", "steps"), [(2, [2, 3]), (9, [3])])
def test_the_drop_rate_is_the_mean_of_the_steps_that_were_logged(ablate, recipe_file, every, steps):
    words = ("--recipe", f"{recipe_file}:tight", "--routers", "top_k", "--seeds", "1")
    folder = ablate(*words, rest=("--log-every-n-steps", str(every)))
    logged = read_metrics(folder / "recipe-tight-seed0" / "metrics.jsonl")
    assert [line["step"] for line in logged] == steps
    rates = [layer["drop_rate"] for line in logged for layer in line["layers"]]
    assert read_metrics(folder / "results.jsonl")[-1]["drop_rate"] == pytest.approx(sum(rates) / len(rates), rel=1e-12)
    assert "the mean of the steps that were logged" in (folder / "table.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(ablate, interrupt_after, capsys, number):
    words = ("--routers", "noisy_top_k,sigmoid_bias", "--seeds", "1", "--keep-checkpoints")
    unbroken = ablate(*words, folder="unbroken")
    capsys.readouterr()
    interrupt_after(2, number)
    with pytest.raises(SystemExit) as ended:
        ablate(*words, folder="broken")
    assert ended.value.code == 128 + number
    folder = unbroken.with_name("broken")
    text = capsys.readouterr().out
    assert "stopped; go on with:\n  python examples/ablate_routers.py --steps 3 --folder " in text
    assert "--routers noisy_top_k,sigmoid_bias --seeds 1" in text
    assert not (folder / "noisy_top_k-seed0" / "results.json").exists()
    assert not (folder / "sigmoid_bias-seed0").exists()
    ablate(*words, folder="broken")
    for name in ("noisy_top_k-seed0", "sigmoid_bias-seed0"):
        assert numbers(folder / name) == numbers(unbroken / name)
        found, expected = (json.loads((each / name / "results.json").read_text()) for each in (folder, unbroken))
        assert found["validation"] == expected["validation"]


def test_a_signal_between_two_runs_stops_there(ablate, monkeypatch, capsys, tmp_path):
    record = ablation_runs.record

    def interrupted(run, console, **given):
        signal.raise_signal(signal.SIGTERM)
        record(run, console, **given)

    monkeypatch.setattr(ablation_runs, "record", interrupted)
    with pytest.raises(SystemExit) as ended:
        ablate("--routers", "top_k,switch", "--seeds", "1")
    assert ended.value.code == 128 + signal.SIGTERM
    folder = tmp_path / "a"
    assert [line["router"] for line in read_metrics(folder / "results.jsonl")] == ["top_k"]
    assert "stopped; go on with:" in capsys.readouterr().out
    assert "top_k" in (folder / "table.md").read_text()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # the process is about to end


@pytest.mark.parametrize(("seeds", "stopped_by"), [(1, None), (2, "SIGTERM")])
def test_a_signal_while_the_last_run_ends_stops_nothing(tmp_path, monkeypatch, seeds, stopped_by):
    monkeypatch.setattr(ablation, "attempt", lambda job, **_: {"failed": "no such luck", "seed": job.seed})
    jobs = make_jobs({"top_k": "router:top_k"}, seeds=seeds, settings=TrainSettings(), folder=tmp_path)
    stop = StopRequest()
    stop.name = "SIGTERM"
    outcome = ablation._do_all(AblationSettings(folder=tmp_path), jobs, Console(quiet=True), stop)
    assert outcome == ablation.Outcome((), stopped_by)
    assert [line["seed"] for line in read_metrics(tmp_path / "results.jsonl")] == [0]


@pytest.mark.parametrize(("ends_process", "stopped_by"), [(True, "SIGTERM"), (True, None), (False, "SIGTERM")])
def test_sigterm_is_heeded_again_unless_the_process_ends(tmp_path, monkeypatch, ends_process, stopped_by):
    monkeypatch.setattr(ablation, "_do_all", lambda *_: ablation.Outcome((), stopped_by))
    monkeypatch.setattr(ablation, "check_data", lambda *_: None)
    settings = AblationSettings(routers="top_k", folder=tmp_path / "a")
    jobs = make_jobs({"top_k": "router:top_k"}, seeds=1, settings=TrainSettings(), folder=settings.folder)
    before = signal.getsignal(signal.SIGTERM)
    ablation.ablate(settings, jobs, Console(quiet=True), ends_process=ends_process)
    ends = ends_process and stopped_by is not None
    assert signal.getsignal(signal.SIGTERM) == (signal.SIG_IGN if ends else before)


def test_a_run_whose_loss_is_not_finite_has_a_row_and_the_others_go_on(ablate, capsys, monkeypatch):
    folder = ablate("--routers", "top_k,switch", "--seeds", "1", rest=("--lr", "1e30", "--warmup", "0"))
    lines = read_metrics(folder / "results.jsonl")
    assert [line["failed"] for line in lines] == [lines[0]["failed"]] * 2
    assert "is not finite at step" in lines[0]["failed"]
    assert "| switch | - |" in (folder / "table.md").read_text().replace("| - | - |", "| - |")
    assert "collapsed: not finite" in capsys.readouterr().out
    monkeypatch.setattr(ablation_runs, "train", lambda *args, **options: pytest.fail("it was trained again"))
    ablate("--routers", "top_k,switch", "--seeds", "1", rest=("--lr", "1e30", "--warmup", "0"))


@pytest.fixture
def validation_loss(monkeypatch):
    """Let every sequence of validation have a given loss, nats per token."""
    sums = evaluate._sequence_sums

    def let(loss):
        def replaced(*arguments):
            found = sums(*arguments)
            return torch.stack([loss * found[:, 1], *found[:, 1:].unbind(1)], dim=1)

        monkeypatch.setattr(evaluate, "_sequence_sums", replaced)

    return let


def test_a_validation_loss_that_is_not_finite_fails_its_run_and_the_others_go_on(ablate, validation_loss, capsys):
    validation_loss(math.nan)
    lines = read_metrics(ablate("--routers", "top_k,switch", "--seeds", "1") / "results.jsonl")
    assert [line["router"] for line in lines] == ["top_k", "switch"]
    for line in lines:
        assert line["failed"].startswith("the validation loss is nan, expected a finite number")
    assert "collapsed: not finite" in capsys.readouterr().out


def test_a_validation_loss_whose_exponential_is_no_float_has_a_row(ablate, validation_loss, capsys):
    validation_loss(777.0)
    folder = ablate("--routers", "top_k,switch", "--seeds", "1")
    for path in (folder / "results.jsonl", folder / "switch-seed0" / "results.json"):
        assert "Infinity" not in path.read_text()
    lines = read_metrics(folder / "results.jsonl")
    assert [line["validation"]["prose"]["perplexity"] for line in lines] == [None, None]
    assert "| switch | 777.000 |" in (folder / "table.md").read_text()
    assert "collapsed: unigram" in capsys.readouterr().out


def test_checkpoints_are_kept_on_request(ablate):
    folder = ablate("--routers", "top_k", "--seeds", "1", "--keep-checkpoints")
    assert [path.name for path in (folder / "top_k-seed0" / "checkpoints").glob("step_*")] == ["step_00000003"]


def test_checkpoints_go_when_a_run_is_done_and_not_when_it_was_stopped(tmp_path, monkeypatch):
    """What a stopped run goes on from is the checkpoint that it leaves."""
    [job] = make_jobs({"top_k": "router:top_k"}, seeds=1, settings=TrainSettings(), folder=tmp_path)
    (job.folder / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(ablation_runs, "train", lambda *_, **__: None)
    assert not ablation_runs.do(job, keep_checkpoints=False)
    assert (job.folder / "checkpoints").is_dir()
    monkeypatch.setattr(ablation_runs, "train", lambda *_, **__: job.results.touch())
    assert ablation_runs.do(job, keep_checkpoints=False)
    assert not (job.folder / "checkpoints").exists()


def test_a_folder_of_an_older_version_goes_on_and_one_of_another_is_told(ablate):
    """A setting that its file lacks is one that came later, with the default that its runs had."""
    path = ablate("--routers", "top_k", "--seeds", "1") / "settings.json"
    written = json.loads(path.read_text())
    older = {name: value for name, value in written.items() if name != "moe_keep"}
    path.write_text(json.dumps(older))
    ablate("--routers", "top_k", "--seeds", "1")
    with pytest.raises(SystemExit, match=r"holds runs with --moe-keep preactivation \(now inputs\); rows of"):
        ablate("--routers", "top_k", "--seeds", "1", rest=("--moe-keep", "inputs"))
    path.write_text(json.dumps(written | {"moe_flavour": "sweet"}))
    with pytest.raises(
        SystemExit, match=r"a/settings\.json holds moe_flavour, which this version .* another version\. Go on with that"
    ):
        ablate("--routers", "top_k", "--seeds", "1")


def test_a_folder_has_one_kind_of_settings(ablate, tmp_path):
    folder = ablate("--routers", "top_k", "--seeds", "1")
    with pytest.raises(
        SystemExit, match=r"holds runs with --lr 0.005 \(now 0.1\), --steps 3 \(now 4\).*choose another --folder"
    ):
        ablate("--routers", "top_k", "--steps", "4", rest=("--lr", "0.1"))
    assert len(read_metrics(folder / "results.jsonl")) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").touch()
    with pytest.raises(SystemExit, match=r"other holds something that is no ablation; choose another --folder"):
        ablate("--routers", "top_k", folder="other")


@pytest.mark.parametrize(
    ("words", "rest", "message"),
    [
        (("--routers", "topk"), (), r"--routers: unknown router 'topk'; did you mean 'top_k'.*Known: .*switch"),
        (("--routers", "mixtral"), (), r"unknown router 'mixtral'.*It is a recipe: give --recipe mixtral\."),
        (("--routers", "top_k,top_k"), (), r"top_k was given twice; expected each name once"),
        (("--steps", "0"), (), r"--steps is 0; expected at least 1"),
        (("--seeds", "0"), (), r"--seeds is 0; expected at least 1"),
        ((), ("--seed", "3"), r"--seed was given after `--`, but the ablation sets it.*before the `--`: --steps"),
        ((), ("--world_size=3",), r"--world_size=3 was given after `--`"),
        ((), ("--moe-freq", "0"), r"--moe-freq 0 makes a dense model, which has no router"),
        (("--routers", "top_k,group_limited"), ("--moe-num-experts", "6"), r"group_limited: .*num_groups = 4"),
        (("--routers", "switch"), ("--moe-top-k", "2"), r"switch: recipe router:switch takes no k"),
        (("--recipe", "mixtrel"), (), r"unknown recipe 'mixtrel'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_the_first_run(ablate, tmp_path, words, rest, message):
    with pytest.raises(SystemExit, match=message):
        ablate(*words, rest=rest)
    assert not (tmp_path / "a").exists()


def test_flags_that_the_models_file_overrides_are_named(ablate, tmp_path, capsys, monkeypatch):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({**read_config("moekit_tiny"), "moe_num_experts": 4}))
    monkeypatch.setattr(ablation, "ablate", lambda *arguments, **options: ablation.Outcome((), None))
    ablate("--routers", "top_k", rest=("--model", str(path), "--moe-num-experts", "16"))
    assert f"--moe-num-experts 16 has no effect: model {path} says moe_num_experts 4" in capsys.readouterr().out


def test_what_a_runs_file_derived_from_its_recipe_is_no_routers_own(tmp_path):
    path = tmp_path / "config.json"
    values = {"recipe": "mixtral", "moe_loss_weight": 0.02, "moe_top_k": 2, "lr": 0.01}
    path.write_text(json.dumps({**values, "derived": ["moe_loss_weight", "moe_top_k"]}))
    model = plan(AblationSettings(routers="switch"), ["--config", str(path)])[0].settings.model
    assert (model.recipe, model.moe_loss_weight, model.moe_top_k) == ("router:switch", None, None)
    path.write_text(json.dumps(values | {"moe_top_k": None, "derived": []}))
    assert plan(AblationSettings(routers="top_k"), ["--config", str(path)])[0].settings.model.moe_loss_weight == 0.02


def test_a_fault_in_a_users_file_is_told_as_such(ablate, recipe_file):
    with pytest.raises(SystemExit, match=r"ablate_routers.py: recipe .*own.py raised RuntimeError: no such luck"):
        ablate("--recipe", f"{recipe_file}:broken")


def test_a_recipe_is_compared_with_the_baseline_unless_routers_are_named(recipe_file):
    own = f"{recipe_file}:mine"
    assert labelled(AblationSettings(recipe=(own,))) == {"top_k": "router:top_k", "recipe-mine": own}
    named = labelled(AblationSettings(routers="switch, relu", recipe=("switch",)))
    assert named == {"switch": "router:switch", "relu": "router:relu", "recipe-switch": "switch"}
    assert len(labelled(AblationSettings())) == len(ablation.ROUTERS)
    twice = tyro.cli(AblationSettings, args=["--recipe", "mixtral", "--recipe", own])
    assert list(labelled(twice)) == ["top_k", "recipe-mixtral", "recipe-mine"]
    assert len(labelled(AblationSettings(routers="all", recipe=(own,)))) == len(ablation.ROUTERS) + 1
    with pytest.raises(ValueError, match=r"recipe-mine was given twice.*Rename one of them in its file"):
        labelled(AblationSettings(recipe=(own, "other.py:mine")))


def test_every_router_fits_the_default_model():
    jobs = plan(AblationSettings(), [])
    assert len(jobs) == 2 * len(ablation.ROUTERS)
    assert {job.settings.run.seed for job in jobs} == {0, 1}
    assert {(job.settings.optimizer.steps, job.settings.model.preset) for job in jobs} == {(200, "moekit_cpu")}
    assert len({job.folder for job in jobs}) == len(jobs)


@pytest.mark.parametrize(
    ("flags", "scored", "known"),
    [
        ((), 6, 6),  # of a whole set it is the entropy
        (("--val-num-samples", "64"), 1, 6),  # few tokens are scored by what is known of the set
        (("--val-num-samples", "160"), 3, 3),  # of which they are always a part, here of at least 128 tokens
    ],
)
def test_the_bound_without_context_is_of_the_tokens_that_are_scored(program, monkeypatch, flags, scored, known):
    checked, read, read_set = [], [], ablation_runs.read_set
    monkeypatch.setattr(ablation_runs, "_UNIGRAM_TOKENS", 10_000 if known == 6 else 128)
    monkeypatch.setattr(ablation_runs, "read_set", lambda *given, **rest: read.append(0) or read_set(*given, **rest))
    monkeypatch.setattr(ablation_runs, "audit", lambda recipe, experts: Causality())

    def look(run, console, **given):
        ablation_runs.record(run, console, **given)
        results = json.loads((run.folder / "results.json").read_text())["validation"]
        assert len(read) == (4 if known > scored else 2)  # two sets, each read once where nothing more is known of it
        for each in run.corpus.validation:
            ids = torch.cat([batch.batch.ids for batch in ablation_runs._batches(run, each, None)])
            ids = ids[ids[:, 0] >= 0]
            assert (len(ids), results[each.name]["tokens"]) == (6, 64 * scored)
            once, ever = (ids[:rows, 1:].flatten().tolist() for rows in (scored, known))
            expected = sum(-math.log(ever.count(token) / len(ever)) for token in once) / len(once)
            assert results[each.name]["unigram"] == pytest.approx(expected, rel=1e-12)
            checked.append(each.name)

    monkeypatch.setattr("moekit.recipes.train.finish", look)
    program("--steps", "1", *flags)
    assert checked == ["prose", "code"]


def test_a_token_that_is_not_known_is_expected_by_no_prediction(program, monkeypatch):
    found = []

    def look(run, console, **_):
        batches = [list(ablation_runs._batches(run, each, None)) for each in run.corpus.validation]
        found.append(ablation_runs.unigram_loss(*batches, 512))  # one set by another's tokens

    monkeypatch.setattr("moekit.recipes.train.finish", look)
    program("--steps", "1")
    assert found == [math.inf]


def test_train_does_what_it_is_told_after_the_last_step(shards, tmp_path):
    from small_runs import words

    from moekit.recipes.configuration import parse_settings
    from moekit.recipes.train import train

    seen = []
    settings = parse_settings(words(shards, tmp_path, "--steps", "2"))
    folder = train(settings, Console(quiet=True), finishing=lambda run, console, **given: seen.append(given))
    assert seen[0]["progress"].seconds >= seen[0]["trained"].seconds > 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "params.txt",
    ]


def test_the_page_lists_every_router_with_its_docstring_and_its_example_runs(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "ablations.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, flags=re.MULTILINE))
    assert rows == {name: (make.__doc__ or "").partition("\n")[0] for name, make in ablation.ROUTERS.items()}
    [code] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "half.py").write_text(code)
    recipe = find_recipe(f"{tmp_path / 'half.py'}:half")
    routing = recipe.route(torch.tensor([[0.0, 3.0, 0.0], [0.1, 0.0, 0.0]]))
    assert routing.expert_indices.tolist() == [[1, -1], [0, -1]]
