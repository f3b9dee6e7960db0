"""Methods of every kind of router, with experts spread over two ranks: the curve of one process, step by step."""

import pytest
import torch
from launches import run_commands
from ranks import run_ranks

from moekit.lm.shards import write_shards
from moekit.lm.trackers import read_metrics
from moekit.parallel import one_process

pytestmark = pytest.mark.distributed
# What looks at a whole batch (Sinkhorn, token rounding, choice of experts over a batch, quantiles) sees that of a rank.
RECIPES = ("soft_moe", "moe_plus_plus", "remoe", "hash_layer", "dynamic_k", "xmoe", "deepseek_v2", "llama4", "gpt_oss")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    rows = torch.randint(16, (60, 65), generator=torch.Generator().manual_seed(0)).cumsum(1) % 16
    write_shards(folder / "a", rows, sequences_per_shard=15)
    fixed = "--model moekit_tiny --precision fp32 --global-batch-size 4 --lr 3e-3 --log-every-n-steps 1 --steps 5"
    flags = [*fixed.split(), "--dataset-manifest", str(folder / "a/manifest.jsonl"), "--multiple-data-passes"]
    flags += ["--logs", str(folder)]
    # gpt_oss: the bias of an expert's output has no hidden axis, so its experts stay whole; with two ranks all do.
    one, two = (
        [[*flags, "--recipe", name, "--name", f"{name}-{ranks}", *more] for name in RECIPES]
        for ranks, more in ((1, []), (2, ["--moe-expert-model-parallelism", "--fsdp"]))
    )
    for ended in (run_commands(one_process(), one), run_ranks("launches:run_commands", 2, two, limit=240)[0]):
        assert [each.message for each in ended] == [None] * len(RECIPES), ended
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_train_as_one_process_does(runs, name):
    one, two = (read_metrics(runs / f"{name}-{ranks}" / "metrics.jsonl") for ranks in (1, 2))
    for key in one[0]:
        if key in ("loss", "grad_norm") or key.startswith("loss/"):
            assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=5e-4), key
    assert len(one) == 5
