"""What the schematics are made of: boxes, tokens, experts and arrows, on a canvas without axes."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from moekit.lm.files import write_whole

# Okabe and Ito's colours, which people with any colour vision tell apart; one for each rank or block of experts.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5C00", "#555555")
INK, FAINT, LOST = "#222222", "#BBBBBB", "#C00000"


def canvas(width: float, height: float, *, scale: float = 0.62) -> tuple[Figure, Any]:
    """Make a figure whose data coordinates are ``scale`` inches each, from (0, 0) to (width, height)."""
    figure = Figure(figsize=(width * scale, height * scale))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    return figure, axis


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG with a palette, which flat drawings do not miss."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    image = Image.open(content).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, format="PNG", optimize=True)
    return write_whole(path, small.getvalue())


def box(axis: Any, x: float, y: float, width: float, height: float, *, title: str = "", **look: Any) -> None:
    """Draw a rounded box, its title in the upper left corner."""
    style = {"facecolor": "#F6F6F6", "edgecolor": "#888888", "linewidth": 1.2, **look}
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", **style))
    if title:
        text(axis, x + 0.14, y + height - 0.13, title, ha="left", va="top", weight="bold")


def text(axis: Any, x: float, y: float, words: str, **look: Any) -> None:
    """Write words, centred unless ``look`` says otherwise."""
    style = {"ha": "center", "va": "center", "fontsize": 9, "color": INK, **look}
    axis.text(x, y, words, **style)


def token(axis: Any, x: float, y: float, words: str, colors: Sequence[str], *, size: float = 0.36) -> None:
    """Draw a token as a square with a stripe of each colour; none leaves it empty."""
    stripe = size / max(len(colors), 1)
    for number, color in enumerate(colors):
        axis.add_patch(Rectangle((x + number * stripe, y), stripe, size, facecolor=color, edgecolor="none"))
    edge = "white" if colors else FAINT
    axis.add_patch(Rectangle((x, y), size, size, facecolor="none", edgecolor=edge, linewidth=0.8))
    color = "white" if colors else FAINT
    text(axis, x + size / 2, y + size / 2 - 0.01, words, fontsize=6.5 * size / 0.36, color=color, weight="bold")


def tokens(axis: Any, x: float, y: float, names: Sequence[int], colors: Sequence[Sequence[str]], **look: Any) -> None:
    """Draw tokens side by side."""
    step = look.get("size", 0.36) + 0.04
    for place, (name, stripes) in enumerate(zip(names, colors, strict=True)):
        token(axis, x + place * step, y, str(name), stripes, **look)


def arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], color: str = INK, **look: Any) -> None:
    """Draw an arrow."""
    style = {"linewidth": 1.4, "arrowstyle": "-|>", "mutation_scale": 10, "shrinkA": 0, "shrinkB": 0, **look}
    axis.add_patch(FancyArrowPatch(start, end, color=color, **style))


def badge(axis: Any, x: float, y: float, words: str, color: str) -> None:
    """Write a number on a round patch, as on an arrow."""
    look = {"boxstyle": "circle,pad=0.18", "facecolor": "white", "edgecolor": color, "linewidth": 1.0}
    text(axis, x, y, words, fontsize=7.5, color=color, weight="bold", bbox=look, zorder=5)
