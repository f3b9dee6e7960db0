"""docs/openlm.md: it lists every flag of the training program, and none that is not there."""

import re
from dataclasses import fields
from pathlib import Path

from moekit.recipes.configuration import parse_settings
from moekit.recipes.settings import TrainSettings
from moekit.recipes.settings_legacy import LegacySettings, without_effect
from moekit.recipes.stored_settings import flat_settings

TEXT = (Path(__file__).parents[2] / "docs/openlm.md").read_text(encoding="utf-8")
SECTION = re.split(r"^## ", TEXT.split("\n## Every flag\n")[1], flags=re.MULTILINE)[0]
LISTED = {flag for code in re.findall(r"`(--[^`]*)`", SECTION) for flag in re.findall(r"--[a-z0-9-]+", code)}


def test_no_flag_is_missing_and_none_is_listed_that_is_not_there():
    assert parse_settings(["--preset", "moekit_tiny"]) == parse_settings(["--model", "moekit_tiny"])
    names = [*flat_settings(TrainSettings()), *(each.name for each in fields(LegacySettings)), "preset"]
    assert {"--" + name.replace("_", "-") for name in names} == LISTED


def test_flags_without_effect_and_refused_ones_are_listed_as_such():
    accepted, refused = SECTION.split("\n### Accepted, without effect\n")[1].split("\n### Refused\n")
    for each in fields(LegacySettings):
        [place] = [accepted] * len(without_effect(LegacySettings(**{each.name: "given"}))) or [refused]
        assert f"`--{each.name.replace('_', '-')}`" in place, each.name
