"""Two gloo ranks against one process: the same data, losses, gradient norms, scores and checkpoints, to rounding."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moekit.lm.checkpoints import checkpoint_folder, load_checkpoint, stored_shapes
from moekit.lm.shards import write_shards
from moekit.lm.trackers import read_metrics
from moekit.recipes.train import main

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SEQ_LEN = 64  # of moekit_tiny
STEPS = 5
VARIANTS = {
    "replicated": ["--save-every-n-steps", "3"],
    "fsdp": ["--fsdp", "--accum-freq", "2", "--moe-expert-model-parallelism", "--moe-weight-parallelism"],
    "weights": ["--moe-weight-parallelism", "--grad-checkpointing", "--workers", "2"],
}
RECIPES = ["mixtral", "deepseek_moe"]  # a balancing loss over the whole step, and a selection bias


def torchrun(program: Path, *words: str, folder: Path, ranks: int = 2) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--"]
    said = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*start, str(program), *words], cwd=folder, env=environment, **said)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for name, count, first in (("a", 90, 0), ("b", 45, 100)):
        rows = first + torch.randint(16, (count, SEQ_LEN + 1), generator=generator).cumsum(1) % 16
        write_shards(folder / name, rows, sequences_per_shard=7)
        write_shards(folder / f"val_{name}", rows[: count // 8].flip(0))  # an odd number of sequences
    manifests = [str(folder / name / "manifest.jsonl") for name in ("a", "b", "val_a", "val_b")]
    fixed = "--model moekit_tiny --precision fp32 --global-batch-size 8 --lr 1e-2 --log-every-n-steps 1 --log-data"
    data = ["--dataset-manifest", *manifests[:2], "--val-manifest", *manifests[2:]]
    return [*fixed.split(), *data, "--train-data-mix-weights", "0.7", "0.3", "--seed", "1", "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    """The folders of all runs: RECIPE-one by this process, RECIPE-VARIANT by two ranks."""
    logs = tmp_path_factory.mktemp("logs")
    common = [*flags, "--logs", str(logs)]
    names = {f"{recipe}-{key}": ["--recipe", recipe, *more] for recipe in RECIPES for key, more in VARIANTS.items()}
    commands = [[*common, "--name", name, *words] for name, words in names.items()]
    commands += [[*common, "--name", "nan", "--lr", "1e30", "--warmup", "0"]]
    process = torchrun(Path(__file__).with_name("rank_program.py"), json.dumps(commands), folder=logs)
    for recipe in RECIPES:
        main([*common, "--recipe", recipe, "--name", f"{recipe}-one"])
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    ended = [json.loads(line.removeprefix("ended ")) for line in said.splitlines() if line.startswith("ended ")]
    assert ended[:-1] == [None] * (len(commands) - 1), said
    (logs / "nan.txt").write_text(ended[-1])
    return logs


def numbers(folder: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(folder / "metrics.jsonl")]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {name: torch.zeros(shape) for name, shape in stored_shapes(checkpoint).items() if "rng" not in name}
    load_checkpoint(checkpoint, found)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_change_nothing_but_rounding(runs, recipe, variant):
    one, two = runs / f"{recipe}-one", runs / f"{recipe}-{variant}"
    assert (one / "data.jsonl").read_text() == (two / "data.jsonl").read_text()
    for key in ("loss", "grad_norm", "loss/load_balance", "lr"):
        assert numbers(two, key) == pytest.approx(numbers(one, key), rel=2e-4), key
    ours, theirs = (json.loads((run / "results.json").read_text())["validation"] for run in (one, two))
    for name in ("a", "b"):
        assert theirs[name]["loss"] == pytest.approx(ours[name]["loss"], rel=1e-4)
        assert theirs[name]["sequences"] == ours[name]["sequences"]
        assert theirs[name]["loss_low"] == pytest.approx(ours[name]["loss_low"], rel=1e-4)
    expected, found = (tensors(checkpoint_folder(run, STEPS)) for run in (one, two))
    assert sorted(expected) == sorted(found)
    for name, tensor in expected.items():
        if not name.startswith("optimizer.exp_avg_sq"):
            torch.testing.assert_close(found[name], tensor, rtol=2e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_checkpoint_of_two_ranks_goes_on_and_is_scored_on_one(runs, flags, capsys):
    middle = checkpoint_folder(runs / "mixtral-replicated", 3)
    main([*flags, "--logs", str(runs), "--recipe", "mixtral", "--name", "part", "--resume", str(middle)])
    assert "step_00000003: step 3" in capsys.readouterr().out
    assert numbers(runs / "part", "loss") == pytest.approx(numbers(runs / "mixtral-one", "loss")[3:], rel=2e-4)
    checkpoint = checkpoint_folder(runs / "mixtral-fsdp", STEPS)
    data = [flags[flags.index("--val-manifest") + 1]]
    words = ["--model", "moekit_tiny", "--recipe", "mixtral", "--precision", "fp32", "--logs", str(runs), "--name", "e"]
    main([*words, "--val-manifest", *data, "--resume", str(checkpoint)])
    lines = [json.loads(line) for line in (checkpoint.parent / "results.jsonl").read_text().splitlines()]
    at_end, alone = lines[0], lines[-1]
    assert (at_end["name"], alone["name"]) == ("a", "val_a")
    assert alone["loss"] == pytest.approx(at_end["loss"], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_both_ranks_with_a_checkpoint(runs):
    message = (runs / "nan.txt").read_text()
    assert "is not finite at step" in message
    assert "--on-nonfinite skip" in message
    [checkpoint] = (runs / "nan/checkpoints").glob("step_*")
    assert all(tensor.isfinite().all() for name, tensor in tensors(checkpoint).items() if name.startswith("model."))


def test_a_terminated_launch_leaves_a_checkpoint_and_goes_on_bit_for_bit(flags, tmp_path, full):
    if not full:
        pytest.skip("is for --full: test_failures.py stops a rank so, test_kills.py and test_slurm.py a launch")
    program = ROOT / "examples/train_moe.py"
    words = [*flags, "--logs", str(tmp_path), "--steps", "40", "--multiple-data-passes", "--save-every-n-steps", "15"]
    whole = torchrun(program, *words, "--name", "whole", folder=tmp_path)
    said, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, said
    broken = torchrun(program, *words, "--name", "broken", folder=tmp_path)
    metrics = tmp_path / "broken/metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 3:
            break
        time.sleep(0.05)
    broken.send_signal(signal.SIGTERM)
    said, _ = broken.communicate(timeout=60)
    assert "stopped by SIGTERM after step" in said, said
    [checkpoint, *_] = sorted((tmp_path / "broken/checkpoints").glob("step_*"), reverse=True)
    stopped = int(checkpoint.name.removeprefix("step_"))
    assert 0 < stopped < 40
    again = torchrun(program, *words, "--name", "broken", "--resume", "latest", folder=tmp_path)
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert f"step {stopped}" in said
    for key in ("loss", "grad_norm"):
        assert numbers(tmp_path / "broken", key) == numbers(tmp_path / "whole", key)
    assert (tmp_path / "broken/data.jsonl").read_text() == (tmp_path / "whole/data.jsonl").read_text()


def test_bad_data_on_one_rank_ends_both_with_its_message(flags, tmp_path):
    manifest = write_shards(tmp_path / "bad", torch.full((16, SEQ_LEN + 1), 3), sequences_per_shard=8)
    tar = manifest.with_name("00000001.tar")
    tar.write_bytes(tar.read_bytes()[:2000])
    words = ["--model", "moekit_tiny", "--dataset-manifest", str(manifest), "--global-batch-size", "2", "--steps", "8"]
    started = time.monotonic()
    process = torchrun(ROOT / "examples/train_moe.py", *words, "--logs", str(tmp_path), folder=tmp_path)
    said, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "00000001.tar" in said
    assert "--on-bad-data skip" in said
    assert time.monotonic() - started < 60
