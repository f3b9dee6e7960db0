"""What an ablation finds out before its first run: what is wrong there is so in every run, and ends it at once."""

import json
from collections.abc import Collection, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

from rich.console import Console

from moekit.lm.consoles import print_lines
from moekit.lm.files import read_object, write_whole
from moekit.recipes.ablation_recipes import other_recipe
from moekit.recipes.ablation_runs import Job
from moekit.recipes.budgets import make_budget
from moekit.recipes.settings import TrainSettings
from moekit.recipes.settings_legacy import LegacySettings
from moekit.recipes.setup import check_model, make_config
from moekit.recipes.sources import check_lasts, make_corpus
from moekit.recipes.stored_settings import flat_settings

_OWN = frozenset({"steps", "recipe", "seed", "name", "logs", "resume", "describe", "world_size"})
_WHERE_TO = "put a whole one back, or choose another --folder"
_NOT_SHARED = frozenset({"recipe", "seed", "name", "logs", "resume", "describe", "world_size", "config"})


def check_words(words: Sequence[str]) -> None:
    """Refuse flags that the ablation sets for every run.

    Args:
        words: of the training program.

    Raises:
        ValueError: if one of them is among those.
    """
    for word in words:
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--") and name in _OWN:
            raise ValueError(
                f"{word} was given after `--`, but the ablation sets it for every run; give its own flags before the "
                f"`--`: --steps, --seeds, --recipe, --folder"
            )


def check_recipe(job: Job) -> None:
    """Find out before the first run whether a router fits the model.

    Args:
        job: any run of it.

    Raises:
        ValueError: if it does not.
    """
    try:
        check_model(job.settings.model)
    except ValueError as error:
        raise ValueError(f"{job.label}: {error}") from error


def check_data(settings: TrainSettings, console: Console) -> None:
    """Find the data, or prepare them, and find out whether they last: what is wrong with them is so in every run.

    Args:
        settings: of any run.
        console: where to say what takes time.

    Raises:
        ValueError: if they make no sense, or there are none to compare routers on.
        FileNotFoundError: if they are not there.
    """
    config = make_config(settings.model)
    corpus = make_corpus(settings, config, say=partial(print_lines, console))
    if not corpus.validation:
        raise ValueError(
            "there are no validation data, and routers are compared by their losses on such data; give after the `--` "
            "one --val-manifest for each --dataset-manifest, or --val-data"
        )
    check_lasts(corpus, make_budget(settings, seq_len=config.seq_len, world_size=1))


def settle_folder(folder: Path, settings: TrainSettings) -> None:
    """Write down the settings that all runs of a folder share, or compare them with what is there.

    A setting that the file of an older version lacks counts as its default.

    Args:
        folder: of the ablation; made if need be.
        settings: of any run.

    Raises:
        ValueError: if the folder holds runs with other settings, or of another version, or something else.
    """
    path = folder / "settings.json"
    shared = {name: value for name, value in flat_settings(settings).items() if name not in _NOT_SHARED}
    if not path.exists():
        if folder.exists() and any(not each.name.startswith(".") for each in folder.iterdir()):
            raise ValueError(f"--folder {folder} holds something that is no ablation; choose another --folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(shared, indent=1) + "\n")
        return
    written = read_object(path, expected="the runs' settings", mend=f"; {_WHERE_TO}")
    _refuse_unknown(written, path)
    before = {**flat_settings(TrainSettings()), **written}  # the file of an older version lacks newer settings
    names = sorted(name for name in {*written, *shared} if before.get(name) != shared.get(name))
    if names:
        told = ", ".join(f"--{name.replace('_', '-')} {before.get(name)} (now {shared.get(name)})" for name in names)
        raise ValueError(
            f"{folder} holds runs with {told}; rows of a table share their settings. Give the same again, or choose "
            f"another --folder"
        )


def _refuse_unknown(written: Collection[str], path: Path) -> None:
    """Refuse a file with names that are no settings of this version."""
    known = {*flat_settings(TrainSettings()), *(field.name for field in fields(LegacySettings))}
    if unknown := sorted(set(written) - known):
        raise ValueError(
            f"{path} holds {', '.join(unknown)}, which this version of moekit does not have: the runs are of another "
            f"version. Go on with that one, or choose another --folder"
        )


def refuse_other_recipes(jobs: Sequence[Job]) -> None:
    """Refuse a folder that holds runs with the labels of these, of other recipes.

    Args:
        jobs: all runs.

    Raises:
        ValueError: if it does.
    """
    for job in jobs:
        if (other := other_recipe(job.folder, job.settings.model.recipe)) is not None:
            raise ValueError(other)
