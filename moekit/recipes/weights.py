"""Checkpoints by name, ours and others', and the weights in them."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moekit.lm.checkpoints import latest_checkpoint, load_checkpoint, read_state
from moekit.lm.configs import ModelConfig
from moekit.lm.model import LanguageModel
from moekit.lm.openlm_checkpoints import from_openlm, read_openlm
from moekit.lm.openlm_names import TIED, check_tensors, check_tied
from moekit.lm.tensor_files import read_metadata, read_safetensors
from moekit.parallel import World, fill


def find_checkpoint(resume: str) -> Path:
    """Find what ``--resume`` names.

    Args:
        resume: a checkpoint folder, a run folder (its newest checkpoint), a .pt or .safetensors file, or
            ``checkpoints/epoch_N.pt`` of one of our runs, as OpenLM names it: the checkpoint at the end of epoch N.

    Returns:
        A folder of ours, or a file.

    Raises:
        FileNotFoundError: if there is nothing of the kind.
    """
    path = Path(resume)
    if os.path.isfile(path):  # unlike Path's own, False also for a name that is too long
        return path
    if os.path.isdir(path):
        newest = newest_of(path)
        read_state(newest)  # says what is expected if it is none
        return newest
    epoch = re.fullmatch(r"epoch_(\d+)(\.pt)?", path.name)
    if epoch:
        for folder in sorted(path.parent.glob("step_*"), reverse=True):
            with suppress(ValueError, FileNotFoundError):  # a neighbour that is damaged, or somebody's copy
                if int(epoch[1]) in _epochs_ended(read_state(folder)):
                    return folder
    raise FileNotFoundError(
        f"--resume {resume}: there is no such checkpoint. Expected a folder step_NNNNNNNN of a run, the run's folder, "
        "or a .pt or .safetensors file"
    )


def newest_of(folder: Path) -> Path:
    """Return the newest checkpoint of a run; of anything else, itself.

    Args:
        folder: of a run, or a checkpoint.

    Returns:
        A folder, which may be none.

    Raises:
        FileNotFoundError: if the run has no complete checkpoint, or none that can be read.
    """
    if not (folder / "checkpoints").is_dir():
        return folder
    newest = latest_checkpoint(folder)
    if newest is None:
        if any((folder / "checkpoints").glob("step_*")):
            raise FileNotFoundError(
                f"no checkpoint of the run {folder} can be read: each is incomplete, damaged or without checksums, as "
                "the warnings say. Name another run, or load one that is of an older version with that version"
            )
        raise FileNotFoundError(
            f"the run {folder} has no complete checkpoint yet; expected a folder step_NNNNNNNN in its checkpoints. Let "
            "it train until it has saved one, or name another run"
        )
    return newest


def _epochs_ended(state: Mapping[str, Any]) -> list[Any]:
    """Say which epochs ended with a checkpoint's last step; of an older version it names the last of them alone."""
    found = state.get("ends_epochs", [state.get("epoch")] if state.get("ends_epoch") else [])
    return found if isinstance(found, list) else []


def load_weights(model: LanguageModel, path: Path, world: World) -> dict[str, Any]:
    """Load the weights of a checkpoint, ours or OpenLM's, and nothing else. All ranks call it together.

    Args:
        model: changed in place.
        path: a checkpoint folder, a .pt file of OpenLM's, or a .safetensors file.
        world: the ranks.

    Returns:
        What the checkpoint says beside tensors; ``step`` if it is known, ``settings`` and ``config`` if it is ours, or
            ``recipe`` if it is OpenLM's, whose layout is of that one alone.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it does not fit the model, or is damaged.
    """
    own = model.state_dict()
    if path.is_dir():
        state = load_checkpoint(path, {f"model.{name}": tensor for name, tensor in own.items()})
        return state
    shapes = {name: tensor.shape for name, tensor in own.items()}
    if path.suffix == ".safetensors":
        tensors, known = read_safetensors(path), _described(path)
        if model.config.weight_tying:  # the file may leave one of the two out
            both = [tensors[name] for name in TIED if name in tensors]
            tensors |= dict(zip(TIED, (both[0], both[-1]), strict=True)) if both else {}
        with naming(path):
            check_tensors(tensors, shapes, integers=[name for name in own if not own[name].is_floating_point()])
            if model.config.weight_tying:
                check_tied(tensors)
    else:
        checkpoint = read_openlm(path)
        with naming(path):
            tensors = from_openlm(checkpoint.state_dict, expected=shapes, config=model.config)
        known = {"step": checkpoint.step, "epoch": checkpoint.epoch, "name": checkpoint.name, "recipe": "openlm"}
    for name, tensor in own.items():
        fill(tensor, tensors[name])
    return {key: value for key, value in known.items() if value is not None}


def stored_config(state: Mapping[str, Any]) -> ModelConfig | None:
    """Read a model's shape out of what a checkpoint says beside its tensors.

    Args:
        state: of the checkpoint.

    Returns:
        ModelConfig; None if it does not say it, as those of older versions.

    Raises:
        ValueError: if it says something else.

    Example:
        >>> stored_config({"step": 3}) is None
        True
    """
    values = state.get("config")
    if values is None:
        return None
    try:
        return ModelConfig(**values)
    except (TypeError, ValueError) as error:  # the first of keys that are none
        raise ValueError(
            f"the checkpoint's config, the shape of its model, makes none: {error}. It was changed, is damaged or "
            f"of another version of moekit. Take another checkpoint"
        ) from error


def _described(path: Path) -> dict[str, Any]:
    """Read what `moekit export` wrote beside tensors; nothing of a file of somebody else's."""
    metadata = read_metadata(path)
    if "moekit" not in metadata:
        return {}
    try:
        return {name: json.loads(metadata[name]) for name in ("settings", "config", "step") if name in metadata}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata are no JSON: {error}. Export the checkpoint again.") from error


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Put into an error what it is about.

    Args:
        what: the file or folder.

    Raises:
        ValueError: the same error with ``what`` before its words.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
