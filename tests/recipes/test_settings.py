import dataclasses
from pathlib import Path

import pytest

from moekit.recipes.configuration import parse_settings
from moekit.recipes.settings import DataSettings, OptimizerSettings, RunSettings, TrainSettings
from moekit.recipes.stored_settings import flat_settings


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


@pytest.mark.parametrize("preset", ["--preset", "--model"])
def test_flags_are_flat_and_typed(preset):
    words = f"{preset} open_lm_41m --dataset-manifest a/m.jsonl b/m.jsonl --steps 7 --lr 1e-2 --name x --logs runs"
    settings = parse_settings([*words.split(), "--train-data-mix-weights", "0.725", "0.275", "--describe"])
    assert settings.model.preset == "open_lm_41m"
    assert settings.data.dataset_manifest == ("a/m.jsonl", "b/m.jsonl")
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
        (["--warmup", "-1"], "--warmup is -1; expected at least 0"),
        (["--resume", "latest"], "--resume latest needs the --name of the run to go on with"),
    ],
)
def test_a_contradiction_is_explained_on_the_command_line(capsys, arguments, message):
    assert message in failing_words(capsys, arguments)


def test_contradictions_are_errors_from_python_too():
    with pytest.raises(ValueError, match="--steps is 0"):
        TrainSettings(optimizer=OptimizerSettings(steps=0))


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as raised:
        parse_settings(["--help"], prog="train_moe.py")
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert "usage: train_moe.py" in text
    for name in flat_settings(TrainSettings()):
        assert f"--{name.replace('_', '-')}" in text


def test_no_group_hides_a_name_of_another():
    groups = [getattr(TrainSettings(), each.name) for each in dataclasses.fields(TrainSettings)]
    names = ["model" if name == "preset" else name for group in groups for name in vars(group)]
    assert len(names) == len(set(names))


def test_a_contradiction_that_the_parser_lets_through_is_explained_too(capsys, monkeypatch):
    def cli(kind, **_):
        return kind(optimizer=OptimizerSettings(steps=0))  # as tyro before 1.0.16, which does not catch what it raises

    monkeypatch.setattr("tyro.cli", cli)
    with pytest.raises(SystemExit) as raised:
        parse_settings(["--steps", "0"], prog="train_moe.py")
    assert raised.value.code == 2
    assert capsys.readouterr() == ("", "train_moe.py: --steps is 0; expected a positive number\n")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (DataSettings(val_data=("v.tar",)), True),
        (DataSettings(val_manifest=("v.jsonl",)), True),
        (DataSettings(val_data=("v.tar",), dataset_manifest=("m.jsonl",)), False),
        (DataSettings(dataset_manifest=("m.jsonl",)), False),
        (DataSettings(), False),
    ],
)
def test_validation_data_without_training_data_are_only_scored(data, expected):
    assert TrainSettings(data=data, run=RunSettings(resume="x.pt")).evaluates_only is expected
