"""Ranks that die, raise, fall silent or have no tokens, and launchers that are killed: nobody waits for ever."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import SEQ_LEN, differing, losses, make_shards, numbers, tensors_of, words

from moekit.lm.checkpoints import checkpoint_folder, latest_checkpoint, read_state
from moekit.lm.shards import write_shards
from moekit.recipes.train import main

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "undrawn.py"
MARK = "MOEKIT_TEST_LAUNCH"  # all processes of a launch inherit it
STEPS, SAVE_EVERY, RANKS = 20, 2, 2
FAULT = "the injected fault"
PATIENCE = 8  # seconds that a rank waits for one that has fallen silent, or that a busy machine starts later
ONE_MACHINE = ["--standalone", "--nproc-per-node", str(RANKS)]  # a free port: torchrun up to 2.11 has one of its own
ELASTIC = "--nnodes 1:2 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-id lost"
QUICKLY = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"  # a lost node is missed after 3 seconds

# The training program with a fault in the middle of a step, before gradients are added up over the ranks.
FAULTY = f"""
import json, os, signal, sys, time
from datetime import timedelta
from moekit.parallel import start_processes
from moekit.recipes import report, updates
from moekit.recipes.train import main

fault = json.loads(sys.argv[1])
sum_gradients, calls = updates.sum_gradients, 0


def faulty(*arguments):
    global calls
    calls += 1
    if calls == fault["call"] and os.environ["RANK"] in fault["ranks"]:
        open(fault["moment"], "w").write(str(time.time()))
        if fault["kind"] == "raise":
            raise RuntimeError({FAULT!r})
        if fault["kind"] == "silence":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torchrun would kill it 30 seconds later
            time.sleep(600)
        if fault["kind"] == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if fault["kind"] in ("launcher", "node"):
            os.kill(os.getppid(), signal.SIGKILL)
        if fault["kind"] in ("rank", "node"):
            os.kill(os.getpid(), signal.SIGKILL)
    if fault["kind"] == "launcher" and calls > fault["call"]:
        time.sleep(1)  # so that the run is far from its end when its launcher is missed
    sum_gradients(*arguments)


updates.sum_gradients = faulty
report.plot_run = lambda path, **options: path
with start_processes(patience=timedelta(seconds={PATIENCE} if fault["kind"] == "silence" else 600)):
    main(sys.argv[2:])
"""


def launch(torchrun, program, *arguments, mark):
    """Start torchrun; its ranks write where it writes, so the output ends when the last of them has ended."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *torchrun, "--", str(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment, MARK: str(mark)},
    )


def ended(process):
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


@pytest.fixture
def mark(tmp_path):
    """Mark the processes of a test; none of them may outlive it."""
    yield tmp_path
    wanted, left = f"{MARK}={tmp_path}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                left.append(int(folder.name))
                os.kill(left[-1], signal.SIGKILL)
        except OSError:  # ended meanwhile, or another user's
            continue
    assert left == [], "processes were left behind"


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    shards = make_shards(tmp_path_factory.mktemp("shards"))
    given = (
        f"--recipe mixtral --global-batch-size 4 --steps {STEPS} --save-every-n-steps {SAVE_EVERY} --log-data --lr 1e-3"
    )

    def make(logs, *more):
        line = words(shards, logs, *given.split(), *more)
        at = line.index("--batch-size")  # of one rank: the number of ranks changes
        return line[:at] + line[at + 2 :]

    return make


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    """The folder of a run of two ranks that nothing happened to."""
    logs = tmp_path_factory.mktemp("unbroken")
    status, said = ended(launch(ONE_MACHINE, PROGRAM, *flags(logs), mark=logs))
    assert status == 0, said
    return logs / "a"


@pytest.fixture
def faulty(tmp_path):
    """Return a function that writes the program and says which words give it a fault."""
    program, moment = tmp_path / "faulty.py", tmp_path / "moment"
    program.write_text(FAULTY)
    return lambda kind, **fault: (program, json.dumps({"kind": kind, "moment": str(moment), **fault}))


def seconds_since_fault(folder):
    return time.time() - float((folder / "moment").read_text())


# What happens to rank 1 in the fourth step of a launch: what is said, the seconds until every process has ended, and
# how many steps the launch leaves in a checkpoint.
FAULTS = {
    "signal": ("stopped by another rank's signal", 20, 4),
    "silence": ("Timed out waiting", PATIENCE + 20, 2),
    "raise": (f"[rank1]: RuntimeError: {FAULT}", 20, 2),
    "rank": ("Signal 9 (SIGKILL)", 20, 2),
    "launcher": ("torchrun is gone, so this rank ends", 20, 2),
}
FOR_FULL = ("signal", "raise")  # else tested by signals to a job (test_slurm.py), and by bad data (test_ranks.py)


@pytest.mark.slow
def test_a_run_that_fails_in_every_way_equals_the_unbroken_one(flags, unbroken, faulty, tmp_path, mark, full):
    torchrun, step = ONE_MACHINE, 0
    for kind, (message, limit, gained) in FAULTS.items():
        if kind in FOR_FULL and not full:
            continue
        program, fault = faulty(kind, ranks=["1"], call=4)
        status, said = ended(launch(torchrun, program, fault, *flags(tmp_path, "--resume", "latest"), mark=mark))
        assert (tmp_path / "moment").exists(), f"it ended before the fault: {said}"
        took = seconds_since_fault(tmp_path)
        (tmp_path / "moment").unlink()
        print(f"{kind}: all ended after {took:.1f} s, status {status}")
        assert status != 0, said
        assert message in said, said
        assert took < limit
        assert "skipping" not in said, "no half checkpoint has a name"
        least, step = step + gained, read_state(latest_checkpoint(tmp_path / "a"))["step"]
        most = STEPS - SAVE_EVERY if kind == "launcher" else least  # its ranks take some steps before they miss it
        assert least <= step <= most, said
    status, said = ended(launch(torchrun, PROGRAM, *flags(tmp_path, "--resume", "latest"), mark=mark))
    assert status == 0, said
    assert f"step_{step:08}: step {step}" in said
    assert numbers(tmp_path / "a") == numbers(unbroken)
    assert (tmp_path / "a/data.jsonl").read_bytes() == (unbroken / "data.jsonl").read_bytes()
    assert differing(*(tensors_of(checkpoint_folder(run, STEPS)) for run in (tmp_path / "a", unbroken))) == []


@pytest.mark.slow
def test_the_other_machine_goes_on_when_one_is_lost(flags, unbroken, faulty, tmp_path, mark):
    """Two agents with a rank each, as on two machines; the one that does not hold the rendezvous is killed with it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    agents = []
    for kind in ("nothing", "node"):
        torchrun = f"{ELASTIC} --rdzv-endpoint 127.0.0.1:{port} --rdzv-conf is_host={kind == 'nothing'},{QUICKLY}"
        program, fault = faulty(kind, ranks=["0", "1"], call=4 if kind == "node" else 0)
        line = flags(tmp_path, "--resume", "latest")
        agents.append(launch(torchrun.split(), program, fault, *line, mark=mark))
    lost, _ = ended(agents[1])
    assert lost == -signal.SIGKILL
    status, said = ended(agents[0])
    print(f"the run ended {seconds_since_fault(tmp_path):.1f} s after the loss")
    assert status == 0, said
    assert ", 2 ranks, " in said
    assert f"step_{SAVE_EVERY:08}: step {SAVE_EVERY}" in said, "it went on from the checkpoint"
    found, expected = numbers(tmp_path / "a"), numbers(unbroken)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert losses(found) == pytest.approx(losses(expected), rel=1e-3)
    assert (tmp_path / "a/data.jsonl").read_bytes() == (unbroken / "data.jsonl").read_bytes()
    assert read_state(latest_checkpoint(tmp_path / "a"))["step"] == STEPS


def test_ranks_without_tokens_and_uneven_ends_change_nothing(flags, tmp_path, mark):
    """Most sequences are padding, so that in some steps a rank has no tokens; shards and validation sets are uneven."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(16, (41, SEQ_LEN + 1), generator=generator)
    validation = write_shards(tmp_path / "validation", rows[:5])
    rows[torch.rand(len(rows), generator=generator) < 0.6] = -1
    manifest = write_shards(tmp_path / "padded", rows, sequences_per_shard=7)
    line = flags(tmp_path, "--dataset-manifest", str(manifest), "--train-data-mix-weights", "1")
    line += ["--val-manifest", str(validation), "--global-batch-size", str(RANKS), "--steps", "12"]
    process = launch(ONE_MACHINE, PROGRAM, *line, "--fsdp", "--name", "several", mark=mark)
    main([*line, "--name", "one"])
    status, said = ended(process)
    assert status == 0, said
    found, expected = numbers(tmp_path / "several"), numbers(tmp_path / "one")
    pairs = list(zip(losses(found), losses(expected), strict=True))
    assert 0 < sum(other is None for _, other in pairs) < len(pairs), "in some steps no rank has tokens"
    for loss, other in pairs:
        assert loss is None if other is None else loss == pytest.approx(other, rel=1e-4)
    assert [line["skipped_steps"] for line in found] == [line["skipped_steps"] for line in expected]
    scores = [json.loads((tmp_path / name / "results.json").read_text())["validation"] for name in ("several", "one")]
    for name, score in scores[1].items():
        assert scores[0][name]["loss"] == pytest.approx(score["loss"], rel=1e-4)
