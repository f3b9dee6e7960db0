import json
import math
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from rich.console import Console
from small_runs import differing, files, numbers, tensors_of, words
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moekit.experts.tile_files import table_text
from moekit.lm.checkpoints import checkpoint_folder, latest_checkpoint, read_state
from moekit.lm.configs import read_config
from moekit.lm.preparation import PreparedDomain
from moekit.lm.shards import write_shards
from moekit.lm.tokenizers import ByteTokenizer
from moekit.lm.trackers import read_metrics
from moekit.recipes import finishing, runs, sources
from moekit.recipes.configuration import parse_settings
from moekit.recipes.export import export
from moekit.recipes.saving import Progress
from moekit.recipes.train import main, train
from moekit.recipes.trained import trained_model

ROUTER = '''\
"""Top-p routing: a token takes its best experts until their probabilities sum to p, at most k of them."""

from functools import partial

import torch

from moekit.recipes import mixtral
from moekit.routing import token_choice


def top_p(logits, *, p, k, bias=None):
    """Map logits (T, E) to a routing (T, k) with -1 where fewer experts are enough."""
    weights, experts = torch.softmax(logits, dim=-1).topk(k, dim=-1)
    enough = weights.cumsum(-1) - weights >= p
    return token_choice(experts.masked_fill(enough, -1), weights.masked_fill(enough, 0.0), logits)


def top_p_mixtral(*, k=2):
    """Compose Mixtral's layer with top-p routing."""
    return mixtral()._replace(route=partial(top_p, p=0.3, k=k))
'''


pytestmark = pytest.mark.usefixtures("quick")


def test_a_run_leaves_everything_in_its_folder(program, picture, capsys):
    from matplotlib import image

    folder = program("--val-every-n-steps", "4", "--seed", "3")
    names = ["checkpoints", "config.json", "metrics.jsonl", "params.txt", "results.json", "run.png"]
    assert sorted(path.name for path in folder.iterdir()) == names

    params = dict(line.split(": ", 1) for line in (folder / "params.txt").read_text().splitlines())
    assert list(params) == sorted(params)
    assert (params["model"], params["steps"], params["seed"]) == ("moekit_tiny", "8", "3")

    metrics = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert [line["tokens"] for line in metrics] == [256 * step for step in range(1, 9)]
    assert [line["step"] for line in metrics if "validation" in line] == [4, 8]
    assert sorted(metrics[-1]["validation"]) == ["code", "prose"]
    assert metrics[-1]["validation_tokens"] == {"code": 6 * 64, "prose": 6 * 64}
    assert metrics[0]["loss"] == pytest.approx(math.log(512), abs=1.0)
    assert all(line["tokens_per_second"] > 0 and line["grad_norm"] > 0 for line in metrics)
    [layer] = metrics[0]["layers"]
    assert (layer["layer"], len(layer["load"])) == (0, 8)
    assert sum(layer["load"]) == pytest.approx(1)

    scored, checkpoint = sorted((folder / "checkpoints").iterdir())
    assert [json.loads(line)["name"] for line in scored.read_text().splitlines()] == ["prose", "code"]
    state = read_state(checkpoint)
    assert checkpoint.name == "step_00000008"
    assert (state["step"], state["settings"]["seed"]) == (8, 3)

    results = json.loads((folder / "results.json").read_text())
    assert results["tokens"] == 8 * 256
    assert results["parameters"] > results["active_parameters"] > 0
    assert results["method"]["losses"]["load_balance"]["form"] == "load_balance_loss(score=softmax)"
    prose = results["validation"]["prose"]
    assert prose["tokens"] == 6 * 64
    assert prose["perplexity"] == pytest.approx(math.exp(prose["loss"]))
    assert prose["loss"] == pytest.approx(metrics[-1]["validation"]["prose"])  # all of it fits a short validation
    assert prose["bigram"] < prose["unigram"]

    assert image.imread(folder / "run.png").std() > 0.05
    text = capsys.readouterr().out
    for words_ in (
        "validation, nats per token",
        "expert load in validation",
        "active per token",
        "MFU " if torch.cuda.is_available() else "MFU unknown (no peak known: cpu)",
        "max violation",
        "run.png",
        "step     8/8",
    ):
        assert words_ in text
    assert f"{results['parameters']:,} parameters" in text


def test_the_same_seed_gives_the_same_bits_and_another_does_not(program):
    first, second = (program("--seed", "5", name=name) for name in ("a", "b"))
    assert len(numbers(first)) == 8
    assert numbers(first) == numbers(second)
    assert differing(*(tensors_of(checkpoint_folder(folder, 8)) for folder in (first, second))) == []
    other = [line["loss"] for line in numbers(program("--seed", "6", name="c"))]
    assert not set(other) & {line["loss"] for line in numbers(first)}


def test_the_same_seed_gives_the_same_bits_on_two_threads(program, two_threads):
    first, second = (program("--steps", "2", name=name) for name in ("a", "b"))
    assert len(numbers(first)) == 2
    assert numbers(first) == numbers(second)


# gshard draws random numbers in its forward; the others remember something. Step 3 is neither reported nor validated.
@pytest.mark.parametrize(
    ("recipe", "step"),
    [("gshard", 3), ("deepseek_moe", 4), ("quantile_moe", 3), ("remoe", 4), ("hash_layer", 3)],
)
def test_an_interrupted_run_that_goes_on_equals_an_unbroken_one(program, interrupt_after, capsys, recipe, step):
    flags = ["--recipe", recipe, "--log-every-n-steps", "2", "--val-every-n-steps", "4"]
    unbroken = program(*flags, name="unbroken")
    interrupt_after(step)
    folder = program(*flags, name="broken")
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "params.txt",
    ]
    assert read_state(checkpoint_folder(folder, step))["step"] == step
    said = capsys.readouterr().out
    assert f"stopped by SIGINT after step {step}" in said

    hint = said[said.index("go on with:") :].splitlines()[1]
    program_words = shlex.split(hint)
    assert program_words[:2] == ["python", "examples/train_moe.py"]
    main(program_words[2:])  # what it told the user to do
    assert f"step_{step:08d}: step {step}" in capsys.readouterr().out
    assert numbers(folder) == numbers(unbroken)
    assert differing(*(tensors_of(checkpoint_folder(run, 8)) for run in (unbroken, folder))) == []
    results = [json.loads((run / "results.json").read_text())["validation"] for run in (unbroken, folder)]
    assert results[0] == results[1]


def test_a_run_stopped_twice_goes_on_from_the_second_stop(program, interrupt_after, capsys):
    interrupt_after(2)
    folder = program()
    checkpoint = checkpoint_folder(folder, 2)
    interrupt_after(5, signal.SIGTERM)
    program("--resume", str(checkpoint))
    said = capsys.readouterr().out
    assert "stopped by SIGTERM after step 5" in said
    main(shlex.split(said[said.rindex("go on with:") :].splitlines()[1])[2:])
    assert "step_00000005: step 5" in capsys.readouterr().out
    assert [line["step"] for line in numbers(folder)] == list(range(1, 9))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_ends_with_the_status_of_its_signal(shards, interrupt_after, tmp_path, capsys, number, status):
    interrupt_after(2, number)
    with pytest.raises(SystemExit) as stopped:
        main(words(shards, tmp_path))
    assert stopped.value.code == status, "so that `train && export` ends there"
    assert "go on with:" in capsys.readouterr().out
    interrupt_after(5, number)
    folder = train(parse_settings(words(shards, tmp_path, "--resume", "latest")), Console(quiet=True))
    assert latest_checkpoint(folder) == checkpoint_folder(folder, 5), "the function returns the folder"


def test_a_signal_in_the_last_step_stops_nothing(shards, interrupt_after, tmp_path):
    interrupt_after(8)
    main(words(shards, tmp_path))
    assert (tmp_path / "a" / "results.json").exists()


def test_a_resumed_run_tells_its_own_speed_alone(program, interrupt_after, capsys):
    folder = program("--steps", "4")
    assert "tokens by its steps" not in capsys.readouterr().out
    program("--steps", "6", "--resume", "latest")
    said = " ".join(capsys.readouterr().out.split())
    found = re.search(r"1,536 tokens by its steps, \d+ s of training; this launch trained on 512 in \d+ s, ", said)
    assert found is not None, said
    results = json.loads((folder / "results.json").read_text())
    assert results["tokens"] == results["trained_tokens"] == 6 * 256
    program("--steps", "6", "--resume", "latest")
    assert "this launch trained on 0 in 0 s" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("steps", [3, 4])
def test_steps_of_another_program_have_no_seconds(program, monkeypatch, capsys, steps):
    """As after OpenLM's optimizer at step 3."""
    monkeypatch.setattr("moekit.recipes.train.restore", lambda *_: Progress(step=3, trained_tokens=None))
    folder = program("--steps", str(steps))
    said = " ".join(capsys.readouterr().out.split())
    assert f"{256 * steps:,} tokens by its steps, " in said
    found = re.search(r"this launch trained on (\d+) in \d+ s(, [\d,]+ tokens/s)?", said)
    assert found is not None, said
    assert int(found[1]) == 256 * (steps - 3)
    assert (found[2] is not None) == (steps > 3), "no steps, no speed"
    results = json.loads((folder / "results.json").read_text())
    assert (results["tokens"], results["trained_tokens"]) == (256 * steps, None)


def test_a_checkpoint_can_start_another_run(program, capsys):
    first = program("--steps", "4", "--recipe", "mixtral")
    second = program("--steps", "8", "--recipe", "mixtral", "--resume", str(checkpoint_folder(first, 4)), name="b")
    assert "step_00000004: step 4" in capsys.readouterr().out
    assert [line["step"] for line in numbers(second)] == [5, 6, 7, 8]
    assert [line["step"] for line in numbers(first)] == [1, 2, 3, 4]


def test_a_finished_run_can_be_resumed_to_print_its_end_again(program, picture, capsys):
    folder = program("--steps", "3")
    before = numbers(folder)
    capsys.readouterr()
    program("--steps", "3", "--resume", "latest")
    assert "validation, nats per token" in capsys.readouterr().out
    assert numbers(folder) == before
    elsewhere = program("--steps", "3", "--resume", str(checkpoint_folder(folder, 3)), name="b")
    assert (elsewhere / "run.png").exists(), "although there is no line of metrics to draw"


def test_fewer_steps_than_the_checkpoint_has_is_an_error(program):
    folder = program("--steps", "3")
    before = files(folder)
    with pytest.raises(
        SystemExit, match=r"step_00000003 is of step 3, but the run has 2 steps; expected at least as many"
    ):
        program("--steps", "2", "--resume", "latest")
    assert files(folder) == before


def test_resuming_the_latest_of_nothing_starts_the_run(program, tmp_path, capsys):
    folder = program("--steps", "2", "--resume", "latest")
    assert "--resume latest: " in capsys.readouterr().out
    assert numbers(folder) == numbers(program("--steps", "2", name="b"))


def test_there_may_be_nothing_to_resume(program, tmp_path):
    with pytest.raises(SystemExit, match=r"--resume .*step_00000009: there is no such checkpoint\. Expected a folder"):
        program("--resume", str(tmp_path / "step_00000009"))
    (tmp_path / "step_00000009").mkdir()
    with pytest.raises(SystemExit, match=r"there is no checkpoint at .*step_00000009: expected a folder"):
        program("--resume", str(tmp_path / "step_00000009"))
    assert not (tmp_path / "logs").exists()


def test_an_existing_run_is_never_written_over(program):
    folder = program("--steps", "3")
    before = files(folder)
    with pytest.raises(SystemExit, match=r"holds a run already; go on with it by --resume latest, or choose another"):
        program("--steps", "3", "--seed", "9")
    assert files(folder) == before


def test_a_half_written_checkpoint_is_skipped_with_a_warning(program, capsys):
    folder = program("--steps", "3")
    half = checkpoint_folder(folder, 99)
    half.mkdir()
    (half / ".metadata").write_bytes(b"half")
    with pytest.warns(UserWarning, match=r"skipping .*step_00000099: it has no state\.json"):
        program("--resume", "latest")
    assert "step_00000003: step 3" in capsys.readouterr().out
    assert numbers(folder)[-1]["step"] == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--moe-num-experts", "4"], r"expected model\S+ of shape \(64, 4\), found shape \(64, 8\).*model flags"),
        (["--moe-freq", "1"], r"expected model\.layers\.1\.feed_forward\.gate .*found no such tensor.*model flags"),
        (["--seed", "1"], "the saved position is for seed 0; this stream has 1. Resume with the same .*--seed"),
    ],
)
def test_other_flags_than_the_checkpoints_are_refused(program, flags, message):
    folder = program("--steps", "3")
    before = files(folder)
    with pytest.raises(SystemExit, match=message):
        program("--resume", "latest", *flags)
    assert files(folder) == before


@pytest.mark.parametrize(
    ("flags", "told"), [((), ""), (("--accum-freq", "2"), "32 rows of a micro-batch of 128 tokens in the mean")]
)
def test_loads_that_are_rounded_to_nothing_are_warned_of(program, capsys, flags, told):
    """4 sequences of 64 tokens, 2 of 8 experts each: 64 rows in the mean, half a tile; and 32."""
    program("--recipe", "sonic_token_rounding", "--steps", "1", *flags)
    warned = [line for line in capsys.readouterr().out.splitlines() if "warning: an expert has" in line]
    assert len(warned) == bool(told)
    assert all(
        told in line and "--recipe sonic_token_rounding rounds loads to multiples of 128" in line for line in warned
    )


def test_a_router_of_the_users_own_may_have_a_tile(program, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from functools import partial\n"
        "from moekit.recipes import mixtral\n"
        "from moekit.routing import top_k\n"
        "def route(logits, *, tile, bias=None):\n"
        "    return top_k(logits, k=2)\n"
        "mine = mixtral()._replace(route=partial(route, tile=4096))\n"
    )
    program("--recipe", f"{tmp_path}/mine.py:mine", "--steps", "1")
    assert "an expert has" not in capsys.readouterr().out


def test_a_plan_of_the_users_own_trains(program, tmp_path):
    """It drops every second choice; its groups are of unequal sizes, as those of a dropless plan."""
    (tmp_path / "mine.py").write_text(
        "from functools import partial\n"
        "import torch\n"
        "from moekit.dispatch import dropless\n"
        "from moekit.experts import grouped, swiglu\n"
        "from moekit.recipes import expert_layer, mixtral\n"
        "def plan(routing):\n"
        "    kept = torch.tensor([True, False], device=routing.expert_indices.device)\n"
        "    return dropless().plan(routing._replace(expert_indices=routing.expert_indices.where(kept, -1)))\n"
        "dispatcher = dropless()._replace(plan=plan)\n"
        "layer = expert_layer(dispatcher=dispatcher, experts=partial(swiglu, matmul=grouped))\n"
        "mine = mixtral()._replace(layer=layer, plan=plan)\n"
    )
    folder = program("--recipe", f"{tmp_path}/mine.py:mine", "--steps", "2")
    assert [layer["drop_rate"] for line in numbers(folder) for layer in line["layers"]] == [0.5] * 2


def test_a_loss_that_is_not_finite_stops_the_run(program, tmp_path):
    message = r"the loss or its gradient is not finite at step 2\. .*step_00000001 has .*Lower --lr, lengthen --warmup"
    with pytest.raises(SystemExit, match=message):
        program("--lr", "1e30", "--warmup", "0")
    folder = tmp_path / "logs" / "a"
    assert latest_checkpoint(folder) == checkpoint_folder(folder, 1)
    assert [line["step"] for line in numbers(folder)] == [1]
    assert all(math.isfinite(line["loss"]) for line in read_metrics(folder / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("preset", "upstream", "ours"),
    [("open_lm_41m", "68,884,704", 68_884_704 - 6 * 288), ("aphid_neox", "165,443,224", 165_443_224 - 6 * 488)],
)
def test_describe_prints_the_counts_and_writes_nothing(monkeypatch, tmp_path, capsys, preset, upstream, ours):
    monkeypatch.chdir(tmp_path)
    main(["--model", preset, "--recipe", "openlm", "--moe-num-experts", "8", "--moe-freq", "2", "--describe"])
    text = capsys.readouterr().out
    assert upstream in text
    assert f"{ours:,}" in text
    assert f"{4 * ours:,}" in text
    assert "(tok_embeddings): Embedding(50432," in text
    assert list(tmp_path.iterdir()) == []


def test_a_router_in_a_users_file_trains(program, tmp_path):
    path = tmp_path / "routers.py"
    path.write_text(ROUTER)
    assert len(ROUTER.splitlines()) < 30
    folder = program("--recipe", f"{path}:top_p_mixtral", "--moe-top-k", "3", "--steps", "12")
    lines = read_metrics(folder / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 1.0
    assert "gate" in " ".join(tensors_of(checkpoint_folder(folder, 12)))


def test_without_a_name_the_run_is_named_by_what_it_is(program, shards, tmp_path):
    path = tmp_path / "routers.py"
    path.write_text(ROUTER)
    flags = words(shards, tmp_path / "logs", "--recipe", f"{path}:top_p_mixtral", "--steps", "1")
    at = flags.index("--name")
    main(flags[:at] + flags[at + 2 :])
    [folder] = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("moekit_tiny-top_p_mixtral-")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "moekit_tinny"], "unknown preset 'moekit_tinny'; did you mean 'moekit_tiny'"),
        (["--model", "absent.json"], r"absent\.json"),
        (["--recipe", "mixtrall"], "unknown recipe 'mixtrall'; did you mean 'mixtral'"),
        (["--recipe", "absent.py:x"], r"there is no file absent\.py\. Give its path from the current folder"),
        (["--moe-top-k", "9"], "moe_top_k is 9, expected between 1 and moe_num_experts = 8"),
        (["--recipe", "switch", "--moe-top-k", "2"], r"recipe switch takes no k \(it was given as 2, by --moe-top-k"),
        (["--train-data-mix-weights", "1"], r"has 1 numbers for 2 sources \(prose, code\); expected one each"),
    ],
)
def test_bad_input_is_explained_and_leaves_nothing(program, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=rf"^train_moe\.py: .*{message}"):
        program("--moe-num-experts", "8", *flags)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"^train_moe\.py: --moe-tiles \S+/tiles\.json: No such file or directory; .* or leave --moe-tiles out"),
        ("[]", r"^train_moe\.py: --moe-tiles \S+/tiles\.json: \[\]; expected an object of the fields format, entries"),
    ],
)
def test_a_file_of_tiles_is_read_before_data_are_prepared(program, tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(runs, "make_corpus", lambda *arguments, **options: pytest.fail("data are prepared"))
    path = tmp_path / "tiles.json"
    if content is not None:
        path.write_text(content)
    for flags in ((), ("--describe",), ("--val-data", "a.tar", "--resume", "a.pt")):
        with pytest.raises(SystemExit, match=message):
            program("--moe-tiles", str(path), *flags)
    assert not (tmp_path / "logs").exists()


def test_a_run_outlives_its_file_of_tiles(program, tmp_path, capsys):
    path = tmp_path / "tiles.json"
    path.write_text(table_text([]))
    folder = program("--steps", "1", "--recipe", "mixtral", "--moe-keep", "inputs", "--moe-tiles", str(path))
    said = capsys.readouterr().out
    for flag in ("--moe-keep inputs", f"--moe-tiles {path}"):
        unused = f"{flag} is of fused_layer, which trains no layer here: its kernels are for CUDA devices" in said
        assert unused != torch.cuda.is_available()
    written, stored = json.loads((folder / "config.json").read_text()), read_state(checkpoint_folder(folder, 1))
    for values in (written, stored["settings"]):
        assert (values["moe_keep"], values["moe_tiles"]) == ("inputs", str(path))
    config = (folder / "config.json").rename(tmp_path / "config.json")  # the next launch writes another
    path.unlink()
    assert trained_model(folder).config.moe_num_experts == 8
    assert export(folder, tmp_path / "a.safetensors").is_file()
    program("--steps", "1", "--recipe", "mixtral", "--resume", "latest")  # ends at once, with its validation
    assert numbers(folder) == numbers(program("--steps", "1", "--recipe", "mixtral", name="b"))
    with pytest.raises(SystemExit, match=r"--moe-tiles \S+: No such file or directory"):
        main(["--config", str(config), "--name", "again"])
    main(["--config", str(config), "--name", "again", "--moe-tiles", "None"])
    assert numbers(folder.with_name("again")) == numbers(folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "mixtrl"], "unknown recipe 'mixtrl'"),
        (["--recipe", "deepseek_v3", "--moe-num-experts", "6"], "recipe deepseek_v3 does not fit --moe-num-experts 6"),
        (["--moe-num-experts", "4", "--moe-top-k", "5"], "moe_top_k is 5, expected between 1 and moe_num_experts = 4"),
    ],
)
def test_what_cannot_be_made_is_told_before_data_are_prepared(program, monkeypatch, flags, message):
    monkeypatch.setattr(runs, "make_corpus", lambda *arguments, **options: pytest.fail("data are prepared"))
    with pytest.raises(SystemExit, match=message):
        program(*flags)


def test_a_models_file_that_wins_over_flags_is_told_and_written_down(program, tmp_path, capsys):
    path = tmp_path / "m4.json"
    path.write_text(json.dumps({**read_config("moekit_tiny"), "moe_freq": 1, "moe_num_experts": 4}))
    flags = ["--model", str(path), "--steps", "1", "--moe-freq", "0", "--moe-num-experts", "16"]
    folder = program(*flags)
    said = capsys.readouterr().out
    assert f"--moe-freq 0 has no effect: model {path} says moe_freq 1" in said
    assert f"--moe-num-experts 16 has no effect: model {path} says moe_num_experts 4" in said
    written = json.loads((folder / "config.json").read_text())
    params = dict(line.split(": ", 1) for line in (folder / "params.txt").read_text().splitlines())
    stored = read_state(checkpoint_folder(folder, 1))["settings"]
    for values in (written, params, stored):
        assert (str(values["moe_freq"]), str(values["moe_num_experts"])) == ("1", "4")
    assert (written["moe_top_k"], written["moe_loss_weight"]) == (2, 0.1)
    main([*flags, "--describe"])
    assert "--moe-freq 0 has no effect" in capsys.readouterr().out
    main(["--config", str(folder / "config.json"), "--name", "again"])
    assert "has no effect" not in capsys.readouterr().out
    assert numbers(folder.with_name("again")) == numbers(folder)


def test_a_dense_file_leaves_no_word_of_experts(program, tmp_path, capsys):
    path = tmp_path / "dense.json"
    path.write_text(json.dumps({**read_config("moekit_tiny"), "moe_freq": 0}))
    folder = program("--model", str(path), "--steps", "1", "--moe-top-k", "2", "--moe-loss-weight", "0.1")
    assert f"--moe-top-k 2 has no effect: model {path} says moe_freq 0" in capsys.readouterr().out
    written = json.loads((folder / "config.json").read_text())
    assert (written["moe_freq"], written["moe_top_k"], written["moe_loss_weight"]) == (0, None, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--moe-capacity-factor", "-1"], "--moe-capacity-factor is -1.0; expected at least 0 (0 means dropless)"),
        (["--train-data-mix-weights", "1", "-1"], "expected positive numbers. Leave out a source you do not want"),
        (["--epochs", "2"], "--epochs 2 counts stretches of --train-num-samples tokens, which is not given"),
    ],
)
def test_settings_that_make_no_sense_are_explained(program, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        program("--recipe", "openlm", *flags)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "logs").exists()


def test_data_that_do_not_fit_are_explained(tmp_path):
    logs = tmp_path / "logs"

    def run(manifest, *flags):
        main(
            ["--model", "moekit_tiny", "--dataset-manifest", str(manifest), "--logs", str(logs), "--name", "a", *flags]
        )

    with pytest.raises(SystemExit, match=r"there is no manifest at .*absent\.jsonl\. Make one from texts with"):
        run(tmp_path / "absent.jsonl")
    short = write_shards(tmp_path / "short", torch.zeros(4, 33, dtype=torch.int64))
    with pytest.raises(SystemExit, match=r"short.*: expected 12800 sequences|12,?800"):
        run(short)
    assert not logs.exists(), "what the manifests show is checked before anything is written"
    passes = ["--multiple-data-passes", "--resume", "latest"]
    with pytest.raises(SystemExit, match=r"has 33 tokens; expected .*65"):
        run(short, *passes)
    large = write_shards(tmp_path / "large", torch.full((4, 65), 512))
    with pytest.raises(SystemExit, match=r"has the id 512 at position 0; expected ids in \[0, 512\)"):
        run(large, *passes)
    assert sorted(files(logs / "a")) == [Path("config.json"), Path("metrics.jsonl"), Path("params.txt")]
    assert (logs / "a" / "metrics.jsonl").read_text() == ""


def test_the_loss_falls_far_below_the_unigrams(program):
    folder = program("--steps", "60", "--recipe", "mixtral", "--log-every-n-steps", "20", "--val-every-n-steps", "60")
    for scores in json.loads((folder / "results.json").read_text())["validation"].values():
        # The source has ln 2 = 0.69 nats per token, a unigram ln 16 = 2.77 (ln 32 for the mixture), the start ln 512.
        assert scores["loss"] < 1.2
        assert scores["loss"] < scores["unigram"] - 1.5
        assert scores["loss"] > math.log(2) - 0.05


def test_the_selection_bias_moves_and_is_checkpointed(program):
    folder = program("--recipe", "deepseek_moe", "--steps", "6")
    bias = tensors_of(checkpoint_folder(folder, 6))["model.layers.0.feed_forward.bias"]
    assert bias.abs().max() > 0
    steps = bias / 0.001
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.abs().max() <= 6.001


def test_the_rates_are_those_of_the_schedule(program):
    folder = program("--steps", "10", "--warmup", "2", "--lr", "4e-3", "--lr-cooldown-end", "1e-3")
    rates = [line["lr"] for line in numbers(folder)]
    assert rates[:3] == pytest.approx([2e-3, 4e-3, 4e-3])
    assert rates[6] == pytest.approx(2.5e-3)
    assert rates[9] == pytest.approx(1e-3 + 1.5e-3 * (1 + math.cos(math.pi * 7 / 8)))


def test_the_gradient_is_clipped_to_the_norm_asked_for(program):
    seen = []

    def look(optimizer, *arguments):
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        seen.append(torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None]).item())

    looking = register_optimizer_step_pre_hook(look)
    try:
        clipped = numbers(program("--steps", "3", "--grad-clip-norm", "0.5"))
        free = numbers(program("--steps", "3", "--grad-clip-norm", "0", name="b"))
    finally:
        looking.remove()
    assert seen[:3] == pytest.approx([0.5] * 3, rel=1e-4)
    assert clipped[0]["grad_norm"] == free[0]["grad_norm"] == pytest.approx(seen[3], rel=1e-5)
    assert seen[3] > 0.6


def test_a_dense_run_without_validation_ends_well(shards, tmp_path, picture, capsys):
    data = ["--dataset-manifest", str(shards.train[0]), "--logs", str(tmp_path), "--name", "dense"]
    main(["--model", "moekit_tiny", "--moe-freq", "0", "--steps", "2", "--batch-size", "4", *data])
    assert "expert load" not in capsys.readouterr().out
    results = json.loads((tmp_path / "dense" / "results.json").read_text())
    assert results["validation"] == {}
    assert results["parameters"] == results["active_parameters"]
    assert (tmp_path / "dense" / "run.png").exists()


def test_with_a_tokenizer_there_are_bits_per_byte_and_samples(shards, tmp_path, capsys, monkeypatch):
    pairs = zip(shards.train, shards.validation, strict=True)
    domains = {name: PreparedDomain(*pair) for name, pair in zip(sources.MIXING_WEIGHTS, pairs, strict=True)}
    prepared = type("Prepared", (), {"domains": domains, "tokenizer": ByteTokenizer()})
    monkeypatch.setattr(sources, "prepare", lambda **options: prepared)
    shape = json.loads((Path(sources.__file__).parents[1] / "lm/presets/moekit_tiny.json").read_text())
    preset = tmp_path / "bytes.json"
    preset.write_text(json.dumps({**shape, "vocab_size": 257}))
    main(["--model", str(preset), "--steps", "2", "--batch-size", "4", "--logs", str(tmp_path), "--name", "a"])
    scores = json.loads((tmp_path / "a" / "results.json").read_text())["validation"]
    assert sorted(scores) == sorted(sources.MIXING_WEIGHTS)
    for each in scores.values():  # a byte a token, but for end-of-text
        assert each["bits_per_byte"] == pytest.approx(each["loss"] / math.log(2), rel=0.2)
    text = capsys.readouterr().out
    assert "sample 1" in text
    assert finishing.PROMPTS[0].rsplit(maxsplit=1)[0] in text  # the last word may be wrapped


@pytest.mark.distributed
def test_a_rank_that_cannot_read_its_first_batch_leaves_no_other_waiting(shards, tmp_path):
    line = words(shards, tmp_path, "--recipe", "mixtral")
    said = run_ranks("failing_ranks:first_batch_fails", 2, line, limit=30)
    assert said[1] == "OSError: the disk of rank 1 is gone"
    assert "stopped by another rank's signal or error after step 0; nothing was saved" in said[0]
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_a_checkpoint_that_dies_in_the_middle_loses_no_earlier_one(program, monkeypatch):
    folder = program("--steps", "3")
    before = tensors_of(checkpoint_folder(folder, 3))
    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", lambda *arguments, **options: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            program("--steps", "5", "--resume", "latest")
    assert latest_checkpoint(folder) == checkpoint_folder(folder, 3)
    assert differing(before, tensors_of(checkpoint_folder(folder, 3))) == []
    program("--steps", "5", "--resume", "latest")
    assert [line["step"] for line in numbers(folder)] == [1, 2, 3, 4, 5]
