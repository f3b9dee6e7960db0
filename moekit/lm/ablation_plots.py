"""The picture of an ablation: what each variant scores on each validation set, seed by seed."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moekit.lm.plots import matplotlib_parts, save_figure


class Dots(NamedTuple):
    """The scores of one variant.

    Attributes:
        label: its name.
        losses: name of a validation set to the loss of each seed.
        comparable: whether they are losses of the same task as the others'; else they are drawn hollow.
    """

    label: str
    losses: Mapping[str, Sequence[float]]
    comparable: bool = True


def plot_ablation(
    path: str | os.PathLike[str],
    dots: Sequence[Dots],
    *,
    sets: Sequence[str],
    baseline: Mapping[str, float] | None,
) -> Path:
    """Draw a panel for each validation set: a row for each variant, a dot for each seed, a bar at their mean.

    The best are at the top, variants that are not comparable at the bottom. A line marks what they are compared with.
    What is far outside of the others is drawn at the edge, with its number.

    Args:
        path: of the PNG; appears there when it is whole.
        dots: the variants.
        sets: names of the validation sets.
        baseline: name of each validation set to the loss that the line is at; None draws no line.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    figure_type, _ = matplotlib_parts()
    figure = figure_type(figsize=(3 + 4.2 * max(len(sets), 1), 1.6 + 0.28 * len(dots)), layout="constrained")
    axes = figure.subplots(1, max(len(sets), 1), sharey=True, squeeze=False)[0]
    ordered = sorted(dots, key=lambda each: (not each.comparable, _mean(each, sets)))
    for axis, name in zip(axes, sets, strict=False):
        _panel(axis, ordered, name, baseline=None if baseline is None else baseline[name])
    axes[0].set_yticks(range(len(ordered)), [f"{each.label}{'' if each.comparable else ' *'}" for each in ordered])
    axes[0].set_ylim(len(ordered) - 0.4, -0.6)
    if not all(each.comparable for each in dots):
        figure.supxlabel("* hollow: not comparable, it sees what it predicts", fontsize=9, color="C3")
    return save_figure(path, figure)


def shown_range(losses: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Choose the part of an axis to show: the rows whose mean is within six widths of the middle half of the means.

    Args:
        losses: those of each row, at least one row.

    Returns:
        Least and largest, with a margin.

    Example:
        >>> low, high = shown_range([[4.0], [4.1], [4.2, 4.3], [9.0]])
        >>> round(low, 2), round(high, 2)
        (3.98, 4.32)
    """
    ranked = sorted(sum(row) / len(row) for row in losses)
    low, high = ranked[len(ranked) // 4], ranked[(3 * len(ranked) - 1) // 4]
    width = max(high - low, 0.02)
    near = [loss for row in losses if low - 6 * width <= sum(row) / len(row) <= high + 6 * width for loss in row]
    margin = 0.06 * max(max(near) - min(near), 0.02)
    return min(near) - margin, max(near) + margin


def _panel(axis: Any, ordered: Sequence[Dots], name: str, *, baseline: float | None) -> None:
    low, high = shown_range([each.losses[name] for each in ordered])
    if baseline is not None:
        axis.axvline(baseline, color="0.6", linestyle="--", linewidth=1)
    for y, each in enumerate(ordered):
        losses = each.losses[name]
        mean = sum(losses) / len(losses)
        if not all(low <= loss <= high for loss in losses):
            left = mean < (low + high) / 2
            edge, text = (low, f"◂ {mean:.2f}") if left else (high, f"{mean:.2f} ▸")
            axis.text(edge, y, text, ha="left" if left else "right", va="center", fontsize=8, color="C3")
            continue
        style = {"facecolors": "C0" if each.comparable else "none", "edgecolors": "C0" if each.comparable else "C3"}
        axis.plot([min(losses), max(losses)], [y, y], color="0.7", linewidth=2, zorder=1)
        axis.scatter(losses, [y] * len(losses), s=22, zorder=2, **style)
        axis.plot([mean, mean], [y - 0.3, y + 0.3], color="black", linewidth=1.2, zorder=3)
    axis.set(xlim=(low, high), xlabel="validation loss, nats per token", title=name)
    axis.grid(alpha=0.3)
    if not all(each.comparable for each in ordered):
        axis.axhline(sum(each.comparable for each in ordered) - 0.5, color="0.4", linewidth=0.8)


def _mean(dots: Dots, sets: Sequence[str]) -> float:
    return sum(sum(dots.losses[name]) / len(dots.losses[name]) for name in sets)
