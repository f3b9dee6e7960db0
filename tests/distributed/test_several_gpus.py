"""Every parallel strategy over NCCL, a GPU for each rank, equals one process; and so does the training program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from strategy_cases import Case, matrix

from moekit.lm.shards import write_shards
from moekit.lm.trackers import read_metrics

NUM_GPUS = torch.cuda.device_count()
RANKS = 2 ** (max(NUM_GPUS, 1).bit_length() - 1)
PROGRAM = Path(__file__).parents[2] / "examples" / "train_moe.py"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA devices"),
]


def test_strategies_equal_one_process_over_nccl():
    cases = [case._replace(loops=True) for case in matrix(RANKS, full=False)]
    done = run_ranks("strategy_cases:compare_all", RANKS, cases, limit=300, device="cuda")
    assert done == [[str(case) for case in cases]] * RANKS


def test_ranks_that_get_nothing_never_hang_over_nccl():
    cases = [
        Case(strategy, capacity, k=1, seed=seed, tokens=sizes, loops=True)
        for strategy in ("all_to_all", "all_gather", "tensor_parallel")
        for capacity in (0.0, 0.6)
        for seed, sizes in enumerate([(0, 5), (5, 0), (1, 0), (0, 0), (2, 3)])
    ]
    run_ranks("strategy_cases:compare_all", 2, cases, limit=60, device="cuda")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Run the program on a number of GPUs; return its metrics."""
    folder = tmp_path_factory.mktemp("runs")
    rows = torch.randint(16, (240, 65), generator=torch.Generator().manual_seed(0)).cumsum(1) % 16
    write_shards(folder / "a", rows, sequences_per_shard=30)
    flags = "--model moekit_tiny --global-batch-size 8 --lr 3e-3 --log-every-n-steps 1 --steps 20"
    data = ["--dataset-manifest", str(folder / "a/manifest.jsonl"), "--multiple-data-passes"]

    def run(name: str, ranks: int, *words: str) -> list[dict]:
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--"] if ranks > 1 else []
        )
        command = [
            sys.executable,
            *launcher,
            str(PROGRAM),
            *flags.split(),
            *data,
            "--logs",
            str(folder),
            "--name",
            name,
        ]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(ranks)))}
        ended = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=240)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return read_metrics(folder / name / "metrics.jsonl")

    return run


LAYOUTS = {
    "experts and shards": "--fsdp --moe-expert-model-parallelism",
    "shards": "--fsdp",
    "hidden split": "--moe-expert-model-parallelism --moe-expert-ranks 1 --moe-hidden-ranks 2",
    "static exchange": "--fsdp --moe-expert-model-parallelism --moe-exchange static --moe-exchange-capacity-factor 8",
}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-4), ("amp_bf16", 2e-2)])
def test_the_program_follows_the_curve_of_one_gpu(precision, tolerance, train):
    method = ["--recipe", "openlm", "--moe-num-experts", "8", "--moe-capacity-factor", "0", "--precision", precision]
    expected = [line["loss"] for line in train(f"alone_{precision}", 1, *method) if "loss" in line]
    assert len(expected) >= 20
    for name, words in LAYOUTS.items():
        lines = train(f"{name} {precision}".replace(" ", "_"), RANKS, *method, *words.split())
        found = [line["loss"] for line in lines if "loss" in line]
        assert found == pytest.approx(expected, rel=tolerance), name
