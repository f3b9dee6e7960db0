"""Schematics of the strategies that gather tokens: ``all_gather``, ``tensor_parallel``, and EP x TP."""

from typing import Any

from drawings.routed import Routed, routed
from drawings.shapes import COLORS, FAINT, arrow, badge, box, canvas, text, token, tokens
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moekit.parallel.layouts import part_of, spread_experts


def draw_all_gather() -> Figure:
    """Draw four ranks that all get every token, and use those that chose their experts."""
    case = routed(ranks=4, tokens=4, experts=8, k=2, seed=21)  # the routing of the all_to_all picture
    figure, axis = canvas(16.4, 8.6)
    text(
        axis, 0.3, 8.3, "Every rank has tokens of its own. A square's colours are the ranks of its experts.", ha="left"
    )
    for rank in range(4):
        x = 0.3 + 4.0 * rank
        for source in range(4):
            style: dict[str, Any] = {"linestyle": (0, (2, 1.5))} if source == rank else {}
            end = (x + 0.8 + 0.73 * source, 4.55)
            lean = 0.3 + 4.0 * source + 1.9 + 0.3 * (rank - 1.5)
            arrow(axis, (lean, 6.7), end, "#888888", **style)
            badge(axis, end[0] + 0.17 * (lean - end[0]), end[1] + 0.17 * 2.15, "4", "#666666")
        box(axis, x + 0.6, 6.7, 2.6, 1.25, title=f"rank {rank}")
        colors = [[COLORS[p] for p in case.owners(n, blocks=4)] for n in case.on(rank)]
        tokens(axis, x + 1.1, 6.87, case.on(rank), colors)
    for rank in range(4):
        x, color = 0.3 + 4.0 * rank, COLORS[rank]
        used = case.wanting(rank, blocks=4)
        box(axis, x, 1.35, 3.8, 3.15, edgecolor=color, linewidth=1.8)
        for source in range(4):
            for place, name in enumerate(case.on(source)):
                stripes = [color] if name in used else []
                token(axis, x + 0.62 + 0.73 * source, 3.85 - 0.43 * place, str(name), stripes, size=0.38)
        text(
            axis,
            x + 0.62,
            2.12,
            f"experts {2 * rank} and {2 * rank + 1} use {len(used)} of 16 rows",
            ha="left",
            fontsize=8,
        )
        text(axis, x + 0.62, 1.74, "and add zero to the others", ha="left", fontsize=8)
    travel = sum(map(sum, case.rows(blocks=4))) - sum(case.rows(blocks=4)[rank][rank] for rank in range(4))
    words = (
        f"T * (P - 1) = 12 rows come in at every rank, {12 * 4} in all, where all_to_all lets {travel} cross a link "
        "for the same routing.\nOutputs of all 16 tokens are added over the ranks and scattered: again 12 rows out of "
        "every rank. All shapes are known beforehand."
    )
    text(axis, 0.3, 0.5, words, ha="left", linespacing=1.5)
    return figure


def draw_tensor_parallel() -> Figure:
    """Draw two ranks that hold half of every expert's hidden units each."""
    figure, axis = canvas(16.4, 7.3)
    titles = ((1.2, "own tokens"), (4.35, "gathered"), (8.0, "half of the hidden units"), (11.55, "partial outputs"))
    for x, words in (*titles, (15.0, "own outputs")):
        text(axis, x, 6.95, words, weight="bold")
    for rank in range(2):
        y, color = 4.0 - 2.9 * rank, COLORS[rank]
        box(axis, 0.2, y, 16.0, 2.6, title=f"rank {rank}", facecolor="#FBFBFB", edgecolor=color, linewidth=1.6)
        mine, every = list(range(4 * rank, 4 * rank + 4)), list(range(8))
        tokens(axis, 0.4, y + 1.0, mine, [["#666666"]] * 4)
        for place, name in enumerate(every):
            at = (3.55 + 0.4 * (place % 4), y + 1.25 - 0.42 * (place // 4))
            token(axis, *at, str(name), ["#666666"])
            token(axis, at[0] + 7.2, at[1], str(name), [color])
        for expert in range(4):
            _slices(axis, 6.45 + 0.85 * expert, y + 0.3, expert, rank)
        arrow(axis, (5.3, y + 1.2), (6.25, y + 1.2))
        arrow(axis, (9.75, y + 1.2), (10.55, y + 1.2))
        tokens(axis, 14.2, y + 1.0, mine, [[COLORS[0], COLORS[1]]] * 4)
    for start, end, words in ((2.1, 3.4, "all-gather"), (12.5, 14.05, "reduce-scatter")):
        for source in range(2):
            for target in range(2):
                style: dict[str, Any] = {"linestyle": (0, (2, 1.5))} if source == target else {}
                arrow(axis, (start, 5.2 - 2.9 * source), (end, 5.2 - 2.9 * target), "#666666", **style)
        text(
            axis,
            (start + end) / 2,
            3.8,
            words,
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
    words = (
        "An expert's output is a sum over its hidden units, so each rank adds its half and the two are added up "
        "(two-coloured: complete).\nT * (Y - 1) rows come in at every rank, and as many go out. Every rank does "
        "1 / Y of every token's work, so no routing can make ranks unequal."
    )
    text(axis, 0.3, 0.5, words, ha="left", linespacing=1.5)
    return figure


def _slices(axis: Any, x: float, y: float, expert: int, own: int, *, height: float = 1.5, units: int = 8) -> None:
    """Draw an expert as its hidden units; a rank holds those of its colour."""
    unit = height / units
    for number in range(units):
        slice_ = number * 2 // units
        look: dict[str, Any] = {"facecolor": COLORS[own]} if slice_ == own else {"facecolor": "white", "hatch": "////"}
        bottom = y + height - (number + 1) * unit
        axis.add_patch(Rectangle((x, bottom), 0.5, unit, edgecolor=FAINT, linewidth=0.6, **look))
    text(axis, x + 0.25, y + height + 0.17, f"expert {expert}", fontsize=7)


def draw_experts_by_hidden() -> Figure:
    """Draw eight ranks with four experts: blocks along one axis, slices of F along the other, and one token's way."""
    layout = spread_experts(8, 4, 8)
    case = routed(ranks=8, tokens=4, experts=4, k=2, seed=1)
    star = next(n for n in case.on(0) if case.owners(n, blocks=4) == [1, 3])
    figure, axis = canvas(16.4, 9.4)
    words = "8 ranks, 4 experts: F is cut in two. Rank r owns expert r mod 4 and slice r div 4 of its hidden units."
    text(axis, 0.3, 9.1, words, ha="left")
    for rank in range(8):
        _grid_rank(axis, case, rank, part_of(layout, rank).block, part_of(layout, rank).hidden)
    for target in case.owners(star, blocks=4):
        x = 4.0 * target
        start, height = 1.5 - 0.1 * target, 7.95 + 0.12 * target
        axis.plot([start, start, x + 2.2], [7.75, height, height], color=COLORS[target], linewidth=1.8)
        arrow(axis, (x + 2.2, height), (x + 2.2, 7.75), COLORS[target], linewidth=1.8)
        arrow(axis, (x + 3.6, 5.0), (x + 3.6, 4.0), COLORS[target], linewidth=1.8, arrowstyle="<|-|>")
    text(
        axis,
        0.3,
        8.6,
        f"1. all_to_all along the line: token {star} of rank 0 chose experts 1 and 3.",
        ha="left",
        fontsize=8.5,
    )
    words = (
        "2. tensor_parallel down the column: the pair gather\neach other's rows, add up what their halves of the\n"
        "expert make of them, and each keeps the sums of its own."
    )
    text(axis, 0.3, 4.5, words, ha="left", fontsize=8, linespacing=1.3)
    sent = sum(map(sum, case.rows(blocks=4)))
    words = (
        f"32 tokens with K = 2 are {sent} rows along the lines (to the own rank included), and each crosses its column "
        "once more.\n"
        "3. The complete sums travel back along the line. Experts of a rank work on all rows of their column."
    )
    text(axis, 0.3, 0.5, words, ha="left", linespacing=1.5)
    return figure


def _grid_rank(axis: Any, case: Routed, rank: int, block: int, hidden: int) -> None:
    x, y, color = 0.3 + 4.0 * block, 5.0 - 3.75 * hidden, COLORS[block]
    row = list(range(4 * hidden, 4 * hidden + 4))
    arrived = case.wanting(block, blocks=4, sources=row)
    both = len(case.wanting(block, blocks=4))
    box(axis, x, y, 3.8, 2.75, title=f"rank {rank}", edgecolor=color, linewidth=1.8)
    for number in range(2):
        look: dict[str, Any] = {"facecolor": color} if number == hidden else {"facecolor": "white", "hatch": "////"}
        axis.add_patch(
            Rectangle((x + 2.35 + 0.55 * number, y + 2.2), 0.55, 0.3, edgecolor=FAINT, linewidth=0.6, **look)
        )
    text(axis, x + 2.3, y + 2.35, f"expert {block}", fontsize=7.5, ha="right")
    colors = [[COLORS[p] for p in case.owners(n, blocks=4)] for n in case.on(rank)]
    tokens(axis, x + 0.15, y + 1.62, case.on(rank), colors)
    text(axis, x + 1.85, y + 1.8, "its tokens", fontsize=7.5, ha="left")
    for place, name in enumerate(arrived):
        token(axis, x + 0.15 + 0.31 * place, y + 0.95, str(name), [color], size=0.28)
    text(axis, x + 0.15, y + 0.68, f"{len(arrived)} rows arrive", fontsize=7.5, ha="left")
    text(axis, x + 0.15, y + 0.3, f"{both} with those of rank {(rank + 4) % 8}", fontsize=7.5, ha="left")
