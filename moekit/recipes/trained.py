"""Models of checkpoints, for Python and notebooks: rebuilt from the shape and the settings that a run stored."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch

from moekit.lm.checkpoints import load_checkpoint, read_state
from moekit.lm.model import LanguageModel
from moekit.recipes.automatic import automatic
from moekit.recipes.language_models import language_model
from moekit.recipes.layers import Recipe
from moekit.recipes.names import RECIPES
from moekit.recipes.routers import PREFIX
from moekit.recipes.setup import make_config, make_evaluation_recipe, make_recipe, with_model_keys
from moekit.recipes.stored_settings import stored_model
from moekit.recipes.weights import newest_of, stored_config


def trained_model(
    checkpoint: str | os.PathLike[str],
    *,
    recipe: str | Recipe | None = None,
    training: bool = False,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """Load the model that a run trained, with its weights and what its routers remember.

    Its layers run as the program scores them: no capacity limit, under which what a token gets depends on who is in its
    batch, and nothing that is drawn for training alone. With fewer ranks than the run had, or another device, it is the
    same model. Its parameters are float32, whatever the precision of the training: those of bf16 or fp16 come back
    exactly.

    Args:
        checkpoint: a checkpoint folder, step_NNNNNNNN, or a run folder for its newest.
        recipe: for a checkpoint whose recipe is in a file, ``path/to/file.py:name`` of that recipe on this machine; its
            code is run. Or the recipe itself, for training and scoring alike, whose layer runs on what ``automatic``
            makes of it.
        training: give it the recipe of its training, with capacity limit, noise and loss weight, to train on. The mode
            of a module, ``model.eval()``, reaches no router.
        device: of the parameters.

    Returns:
        The model, in the mode of ``training``.

    Raises:
        FileNotFoundError: if there is no checkpoint, or it is of an older version and its model's file is not there.
        ValueError: if the checkpoint holds no settings or is damaged, its recipe is in a file and ``recipe`` is None,
            or the device is meta.
        TypeError: if ``recipe`` is something else, as a function that makes one.

    Example:
        >>> import tempfile
        >>> from moekit.lm.checkpoints import save_checkpoint
        >>> from moekit.lm.configs import load_config
        >>> config = load_config("moekit_tiny", moe_freq=2, moe_num_experts=8)
        >>> tensors = language_model(config, RECIPES["openlm"]()).state_dict()  # as `moekit train --model moekit_tiny`
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     place = save_checkpoint(
        ...         f"{folder}/step_00000001",
        ...         {f"model.{name}": tensor for name, tensor in tensors.items()},
        ...         {"step": 1, "settings": {"model": "moekit_tiny", "recipe": "openlm"}},
        ...     )
        ...     model = trained_model(place)
        >>> all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
        True
    """
    if torch.device(device).type == "meta":
        raise ValueError("trained_model: device = meta, which holds no weights; expected cpu or cuda. See model_of.")
    if recipe is not None and not isinstance(recipe, str | Recipe):
        raise TypeError(
            f"trained_model: recipe = {recipe!r}; expected a name, path/to/file.py:name, or a Recipe. A method is "
            f"called: mixtral(), not mixtral."
        )
    folder = newest_of(Path(checkpoint))
    with torch.device(device):
        model = _built(folder, recipe, make_recipe if training else make_evaluation_recipe)
    load_checkpoint(folder, {f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    return model.train(training)


def model_of(checkpoint: Path, *, recipe: str | None = None) -> LanguageModel:
    """Rebuild the model of a checkpoint from the shape and the settings in it, without weights: on the meta device.

    Args:
        checkpoint: its folder.
        recipe: see ``trained_model``.

    Returns:
        The model.

    Raises:
        FileNotFoundError: if there is no checkpoint, or it is of an older version and its model's file is not there.
        ValueError: if the checkpoint holds no settings, or its recipe is in a file and ``recipe`` is None.
    """
    with torch.device("meta"):
        return _built(checkpoint, recipe, make_recipe)


def _built(checkpoint: Path, recipe: str | Recipe | None, make: Callable[..., Recipe]) -> LanguageModel:
    state = read_state(checkpoint)
    settings = state.get("settings")
    if not isinstance(settings, dict):
        raise ValueError(
            f"{checkpoint} holds no settings of its model; expected a checkpoint that `moekit train` wrote"
        )
    given, config = stored_model(settings), stored_config(state)
    if config is None:
        given, config = with_model_keys(given), make_config(given)
    if isinstance(recipe, Recipe):
        return language_model(config, automatic(recipe))
    # A recipe from a file is code, and the checkpoint may be a stranger's.
    if recipe is None and given.recipe not in RECIPES and not given.recipe.startswith(PREFIX):
        raise ValueError(
            f"{checkpoint} was trained with the recipe {given.recipe!r}, which is code in a file. If it is yours, say "
            f"so with --recipe {given.recipe}, in Python recipe="
        )
    given = dataclasses.replace(given, recipe=recipe or given.recipe)
    return language_model(config, make(given, config=config))
