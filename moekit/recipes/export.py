"""The program ``moekit export``: a checkpoint becomes one file that other programs read."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from moekit import __version__
from moekit.lm.checkpoints import load_checkpoint, read_state
from moekit.lm.model import LanguageModel
from moekit.lm.openlm_checkpoints import to_openlm, write_openlm
from moekit.lm.signals import exit_on_sigterm
from moekit.lm.streams import print_text
from moekit.lm.tensor_files import write_safetensors
from moekit.recipes.language_models import moe_layers
from moekit.recipes.trained import model_of
from moekit.recipes.weights import newest_of

_SUFFIXES = (".pt", ".safetensors")


@dataclass(frozen=True)
class ExportSettings:
    """Write the weights of a checkpoint into one file, for OpenLM (.pt) or as .safetensors."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, step_NNNNNNNN, or a run folder for its newest."""
    to: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The file; .pt makes an OpenLM checkpoint (openlm recipe or dense), .safetensors holds any model."""
    recipe: str | None = None
    """path/to/file.py:name, for a checkpoint trained with a recipe from a file, whose code this runs."""
    overwrite: bool = False
    """Replace the file if it is there; of a link, the file that it leads to."""


def main(arguments: list[str] | None = None, *, prog: str = "moekit export") -> None:
    """Run the program.

    Args:
        arguments: the words of the command line; None takes ``sys.argv``.
        prog: its name in messages.

    Raises:
        SystemExit: with a message, if it cannot be done; with status 143 at SIGTERM.
    """
    settings = tyro.cli(ExportSettings, args=arguments, prog=prog)
    try:
        with exit_on_sigterm():
            path = export(settings.checkpoint, settings.to, recipe=settings.recipe, overwrite=settings.overwrite)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"{prog}: {error}") from error
    print_text(f"{path}: {path.stat().st_size:,} bytes")


def export(checkpoint: Path, to: Path, *, recipe: str | None = None, overwrite: bool = False) -> Path:
    """Write the weights of a checkpoint into one file, whole or not at all.

    A ``.safetensors`` file has our names, and in its metadata, as JSON, ``config`` (the model's shape), ``settings``
    (all flags of the run) and ``step``. A ``.pt`` file is OpenLM's ``epoch_N.pt`` without an optimizer beside it.

    Args:
        checkpoint: its folder, or a run folder for its newest.
        to: the file; the suffix says of which kind.
        recipe: see ``trained_model``.
        overwrite: replace the file if it is there; of a link, the file that it leads to.

    Returns:
        The path.

    Raises:
        FileExistsError: if the file is there and ``overwrite`` is off.
        FileNotFoundError: if there is no checkpoint, or no folder to write into.
        ValueError: if the suffix is another, the model cannot be rebuilt, or OpenLM has no layout for it.
    """
    if to.suffix not in _SUFFIXES:
        raise ValueError(f"--to is {to}; expected a name that ends in {' or '.join(_SUFFIXES)}")
    if os.path.lexists(to) and (to.is_dir() or not overwrite):
        raise FileExistsError(f"{to} is there already; choose another name, or replace the file with --overwrite")
    folder = Path(os.path.realpath(to)).parent if to.is_symlink() else to.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to write {to.name} into; create it first")
    checkpoint = newest_of(checkpoint)
    model = model_of(checkpoint, recipe=recipe)
    if to.suffix == ".pt":
        _check_method(model, read_state(checkpoint)["settings"].get("recipe"))
    tensors = _empty_like(model)
    state = load_checkpoint(checkpoint, {f"model.{name}": tensor for name, tensor in tensors.items()})
    write = _write_openlm if to.suffix == ".pt" else _write_safetensors
    return write(to, model, tensors, state)


def _empty_like(model: LanguageModel) -> dict[str, Tensor]:
    """Allocate a model's state on the CPU, one tensor for names that are tied."""
    made: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return {name: made[id(tensor)] for name, tensor in state.items()}


def _check_method(model: LanguageModel, recipe: Any) -> None:
    # Other recipes may have the same tensors and compute something else with them.
    if recipe != "openlm" and any(moe_layers(model)):
        raise ValueError(
            f"OpenLM has no layout for the recipe {recipe}: it would read the tensors as those of its own MoE layer. "
            f"Export to a .safetensors file, which can hold them"
        )


def _write_openlm(to: Path, model: LanguageModel, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    theirs = to_openlm(tensors, config=model.config)
    name = state["settings"].get("name")
    return write_openlm(to, theirs, epoch=state.get("epoch", 0), step=state.get("step"), name=name)


def _write_safetensors(to: Path, model: LanguageModel, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    described = {"config": dataclasses.asdict(model.config), "settings": state["settings"], "step": state.get("step")}
    metadata = {name: json.dumps(value) for name, value in described.items()}
    return write_safetensors(to, tensors, metadata={"moekit": __version__, **metadata})
