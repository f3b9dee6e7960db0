"""The two commands of OpenLM's MoE guide, as docs/openlm.md has them, against an S3 server on loopback."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from s3_server import s3_server

from moekit.lm.checkpoints import load_checkpoint, read_state, stored_shapes
from moekit.lm.shards import write_shards
from moekit.lm.trackers import read_metrics

ROOT = Path(__file__).parents[2]
SEQ_LEN, VOCABULARY = 32, 256
SHAPE = {"hidden_dim": 32, "n_layers": 4, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": VOCABULARY}
SHAPE |= {"post_embed_norm": False, "weight_tying": False}
PROCESSES = "2"
# What else is changed in the documented commands: data paths, model size, folders, and the amount of data. Batch size,
# workers and accumulation stay the guide's.
CHANGES = {
    "1000000000": str(64 * SEQ_LEN),
    "aphid_neox": "model.json",
    "/experiments/moe": "logs",
    "/experiments/eval": "eval",
    "/experiments/moe/test_moe/checkpoints/epoch_1.pt": "logs/test_moe/checkpoints/epoch_1.pt",
    "$RANDOM": "31415",
}


def command(number: int) -> list[str]:
    """Return the words of one of the page's commands, with `CHANGES`."""
    blocks = re.findall(r"```bash\n(torchrun.*?)```", (ROOT / "docs/openlm.md").read_text(), re.DOTALL)
    words = shlex.split(blocks[number].replace("\\\n", " "))
    assert words[:4] == ["torchrun", "--nproc-per-node", "8", "--"]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", PROCESSES, "--", str(ROOT / words[4])]
    return [sys.executable, *start, *(CHANGES.get(word, word) for word in words[5:])]


@pytest.fixture
def bucket():
    """A bucket in a real S3 server on loopback; returns a function that uploads a folder."""
    with s3_server() as client:
        client.create_bucket(Bucket="my-bucket")

        def upload(folder: Path, prefix: str) -> None:
            for file in folder.iterdir():
                client.upload_file(str(file), "my-bucket", f"{prefix}/{file.name}")

        yield upload


def run(words: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "COLUMNS": "120"}
    with socket.create_server(("", 0)) as free:  # torchrun up to 2.11 always takes one, which others may have
        environment["PET_MASTER_PORT"] = str(free.getsockname()[1])
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.distributed
def test_both_commands_of_the_guide_run_and_the_second_scores_what_the_first_wrote(bucket, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name, count in (("a", 300), ("b", 150), ("validation", 13)):
        rows = torch.randint(0, 8, (count, SEQ_LEN + 1), generator=generator)
        write_shards(tmp_path / name, rows, sequences_per_shard=40)
        bucket(tmp_path / name, name)
    (tmp_path / "model.json").write_text(json.dumps(SHAPE))

    said = run(command(0), tmp_path)
    assert "--no-skip-tokens has no effect" in said
    assert "--warmup 200 is not shorter than the run" in said
    folder = tmp_path / "logs/test_moe"
    metrics = read_metrics(folder / "metrics.jsonl")
    assert metrics[-1]["step"] == 64 * 4 // 16  # sequences per epoch, epochs, batch over both ranks
    assert metrics[-1]["tokens"] == 4 * 64 * SEQ_LEN
    assert metrics[-1]["skipped_data"] == {}
    assert list(folder.glob("wandb/offline-run-*"))
    states = [read_state(each) for each in sorted((folder / "checkpoints").glob("step_*"))]
    assert [(state["step"], state["epoch"]) for state in states] == [(4, 1), (8, 2), (12, 3), (16, 4)]
    checkpoint = sorted((folder / "checkpoints").glob("step_*"))[-1]
    shapes = stored_shapes(checkpoint)
    experts = {name: torch.zeros(shapes[name]) for name in shapes if name.startswith("model.") and ".experts." in name}
    assert len(experts) == 4  # two matrices in each of two MoE layers
    load_checkpoint_part(checkpoint, experts)
    for name, stacked in experts.items():
        assert stacked.shape[0] == 8, name
        assert len({tuple(expert.flatten()[:8].tolist()) for expert in stacked}) == 8, f"experts of {name} are equal"

    said = run(command(1), tmp_path)
    assert "validation, nats per token" in said
    [line] = [
        json.loads(line)
        for line in (folder / "checkpoints/results.jsonl").read_text().splitlines()
        if "step_00000004" in line
    ]
    assert line["sequences"] == 13
    assert line["tokens"] == 13 * SEQ_LEN
    assert line["loss_low"] < line["loss"] < line["loss_high"]
    assert line["loss"] < 6.0
    assert [layer["layer"] for layer in line["layers"]] == [0, 2]
    assert line["val_data"] == "pipe:aws s3 cp s3://my-bucket/validation/00000000.tar -"


def load_checkpoint_part(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read some of the tensors of a checkpoint; all of its model's must be asked for at once."""
    shapes = stored_shapes(checkpoint)
    others = {name: torch.zeros(shapes[name]) for name in shapes if name.startswith("model.") and name not in tensors}
    load_checkpoint(checkpoint, {**tensors, **others})
