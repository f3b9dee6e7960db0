"""Building the model of a run: the same weights for any number of ranks, spread over them as the settings say."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from moekit.experts import EVERYTHING, INPUTS, PREACTIVATION
from moekit.lm.model import LanguageModel
from moekit.parallel import Grid, Layout, World, distribute_experts, make_grid, shard_experts, shard_model
from moekit.recipes.automatic import tiles_of, why_not_on_kernels
from moekit.recipes.backends import auto
from moekit.recipes.exchanges import make_layout, spread_recipe
from moekit.recipes.expert_parameters import RoutedExperts, hidden_axes, hidden_size
from moekit.recipes.language_models import language_model, moe_layers, recompute_activations
from moekit.recipes.layers import Recipe
from moekit.recipes.precisions import parameter_dtype
from moekit.recipes.settings import ParallelSettings, RunSettings, TrainSettings
from moekit.recipes.setup import make_config, make_evaluation_recipe, make_recipe
from moekit.types import ExpertLayer

_KEEPS = {"preactivation": PREACTIVATION, "inputs": INPUTS, "everything": EVERYTHING}


class BuiltModel(NamedTuple):
    """A model on the ranks of a run.

    Attributes:
        model: on this rank's device, with its part of the parameters.
        evaluation_recipe: what its MoE layers run when it is scored; None for a dense model.
        grid: of the ranks.
    """

    model: LanguageModel
    evaluation_recipe: Recipe | None
    grid: Grid


def make_model(settings: TrainSettings, world: World) -> BuiltModel:
    """Build the model of some settings, and spread it over ranks. All ranks call it together.

    Args:
        settings: of the run.
        world: the ranks.

    Returns:
        BuiltModel.

    Raises:
        ValueError: if it does not fit the device, or cannot be spread as the settings want; or as ``run_layer``.
    """
    config, given, choose = make_config(settings.model), settings.parallel, run_layer(settings.run)
    recipe = make_recipe(settings.model, choose=choose)
    grid = _run_grid(settings, world)
    torch.manual_seed(settings.run.seed)
    try:
        model = language_model(config, recipe, part=grid.part).to(world.device)
    except (RuntimeError, MemoryError) as error:  # torch has no class of its own for a CPU that is out of memory
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the model --model {settings.model.preset} cannot be made on {world.device.type}: {reason}. Choose a "
            "smaller one, or fewer --moe-num-experts"
        ) from error
    dtype = parameter_dtype(settings.optimizer.precision)
    for parameter in model.parameters():  # not the buffers: the selection bias stays float32
        parameter.data = parameter.data.to(dtype)
    if world.rank:  # the weights are the same everywhere, but random routers must not draw the same noise
        torch.manual_seed(settings.run.seed + 1_000_003 * world.rank)
    if settings.run.grad_checkpointing:
        recompute_activations(model)
    axes = hidden_axes(recipe.init, config.hidden_dim, None) if grid.layout.hidden > 1 else {}
    for _, layer in moe_layers(model):
        distribute_experts(layer.experts, grid, axes)
        layer.recipe = spread_recipe(layer.recipe, grid, given, block=config.seq_len)
    _shard(model, given, grid)
    if settings.run.torchcompile:
        model.compile()
    evaluation = None
    if config.moe_freq:
        evaluation = make_evaluation_recipe(settings.model, choose=choose)
        evaluation = spread_recipe(evaluation, grid, given, block=config.seq_len, evaluates=True)
    return BuiltModel(model, evaluation, grid)


def run_layer(run: RunSettings) -> Callable[..., ExpertLayer]:
    """Return what makes the expert layers of a run: ``auto``, with what the settings say for ``fused_layer``.

    Args:
        run: settings of the run.

    Returns:
        A function of ``dispatcher`` and ``activation``, for ``make_recipe``.

    Raises:
        ValueError: if the file of ``--moe-tiles`` is not there, or holds no tiles.

    Example:
        >>> run_layer(RunSettings(moe_keep="inputs")).keywords["keep"]
        Keep(rows=False, preactivation=False)
    """
    return partial(auto, keep=_KEEPS[run.moe_keep], tiles=tiles_of(run.moe_tiles, flag="--moe-tiles"))


def kernel_notes(settings: TrainSettings, device: torch.device) -> list[str]:
    """Say which flags of ``fused_layer`` have no effect in training, and why.

    Args:
        settings: of the run.
        device: that trains.

    Returns:
        A line of text for each.

    Raises:
        ValueError: if there is no such model or recipe.
        FileNotFoundError: if one of them is a path and not there.

    Example:
        >>> kernel_notes(TrainSettings(run=RunSettings(moe_keep="inputs")), torch.device("cpu"))
        ['--moe-keep inputs is of fused_layer, which trains no layer here: its kernels are for CUDA devices, not cpu']
    """
    given = {"--moe-keep": settings.run.moe_keep, "--moe-tiles": settings.run.moe_tiles}
    flags = [f"{flag} {value}" for flag, value in given.items() if value not in (None, RunSettings.moe_keep)]
    if not flags:
        return []
    dense = not make_config(settings.model).moe_freq
    why = "the model is dense" if dense else why_not_on_kernels(make_recipe(settings.model), device)
    return [f"{flag} is of fused_layer, which trains no layer here: {why}" for flag in flags] if why else []


def ranks_per_shard(given: ParallelSettings, world_size: int, *, ranks_per_node: int) -> int:
    """Say over how many neighbouring ranks parameters are sharded, where they are.

    Args:
        given: settings of the launch.
        world_size: ranks.
        ranks_per_node: ranks of a node.

    Returns:
        All ranks, or those of a node for hybrid sharding.

    Example:
        >>> ranks_per_shard(ParallelSettings(fsdp=True, fsdp_hybrid=True), 16, ranks_per_node=8)
        8
    """
    hybrid = given.fsdp_hybrid or given.fsdp_hybrid_o2
    return min(ranks_per_node, world_size) if hybrid else world_size


def run_layout(settings: TrainSettings, world_size: int, *, ranks_per_node: int) -> Layout:
    """Lay out the experts of a run.

    Args:
        settings: of the run.
        world_size: ranks.
        ranks_per_node: ranks of a node.

    Returns:
        Layout.

    Raises:
        ValueError: if the experts cannot be spread as the settings want.
    """
    config = make_config(settings.model)
    return make_layout(
        settings.parallel,
        world_size,
        num_experts=(config.moe_num_experts or 0) if config.moe_freq else 0,
        hidden=hidden_size(make_recipe(settings.model).init, config.hidden_dim, None),
        ranks_per_node=ranks_per_node,
    )


def _run_grid(settings: TrainSettings, world: World) -> Grid:
    """Lay out the ranks of a run. All ranks call it together."""
    given = settings.parallel
    per_node = world.ranks_per_node if given.ranks_per_node is None else given.ranks_per_node
    layout = run_layout(settings, world.size, ranks_per_node=per_node)
    shards = ranks_per_shard(given, world.size, ranks_per_node=per_node)
    return make_grid(world, layout, ranks_per_shard=shards, returning=given.moe_exchange_chunks > 1)


def _shard(model: LanguageModel, given: ParallelSettings, grid: Grid) -> None:
    reduce_dtype = torch.float32 if given.fsdp_amp else torch.bfloat16 if given.fsdp_pure_bf16 else None
    experts: list[RoutedExperts] = [layer.experts for _, layer in moe_layers(model)]
    if given.fsdp:
        keep = given.fsdp_hybrid_o2
        shard_model(model, model.layers, grid, experts=experts, reduce_dtype=reduce_dtype, keep_gathered=keep)
        if reduce_dtype is not None and grid.world.size > 1:
            for each in experts:  # those that FSDP leaves alone do not get its bf16 either
                each.compute_dtype = torch.bfloat16
    elif given.moe_weight_parallelism:
        shard_experts(experts, grid)
