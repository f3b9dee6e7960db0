"""From settings to the model of a run: its shape, and the method of its MoE layers."""

from dataclasses import replace

from moekit.lm.configs import ModelConfig, load_config, read_config
from moekit.recipes.automatic import automatic
from moekit.recipes.layers import Recipe
from moekit.recipes.names import DEFAULT_K, find_recipe, recipe_options
from moekit.recipes.settings import ModelSettings


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
    names = ("model_norm", "qk_norm", "positional_embedding_type", "ffn_type", "moe_freq")
    flags = {name: getattr(settings, name) for name in names}
    if settings.moe_freq:
        flags |= {"moe_num_experts": settings.moe_num_experts}
        flags |= {} if settings.moe_top_k is None else {"moe_top_k": settings.moe_top_k}
    return load_config(settings.preset, defaults=flags)


def make_recipe(settings: ModelSettings) -> Recipe:
    """Find the recipe and apply the flags that concern it; keys in the model's file win over them, as in OpenLM.

    Its experts run on what ``auto`` chooses, unless the recipe itself chose a backend.

    Args:
        settings: of the model.

    Returns:
        Recipe.

    Raises:
        ValueError: if the recipe is unknown, or has no load-balancing loss to weigh.
        FileNotFoundError: if it names a file that is not there.

    Example:
        >>> make_recipe(ModelSettings(recipe="openlm", moe_loss_weight=0.3)).coefficients
        {'load_balance': 0.3}
    """
    settings = _with_model_keys(settings)
    recipe = _find(settings, capacity_factor=settings.moe_capacity_factor)
    if settings.moe_loss_weight is None:
        return recipe
    if "load_balance" not in recipe.losses:
        raise ValueError(
            f"--moe-loss-weight is {settings.moe_loss_weight}, but recipe {settings.recipe} has no loss named "
            f"load_balance (it has: {', '.join(recipe.losses) or 'none'}). Leave the flag out."
        )
    return recipe._replace(coefficients={**recipe.coefficients, "load_balance": settings.moe_loss_weight})


def resolved_model(settings: ModelSettings) -> ModelSettings:
    """Fill in what the recipe takes for the MoE flags that were left out.

    Args:
        settings: of an MoE model.

    Returns:
        The settings; what the recipe has no option for stays out.

    Example:
        >>> resolved = resolved_model(ModelSettings(recipe="openlm"))
        >>> resolved.moe_top_k, resolved.moe_capacity_factor, resolved.moe_loss_weight
        (2, 1.25, 0.1)
    """
    merged, options = _with_model_keys(settings), recipe_options(settings.recipe)
    weight = make_recipe(settings).coefficients.get("load_balance")
    return replace(
        merged,
        moe_top_k=DEFAULT_K if merged.moe_top_k is None and "k" in options else merged.moe_top_k,
        moe_capacity_factor=options.get("capacity_factor")
        if merged.moe_capacity_factor is None
        else merged.moe_capacity_factor,
        moe_loss_weight=weight if merged.moe_loss_weight is None else merged.moe_loss_weight,
    )


def make_evaluation_recipe(settings: ModelSettings) -> Recipe:
    """Find the recipe that evaluation runs: the same with no capacity limit, and without what is for training alone.

    What a limit drops depends on which sequences share a batch, so with one a score would depend on the batch size and
    on the number of ranks. Noise, sampling and balancing within a batch are left out where a method's function has an
    option ``training``.

    Args:
        settings: of the model.

    Returns:
        Recipe; that of training if its function takes neither ``capacity_factor`` nor ``training``.

    Example:
        >>> from moekit.recipes.cli import capacity_words
        >>> capacity_words(make_evaluation_recipe(ModelSettings(moe_capacity_factor=1.25)))
        'dropless'
    """
    settings = _with_model_keys(settings)
    options = recipe_options(settings.recipe)
    if "capacity_factor" not in options and "training" not in options:
        return make_recipe(settings)
    return _find(settings, capacity_factor=0.0 if "capacity_factor" in options else None, training=False)


def _find(settings: ModelSettings, *, capacity_factor: float | None, training: bool = True) -> Recipe:
    vocab_size = make_config(settings).vocab_size
    offered = {"training": training, "vocab_size": vocab_size}
    return automatic(find_recipe(settings.recipe, k=settings.moe_top_k, capacity_factor=capacity_factor, **offered))


def _with_model_keys(settings: ModelSettings) -> ModelSettings:
    """Let the MoE keys of the model's file win over flags."""
    concerned = ("moe_top_k", "moe_capacity_factor", "moe_loss_weight")
    return replace(settings, **{key: value for key, value in read_config(settings.preset).items() if key in concerned})
