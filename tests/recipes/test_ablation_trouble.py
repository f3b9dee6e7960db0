"""What goes wrong in an ablation: recipes that raise, folders of another recipe, and signals."""

import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from moekit.lm import folder_locks
from moekit.lm.folder_locks import FolderLock
from moekit.lm.trackers import read_metrics
from moekit.recipes import ablation, ablation_failures, ablation_runs, train
from moekit.recipes.ablation import main
from moekit.recipes.ablation_recipes import located, other_recipe, same_recipe
from moekit.routing import Causality

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick")
OTHER = r"holds a run of --recipe .*/r\.py:half, and now it is --recipe .*/s\.py:half"
GOOD = """
from moekit.recipes import mixtral


def half():
    return mixtral(k=1)
"""
BROKEN = """
import torch

from moekit.recipes import mixtral


def _raising(make, *, grad):
    recipe = mixtral()

    def route(logits, *, bias=None):
        if logits.shape[0] > 200 and torch.is_grad_enabled() is grad:
            raise make("no such luck")
        return recipe.route(logits, bias=bias)

    return recipe._replace(route=route)


def step():
    return _raising(ValueError, grad=True)


def validation():
    return _raising(KeyError, grad=False)


def exits():
    return _raising(SystemExit, grad=True)
"""


@pytest.fixture
def flags(shards) -> list[str]:
    return ["--model", "moekit_tiny", "--batch-size", "4", "--precision", "fp32", *shards.flags]


@pytest.fixture
def ablate(flags, tmp_path, monkeypatch) -> Callable[..., Path]:
    """Run the program on small shards, in a folder of its own, and return its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "180")
    monkeypatch.setattr("moekit.recipes.train.audit", lambda recipe, experts: Causality())
    monkeypatch.setattr(ablation_runs, "audit", lambda recipe, experts: Causality())

    def run(*words: str, rest: tuple[str, ...] = (), folder: str = "F") -> Path:
        main(["--steps", "2", "--seeds", "1", "--folder", folder, *words, "--", *flags, *rest])
        return tmp_path / folder

    return run


@pytest.fixture
def files(tmp_path) -> Path:
    for name, text in (("r.py", GOOD), ("s.py", GOOD.replace("k=1", "k=3")), ("broken.py", BROKEN)):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_results_of_one_file_are_not_reported_as_anothers(ablate, files):
    folder = ablate("--recipe", "r.py:half")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    message = (
        r"F/recipe-half-seed0 holds a run of --recipe .*/r\.py:half, and now it is --recipe .*/s\.py:half; .*Choose"
    )
    with pytest.raises(SystemExit, match=message + r" another --folder, or remove F/recipe-half-seed0"):
        ablate("--recipe", "s.py:half")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    shutil.rmtree(folder / "recipe-half-seed0")
    ablate("--recipe", "s.py:half")
    assert [line["experts_per_token"] for line in read_metrics(folder / "results.jsonl")] == [2.0, 3.0]


def test_a_half_done_run_does_not_go_on_with_another_file(ablate, files, interrupt_after, monkeypatch):
    ablate("--routers", "top_k")
    interrupt_after(1)
    with pytest.raises(SystemExit) as ended:
        ablate("--recipe", "r.py:half")
    assert ended.value.code == 128 + signal.SIGINT
    run = files / "F/recipe-half-seed0"
    assert list(run.glob("checkpoints/step_*"))
    monkeypatch.setattr(ablation_runs, "train", lambda *args, **options: pytest.fail("it went on"))
    with pytest.raises(SystemExit, match=OTHER):
        ablate("--recipe", "s.py:half")
    with pytest.raises(pytest.fail.Exception, match="it went on"):
        ablate("--recipe", "r.py:half")


def test_another_process_may_have_put_a_run_of_another_file_there_meanwhile(ablate, files, monkeypatch, capsys):
    do = ablation_failures.do

    def meanwhile(job, **options):
        other = files / "F/recipe-half-seed0"
        other.mkdir()
        (other / "config.json").write_text(json.dumps({"recipe": str(files / "s.py:half")}))
        (other / "results.json").write_text("{}")
        return do(job, **options)

    monkeypatch.setattr(ablation_failures, "do", meanwhile)
    with pytest.raises(SystemExit, match=r"1 of 2 runs failed.*\n  recipe-half, seed 0: .* holds a run of --recipe"):
        ablate("--recipe", "r.py:half")
    assert [line["router"] for line in read_metrics(files / "F/results.jsonl")] == ["top_k"]
    assert not (files / "F/recipe-half-seed0/error.txt").exists()


def test_the_same_file_by_another_path_is_the_same_recipe(ablate, files, monkeypatch):
    folder = ablate("--recipe", "r.py:half")
    lines = (folder / "results.jsonl").read_text()
    config = json.loads((folder / "recipe-half-seed0/config.json").read_text())
    monkeypatch.setattr(ablation_runs, "train", lambda *args, **options: pytest.fail("it was trained again"))
    (files / "link.py").symlink_to("r.py")
    for given in ("./r.py:half", f"{files}/r.py:half", f"../{files.name}/r.py:half", "link.py:half"):
        ablate("--recipe", given)
    assert (folder / "results.jsonl").read_text() == lines
    # Older versions wrote the path as it was typed.
    (folder / "recipe-half-seed0/config.json").write_text(json.dumps({**config, "recipe": "r.py:half"}))
    for given in ("r.py:half", f"{files}/r.py:half"):
        ablate("--recipe", given)
    (files / "below").mkdir()
    monkeypatch.chdir(files / "below")
    assert other_recipe(folder / "recipe-half-seed0", "../r.py:half") is None
    assert other_recipe(folder / "recipe-half-seed0", "../s.py:half") is not None


def test_which_recipes_are_the_same(files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "sub").mkdir()
    shutil.copy("r.py", "sub/r.py")
    assert same_recipe("mixtral", "mixtral")
    assert same_recipe("router:top_k", "router:top_k")
    assert not same_recipe("mixtral", located("r.py:mixtral"))
    assert not same_recipe("r.py:half", located("sub/r.py:half"))
    assert not same_recipe(located("sub/r.py:half"), located("r.py:half"))
    assert not same_recipe("r.py:half", located("r.py:other"))
    assert same_recipe("/elsewhere/r.py:half", located("r.py:half"))  # moved, or another machine's
    assert not same_recipe("/elsewhere/s.py:half", located("r.py:half"))


def test_a_run_folder_without_a_word_of_its_recipe_is_taken_and_a_damaged_one_is_named(tmp_path):
    assert other_recipe(tmp_path, "mixtral") is None
    for text in ("{}", "[]"):
        (tmp_path / "config.json").write_text(text)
        assert other_recipe(tmp_path, "mixtral") is None
    for damaged in ("{", "[" * 99_999):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"config\.json is damaged .*; expected the settings of a run\. Remove "):
            other_recipe(tmp_path, "mixtral")


@pytest.mark.parametrize(
    ("kind", "error", "told"),
    [
        ("step", "ValueError", r"recipe '.*broken\.py:step': .* raised ValueError: no such luck \(line \d+\)\. Mend"),
        (
            "validation",
            "KeyError",
            r"recipe '.*broken\.py:validation': .* raised KeyError: 'no such luck' \(line \d+\)",
        ),
        ("exits", "SystemExit", r"SystemExit: no such luck"),
    ],
)
def test_a_recipe_that_raises_does_not_end_the_others(ablate, files, capsys, kind, error, told):
    own = f"recipe-{kind}"
    message = rf"^ablate_routers\.py: 1 of 3 runs failed; the same command tries them again\n  {own}, seed 0: {told}"
    with pytest.raises(SystemExit, match=message) as ended:
        ablate("--routers", "top_k", "--recipe", f"broken.py:{kind}", "--recipe", "r.py:half")
    folder = files / "F"
    assert f"traceback: F/{own}-seed0/error.txt" in ended.value.code
    assert "in route\n" in (folder / f"{own}-seed0/error.txt").read_text()
    assert [line["router"] for line in read_metrics(folder / "results.jsonl")] == ["top_k", "recipe-half"]
    rows = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| top_k", f"| {own}", "| recipe-half"]
    assert rows[3].endswith(f"| failed: {error} |")
    assert (folder / "ablation.png").exists()
    text = capsys.readouterr().out
    assert f"[2/3] {own}, seed 0: " in text
    assert "failed: an error ended a run" in text


def test_a_run_that_failed_is_tried_again(ablate, files, monkeypatch):
    words = ("--routers", "top_k", "--recipe", "broken.py:step")
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        ablate(*words)
    (files / "broken.py").write_text(GOOD.replace("half", "step"))
    folder = ablate(*words)
    assert [line["router"] for line in read_metrics(folder / "results.jsonl")] == ["top_k", "recipe-step"]
    assert "failed" not in (folder / "table.md").read_text()
    assert not (folder / "recipe-step-seed0/error.txt").exists()


def test_runs_that_fail_alike_are_told_together(ablate, files):
    with pytest.raises(SystemExit, match=r"2 of 4 runs failed.*\n  recipe-step, seed 0; recipe-step, seed 1: recipe "):
        ablate("--recipe", "broken.py:step", "--seeds", "2")


def test_a_run_that_failed_keeps_neither_model_nor_data(ablate, files, monkeypatch):
    runs, alive, do, set_up = [], [], ablation_failures.do, train.set_up

    def remembered(*arguments, **options):
        run = set_up(*arguments, **options)
        runs.append(weakref.ref(run.model))
        return run

    def count(job, **options):
        gc.collect()
        alive.append([run() is not None for run in runs])
        return do(job, **options)

    monkeypatch.setattr(train, "set_up", remembered)
    monkeypatch.setattr(ablation_failures, "do", count)
    with pytest.raises(SystemExit, match="1 of 3 runs failed"):
        ablate("--routers", "top_k", "--recipe", "broken.py:step", "--recipe", "r.py:half")
    assert alive == [[], [False], [False, False]]


def rows_of(folder):
    """Return the first cell of the table's rows, and the heading of the differences."""
    heading, _, *rows = [
        line.split(" | ") for line in (folder / "table.md").read_text().splitlines() if line[:1] == "|"
    ]
    return [row[0].removeprefix("| ") for row in rows], next(each for each in heading if each.startswith("vs "))


@pytest.fixture
def held(ablate, monkeypatch):
    """Have the folder of one run as another process would have it, beside a run that is done."""
    lock = FolderLock(ablate("--routers", "relu") / "top_k-seed0", flag="--name")
    monkeypatch.setattr(folder_locks, "PATIENCE", 0.0)
    lock.take()
    yield lock
    lock.let_go()


def test_a_run_that_another_process_does_is_left_to_it_and_has_not_failed(ablate, held, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        ablate("--routers", "top_k,switch")
    head, line = ended.value.code.splitlines()
    told = "ablate_routers.py: 1 of 2 runs is left to another process; give the same command again when it has ended"
    assert head == told
    who = rf"process {os.getpid()} of \S+|another process"
    assert re.fullmatch(rf"  top_k, seed 0: F/top_k-seed0: ({who}) works in this folder", line)
    assert re.search(r"\[1/2\] top_k, seed 0: F/top_k-seed0: .* works in this folder\n", capsys.readouterr().out)
    folder = tmp_path / "F"
    assert [line["router"] for line in read_metrics(folder / "results.jsonl")] == ["relu", "switch"]
    table = (folder / "table.md").read_text()
    assert rows_of(folder) == (["switch", "relu"], "vs switch")
    assert "failed" not in table
    instead = "top_k, the first router, has no run that has ended yet: differences are from switch instead."
    assert instead in table
    assert not list((folder / "top_k-seed0").iterdir())
    held.let_go()
    ablate("--routers", "top_k,switch")
    assert [line["router"] for line in read_metrics(folder / "results.jsonl")] == ["relu", "switch", "top_k"]
    assert instead not in (folder / "table.md").read_text()


def test_a_run_that_another_process_has_done_meanwhile_is_in_the_table(ablate, held, tmp_path, monkeypatch):
    ablate("--routers", "top_k", folder="elsewhere")
    do = ablation_failures.do

    def meanwhile(job, **options):
        if job.label == "switch":
            shutil.copytree(tmp_path / "elsewhere/top_k-seed0", held.folder, dirs_exist_ok=True)
        return do(job, **options)

    monkeypatch.setattr(ablation_failures, "do", meanwhile)
    assert rows_of(ablate("--routers", "top_k,switch")) == (["top_k", "switch", "relu"], "vs top_k")


def test_a_stop_wins_over_a_run_of_another_process_and_both_are_told(ablate, held, monkeypatch, capsys):
    do = ablation_failures.do

    def interrupted(job, **options):
        signal.raise_signal(signal.SIGTERM)
        return do(job, **options)

    monkeypatch.setattr(ablation_failures, "do", interrupted)
    with pytest.raises(SystemExit) as ended:
        ablate("--routers", "top_k")
    assert ended.value.code == 128 + signal.SIGTERM
    assert "1 of 1 runs is left to another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (("--val-manifest", "nowhere.jsonl", "gone.jsonl"), r"nowhere\.jsonl"),
        (("--no-multiple-data-passes", "--batch-size", "4000"), r"--multiple-data-passes"),
        (("--val-manifest",), r"there are no validation data, and routers are compared by .* --val-manifest for each"),
    ],
)
def test_data_that_no_run_can_take_are_refused_before_the_first(ablate, files, rest, message):
    with pytest.raises(SystemExit, match=message) as ended:
        ablate("--routers", "top_k,switch", rest=rest)
    assert "runs failed" not in ended.value.code
    assert not (files / "F").exists()


def test_damaged_files_of_an_ablation_are_named(ablate, files):
    folder = ablate("--routers", "top_k")
    for content in ("{", "[]", "{}"):
        (folder / "top_k-seed0/results.json").write_text(content)
        with pytest.raises(
            SystemExit, match=r"F/top_k-seed0/results\.json is damaged, expected .*; delete it, and the"
        ):
            ablate("--routers", "top_k")
    for content in ("{", "[]"):
        (folder / "settings.json").write_text(content)
        with pytest.raises(SystemExit, match=r"F/settings\.json is damaged.* put a whole one back, or choose another"):
            ablate("--routers", "top_k")


EDITS = [
    lambda results: {"validation": {}},
    lambda results: without(results, "leaks"),
    lambda results: without(results, "seconds"),
    lambda results: results | {"nonfinite": ["loss"]},
    lambda results: results | {"drop_rate": None},
    lambda results: of_prose(results, without(results["validation"]["prose"], "unigram")),
    lambda results: of_prose(results, results["validation"]["prose"] | {"loss": None}),
    lambda results: of_prose(results, results["validation"]["prose"] | {"layers": []}),
    lambda results: of_prose(results, None),
]


def without(results, name):
    return {key: value for key, value in results.items() if key != name}


def of_prose(results, scores):
    return results | {"validation": results["validation"] | {"prose": scores}}


def test_results_that_lack_what_a_table_needs_fail_their_run_alone(ablate, files, monkeypatch):
    monkeypatch.setattr("moekit.recipes.ablation_summaries.dead_experts", lambda line: 0)  # of too few tokens
    folder = ablate("--routers", "top_k,switch")
    path = folder / "switch-seed0/results.json"
    whole = json.loads(path.read_text())
    for edit in EDITS:
        path.write_text(json.dumps(edit(whole)))
        with pytest.raises(
            SystemExit, match=r"1 of 2 runs failed.*(\n.*)*switch-seed0/results\.json is damaged, expec"
        ):
            ablate("--routers", "top_k,switch")
        assert re.search(
            r"\| top_k \| \d.*\n\| switch \| - .*\| failed: ValueError \|", (folder / "table.md").read_text()
        )


def test_a_run_that_was_scored_on_other_sets_fails_alone(ablate, files):
    path = ablate("--routers", "top_k,switch") / "switch-seed0/results.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"validation": {"prose": whole["validation"]["prose"]}}))
    told = r"1 of 3 runs failed(.*\n)*.*switch-seed0/results\.json has scores of prose; expected code, prose, as most"
    with pytest.raises(SystemExit, match=told):
        ablate("--routers", "top_k,switch,relu")
    table = (path.parent.parent / "table.md").read_text()
    assert re.search(r"\| top_k \| \d\S* \| \d.*\n\| switch \| - \| - \| .*\| failed: ValueError \|", table)


def test_a_table_has_the_runs_of_other_launches_after_those_that_were_asked_for(ablate, files):
    folder = ablate("--routers", "switch,top_k")
    assert rows_of(folder) == (["switch", "top_k"], "vs switch")
    ablate("--routers", "relu", "--recipe", "r.py:half", "--seeds", "2")
    assert rows_of(folder) == (["relu", "recipe-half", "top_k", "switch"], "vs relu")
    ablate("--routers", "top_k,switch")
    whole = (folder / "table.md").read_text()
    assert rows_of(folder) == (["top_k", "switch", "relu", "recipe-half"], "vs top_k")
    assert re.search(r"\| top_k \| \S+ \(1 of 2\) .*\n\| switch \| \S+ \(1 of 2\) .*\n\| relu \| \S+ ± \S+ \|", whole)
    (folder / "expert_choice-seed0").mkdir()  # not done
    (folder / "expert_choice-seedling").mkdir()
    shutil.copy(folder / "top_k-seed0/results.json", folder / "expert_choice-seedling")
    ablate("--routers", "top_k,switch")
    assert (folder / "table.md").read_text() == whole


def test_runs_of_other_launches_that_fit_no_table_are_left_out_and_told(ablate, files, capsys):
    folder = ablate("--routers", "top_k,switch,relu", "--recipe", "r.py:half")
    edited = {name: folder / f"{name}-seed0/results.json" for name in ("switch", "relu")}
    edited["switch"].write_text("{}")
    whole = json.loads(edited["relu"].read_text())
    edited["relu"].write_text(json.dumps(whole | {"validation": {"prose": whole["validation"]["prose"]}}))
    (folder / "recipe-half-seed0").rename(folder / "recipe-half-seed1")
    capsys.readouterr()
    ablate("--routers", "top_k", "--recipe", "s.py:half")
    said = capsys.readouterr().out
    left_out = [line for line in said.splitlines() if line.startswith("not in the table: ")]
    expected = (
        "recipe-half-seed1 holds a run of --recipe",
        "relu-seed0/results.json has scores of prose; expected code, prose",
        "switch-seed0/results.json is damaged",
    )
    assert [words in line for words, line in zip(expected, left_out, strict=True)] == [True] * 3
    assert rows_of(folder) == (["top_k", "recipe-half"], "vs top_k")
    assert not list(folder.glob("*/error.txt"))


def test_a_table_is_printed_also_where_table_or_picture_cannot_be_written(ablate, files, monkeypatch, capsys):
    def broken(path, rows):
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr(ablation, "draw", broken)
    folder = ablate("--routers", "top_k")
    said = capsys.readouterr().out
    assert said.endswith("table: F/table.md\npicture: none: numpy.core.multiarray failed to import\n")
    (folder / "table.md").unlink()
    (folder / "table.md").mkdir()
    with pytest.raises(SystemExit, match=r"Is a directory.*F/table\.md"):
        ablate("--routers", "top_k")
    assert "│ top_k " in capsys.readouterr().out


def test_ctrl_c_before_the_first_run_ends_without_a_traceback(ablate, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "check_data", interrupted)
    with pytest.raises(SystemExit) as ended:
        ablate("--routers", "top_k")
    assert ended.value.code == 128 + signal.SIGINT
    assert ended.value.__suppress_context__
    assert capsys.readouterr().err == "ablate_routers.py: interrupted\n"


def test_damaged_results_that_a_stopped_ablation_did_not_come_to_have_a_row(ablate, files, monkeypatch, capsys):
    results = ablate("--routers", "top_k,switch") / "switch-seed0/results.json"
    results.write_text("{}")
    attempt = ablation.attempt

    def stopped(job, **options):
        signal.raise_signal(signal.SIGTERM)
        return attempt(job, **options)

    monkeypatch.setattr(ablation, "attempt", stopped)
    with pytest.raises(SystemExit) as ended:
        ablate("--routers", "top_k,switch")
    assert ended.value.code == 128 + signal.SIGTERM
    assert re.search(r"│ switch .* failed: ValueError", capsys.readouterr().out)


def test_a_stop_wins_over_a_failure_and_both_are_told(ablate, files, monkeypatch, capsys):
    do = ablation_failures.do

    def interrupted(job, **options):
        if job.label == "recipe-half":
            signal.raise_signal(signal.SIGTERM)
        return do(job, **options)

    monkeypatch.setattr(ablation_failures, "do", interrupted)
    words = ("--routers", "top_k", "--recipe", "broken.py:step", "--recipe", "r.py:half", "--recipe", "mixtral")
    with pytest.raises(SystemExit) as ended:
        ablate(*words)
    assert ended.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr()
    assert "stopped; go on with:\n" in said.out
    assert "1 of 4 runs failed" in said.err
    assert "recipe-step, seed 0: recipe " in said.err
    rows = [line.split(" | ")[0] for line in (files / "F/table.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[2:] == ["| top_k", "| recipe-step"]  # the signal came before the run's first step


def test_a_run_that_fails_while_it_is_stopped_is_not_the_end_of_a_whole_ablation(ablate, files, monkeypatch):
    def fail(job, **options):
        signal.raise_signal(signal.SIGINT)
        raise OSError("no space left")

    monkeypatch.setattr(ablation_failures, "do", fail)
    with pytest.raises(SystemExit) as ended:
        ablate("--routers", "top_k")
    assert ended.value.code == 128 + signal.SIGINT


def test_with_data_workers_ctrl_c_to_the_whole_group_ends_with_its_status(flags, tmp_path):
    number = signal.SIGINT
    words = ["--steps", "2000", "--seeds", "1", "--routers", "top_k", "--folder", "F", "--", *flags, "--workers", "2"]
    started = [sys.executable, str(ROOT / "examples/ablate_routers.py"), *words, "--log-every-n-steps", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        started,
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    metrics = tmp_path / "F/top_k-seed0/metrics.jsonl"
    for _ in range(1200):
        if process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 2):
            break
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal does
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    told = said.split("stopped; go on with:\n  ")[1].splitlines()[0]
    assert told == shlex.join(started)  # as it was started, here from another folder
    assert list((tmp_path / "F/top_k-seed0/checkpoints").glob("step_*"))
