"""Settings as a run stores them: flat, by flag name, in checkpoints and in its folder."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moekit.lm.files import write_whole
from moekit.recipes.derived import DERIVED
from moekit.recipes.settings import ModelSettings, TrainSettings
from moekit.recipes.wording import no_place

_NOT_WRITTEN = frozenset({"config", "resume", "describe", "world_size"})  # of one launch, not of the run
_RENAMED = {"preset": "model"}  # field to flag


def flat_settings(settings: TrainSettings) -> dict[str, Any]:
    """List all settings by flag name, sorted, in plain values that JSON and text can hold.

    Args:
        settings: to list.

    Returns:
        Name to value; flags without effect are left out, unless they were given.

    Example:
        >>> flat = flat_settings(TrainSettings())
        >>> flat["moe_num_experts"], flat["model"], "trace" in flat
        (8, 'moekit_cpu', False)
    """
    groups = (getattr(settings, group.name) for group in dataclasses.fields(settings) if group.name != "legacy")
    values = {_RENAMED.get(name, name): value for group in groups for name, value in vars(group).items()}
    legacy = settings.legacy
    values |= {each.name: given for each in dataclasses.fields(legacy) if (given := getattr(legacy, each.name))}
    return {name: _plain(values[name]) for name in sorted(values)}


def stored_model(values: Mapping[str, Any]) -> ModelSettings:
    """Pick a model's settings out of what ``flat_settings`` listed, as they are in a checkpoint.

    Args:
        values: name to value; others are left out, and what is not there takes its default.

    Returns:
        ModelSettings.

    Raises:
        ValueError: if a value is of another kind than the setting.

    Example:
        >>> stored_model({"model": "open_lm_41m", "moe_top_k": 4, "lr": 1e-3}).preset
        'open_lm_41m'
    """
    known, fields = {field.name for field in dataclasses.fields(ModelSettings)}, {v: k for k, v in _RENAMED.items()}
    given = {fields.get(name, name): value for name, value in values.items()}
    given = {name: value for name, value in given.items() if name in known}
    hints = get_type_hints(ModelSettings)
    for name, value in given.items():
        if not _is_of(value, hints[name]):
            raise ValueError(
                f"the checkpoint's settings say {_RENAMED.get(name, name)} = {value!r}, which is no value of that "
                f"setting; its state.json was changed or is damaged. Take another checkpoint"
            )
    return ModelSettings(**given)


def write_config(folder: Path, settings: TrainSettings, *, derived: Collection[str] = ()) -> Path:
    """Write a run's settings, resolved, as ``config.json``, which ``--config`` reads; and as OpenLM's ``params.txt``.

    Args:
        folder: of the run; made if need be.
        settings: of the run.
        derived: names of those that nobody gave, for ``config.json``.

    Returns:
        The path of ``config.json``.

    Raises:
        OSError: if the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(no_place(folder, error)) from error
    values = flat_settings(settings)
    write_whole(folder / "params.txt", "".join(f"{name}: {value}\n" for name, value in values.items()))
    kept = {name: value for name, value in values.items() if name not in _NOT_WRITTEN}
    kept |= {DERIVED: [name for name in kept if name in derived]}
    return write_whole(folder / "config.json", json.dumps(kept, indent=1) + "\n")


def _is_of(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kinds = get_args(hint) or (hint,)
    also = (int,) if float in kinds else ()
    return isinstance(value, (*kinds, *also)) or (value is None and hint is not str)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
