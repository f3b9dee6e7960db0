"""The picture of a training run: loss curves, and which experts each domain uses."""

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import Any, NamedTuple

from moekit.lm.files import write_whole


class Curve(NamedTuple):
    """A line over training steps.

    Attributes:
        steps: x values.
        losses: y values, nats per token.
    """

    steps: Sequence[int]
    losses: Sequence[float]


def plot_run(
    path: str | os.PathLike[str],
    *,
    train: Curve,
    validation: Mapping[str, Curve],
    whole: Mapping[str, float],
    baselines: Mapping[str, float],
    loads: Mapping[str, Mapping[int, Sequence[float]]],
) -> Path:
    """Draw a run as a PNG: losses on the left, one heat map of expert loads per domain on the right.

    Args:
        path: of the PNG; appears there when it is whole.
        train: training loss.
        validation: domain to its loss, of the front of the domain that is scored on the way.
        whole: domain to the final loss of all of it, drawn as a diamond at the last step.
        baselines: domain to its bigram loss of all of it, drawn dashed.
        loads: domain to block index to the share of assignments per expert; empty for a dense model.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    figure_type, ticker = matplotlib_parts()
    figure = figure_type(figsize=(6 + 3.2 * max(len(loads), 1), 4), layout="constrained")
    ratios = [2.0] + [1.0] * len(loads)
    axes = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    _losses(axes[0], train, validation, whole, baselines)
    largest = max((max(load) * len(load) for layers in loads.values() for load in layers.values()), default=1.0)
    for axis, (domain, layers) in zip(axes[1:], loads.items(), strict=True):
        rows = [[share * len(load) for share in load] for load in layers.values()]
        image = axis.imshow(rows, aspect="auto", cmap="magma", vmin=0.0, vmax=max(largest, 2.0))
        axis.set(title=f"expert load: {domain}", xlabel="expert", yticks=range(len(rows)))
        axis.set_yticklabels([f"block {index}" for index in layers])
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        for y, row in enumerate(rows if len(rows[0]) <= 16 else []):
            for x, value in enumerate(row):
                color = "white" if value < 0.6 * max(largest, 2.0) else "black"
                axis.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7, color=color)
    if loads:
        figure.colorbar(image, ax=axes[1:].tolist(), label="load, 1 = balanced", shrink=0.9)
    return save_figure(path, figure)


def picture_or_why(draw: Callable[[], Path]) -> Path | str:
    """Draw a picture, or say why there is none: matplotlib is an extra, and a run is none the worse without it.

    Args:
        draw: writes a picture and returns its path.

    Returns:
        The path; or what to print in its place, if matplotlib is missing or broken, or the file cannot be written.

    Example:
        >>> picture_or_why(lambda: Path("no/such/folder/run.png").rename("a.png"))
        "none: [Errno 2] No such file or directory: 'no/such/folder/run.png' -> 'a.png'"
    """
    try:
        return draw()
    except (ImportError, OSError) as error:
        return f"none: {error}"


def save_figure(path: str | os.PathLike[str], figure: Any) -> Path:
    """Write a figure of matplotlib's as a PNG, whole or not at all; return its path."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return write_whole(path, content.getvalue())


def _smooth(losses: Sequence[float], *, window: int) -> list[float]:
    """Average each value with up to ``window - 1`` values before it."""
    starts = (max(0, i + 1 - window) for i in range(len(losses)))
    return [sum(losses[start : i + 1]) / (i + 1 - start) for i, start in enumerate(starts)]


def _losses(  # type: ignore[no-untyped-def]
    axis, train: Curve, validation: Mapping[str, Curve], whole: Mapping[str, float], baselines: Mapping[str, float]
) -> None:
    axis.plot(train.steps, train.losses, color="0.8", linewidth=0.8)
    axis.plot(train.steps, _smooth(train.losses, window=10), color="0.35", label="training, mean of 10 logged steps")
    for color, (domain, curve) in zip(cycle(("C0", "C1", "C2", "C3", "C4", "C5")), validation.items(), strict=False):
        axis.plot(
            curve.steps, curve.losses, color=color, marker="o", markersize=3, label=f"validation, front: {domain}"
        )
        if domain in whole:
            axis.plot(
                curve.steps[-1:],
                [whole[domain]],
                color=color,
                marker="D",
                linestyle="",
                label=f"validation, all: {domain}",
            )
        if domain in baselines:
            axis.axhline(baselines[domain], color=color, linestyle="--", linewidth=1, label=f"bigram, all: {domain}")
    axis.set(xlabel="step", ylabel="loss, nats per token", title="loss")
    early = len(train.losses) // 20
    shown = chain(
        baselines.values(), whole.values(), train.losses[early:], *(curve.losses for curve in validation.values())
    )
    axis.set_ylim(top=max(filter(math.isfinite, shown), default=1.0) * 1.05)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def matplotlib_parts():  # type: ignore[no-untyped-def]
    """Import what pictures are drawn with.

    Returns:
        The type ``Figure``, and the module ``ticker``.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        from matplotlib import ticker
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the picture of a run needs matplotlib: pip install 'moekit[plots]'") from error
    return Figure, ticker
