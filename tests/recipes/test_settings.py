import json
from pathlib import Path

import pytest

from moekit.recipes.settings import OptimizerSettings, TrainSettings, flat_settings, parse_settings


def failing_words(capsys, arguments):
    """Parse, expect failure, and return what was said as one line of words, without the box around it."""
    with pytest.raises(SystemExit) as raised:
        parse_settings(arguments)
    assert raised.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return " ".join("".join(c for c in captured.err if c not in "│╭╮╰╯─").split())


def test_no_flags_give_the_defaults():
    assert parse_settings([]) == TrainSettings()


def test_flags_are_flat_and_typed():
    words = "--preset open_lm_41m --dataset-manifest a/m.jsonl b/m.jsonl --steps 7 --lr 1e-2 --name x --logs runs"
    settings = parse_settings([*words.split(), "--train-data-mix-weights", "0.725", "0.275", "--describe"])
    assert settings.model.preset == "open_lm_41m"
    assert settings.data.dataset_manifest == (Path("a/m.jsonl"), Path("b/m.jsonl"))
    assert settings.data.train_data_mix_weights == (0.725, 0.275)
    assert settings.optimizer.steps == 7
    assert settings.optimizer.lr == 0.01
    assert (settings.run.name, settings.run.logs, settings.run.describe) == ("x", Path("runs"), True)


def test_dashes_and_underscores_mean_the_same():
    dashes = parse_settings(["--moe-num-experts", "4", "--moe-capacity-factor", "0", "--no-describe"])
    underscores = parse_settings(["--moe_num_experts", "4", "--moe_capacity_factor=0", "--no_describe"])
    assert dashes == underscores
    assert dashes.model.moe_num_experts == 4
    assert dashes.model.moe_capacity_factor == 0.0


def test_of_a_flag_given_twice_the_last_counts():
    assert parse_settings(["--name", "a", "--resume", "a/step_00000001", "--resume", "latest"]).run.resume == "latest"


@pytest.mark.parametrize(
    ("given", "near"),
    [("--stpes", "--steps"), ("--moe-num-expert", "--moe-num-experts"), ("--batchsize", "--batch-size")],
)
def test_a_mistyped_flag_gets_a_hint(capsys, given, near):
    words = failing_words(capsys, [given, "3"])
    assert f"Unrecognized options: {given}" in words
    assert f"Perhaps you meant: {near} " in words


def test_a_value_of_the_wrong_type_is_named(capsys):
    words = failing_words(capsys, ["--steps", "many"])
    assert "--steps" in words
    assert "many" in words
    assert "fp32" in failing_words(capsys, ["--precision", "fp61"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0; expected a positive number"),
        (["--batch-size", "-2"], "--batch-size is -2; expected a positive number"),
        (["--lr", "0"], "--lr is 0.0; expected a positive number"),
        (["--log-every-n-steps", "0"], "--log-every-n-steps is 0; expected a positive number"),
        (["--val-every-n-steps", "-1"], "--val-every-n-steps is -1; expected a positive number"),
        (["--steps", "5", "--warmup", "5"], "--warmup is 5; expected at least 0 and less than --steps = 5"),
        (["--warmup", "-1"], "--warmup is -1; expected at least 0"),
        (["--moe-capacity-factor", "-0.5"], "--moe-capacity-factor is -0.5; expected at least 0 (0 means dropless)"),
        (["--resume", "latest"], "--resume latest needs the --name of the run to go on with"),
        (["--val-manifest", "v.jsonl"], "--val-manifest goes with --dataset-manifest"),
        (["--name", "a/b"], "--name is 'a/b'; expected a plain folder name"),
        (["--name", ""], "--name is ''; expected a plain folder name"),
        (["--name", ".."], "--name is '..'; expected a plain folder name"),
    ],
)
def test_a_contradiction_is_explained(capsys, arguments, message):
    assert message in failing_words(capsys, arguments)


def test_contradictions_are_errors_from_python_too():
    with pytest.raises(ValueError, match="--steps is 0"):
        TrainSettings(optimizer=OptimizerSettings(steps=0))


def test_warmup_defaults_to_a_tenth():
    assert OptimizerSettings(steps=600).warmup_steps == 60
    assert OptimizerSettings(steps=9).warmup_steps == 0
    assert OptimizerSettings(steps=600, warmup=0).warmup_steps == 0


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as raised:
        parse_settings(["--help"], prog="train_moe.py")
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert "usage: train_moe.py" in text
    for name in flat_settings(TrainSettings()):
        assert f"--{name.replace('_', '-')}" in text


def test_flat_settings_are_sorted_plain_and_complete():
    arguments = ["--dataset-manifest", "a/m.jsonl", "--logs", "runs", "--moe-capacity-factor", "1.5"]
    flat = flat_settings(parse_settings(arguments))
    assert list(flat) == sorted(flat)
    assert json.loads(json.dumps(flat)) == flat
    assert flat["dataset_manifest"] == ["a/m.jsonl"]
    assert flat["logs"] == "runs"
    assert flat["moe_capacity_factor"] == 1.5
    groups = TrainSettings()
    sizes = [len(vars(group)) for group in (groups.model, groups.data, groups.optimizer, groups.run)]
    assert len(flat) == sum(sizes)  # no group hides a name of another
