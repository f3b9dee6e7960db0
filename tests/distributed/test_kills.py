"""Real processes, killed at any moment and started again: the run that comes out is the unbroken one, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import differing, make_shards, numbers, tensors_of, words

from moekit.lm.checkpoints import checkpoint_folder, latest_checkpoint, read_state
from moekit.lm.trackers import read_metrics

ROOT = Path(__file__).parents[2]
MARK = "MOEKIT_TEST_RUN"  # workers inherit it, so that none of them is overlooked
STEPS_PER_KILL = 8  # more than one launch does, so that every kill finds the run alive

# Runs the program and ends it by SIGKILL at the n-th call of something.
KILLER = """
import os, signal, sys
import torch.distributed.checkpoint as dcp
from moekit.lm.json_lines import JsonLines
from moekit.recipes.train import main

what, calls = sys.argv[1], int(sys.argv[2])
place, name = {
    "rename": (os, "replace"),
    "save": (dcp.FileSystemWriter, "write_data"),
    "line": (JsonLines, "log"),
}[what]
function = getattr(place, name)


def counted(*arguments, **options):
    global calls
    calls -= 1
    if calls:
        return function(*arguments, **options)
    if what == "save":  # the tensors are on disk, their index is not
        function(*arguments, **options)
    if what == "line":
        with arguments[0].path.open("a") as file:
            file.write('{"step": ')
    os.kill(os.getpid(), signal.SIGKILL)


setattr(place, name, counted)
main(sys.argv[3:])
"""


class Launch:
    """A real process of the program."""

    def __init__(self, arguments, folder, *, mark, killer=()):
        program = ["-c", KILLER, *map(str, killer)] if killer else [str(ROOT / "tests" / "undrawn.py")]
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", MARK: mark},
        )

    def lines(self):
        """Count the metrics that are written."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for_step(self, step):
        """Wait until a step is reported, or the process has ended."""
        deadline = time.monotonic() + 120
        while self._process.poll() is None and time.monotonic() < deadline and not self._has(step):
            time.sleep(0.005)

    def _has(self, step):
        path = self.folder / "metrics.jsonl"
        return path.exists() and any(line["step"] >= step for line in read_metrics(path))

    def send(self, number):
        self._process.send_signal(number)

    def ended(self):
        """Wait for the end; return exit status and output."""
        output, _ = self._process.communicate(timeout=180)
        return self._process.returncode, output


def processes_with(mark):
    """List the processes that are alive and carry a mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


@pytest.fixture
def mark(tmp_path):
    """Mark the processes of a test; none of them may outlive it."""
    yield str(tmp_path)
    deadline = time.monotonic() + 30  # a worker looks for its parent every 5 seconds
    while (left := processes_with(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert left == [], "processes were left behind"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def kills(request):
    return request.config.getoption("--kills", default=4)


@pytest.fixture(scope="module")
def flags(shards, kills):
    """The words of the run: gshard draws random numbers in its forward."""
    given = "--recipe gshard --save-every-n-steps 2 --keep-checkpoints 2 --val-every-n-steps 5 --log-data --steps"
    return lambda logs, *more: words(shards, logs, *given.split(), str(STEPS_PER_KILL * max(kills, 4)), *more)


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    logs = tmp_path_factory.mktemp("unbroken")
    status, output = Launch(flags(logs), logs / "a", mark=str(logs)).ended()
    assert status == 0, output
    return logs / "a"


def assert_same_run(found, expected):
    assert numbers(found) == numbers(expected)
    assert (found / "data.jsonl").read_bytes() == (expected / "data.jsonl").read_bytes()
    steps = numbers(expected)[-1]["step"]
    assert [line["step"] for line in numbers(found)] == list(range(1, steps + 1))
    checkpoints = [checkpoint_folder(run, steps) for run in (found, expected)]
    assert differing(*map(tensors_of, checkpoints)) == []
    states = [read_state(checkpoint) for checkpoint in checkpoints]
    for state in states:
        del state["seconds"], state["settings"]
    assert states[0] == states[1]
    results = [json.loads((run / "results.json").read_text())["validation"] for run in (found, expected)]
    assert results[0] == results[1]
    assert sorted(path.name for path in (found / "checkpoints").iterdir()) == sorted(
        path.name for path in (expected / "checkpoints").iterdir()
    )


def moment(kind, rng):
    """Draw which call of a kind is the last: some come before the first step, none after STEPS_PER_KILL more."""
    return rng.randint(*{"rename": (1, 15), "save": (2, 3), "line": (7, 14)}[kind])


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_the_unbroken_one(flags, unbroken, kills, tmp_path, mark):
    rng, folder, starts = random.Random(kills), tmp_path / "a", []
    kinds = [("time", "rename", "save", "line")[n % 4] for n in range(kills)]
    for number, kind in enumerate(kinds):
        arguments = flags(tmp_path, "--resume", "latest", "--workers", str(number % 2))
        latest = latest_checkpoint(folder)
        start = 0 if latest is None else read_state(latest)["step"]
        starts.append(start)
        if kind == "time":
            launch = Launch(arguments, folder, mark=mark)
            launch.wait_for_step(start + rng.randint(2, STEPS_PER_KILL - 3))
            time.sleep(rng.uniform(0, 0.05))
            launch.send(signal.SIGKILL)
        else:
            launch = Launch(arguments, folder, mark=mark, killer=(kind, moment(kind, rng)))
        status, output = launch.ended()
        assert "skipping" not in output, "no half checkpoint has a name"
        assert status == -signal.SIGKILL, output
        print(f"{kind}: went on from step {start}, killed with {launch.lines()} lines of metrics")
    launch = Launch(flags(tmp_path, "--resume", "latest", "--workers", "1"), folder, mark=mark)
    status, output = launch.ended()
    assert status == 0, output
    assert kills < 4 or max(starts) > 0, "some launches went on from a checkpoint"
    assert_same_run(folder, unbroken)


@pytest.mark.slow
def test_a_run_stopped_twice_goes_on_with_other_workers(flags, unbroken, tmp_path, mark, full):
    if not full:
        pytest.skip("is for --full: test_trouble.py stops runs by signals, test_batches.py changes workers")
    folder = tmp_path / "a"
    for number, (step, workers) in enumerate([(3, 0), (9, 2)]):
        launch = Launch(flags(tmp_path, "--resume", "latest", "--workers", str(workers)), folder, mark=mark)
        launch.wait_for_step(step)
        sent = (signal.SIGTERM, signal.SIGINT)[number]
        launch.send(sent)
        status, output = launch.ended()
        assert status == 128 + sent, output
        reached = numbers(folder)[-1]["step"]
        assert f"stopped by {sent.name} after step {reached}; checkpoint" in output
        assert reached >= step
        assert latest_checkpoint(folder) == checkpoint_folder(folder, reached)
        assert read_state(checkpoint_folder(folder, reached))["step"] == reached
    assert reached < STEPS_PER_KILL * 4, "the run was stopped before its end"
    status, output = Launch(flags(tmp_path, "--resume", "latest", "--workers", "0"), folder, mark=mark).ended()
    assert status == 0, output
    assert_same_run(folder, unbroken)
