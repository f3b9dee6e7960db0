"""Who holds what: the bytes of parameters, gradients and optimizer state on each rank, planned without making any."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moekit.lm.model import LanguageModel
from moekit.parallel import Layout, part_of, shard_axis, shards_of_experts
from moekit.recipes.construction import ranks_per_shard, run_layout
from moekit.recipes.exchanges import check_slices
from moekit.recipes.expert_parameters import hidden_axes
from moekit.recipes.language_models import moe_layers
from moekit.recipes.precisions import parameter_dtype
from moekit.recipes.settings import TrainSettings
from moekit.recipes.setup import make_config, make_recipe


class Holding(NamedTuple):
    """What a rank keeps of a group of parameters between steps, in bytes; the largest rank where they differ.

    Attributes:
        what: name of the group.
        total: parameters of the whole model.
        parameters: bytes of this rank's parameters.
        gradients: bytes of their gradients.
        optimizer: bytes of AdamW's two moments.
        spread: words that say over which ranks the group is cut.
    """

    what: str
    total: int
    parameters: int
    gradients: int
    optimizer: int
    spread: str

    @property
    def bytes(self) -> int:
        """All three."""
        return self.parameters + self.gradients + self.optimizer


def plan_holdings(
    model: LanguageModel, settings: TrainSettings, world_size: int, *, ranks_per_node: int
) -> list[Holding]:
    """Compute what a rank would hold.

    Args:
        model: whole, on any device, the meta device included.
        settings: of the run.
        world_size: ranks to plan for.
        ranks_per_node: ranks of a node.

    Returns:
        A row for what is outside experts, one for experts, and their sum.

    Raises:
        ValueError: if the experts cannot be spread as the settings want, which a launch would refuse, too.
    """
    given, layout = settings.parallel, run_layout(settings, world_size, ranks_per_node=ranks_per_node)
    for _, layer in moe_layers(model):
        check_slices(layer.recipe, layout, given)
    together = ranks_per_shard(given, world_size, ranks_per_node=ranks_per_node)
    size = torch.empty((), dtype=parameter_dtype(settings.optimizer.precision)).element_size()
    experts = [pair for _, layer in moe_layers(model) for pair in layer.experts.named_parameters()]
    inside = {id(p) for _, p in experts}
    dense = [p for p in model.parameters() if id(p) not in inside]
    rows = [_dense_holding(dense, size, world_size, shards=together if given.fsdp else 1)]
    if experts:
        shards = shards_of_experts(layout, together) if given.fsdp or given.moe_weight_parallelism else 1
        rows.append(_experts_holding(experts, size, layout, _cut_axes(settings, layout), shards))
    total, parameters, gradients, optimizer = (sum(column) for column in zip(*(row[1:5] for row in rows), strict=True))
    return [*rows, Holding("all", total, parameters, gradients, optimizer, spread="")]


def _dense_holding(parameters: Sequence[torch.Tensor], size: int, world_size: int, *, shards: int) -> Holding:
    kept = sum(_fullest(p, p.numel(), shard_axis(p.shape, shards) if p.ndim == 3 else 0, shards) for p in parameters)
    return _holding("all but experts", parameters, kept, size, _words([], shards, world_size // shards))


def _experts_holding(
    named: Sequence[tuple[str, torch.Tensor]], size: int, layout: Layout, cut: dict[str, tuple[int, ...]], shards: int
) -> Holding:
    """Count what a rank keeps of experts; they are not sharded if any of their parameters has no axis left for it."""
    taken = [cut.get(name, (0,) if layout.exchanges else ()) for name, _ in named]
    pairs = [(p, axes) for (_, p), axes in zip(named, taken, strict=True)]
    if any(shard_axis(p.shape, shards, taken=axes) is None for p, axes in pairs):
        shards = 1
    kept = sum(_expert_elements(p, layout, shards, axes) for p, axes in pairs)
    return _holding("experts", [p for p, _ in pairs], kept, size, _expert_words(layout, shards))


def _rank_table(layout: Layout) -> list[tuple[str, str, str]]:
    """Say which experts each rank holds: ranks that hold the same, experts, slice of their hidden dimension."""
    holders: dict[tuple[str, str], list[int]] = {}
    for rank in range(layout.world_size):
        part = part_of(layout, rank)
        own = part.experts(layout.num_experts)
        names = f"{own[0]}" if len(own) == 1 else f"{own[0]}-{own[-1]}"
        share = "all" if part.slices == 1 else f"{part.hidden + 1} of {part.slices}"
        holders.setdefault((names, share), []).append(rank)
    return [(_listed(ranks), *key) for key, ranks in holders.items()]


def holding_table(rows: Sequence[Holding], layout: Layout) -> Any:
    """Lay out what a rank holds, and below it which experts.

    Args:
        rows: from ``plan_holdings``.
        layout: of the ranks.

    Returns:
        A ``rich.table.Table``.
    """
    from rich.table import Table

    ranks = "1 rank" if layout.world_size == 1 else f"{layout.world_size:,} ranks"
    table = Table(title=f"bytes per rank, {ranks}", title_justify="left", caption_justify="left")
    for name in ("", "parameters\nof the model", "parameters", "gradients", "AdamW", "all", "cut over"):
        table.add_column(name, justify="left" if name in ("", "cut over") else "right")
    for row in rows:
        cells = (row.parameters, row.gradients, row.optimizer, row.bytes)
        style = "bold" if row.what == "all" else None
        table.add_row(row.what, f"{row.total:,}", *(f"{cell:,}" for cell in cells), row.spread, style=style)
    if layout.exchanges:
        lines = [_owned(*row) for row in _rank_table(layout)]
        table.caption = "\n".join(lines if len(lines) <= 16 else [*lines[:8], "...", *lines[-2:]])
    return table


def _expert_words(layout: Layout, shards: int) -> str:
    """Say over which ranks the experts are cut, and what replicas hold over shards."""
    words = [f"{layout.expert_ranks} blocks of experts"] if layout.expert_ranks > 1 else []
    words += [f"{layout.hidden} slices of hidden"] if layout.hidden > 1 else []
    return _words(words, shards, layout.replicas // shards)


def _words(words: list[str], shards: int, copies: int) -> str:
    words = [*words, *([f"{shards} shards"] if shards > 1 else [])]
    return " x ".join([*words, *([f"{copies} copies"] if copies > 1 else [])]) or "nothing"


def _cut_axes(settings: TrainSettings, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Name the axes of each parameter of experts that are cut where each rank holds a slice of hidden units."""
    if layout.hidden == 1:
        return {}
    dim = make_config(settings.model).hidden_dim
    return {name: (0, axis) for name, axis in hidden_axes(make_recipe(settings.model).init, dim, None).items()}


def _expert_elements(parameter: torch.Tensor, layout: Layout, shards: int, taken: tuple[int, ...]) -> int:
    """Count the elements of a parameter (E, ...) that the fullest rank holds."""
    own = parameter.numel() // (layout.expert_ranks * layout.hidden)
    if parameter.ndim != 3:  # FSDP cuts these along their experts
        experts = parameter.shape[0] // layout.expert_ranks
        return own // experts * -(-experts // shards)
    return _fullest(parameter, own, shard_axis(parameter.shape, shards, taken=taken), shards)


def _fullest(parameter: torch.Tensor, elements: int, axis: int | None, shards: int) -> int:
    """Count the elements that the fullest rank keeps, of those that FSDP cuts along an axis, if there is any."""
    if shards == 1 or axis is None or not parameter.ndim:
        return elements
    size = parameter.shape[axis]
    return elements // size * -(-size // shards)


def _holding(what: str, parameters: Sequence[torch.Tensor], kept: int, size: int, spread: str) -> Holding:
    return Holding(what, sum(p.numel() for p in parameters), kept * size, kept * size, 2 * kept * size, spread)


def _owned(ranks: str, experts: str, hidden: str) -> str:
    return (
        f"{'ranks' if ',' in ranks else 'rank'} {ranks}: {'experts' if '-' in experts else 'expert'} {experts}, "
        f"hidden {hidden}"
    )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]}"
