import json
import shutil
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from small_runs import SEQ_LEN, TIMES, differing, losses, markov_sequences, numbers, tensors_of, words

from moekit.lm.checkpoints import checkpoint_folder, read_state
from moekit.lm.ngrams import unigram_loss
from moekit.lm.shards import ShardError, write_shards
from moekit.lm.trackers import read_metrics
from moekit.parallel import one_process
from moekit.recipes import loop, recording
from moekit.recipes.budgets import Budget
from moekit.recipes.recording import Clock
from moekit.recipes.train import main

pytestmark = pytest.mark.usefixtures("quick")


def test_every_number_has_its_name_and_adds_up(program):
    folder = program("--log-every-n-steps", "4", "--val-every-n-steps", "3")
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 4, 6, 8]
    named = {
        "step",
        "epoch",
        "tokens",
        "step_tokens",
        "loss",
        "loss/load_balance",
        "load_balancing_loss",
        "lr",
        "grad_norm",
    }
    named |= {"expected_steps_epoch", "seen_steps_epoch", "dataset_pass_0", "dataset_pass_1"}
    named |= {"skipped_steps", "skipped_data", "layers"} | set(TIMES)
    named -= set() if torch.cuda.is_available() else {"mfu"}  # no peak is known of a CPU
    assert set(lines[1]) == named
    active = json.loads((folder / "results.json").read_text())["active_parameters"]
    for line in lines:
        assert line["load_balancing_loss"] == pytest.approx(0.1 * line["loss/load_balance"])
        assert line["samples_per_second"] == line["tokens_per_second"] == line["samples_per_second_per_gpu"]
        parts = (
            line["data_time"]
            + line["forward_time"]
            + line["backward_time"]
            + line["sync_time"]
            + line["optim_step_time"]
        )
        assert all(line[name] > 0 for name in TIMES if name in line)
        lookup, attention = 512 * 64, 12 * 2 * SEQ_LEN * 64
        flops = (6 * (active - lookup) + attention) * line["tokens_per_second"]
        assert line["tflops_per_second"] == pytest.approx(flops / 1e12, abs=1e-4)
        assert line["tokens_per_second"] * line["batch_time"] == pytest.approx(4 * SEQ_LEN, rel=1e-2)
        assert parts < 60
        assert sum(line["layers"][0]["load"]) == pytest.approx(1)


def test_a_step_that_ends_several_epochs_is_all_of_the_last_that_it_began():
    """Batches of 8 and epochs of 3 sequences: two end before the first step, and each step ends two or three."""
    run = SimpleNamespace(budget=Budget(3, 8, 8, 3, 1), stream=SimpleNamespace(passes=[0]))
    counts = [recording._epoch_metrics(run, step) for step in (1, 2, 3)]
    assert [count["epoch"] for count in counts] == [5, 7, 8]
    assert {(count["seen_steps_epoch"], count["expected_steps_epoch"]) for count in counts} == {(1, 1)}


def test_the_clock_stands_still_in_pauses():
    clock = Clock(5.0)
    time.sleep(0.02)
    with clock.paused(steps=2, tokens=20):
        time.sleep(0.2)
    assert 5.02 <= clock.seconds < 5.2
    speed = clock.lap()
    assert 2 / 0.2 < speed.steps <= 2 / 0.02
    assert speed.tokens == pytest.approx(10 * speed.steps)
    with clock.paused(steps=1, tokens=7):
        pass
    speed = clock.lap()
    assert speed.steps > 5, "a lap begins where the last one ended"
    assert speed.tokens == pytest.approx(7 * speed.steps)


def test_a_dense_run_has_no_balancing(program):
    [line] = numbers(program("--moe-freq", "0", "--steps", "1"))
    assert line["layers"] == []
    assert not {"loss/load_balance", "load_balancing_loss"} & set(line)


def test_a_coefficient_that_the_router_learns_is_written_down(program):
    folder = program("--recipe", "remoe", "--steps", "2")
    lines = numbers(folder)
    coefficients = [layer["l1_coefficient"] for line in lines for layer in line["layers"]]
    assert len(set(coefficients)) > 1
    assert all(0 < coefficient < 1 for coefficient in coefficients)
    assert all("load_balancing_loss" not in line and line["loss/l1"] > 0 for line in lines)
    losses = json.loads((folder / "results.json").read_text())["method"]["losses"]
    assert losses["l1"]["coefficient"] == "l1_coefficient"


@pytest.mark.parametrize(("recipe", "said"), [("base_sinkhorn", False), ("mixtral", True)])
def test_the_console_speaks_of_balance_where_there_is_such_a_loss(program, capsys, recipe, said):
    program("--recipe", recipe, "--steps", "1")
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert ("balance" in line) is said
    assert "nan" not in line


def test_the_data_log_names_each_sequence_of_each_step(program, interrupt_after):
    interrupt_after(5)
    folder = program("--log-data", "--workers", "1")
    program("--log-data", "--resume", "latest")
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    read = [tuple(sequence) for line in lines for sequence in line["sequences"]]
    assert len(read) == len(set(read)) == 8 * 4, "none is read twice in a pass"
    assert {name for name, _, _, _ in read} == {"prose", "code"}
    assert sum(name == "prose" for name, _, _, _ in read) == 24, "three quarters"
    assert {shard for _, _, shard, _ in read} <= {"00000000.tar", "00000001.tar", "00000002.tar"}
    assert {data_pass for _, data_pass, _, _ in read} == {0}


def test_the_data_log_names_shards_as_the_manifest_does(program, shards, tmp_path):
    lines = []
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        shutil.copy(shards.train[0].parent / "00000000.tar", tmp_path / name)
        lines.append(json.dumps({"shard": f"{name}/00000000", "num_sequences": 20}))
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    data = ["--dataset-manifest", str(tmp_path / "manifest.jsonl"), "--val-manifest", "--train-data-mix-weights", "1"]
    folder = program(*data, "--log-data", "--steps", "5", "--batch-size", "8")
    read = [json.loads(line)["sequences"] for line in (folder / "data.jsonl").read_text().splitlines()]
    places = {(shard, member) for step in read for _, _, shard, member in step}
    assert places == {(f"{name}/00000000.tar", member) for name in "xy" for member in range(20)}


def test_a_step_whose_validation_fails_is_in_the_data_log(program, monkeypatch):
    def fail(run, *, tokens):
        raise ShardError("it is cut short")

    flags = ["--log-data", "--val-every-n-steps", "3", "--steps", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", fail)
        with pytest.raises(SystemExit, match="it is cut short"):
            program(*flags)
    folder = program(*flags, "--resume", "latest")
    for name in ("metrics.jsonl", "data.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4], name


def test_without_the_flag_there_is_no_data_log(program):
    assert not (program("--steps", "1") / "data.jsonl").exists()


def test_trackers_get_the_metrics_of_a_run(program, monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = ["--report-to", "tensorboard,wandb", "--wandb-project-name", "moe", "--steps", "3"]
    folder = program(*flags, "--val-every-n-steps", "2")
    metrics = numbers(folder)
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    points = [(point.step, point.value) for point in board.Scalars("train/loss")]
    assert points == [(line["step"], pytest.approx(line["loss"])) for line in metrics]
    assert "valid/prose/loss" in board.Tags()["scalars"]
    [offline] = (folder / "wandb").glob("offline-run-*")
    assert any(path.suffix == ".wandb" and path.stat().st_size > 0 for path in offline.iterdir())


def test_an_unknown_tracker_is_refused_before_anything_is_written(program, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        program("--report-to", "wandbb")
    assert "did you mean 'wandb'" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "logs").exists()


def test_the_settings_of_a_run_repeat_it(program, shards, tmp_path, capsys):
    flags = [
        "--recipe",
        "deepseek_moe",
        "--moe-loss-weight",
        "0.02",
        "--accum-freq",
        "2",
        "--seed",
        "7",
        "--wd",
        "0.02",
    ]
    first = program(*flags, "--val-every-n-steps", "4", "--save-every-n-steps", "4", "--log-data")
    main(["--config", str(first / "config.json"), "--name", "again", "--logs", str(tmp_path / "elsewhere")])
    again = tmp_path / "elsewhere" / "again"
    assert numbers(again) == numbers(first)
    assert (again / "data.jsonl").read_bytes() == (first / "data.jsonl").read_bytes()
    for step in (4, 8):
        assert differing(*(tensors_of(checkpoint_folder(run, step)) for run in (first, again))) == []
    configs = [json.loads((run / "config.json").read_text()) for run in (first, again)]
    different = {name for name in {*configs[0], *configs[1]} if configs[0].get(name) != configs[1].get(name)}
    assert different == {"name", "logs"}
    main(["--config", str(first / "config.json"), "--name", "c", "--seed", "8"])  # a flag wins over the file
    assert losses(numbers(tmp_path / "logs" / "c")) != losses(numbers(first))


def test_flags_beside_the_settings_of_a_run_win_over_what_it_filled_in(program, capsys):
    first = program("--steps", "2", "--recipe", "openlm")

    def again(config, name, *flags):
        main(["--config", str(config), "--name", name, *flags])
        return first.with_name(name) / "config.json"

    def written(config, *names):
        values = json.loads(config.read_text())
        return tuple(values[name] for name in names)

    cooled = again(first / "config.json", "b", "--lr", "1e-5", "--steps", "20")
    assert written(cooled, "lr_cooldown_end", "warmup", "global_batch_size") == (pytest.approx(2e-7), 2, 4)
    assert written(first / "config.json", "derived") == written(cooled, "derived"), "although the file gave them"
    other = again(cooled, "c", "--recipe", "mixtral", "--batch-size", "8", "--train-num-samples", "1024")
    assert written(other, "global_batch_size", "steps", "warmup", "train_num_samples") == (8, None, 0, 1024)
    assert written(other, "moe_top_k", "moe_capacity_factor", "moe_loss_weight") == (2, None, 0.02)
    assert [line["step"] for line in numbers(other.parent)] == [1, 2]
    dense = again(other, "d", "--moe-freq", "0")
    assert written(dense, "moe_top_k", "moe_capacity_factor", "moe_loss_weight") == (None, None, None)
    said = capsys.readouterr().out
    assert "has no effect" not in said
    assert "did not write which settings" not in said
    values = json.loads(other.read_text())
    del values["derived"]
    other.write_text(json.dumps(values))
    old = again(other, "e", "--recipe", "openlm")
    assert written(old, "moe_loss_weight") == (0.02,)
    said = " ".join(capsys.readouterr().out.split())
    assert f"warning: --config {other} is of a version that did not" in said
    assert "keeps --moe-loss-weight 0.02, --moe-top-k 2, which" in said


def test_data_that_do_not_last_are_refused_before_step_0(shards, tmp_path):
    flags = [flag for flag in words(shards, tmp_path / "logs", "--steps", "20") if flag != "--multiple-data-passes"]
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    message = str(stopped.value)
    assert message.startswith("train_moe.py: the run takes 80 sequences, more than one pass over the data can give:")
    assert "prose/manifest.jsonl: 60 needed, 48 there (12 short)" in message
    assert "code/manifest.jsonl: 20 needed, 48 there\n" in message
    assert "--multiple-data-passes" in message
    assert not (tmp_path / "logs").exists()
    main([*flags, "--steps", "16"])
    assert len(numbers(tmp_path / "logs" / "a")) == 16


def test_numbers_of_a_device_are_those_of_all_ranks_over_their_number(program, monkeypatch):
    seen = []
    record = recording.Recorder.step

    def keeping(self, result, progress, **options):
        seen.append((self._run, result, progress, options["speed"]))
        record(self, result, progress, **options)

    monkeypatch.setattr(recording.Recorder, "step", keeping)
    monkeypatch.setattr(recording, "_PEAK", {recording.device_name(one_process().device): 1e12})
    program("--steps", "1")
    run, result, progress, speed = seen[-1]
    four = run._replace(world=run.world._replace(size=4))
    alone, together = (
        recording.step_metrics(each, result, progress, speed=speed, data_time=0.0) for each in (run, four)
    )
    for name, share in (("tokens_per_second", 1), ("samples_per_second_per_gpu", 0.25), ("mfu", 0.25)):
        assert together[name] == pytest.approx(share * alone[name], rel=1e-3)
    assert together["mfu"] == recording.utilization(four, speed.tokens)


@pytest.fixture
def bad_data(tmp_path):
    """A source in which every fourth sequence is too short, and a validation set with one id out of the vocabulary."""
    rows = markov_sequences(40, first=0, seed=1).tolist()
    for number in range(0, 40, 4):
        rows[number] = rows[number][:10]
    held_out = markov_sequences(6, first=0, seed=2).tolist()
    held_out[2][5] = 512
    return [
        *("--dataset-manifest", str(write_shards(tmp_path / "bad" / "train", rows, sequences_per_shard=16))),
        *("--val-manifest", str(write_shards(tmp_path / "bad" / "val", held_out))),
        *("--model", "moekit_tiny", "--precision", "fp32", "--batch-size", "4", "--log-every-n-steps", "3"),
        *("--logs", str(tmp_path / "logs"), "--name", "a", "--steps", "8", "--log-data"),
    ]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_bad_data_stop_the_run_with_one_message(bad_data, tmp_path, workers, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*bad_data, "--workers", workers])
    message = str(stopped.value)
    assert message.startswith("train_moe.py: ")
    assert "00000" in message
    assert "has 10 tokens; expected" in message
    assert message.endswith("To leave out bad data and count it, add --on-bad-data skip")
    assert "Traceback" not in message + capsys.readouterr().out
    # What was trained before the bad sequence was met is saved.
    trained = len((tmp_path / "logs" / "a" / "data.jsonl").read_text().splitlines())
    saved = [path.name for path in (tmp_path / "logs" / "a").glob("checkpoints/*")]
    assert saved == ([f"step_{trained:08d}"] if trained else [])


def test_bad_data_are_left_out_and_counted(bad_data, tmp_path, capsys):
    main([*bad_data, "--on-bad-data", "skip"])
    assert "no bigrams and unigrams" not in " ".join(capsys.readouterr().out.split())
    folder = tmp_path / "logs" / "a"
    lines = numbers(folder)
    counts = [line["skipped_data"].get("short sequence", 0) for line in lines]
    assert [line["step"] for line in lines] == [3, 6, 8]
    read = [json.loads(line)["sequences"] for line in (folder / "data.jsonl").read_text().splitlines()]
    # Every fourth member is bad, in each tar of 16.
    bad = [sum(place % 4 == 0 for _, _, _, place in step) for step in read]
    assert counts == [sum(bad[: line["step"]]) for line in lines]
    assert counts[-1] > 4
    assert read_state(checkpoint_folder(folder, 8))["skipped_data"] == {"short sequence": counts[-1]}
    [results] = json.loads((folder / "results.json").read_text())["validation"].values()
    assert results["skipped_data"] == {"id outside vocabulary": 1}
    assert results["sequences"] == 5
    good = [row for number, row in enumerate(markov_sequences(40, first=0, seed=1)) if number % 4]
    scored = [row for number, row in enumerate(markov_sequences(6, first=0, seed=2)) if number != 2]
    assert results["unigram"] == unigram_loss(torch.stack(good), torch.stack(scored), vocab_size=512)
    assert all(torch.tensor(losses(lines)).isfinite())


def test_sequences_of_a_shard_that_is_empty_by_its_manifest_are_counted_once(program, shards, tmp_path):
    folder = shutil.copytree(shards.train[0].parent, tmp_path / "data")
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    lines[-1]["num_sequences"] = 0
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--dataset-manifest", str(folder / "manifest.jsonl"), "--val-manifest", "--train-data-mix-weights", "1"]
    with pytest.raises(SystemExit, match=r"holds 8 sequences; its manifest says 0\..*add --on-bad-data skip"):
        program(*flags)
    assert not (tmp_path / "logs" / "a" / "config.json").exists()
    flags += ["--on-bad-data", "skip", "--steps"]
    program(*flags, "1")
    lines = numbers(program(*flags, "2", "--resume", "latest"))
    assert [line["skipped_data"] for line in lines] == 2 * [{"surplus sequences": 8}]


def test_holes_and_padding_are_no_tokens(bad_data, tmp_path, capsys):
    """Of every four sequences one is too short, so that a batch of four has room for 256 tokens, and a hole or none."""
    main([*bad_data, "--on-bad-data", "skip", "--log-every-n-steps", "1"])
    said = " ".join(capsys.readouterr().out.split())
    lines = read_metrics(tmp_path / "logs" / "a" / "metrics.jsonl")
    skipped = [0, *(line["skipped_data"].get("short sequence", 0) for line in lines)]
    there = [256 - 64 * (after - before) for before, after in pairwise(skipped)]
    assert [line["step_tokens"] for line in lines] == there
    assert [line["tokens"] for line in lines] == [256 * step for step in range(1, 9)], "what the steps have room for"
    rates = [line["tokens_per_second"] * line["batch_time"] for line in lines]
    assert rates == pytest.approx(there, rel=1e-2)
    results = json.loads((tmp_path / "logs" / "a" / "results.json").read_text())
    assert (results["tokens"], results["trained_tokens"]) == (8 * 256, sum(there))
    assert sum(there) < 8 * 256
    assert f"2,048 tokens by its steps, {sum(there):,} of them trained on, in " in said


def test_padded_sequences_are_trained_on_and_scored(tmp_path, capsys):
    rows = markov_sequences(40, first=0, seed=1)
    rows[::3, 40:] = -1
    manifests = [str(write_shards(tmp_path / name, part)) for name, part in (("train", rows), ("val", rows[:6]))]
    flags = ["--model", "moekit_tiny", "--precision", "fp32", "--steps", "2", "--batch-size", "4", "--name", "a"]
    main([*flags, "--dataset-manifest", manifests[0], "--val-manifest", manifests[1], "--logs", str(tmp_path / "logs")])
    results = json.loads((tmp_path / "logs" / "a" / "results.json").read_text())["validation"]
    [scores] = results.values()
    assert scores["tokens"] == 4 * 64 + 2 * 39
    trained = json.loads((tmp_path / "logs" / "a" / "results.json").read_text())["trained_tokens"]
    assert trained < 2 * 256
    assert (2 * 256 - trained) % 25 == 0, "the padding of a whole number of sequences"
    assert "no bigrams and unigrams" not in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("step", [2, 5])  # neither is reported
def test_counts_of_bad_data_go_on_over_a_resume(bad_data, interrupt_after, tmp_path, step):
    main([*bad_data, "--on-bad-data", "skip", "--name", "unbroken"])
    interrupt_after(step)
    with pytest.raises(SystemExit, match="130"):
        main([*bad_data, "--on-bad-data", "skip", "--workers", "1"])
    main([*bad_data, "--on-bad-data", "skip", "--resume", "latest"])
    runs = [tmp_path / "logs" / name for name in ("unbroken", "a")]
    assert numbers(runs[0]) == numbers(runs[1])
    states = [read_state(checkpoint_folder(run, 8)) for run in runs]
    assert states[0]["skipped_data"] == states[1]["skipped_data"]
