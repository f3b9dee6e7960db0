"""What goes wrong outside a step, and resuming that would mix runs up: no work and no run is lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import numbers, words

from moekit.lm.checkpoints import checkpoint_folder, read_state
from moekit.lm.json_lines import JsonLines
from moekit.lm.shards import write_shards
from moekit.recipes import report, train
from moekit.recipes.configuration import parse_settings
from moekit.recipes.names import find_recipe
from moekit.recipes.recording import Recorder
from moekit.recipes.train import main, notes

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def broken_tar(shards, tmp_path):
    """A validation tar that is cut short."""
    content = shards.validation[0].with_name("00000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:2000])
    return str(tmp_path / "cut.tar")


@pytest.mark.parametrize("every", ["3", "100"])
def test_an_error_in_a_validation_loses_no_step(program, broken_tar, every):
    with pytest.raises(SystemExit, match=r"cut\.tar.*--on-bad-data skip"):
        program("--val-data", broken_tar, "--val-every-n-steps", every)
    logs = Path(broken_tar).parent / "logs" / "a"
    done = min(int(every), 8)
    assert [path.name for path in (logs / "checkpoints").iterdir()] == [f"step_{done:08d}"]
    folder = program("--resume", "latest")
    unbroken = {line["step"]: line["loss"] for line in numbers(program(name="b"))}
    after = {line["step"]: line["loss"] for line in numbers(folder)}
    assert set(range(done + 1, 9)) <= set(after) <= set(unbroken)  # step `done` failed to be reported
    assert after == {step: unbroken[step] for step in after}


def test_bad_data_in_the_middle_save_what_was_trained(shards, tmp_path, program):
    manifest = write_shards(tmp_path / "bad", [[5] * 65] * 20 + [[5] * 9], sequences_per_shard=5)
    flags = [
        "--dataset-manifest",
        str(manifest),
        "--train-data-mix-weights",
        "1",
        "--batch-size",
        "2",
        "--data-lanes",
        "1",
    ]
    start = words(shards, tmp_path / "logs", *flags)
    at = start.index("--val-manifest")
    start = start[:at] + start[at + 3 :]
    with pytest.raises(SystemExit, match="has 9 tokens"):
        main(start)
    [checkpoint] = (tmp_path / "logs/a/checkpoints").iterdir()
    step = read_state(checkpoint)["step"]
    assert 0 < step < 8
    main([*start, "--resume", "latest", "--on-bad-data", "skip"])
    assert [line["step"] for line in numbers(tmp_path / "logs/a")] == list(range(1, 9))


def test_a_tracker_that_fails_loses_no_step(program, tmp_path, monkeypatch):
    def fail(self, *arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(Recorder, "step", fail)
    with pytest.raises(SystemExit, match="no space left"):
        program("--log-every-n-steps", "5")
    assert checkpoint_folder(tmp_path / "logs/a", 5).exists()


class LostDashboard:
    """Takes the place of TensorBoard, and fails at the third line and when it is closed."""

    place = "logs/a/tensorboard"

    def __init__(self, *_, **__):
        self.lines = 0

    def log(self, metrics):
        self.lines += 1
        if self.lines == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    def close(self, *, failed=False):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_goes_on_without_a_dashboard_that_fails(program, monkeypatch):
    monkeypatch.setattr("moekit.lm.trackers.TensorBoard", LostDashboard)
    words = r"tensorboard, which writes to logs/a/tensorboard, failed at step 3: OSError: \[Errno 28\] No space left"
    with pytest.warns(RuntimeWarning, match=words) as warned:
        folder = program("--report-to", "tensorboard")
    told = [text for text in (str(each.message) for each in warned) if text.startswith("tensorboard")]
    assert len(told) == 1
    lines = numbers(folder)
    assert [line.pop("warnings", None) for line in lines] == [None, None, told, *[None] * 5]
    assert lines == numbers(program(name="b"))
    assert (folder / "results.json").exists()


def test_an_error_of_the_metrics_ends_a_run_with_a_dashboard_too(program, tmp_path, monkeypatch):
    log = JsonLines.log

    def fail(self, metrics):
        if metrics["step"] == 3:
            raise OSError("no space left")
        log(self, metrics)

    monkeypatch.setattr(JsonLines, "log", fail)
    with pytest.raises(SystemExit, match="no space left"):
        program("--report-to", "tensorboard")
    assert checkpoint_folder(tmp_path / "logs/a", 3).exists()


def test_a_run_ends_well_without_matplotlib_and_where_its_held_out_data_cannot_be_read_again(
    program, monkeypatch, capsys
):
    def absent(path, **options):
        raise ModuleNotFoundError("the picture of a run needs matplotlib")

    def unreachable(*arguments, **options):
        raise OSError("no answer from the store")

    monkeypatch.setattr(report, "plot_run", absent)
    monkeypatch.setattr(report, "read_set", unreachable)
    folder = program("--steps", "1", name="a[v2]:car:")
    said = capsys.readouterr().out
    assert "no bigrams and unigrams beside the scores: no answer from the store\n" in said
    ending = f"picture: none: the picture of a run needs matplotlib\ncheckpoint: {folder}/checkpoints/step_00000001\n"
    assert said.endswith(ending)
    assert "unigram" not in json.loads((folder / "results.json").read_text())["validation"]["prose"]


def test_the_line_to_go_on_with_is_whole_and_torchruns_is_named(program, interrupt_after, monkeypatch, capsys):
    interrupt_after(1)
    program(name="a[v2]:car:")
    said = capsys.readouterr().out
    hint = said[said.index("go on with:\n") :].splitlines()[1]
    assert " --name 'a[v2]:car:' --logs " in hint
    assert hint.endswith(" --resume latest")
    for name in ("recipes.commands", "recipes.train"):
        monkeypatch.setattr(f"moekit.{name}.under_torchrun", lambda: True)
    interrupt_after(1)
    with pytest.raises(SystemExit, match="1"):
        program(name="b")
    assert "go on with:\n  (the same torchrun line) --resume latest\n" in capsys.readouterr().out


def test_another_global_batch_is_refused(program):
    folder = program("--steps", "4", "--save-every-n-steps", "2")
    with pytest.raises(SystemExit, match=r"trained with 4 sequences per step .* has 8, .* give --global-batch-size 4"):
        program("--steps", "8", "--batch-size", "8", "--resume", "latest")
    assert [line["step"] for line in numbers(folder)] == [1, 2, 3, 4]


def test_a_run_is_not_written_over_by_going_on_from_another(program):
    one, two = program("--steps", "4", name="one"), program("--steps", "2", name="two")
    before = {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=r"one holds a run already; go on with it by --resume latest"):
        program("--steps", "4", "--resume", str(checkpoint_folder(two, 2)), name="one")
    assert {path: path.read_bytes() for path in one.rglob("*") if path.is_file()} == before


def test_after_going_back_the_latest_is_of_the_new_branch(program, interrupt_after, capsys):
    folder = program("--save-every-n-steps", "1")
    interrupt_after(4)
    program("--resume", str(checkpoint_folder(folder, 2)), "--lr", "3e-3")
    said = capsys.readouterr().out
    assert "abandoned_step_00000008 was set aside: the run goes back to step 2" in said
    program("--resume", "latest", "--lr", "3e-3")
    assert "step_00000004: step 4" in capsys.readouterr().out
    assert [line["step"] for line in numbers(folder)] == list(range(1, 9))


def test_a_reader_of_what_is_printed_may_go_away(shards, tmp_path):
    command = [sys.executable, str(ROOT / "examples/train_moe.py"), *words(shards, tmp_path, "--steps", "12")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.readline()
        run.stdout.close()
        assert "nobody reads standard output any more" in run.stderr.read()
    assert run.returncode == 0
    assert checkpoint_folder(tmp_path / "a", 12).exists()
    assert json.loads((tmp_path / "a" / "results.json").read_text())["validation"]


def test_a_tracker_that_cannot_open_leaves_the_run_as_it_was(program, monkeypatch):
    folder = program("--save-every-n-steps", "4")
    before = numbers(folder)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="needs the package wandb"):
        program("--save-every-n-steps", "4", "--resume", str(checkpoint_folder(folder, 4)), "--report-to", "wandb")
    assert numbers(folder) == before
    assert checkpoint_folder(folder, 8).exists()
    assert not [*folder.glob("checkpoints/abandoned*")]


def test_ctrl_c_while_a_run_is_scored_says_how_to_go_on(program, monkeypatch, capsys):
    def interrupted(*_, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", interrupted)
        folder = program()
    assert not (folder / "results.json").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert "stopped by SIGINT after step 8; checkpoint" in said
    assert "--resume latest" in said
    assert (program("--resume", "latest") / "results.json").exists()


def test_ctrl_c_before_a_run_begins_ends_without_a_traceback(program, monkeypatch, capsys):
    def interrupted(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "set_up", interrupted)  # which prepares the data
    program()  # it ends with the status of a signal, or raises
    assert capsys.readouterr().err == "train_moe.py: interrupted\n"


def test_several_sigterms_still_leave_a_checkpoint(shards, tmp_path):
    start = words(shards, tmp_path, "--steps", "2000")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples/train_moe.py"), *start]
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = tmp_path / "a/metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") > 2:
            break
        time.sleep(0.05)
    sent = 0
    while process.poll() is None:  # to the very end: while it saves, prints, and puts the interpreter away
        process.send_signal(signal.SIGTERM)
        sent += 1
        time.sleep(0.001)
    said, _ = process.communicate(timeout=60)
    assert sent > 3
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM after step" in said
    assert list((tmp_path / "a/checkpoints").glob("step_*"))


def test_fp16_steps_that_the_scaler_leaves_out_are_counted(program, monkeypatch):
    # A scale that overflows fp16 at once: the first steps are left out, until it has come down.
    made = train.set_up

    def set_up(*arguments, **options):
        run = made(*arguments, **options)
        run.scaler._init_scale = 2.0**30
        return run

    monkeypatch.setattr(train, "set_up", set_up)
    lines = numbers(program("--precision", "amp", "--steps", "6"))
    assert lines[0]["skipped_steps"] == 1
    assert lines[-1]["skipped_steps"] >= 1
    assert lines[1]["loss_scale"] < lines[0]["loss_scale"] <= 2.0**29


def test_flags_that_need_ranks_are_answered_on_one_process():
    from moekit.parallel import one_process

    lines = notes(parse_settings(["--fsdp", "--fsdp-amp"]), one_process())
    assert [line.partition(" ")[0] for line in lines] == ["--fsdp", "--fsdp-amp"]


def test_tasks_of_slurm_without_a_launcher_are_refused(monkeypatch, shards, tmp_path):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=r"one of 4 tasks of a SLURM step without RANK.*Let srun start torchrun"):
        main(words(shards, tmp_path))


def test_the_written_settings_leave_nothing_open(program):
    folder = program("--recipe", "openlm")
    config = json.loads((folder / "config.json").read_text())
    assert (config["global_batch_size"], config["batch_size"], config["steps"]) == (4, None, 8)
    beside_a_gpu = int(torch.cuda.is_available())
    assert (config["precision"], config["workers"], config["warmup"]) == ("fp32", beside_a_gpu, 0)
    assert (config["moe_top_k"], config["moe_capacity_factor"], config["moe_loss_weight"]) == (2, 1.25, 0.1)
    assert find_recipe("openlm", k=2, capacity_factor=1.25) is not None
    main(["--config", str(folder / "config.json"), "--name", "again"])
    assert numbers(folder.with_name("again")) == numbers(folder)
