import dataclasses
from typing import get_type_hints

import pytest

from moekit.recipes.configuration import parse_settings
from moekit.recipes.settings import TrainSettings
from moekit.recipes.settings_legacy import LegacySettings, without_effect
from moekit.recipes.stored_settings import flat_settings

REFUSED = ("train_data", "dataset_resampled", "dataset_type", "target_mask_left", "target_mask_individual")
REFUSED += ("averagers", "remote_sync")
FIELDS = [each for each in dataclasses.fields(LegacySettings) if each.name not in REFUSED]
HINTS = get_type_hints(LegacySettings)
WORDS = {each.name: "3" for each in dataclasses.fields(LegacySettings) if HINTS[each.name] is not bool}


def flag_words(name):
    flag = "--" + name.replace("_", "-")
    return [flag, WORDS[name]] if name in WORDS else [flag]


@pytest.mark.parametrize("name", [each.name for each in FIELDS])
def test_each_flag_is_accepted_and_answered_in_one_line(name):
    settings = parse_settings(flag_words(name))
    assert dataclasses.replace(settings, legacy=LegacySettings()) == TrainSettings()  # it has no effect, indeed
    [line] = without_effect(settings.legacy)
    assert line.startswith(f"--{name.replace('_', '-')} has no effect: ")
    assert line.endswith(".")
    assert "\n" not in line
    assert len(line) < 140


def test_all_flags_together_are_answered_in_a_line_each():
    settings = parse_settings([word for each in FIELDS for word in flag_words(each.name)])
    lines = without_effect(settings.legacy)
    assert len(lines) == len(FIELDS) == len(set(lines))


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_would_change_the_training_are_refused(name, capsys):
    with pytest.raises(SystemExit):
        parse_settings(flag_words(name))
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"--{name.replace('_', '-')} is not supported: " in said


def test_flags_that_were_not_given_are_not_answered():
    assert without_effect(parse_settings([]).legacy) == []


def test_help_says_that_they_have_no_effect(capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("No effect: ") == len(FIELDS)
    assert text.count("Not supported: ") == len(REFUSED)
    for each in dataclasses.fields(LegacySettings):
        flag = "--" + each.name.replace("_", "-")
        assert f" {flag}" in text


def test_those_that_were_given_are_written_down():
    flat = flat_settings(parse_settings(["--no-skip-tokens", "--optimizer", "adamw"]))
    assert (flat["no_skip_tokens"], flat["optimizer"]) == (True, "adamw")
    assert "trace" not in flat
