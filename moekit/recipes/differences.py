"""How the model of a launch differs from the one whose weights a checkpoint holds, where no shape tells."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moekit.lm.configs import OF_METHOD, ModelConfig
from moekit.recipes.ablation_recipes import located, same_recipe
from moekit.recipes.names import RECIPES
from moekit.recipes.settings import ModelSettings
from moekit.recipes.setup import make_config, resolved_model
from moekit.recipes.stored_settings import stored_model
from moekit.recipes.weights import stored_config
from moekit.recipes.wording import flag_of

_TRAINING_ALONE = {"moe_capacity_factor", "moe_loss_weight", "moe_loss_scope"}  # evaluation drops and weighs nothing
_OF_LAYERS = (*OF_METHOD, "moe_loss_scope")


def model_warnings(given: ModelSettings, state: Mapping[str, Any], *, training: bool) -> list[str]:
    """Warn if weights are about to compute something else than what they were trained to.

    A recipe that the checkpoint names and that is in a file is code, perhaps a stranger's, and is not run. Where this
    launch has the same function from a file that has moved, that one fills in which flags the checkpoint left to it.

    Args:
        given: the model of this launch.
        state: what a checkpoint says beside its tensors; one of another program holds no ``settings``, and OpenLM's
            has the ``recipe`` of its MoE layers.
        training: whether it goes on, so that what is for training alone counts too.

    Returns:
        Lines of text; none if nothing differs, or nothing is known.

    Example:
        >>> from moekit.recipes.stored_settings import flat_settings
        >>> from moekit.recipes.settings import TrainSettings
        >>> state = {"settings": flat_settings(TrainSettings(model=ModelSettings(recipe="olmoe", moe_top_k=4)))}
        >>> print(*model_warnings(ModelSettings(recipe="olmoe"), state, training=False))
        warning: these weights were trained with --moe-top-k 4, and this launch has --moe-top-k 2
    """
    try:
        before, now = _before_and_now(given, state)
    except (ValueError, TypeError, OSError) as error:
        return [f"warning: whether these weights are of this model is not known: {error}"]
    names = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    differing = sorted(name for name in names if training or name not in _TRAINING_ALONE)
    if not differing:
        return []
    were, are = (_spelled({name: each.get(name) for name in differing}) for each in (before, now))
    return [f"warning: these weights were trained with {were}, and this launch has {are}"]


def _before_and_now(given: ModelSettings, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    stored = state.get("settings")
    if not isinstance(stored, Mapping):  # the recipe at most is known
        theirs = dataclasses.replace(given, recipe=state.get("recipe", given.recipe))
        return _described(theirs, filling=None), _described(given, filling=None)
    theirs = stored_model(stored)
    if located(theirs.recipe) == located(given.recipe):  # one file, by two paths
        theirs = dataclasses.replace(theirs, recipe=given.recipe)
    known = theirs.recipe if theirs.recipe in RECIPES else None
    filling = given.recipe if same_recipe(theirs.recipe, given.recipe) else known
    before = _described(theirs, filling=filling, config=stored_config(state))
    return before, _described(given, filling=None if filling is None else given.recipe)


def _described(settings: ModelSettings, *, filling: str | None, config: ModelConfig | None = None) -> dict[str, Any]:
    """List what tells one model from another; a recipe fills in what was left to it, or what was left to it is left."""
    described = dataclasses.asdict(make_config(settings) if config is None else config)
    if described["moe_freq"] and described["moe_num_experts"] is not None:
        described["recipe"] = settings.recipe
        if filling is not None:
            filled = resolved_model(dataclasses.replace(settings, recipe=filling), config=config)
            described |= {name: getattr(filled, name) for name in _OF_LAYERS}
    return described


def _spelled(values: Mapping[str, Any]) -> str:
    flags = {field.name for field in dataclasses.fields(ModelSettings)}
    told = {name: "none" if value is None else value for name, value in values.items()}
    return ", ".join(
        f"{flag_of(name)} {value}" if name in flags else f"{name} {value} (of --model)" for name, value in told.items()
    )
