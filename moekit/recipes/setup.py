"""From settings to the model of a run: its shape, and the method of its MoE layers."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from moekit.lm.configs import OF_METHOD, ModelConfig, load_config, read_config
from moekit.recipes.automatic import automatic
from moekit.recipes.backends import auto
from moekit.recipes.choices import experts_per_token
from moekit.recipes.derived import OF_SHAPE
from moekit.recipes.layers import Recipe
from moekit.recipes.modules import MoE
from moekit.recipes.names import DEFAULT_K, find_recipe, recipe_options, users_fault
from moekit.recipes.recipe_checks import check_observation
from moekit.recipes.settings import ModelSettings
from moekit.types import ExpertLayer


def make_config(settings: ModelSettings) -> ModelConfig:
    """Load the model's shape; keys in its file win over the flags, as in OpenLM.

    Args:
        settings: of the model.

    Returns:
        ModelConfig.

    Raises:
        ValueError: if the preset is unknown or a value makes no sense.
        FileNotFoundError: if the preset is a path and not there.

    Example:
        >>> make_config(ModelSettings(preset="open_lm_41m")).moe_num_experts
        8
    """
    settings = with_model_keys(settings)
    flags = {name: getattr(settings, name) for name in OF_SHAPE}
    if settings.moe_freq:
        flags |= {"moe_num_experts": settings.moe_num_experts}
    config = load_config(settings.preset, defaults=flags)
    experts, k = config.moe_num_experts, settings.moe_top_k
    if config.moe_freq and experts is not None and k is not None and not 1 <= k <= experts:
        raise ValueError(
            f"model config {settings.preset}: moe_top_k is {k}, expected between 1 and moe_num_experts = {experts}. "
            "Change one of the two (--moe-top-k, --moe-num-experts)"
        )
    return config


def _default_top_k(settings: ModelSettings) -> int:
    """Say how many experts a token gets where nobody says it: no more than there are."""
    return 1 if settings.moe_num_experts == 1 else DEFAULT_K


def make_recipe(
    settings: ModelSettings, *, choose: Callable[..., ExpertLayer] = auto, config: ModelConfig | None = None
) -> Recipe:
    """Find the recipe and apply the flags that concern it; keys in the model's file win over them, as in OpenLM.

    Its experts run on what ``auto`` chooses, unless the recipe itself chose a backend.

    Args:
        settings: of the model.
        choose: makes their layer, see ``automatic``.
        config: the model's shape, if a checkpoint holds it: settings are then of what was made, and no file is read.

    Returns:
        Recipe.

    Raises:
        ValueError: if the recipe is unknown, or has no load-balancing loss to weigh.
        FileNotFoundError: if it names a file that is not there.

    Example:
        >>> make_recipe(ModelSettings(recipe="openlm", moe_loss_weight=0.3)).coefficients
        {'load_balance': 0.3}
    """
    settings, config = _made(settings, config)
    recipe = _find(settings, config, choose, capacity_factor=settings.moe_capacity_factor)
    if settings.moe_loss_weight is None:
        return recipe
    if "load_balance" not in recipe.losses:
        raise ValueError(
            f"--moe-loss-weight is {settings.moe_loss_weight}, but recipe {settings.recipe} has no loss named "
            f"load_balance (it has: {', '.join(recipe.losses) or 'none'}). Leave the flag out."
        )
    return recipe._replace(coefficients={**recipe.coefficients, "load_balance": settings.moe_loss_weight})


def check_model(settings: ModelSettings) -> None:
    """Find out whether shape and method make a model, before anything is made that takes time.

    Args:
        settings: of the model.

    Raises:
        ValueError: if a name is unknown, a value makes no sense, or the recipe cannot have so many experts.
        FileNotFoundError: if a file is not there.

    Example:
        >>> check_model(ModelSettings(recipe="deepseek_v3", moe_num_experts=6))
        Traceback (most recent call last):
        ValueError: recipe deepseek_v3 does not fit --moe-num-experts 6: group_limited: groups_kept = 4 of
            num_groups = 8 groups of E = 6 experts; expected num_groups to divide E, and 1 <= groups_kept <= num_groups.
    """
    config = make_config(settings)
    recipes = [make(settings) for make in (make_recipe, make_evaluation_recipe)]
    if not config.moe_freq:
        return
    assert config.moe_num_experts is not None  # the configuration has checked it
    try:
        for recipe in recipes:
            experts_per_token(recipe, config.moe_num_experts, sequence_length=config.seq_len)
    except ValueError as error:
        if users_fault(settings.recipe, error) is not None:
            raise
        raise ValueError(
            f"recipe {settings.recipe} does not fit --moe-num-experts {config.moe_num_experts}: {error}"
        ) from error
    for recipe, purpose in zip(recipes, (_TRAINING, _SCORING), strict=True):
        _try(recipe, config, f"recipe {settings.recipe}, tried on shapes alone (meta tensors) {purpose}")


_TRAINING = "as it trains"
_SCORING = (
    "as it is scored, by its function with capacity_factor=0 and training=False, as far as it takes them (what a limit "
    "drops would depend on the batch)"
)


def _try(recipe: Recipe, config: ModelConfig, what: str) -> None:
    """Run a recipe's layer on shapes alone; what it refuses by them it would refuse after hours of training."""
    assert config.moe_num_experts is not None
    x = torch.empty(1, config.seq_len, config.hidden_dim, device="meta")
    ids = torch.empty(1, config.seq_len, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            moe = MoE(config.hidden_dim, config.moe_num_experts, recipe, device="meta")
            output = moe(x, token_ids=ids)
            if recipe.state is not None and recipe.state.observe is not None:
                check_observation(recipe.state.observe(output.logits, output.routing, moe.state, token_mask=None))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    except Exception:  # what reads tensors, or runs on one kind of device, tells nothing here
        return


def resolved_model(settings: ModelSettings, *, config: ModelConfig | None = None) -> ModelSettings:
    """Fill in what the model's file says, and what the recipe takes for the MoE flags that were left out.

    Args:
        settings: of the model.
        config: see ``make_recipe``.

    Returns:
        The settings; what the recipe has no option for stays out, as does all of it in a dense model.

    Example:
        >>> resolved = resolved_model(ModelSettings(recipe="openlm"))
        >>> resolved.moe_top_k, resolved.moe_capacity_factor, resolved.moe_loss_weight
        (2, 1.25, 0.1)
    """
    (merged, config), options = _made(settings, config), recipe_options(settings.recipe)
    if not merged.moe_freq:
        return merged
    weight = make_recipe(merged, config=config).coefficients.get("load_balance")
    return replace(
        merged,
        moe_top_k=_default_top_k(merged) if merged.moe_top_k is None and "k" in options else merged.moe_top_k,
        moe_capacity_factor=options.get("capacity_factor")
        if merged.moe_capacity_factor is None
        else merged.moe_capacity_factor,
        moe_loss_weight=weight if merged.moe_loss_weight is None else merged.moe_loss_weight,
    )


def make_evaluation_recipe(
    settings: ModelSettings, *, choose: Callable[..., ExpertLayer] = auto, config: ModelConfig | None = None
) -> Recipe:
    """Find the recipe that evaluation runs: the same with no capacity limit, and without what is for training alone.

    What a limit drops depends on which sequences share a batch, so with one a score would depend on the batch size and
    on the number of ranks. Noise, sampling and balancing within a batch are left out where a method's function has an
    option ``training``.

    Args:
        settings: of the model.
        choose: makes the layer of its experts, see ``automatic``.
        config: see ``make_recipe``.

    Returns:
        Recipe; that of training if its function takes neither ``capacity_factor`` nor ``training``.

    Example:
        >>> from moekit.recipes.recipe_tables import capacity_words
        >>> capacity_words(make_evaluation_recipe(ModelSettings(moe_capacity_factor=1.25)))
        'dropless'
    """
    settings, config = _made(settings, config)
    options = recipe_options(settings.recipe)
    if "capacity_factor" not in options and "training" not in options:
        return make_recipe(settings, choose=choose, config=config)
    factor = 0.0 if "capacity_factor" in options else None
    return _find(settings, config, choose, capacity_factor=factor, training=False)


def with_model_keys(settings: ModelSettings) -> ModelSettings:
    """Let the keys of the model's file win over flags, as in OpenLM.

    Args:
        settings: of the model.

    Returns:
        Settings of what is made; where the file makes it dense, those of the method are left out.

    Raises:
        ValueError: if the preset is unknown or its file holds no keys.
        FileNotFoundError: if the preset is a path and not there.

    Example:
        >>> with_model_keys(ModelSettings(preset="llama2_7b", model_norm="layer_norm")).model_norm
        'rms_norm'
    """
    found = _keys_of_flags(settings)
    dense = dict.fromkeys(OF_METHOD) if found.get("moe_freq") == 0 else {}
    return replace(settings, **{**found, **dense})


def overridden_flags(settings: ModelSettings) -> list[str]:
    """Say which flags have no effect because the model's file says something else.

    Args:
        settings: of the model, as they were given; a flag that was given its default is not told from one left out.

    Returns:
        A line of text for each.

    Raises:
        ValueError: if the preset is unknown or its file holds no keys.
        FileNotFoundError: if the preset is a path and not there.

    Example:
        >>> print(*overridden_flags(ModelSettings(preset="llama2_7b", model_norm="layer_norm")))
        --model-norm layer_norm has no effect: model llama2_7b says model_norm rms_norm, and its keys win. Leave it out
    """
    found, lines = _keys_of_flags(settings), []
    mend = "Leave it out" + (", or take the key out of the file" if settings.preset.endswith(".json") else "")
    for name, default in ((field.name, field.default) for field in fields(settings)):
        given = getattr(settings, name)
        key = "moe_freq" if found.get("moe_freq") == 0 and name in ("moe_num_experts", *OF_METHOD) else name
        if given != default and key in found and (key != name or given != found[key]):
            flag = f"--{name.replace('_', '-')}" + ("" if given is True else f" {given}")
            lines.append(
                f"{flag} has no effect: model {settings.preset} says {key} {found[key]}, and its keys win. {mend}"
            )
    return lines


def _made(settings: ModelSettings, config: ModelConfig | None) -> tuple[ModelSettings, ModelConfig]:
    """Return the settings and the shape of what is made: by its file, unless the shape is known."""
    return (with_model_keys(settings), make_config(settings)) if config is None else (settings, config)


def _find(
    settings: ModelSettings,
    config: ModelConfig,
    choose: Callable[..., ExpertLayer],
    *,
    capacity_factor: float | None,
    training: bool = True,
) -> Recipe:
    offered = {"training": training, "vocab_size": config.vocab_size}
    found = find_recipe(
        settings.recipe,
        k=settings.moe_top_k,
        capacity_factor=capacity_factor,
        default_k=_default_top_k(settings),
        **offered,
    )
    return automatic(found, choose=choose)


def _keys_of_flags(settings: ModelSettings) -> dict[str, Any]:
    """Read the keys of the model's file that there are flags for."""
    names = (*OF_SHAPE, "moe_num_experts", *OF_METHOD)
    return {key: value for key, value in read_config(settings.preset).items() if key in names}
