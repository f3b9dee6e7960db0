"""The SLURM script, run as SLURM would run it, with stand-ins for srun and scontrol on one node of two ranks."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import make_shards, numbers, words

from moekit.lm.checkpoints import latest_checkpoint, read_state

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SCRIPT = "examples/slurm/train_moe.sbatch"
STEPS = 100

# Each writes down its words. srun starts what stands behind its own flags, once; scontrol knows one node.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$RECORDS/srun"
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "$RECORDS/scontrol"
[[ "$1" != show ]] || echo localhost
"""


@pytest.fixture
def sbatch(tmp_path):
    """Return a function that starts the script with words behind its name, and the number of its job."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as server:
        job = str(30_000 + server.getsockname()[1] % 10_000)
    slurm = {"JOB_ID": job, "JOB_NODELIST": "node[1]", "NNODES": "1", "CPUS_PER_TASK": "2"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment |= {"RANKS_PER_NODE": "2", "PATH": path, "RECORDS": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def start(*arguments):
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return start, job


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_bash_can_read_the_script():
    done = subprocess.run(["bash", "-n", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_job_whose_time_is_over_goes_back_into_the_queue_and_on_from_its_checkpoint(sbatch, tmp_path):
    start, job = sbatch
    line = words(make_shards(tmp_path / "shards"), tmp_path, "--steps", str(STEPS))
    name = line.index("--name")
    line = line[:name] + line[name + 2 :]  # the script's own name of the run is used
    folder = tmp_path / f"slurm-{job}"
    script = start(*line)
    deadline = time.monotonic() + 60
    while script.poll() is None and time.monotonic() < deadline and not steps_done(folder):
        time.sleep(0.02)
    script.send_signal(signal.SIGUSR1)
    said, _ = script.communicate(timeout=60)
    assert script.returncode != 0, said
    assert f"job {job} goes back into the queue" in said
    stopped = read_state(latest_checkpoint(folder))["step"]
    assert 0 < stopped < STEPS, said
    assert (tmp_path / "scontrol").read_text().splitlines() == ["show hostnames node[1]", f"requeue {job}"]
    own = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpus-per-task=2"]
    endpoint = f"localhost:{20_000 + int(job) % 10_000}"
    torchrun = ["torchrun", "--nnodes=1", "--nproc-per-node=2", "--max-restarts=3", "--rdzv-backend=c10d"]
    torchrun += [f"--rdzv-endpoint={endpoint}", f"--rdzv-id={job}", "--"]
    program = ["examples/train_moe.py", "--name", folder.name, "--resume", "latest"]
    assert (tmp_path / "srun").read_text().splitlines() == [*own, *torchrun, *program, *line]

    again = start(*line)
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert f"step {stopped}" in said
    assert ", 2 ranks, " in said
    assert [line["step"] for line in numbers(folder)] == list(range(1, STEPS + 1))
    assert (tmp_path / "scontrol").read_text().splitlines()[2:] == ["show hostnames node[1]"]
