"""The training program under every layout: the curve of one process, distinct experts, checkpoints for any other."""

import json
from pathlib import Path

import pytest
import torch
from launches import run_commands
from ranks import run_ranks

from moekit.lm.checkpoints import checkpoint_folder, load_checkpoint, stored_shapes
from moekit.lm.shards import write_shards
from moekit.lm.trackers import read_metrics
from moekit.parallel import one_process

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SEQ_LEN, STEPS, SAVED = 64, 12, 6
QUICK = ("document", "fewer", "hybrid")  # the others are for --full
SPREAD = "--moe-expert-model-parallelism"
DOCUMENT = ("--recipe", "openlm", "--moe-num-experts", "8", "--moe-capacity-factor", "1.25")
HYBRID = ("--ranks-per-node", "4", SPREAD, "--moe-expert-ranks", "2")
FEWER = ("--recipe", "openlm", "--moe-num-experts", "4", "--moe-capacity-factor", "1.25")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(16, (240, SEQ_LEN + 1), generator=generator).cumsum(1) % 16
    write_shards(folder / "a", rows, sequences_per_shard=30)
    write_shards(folder / "val", rows[:21].flip(0))
    fixed = "--model moekit_tiny --precision fp32 --global-batch-size 8 --lr 3e-3 --log-every-n-steps 1"
    manifests = ["--dataset-manifest", str(folder / "a/manifest.jsonl")]
    manifests += ["--val-manifest", str(folder / "val/manifest.jsonl")]
    length = ["--steps", str(STEPS), "--save-every-n-steps", str(SAVED)]
    return [*fixed.split(), *manifests, "--multiple-data-passes", *length]


@pytest.fixture(scope="module")
def launch(flags, tmp_path_factory):
    """Run named command lines on a number of ranks; return the folder of the runs."""
    logs = tmp_path_factory.mktemp("logs")

    def run(ranks: int, named: dict[str, list[str]], *, limit: float = 240) -> Path:
        commands = [[*flags, "--logs", str(logs), "--name", name, *words] for name, words in named.items()]
        if ranks == 1:
            ended = run_commands(one_process(), commands)
        else:
            ended = run_ranks("launches:run_commands", ranks, commands, limit=limit)[0]
        assert [each.message for each in ended] == [None] * len(named), ended
        for name, each in zip(named, ended, strict=True):
            (logs / f"{name}.txt").write_text(each.said)
        return logs

    return run


@pytest.fixture(scope="module")
def runs(launch, full):
    """The runs of one process, and those of eight ranks."""
    dropless = [*DOCUMENT, "--moe-capacity-factor", "0"]
    launch(1, {"document-one": [*DOCUMENT], "fewer-one": [*FEWER], "dropless-one": dropless})
    named = {
        "document": [*DOCUMENT, "--fsdp", SPREAD],
        "fewer": [*FEWER, "--fsdp", SPREAD],
        "fewer-gathered": [*FEWER, SPREAD, "--moe-exchange", "all_gather"],
        "replicas": [*DOCUMENT, "--moe-capacity-factor", "0", "--fsdp", SPREAD, "--moe-expert-ranks", "2"],
        "hybrid": [*DOCUMENT, "--moe-capacity-factor", "0", "--fsdp", "--fsdp-hybrid", *HYBRID],
        "nodes": [*DOCUMENT, SPREAD, "--moe-hierarchical-exchange", "--ranks-per-node", "4"],
        "static": [*DOCUMENT, SPREAD, *["--moe-exchange", "static", "--moe-exchange-capacity-factor", "8"]],
    }
    chosen = {name: words for name, words in named.items() if full or name in QUICK}
    return launch(8, chosen)


def curve(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_metrics(folder / "metrics.jsonl")]


def scores(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["validation"]["a"]


def experts_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.zeros(shape) for name, shape in stored_shapes(checkpoint).items() if "rng" not in name}
    load_checkpoint(checkpoint, tensors)
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model.") and ".experts." in name}


def one_of(name: str) -> str:
    """Name the run of one process that a run equals."""
    kinds = {"fewer": "fewer", "fewer-gathered": "fewer", "replicas": "dropless", "hybrid": "dropless"}
    return f"{kinds.get(name, 'document')}-one"


def printed(loss: float) -> str:
    """Write a loss as the tables do."""
    return f"{loss:.3f}"


@pytest.mark.parametrize("name", ["document", "fewer", "fewer-gathered", "replicas", "hybrid", "nodes", "static"])
def test_eight_ranks_train_as_one_process_does(runs, name, full):
    if not full and name not in QUICK:
        pytest.skip("is for --full")
    one = runs / one_of(name)
    for key in ("loss", "grad_norm", "loss/load_balance"):
        assert curve(runs / name, key) == pytest.approx(curve(one, key), rel=5e-4), key
    assert len(curve(one)) == STEPS
    assert curve(one)[-1] < curve(one)[0] - 0.5
    ours, theirs = scores(runs / name), scores(one)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert (ours["sequences"], ours["tokens"]) == (theirs["sequences"], theirs["tokens"]) == (21, 21 * SEQ_LEN)


def test_the_same_tokens_are_dropped(runs, full):
    """The limit counts over all ranks, in the order that one process has the tokens in."""
    rates = [
        [[layer["drop_rate"] for layer in line["layers"]] for line in read_metrics(runs / name / "metrics.jsonl")]
        for name in ("document-one", "document", *(("nodes", "static") if full else ()))
    ]
    assert all(rate > 0 for rate in rates[0][0])
    for others in rates[1:]:
        assert others[:5] == rates[0][:5]  # later, rounding may move a token


def test_all_experts_differ_after_training(runs):
    """OpenLM's FSDP makes them equal: of eight experts on eight ranks it leaves one."""
    for stacked in experts_of(checkpoint_folder(runs / "document", STEPS)).values():
        assert stacked.shape[0] == 8
        distances = torch.cdist(stacked.flatten(1), stacked.flatten(1))
        assert (distances + torch.eye(8) * 1e3 > 0.1).all()


def test_the_layout_is_printed(runs):
    said = (runs / "fewer.txt").read_text()
    assert "bytes per rank, 8 ranks" in said
    assert "4 blocks of experts x 2 slices of hidden" in said
    assert "rank 6: expert 2, hidden 2 of 2" in said


def test_other_mixes_score_as_one_process(launch, full):
    """Gathered under FSDP, in slices and recomputing, compiled."""
    short = ["--recipe", "mixtral", "--steps", "4"]
    mixes = {
        "gathered": [SPREAD, "--fsdp", "--moe-expert-ranks", "1", "--moe-hidden-ranks", "2"],
        "slices": [SPREAD, "--moe-exchange-chunks", "2", "--grad-checkpointing"],
        **({"compiled": [SPREAD, "--torchcompile"]} if full else {}),  # two minutes of compiling
    }
    logs = launch(1, {"plain": short})
    launch(2, {name: [*short, *words] for name, words in mixes.items()})
    for name in mixes:
        assert curve(logs / name) == pytest.approx(curve(logs / "plain"), rel=1e-5), name
        assert scores(logs / name)["loss"] == pytest.approx(scores(logs / "plain")["loss"], rel=1e-5), name


def test_text_is_sampled_after_a_run_with_a_capacity_limit(tmp_path, full):
    """A prompt is no whole sequence, and its tokens must not be dropped."""
    if not full:
        pytest.skip("is for --full: it prepares the embedded text")
    shape = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 64, "vocab_size": 257, "post_embed_norm": False}
    (tmp_path / "bytes.json").write_text(json.dumps(shape | {"weight_tying": False}))
    words = "--precision fp32 --steps 2 --batch-size 2 --tokenizer byte --val-num-samples 640 --name text"
    command = ["--model", str(tmp_path / "bytes.json"), *words.split(), "--logs", str(tmp_path), SPREAD]
    [ended, _] = run_ranks("launches:run_drawn", 2, command, limit=120)
    assert ended.message is None
    assert "sample 2" in ended.said
    assert (tmp_path / "text/run.png").exists()


LAYOUTS = {1: [], 2: [SPREAD], 4: [SPREAD, "--moe-expert-ranks", "2", "--moe-hidden-ranks", "2"]}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_a_checkpoint_of_eight_ranks_goes_on_under_another_layout(runs, launch, flags, ranks):
    middle, last = (str(checkpoint_folder(runs / "document", step)) for step in (SAVED, STEPS))
    data = flags[flags.index("--val-manifest") + 1]
    fixed = ["--model", "moekit_tiny", *DOCUMENT, "--precision", "fp32"]
    evaluation = [*fixed, "--val-manifest", data, "--resume", last, "--logs", str(runs), "--name", f"scored-{ranks}"]
    named = {f"resumed-{ranks}": [*DOCUMENT, *LAYOUTS[ranks], "--resume", middle]}
    launch(ranks, named)
    assert curve(runs / f"resumed-{ranks}") == pytest.approx(curve(runs / "document")[SAVED:], rel=5e-4)
    evaluation += LAYOUTS[ranks]
    run = run_commands(one_process(), [evaluation]) if ranks == 1 else None
    ended = run or run_ranks("launches:run_commands", ranks, [evaluation], limit=60)[0]
    assert ended[0].message is None
    found = json.loads((runs / f"scored-{ranks}/results.json").read_text())["validation"]["val"]["loss"]
    assert printed(found) == printed(scores(runs / "document")["loss"])
    assert found == pytest.approx(scores(runs / "document")["loss"], rel=1e-6)
