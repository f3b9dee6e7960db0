"""Schematics of the strategies that send tokens to experts: ``all_to_all``, static, hierarchical."""

from typing import Any

from drawings.routed import Routed, routed
from drawings.shapes import COLORS, FAINT, INK, LOST, arrow, badge, box, canvas, text, token, tokens
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moekit.parallel.all_to_all import static_limits
from moekit.parallel.exchange_plans import limit_exchange, plan_exchange

STEP = 0.4  # from token to token


def draw_all_to_all() -> Figure:
    """Draw four ranks: their tokens, the rows that travel, and the experts that use them."""
    case = routed(ranks=4, tokens=4, experts=8, k=2, seed=21)
    figure, axis = canvas(16.4, 8.9)
    rows = case.rows(blocks=4)
    text(
        axis, 0.3, 8.6, "Every rank has tokens of its own. A square's colours are the ranks of its experts.", ha="left"
    )
    for rank in range(4):
        x = 0.3 + 4.0 * rank
        box(axis, x + 0.6, 7.0, 2.6, 1.25, title=f"rank {rank}")
        colors = [[COLORS[p] for p in case.owners(n, blocks=4)] for n in case.on(rank)]
        tokens(axis, x + 1.1, 7.17, case.on(rank), colors)
    for rank in range(4):
        _receiving_rank(axis, case, rank, rows)
    sent, own = sum(map(sum, rows)), sum(rows[rank][rank] for rank in range(4))
    words = (
        f"16 tokens with K = 2 are 32 choices, but only {sent} rows: a token goes once to each rank, however many of "
        f"its experts are there.\n{own} of the rows stay on their rank (dashed), {sent - own} cross a link. Each rank "
        "adds a token's experts up, and one row of sums goes back by the same way."
    )
    text(axis, 0.3, 0.42, words, ha="left", linespacing=1.5)
    return figure


def _receiving_rank(axis: Any, case: Routed, rank: int, rows: list[list[int]]) -> None:
    x, color = 0.3 + 4.0 * rank, COLORS[rank]
    arrived = case.wanting(rank, blocks=4)
    box(axis, x, 1.0, 3.8, 2.9, edgecolor=color, linewidth=1.8)
    left = x + 0.15
    tokens(axis, left, 3.32, arrived, [[color]] * len(arrived), size=0.36)
    start = left
    for source in range(4):
        width = rows[source][rank] * STEP
        if width:
            middle, home = start + width / 2, 0.3 + 4.0 * source + 1.9
            style: dict[str, Any] = {"linestyle": (0, (2, 1.5))} if source == rank else {}
            lean = home + 0.3 * (rank - 1.5)
            arrow(axis, (lean, 7.0), (middle, 3.95), color, linewidth=0.7 + 0.6 * rows[source][rank], **style)
            badge(axis, middle + (lean - middle) * 0.17, 3.95 + 3.05 * 0.17, str(rows[source][rank]), color)
        start += width
    text(axis, x + 0.15, 3.13, f"rank {rank} receives {len(arrived)} rows", ha="left", fontsize=8)
    for place in range(2):
        expert = 2 * rank + place
        y = 2.0 - 0.9 * place
        box(axis, x + 0.15, y, 3.5, 0.78, facecolor="white", edgecolor=color)
        text(axis, x + 0.27, y + 0.39, f"expert\n{expert}", ha="left", fontsize=7.5)
        mine = [n for n in arrived if expert in case.choices[n]]
        tokens(axis, x + 1.0, y + 0.22, mine, [[color]] * len(mine), size=0.34)


def draw_static() -> Figure:
    """Draw the places that a rank has for every rank: full, empty, and the choices without a place."""
    case = routed(ranks=4, tokens=8, experts=8, k=2, seed=165)
    figure, axis = canvas(16.4, 6.5)
    routings = [case.routing(rank) for rank in range(4)]
    limit, assignments = static_limits(routings[0], 4, capacity_factor=1.0)
    text(axis, 0.3, 6.2, f"Every rank sends exactly C = {limit} rows to every rank.", ha="left")
    lost = empty = 0
    for rank in range(4):
        x = 0.3 + 4.0 * rank
        box(axis, x, 1.05, 3.8, 4.85, title=f"rank {rank} sends")
        plan = limit_exchange(plan_exchange(routings[rank], 4), rows=limit, assignments=assignments)
        kept = plan.rows.view(-1, 2).tolist()
        for target in range(4):
            y, color = 4.4 - 0.98 * target, COLORS[target]
            text(axis, x + 0.14, y + 0.32, f"to {target}", ha="left", fontsize=8, color=color, weight="bold")
            want = [n for n in case.on(rank) if target in case.owners(n, blocks=4)]
            have = {row - target * limit: case.on(rank)[t] for t, pair in enumerate(kept) for row in pair
                    if row // limit == target}  # fmt: skip
            for place in range(limit):
                at = (x + 0.72 + place * 0.44, y + 0.12)
                if place in have:
                    token(axis, *at, str(have[place]), [color], size=0.4)
                else:
                    axis.add_patch(Rectangle(at, 0.4, 0.4, facecolor="white", edgecolor=FAINT, hatch="////", lw=0.6))
                    empty += 1
            beyond = [n for n in want if n not in have.values()]
            for place, name in enumerate(beyond):
                at = (x + 0.72 + limit * 0.44 + 0.12 + place * 0.44, y + 0.12)
                token(axis, *at, str(name), [], size=0.4)
                axis.plot([at[0], at[0] + 0.4], [at[1], at[1] + 0.4], color=LOST, linewidth=1.3)
            lost += len(beyond)
    words = (
        f"C = min(T, trunc(cf * K * T / P)), here with T = 8, K = 2, P = 4 and cf = 1. {16 * limit} rows travel: "
        f"{16 * limit - empty} tokens and {empty} of padding (hatched).\n{lost} rows find no place and are dropped "
        "(struck out). Nobody asks how many are coming, so the device is never read and the layer compiles."
    )
    text(axis, 0.3, 0.5, words, ha="left", linespacing=1.5)
    return figure


def draw_hierarchical() -> Figure:
    """Draw the way of one token, sent flat and sent through its own number on the other node."""
    case = routed(ranks=8, tokens=6, experts=16, k=4, seed=6)
    star = max(case.on(1), key=lambda n: sum(owner >= 4 for owner in case.owners(n, blocks=8)))
    figure, axis = canvas(16.4, 8.0)
    over = [sum(rows[p] for s, rows in enumerate(case.rows(blocks=8)) for p in range(8) if s // 4 != p // 4)]
    over += [sum(rows[node] for s, rows in enumerate(case.rows(blocks=2)) for node in range(2) if s // 4 != node)]
    titles = ["all_to_all over 8 ranks", "all_to_all over 2 nodes, then over the 4 ranks of each"]
    for part, (title, count) in enumerate(zip(titles, over, strict=True)):
        x = 0.3 + 8.1 * part
        text(axis, x, 7.7, title, ha="left", weight="bold", fontsize=10)
        _two_nodes(axis, x, case, star, by_node=bool(part))
        crossing = sum(owner >= 4 for owner in case.owners(star, blocks=8)) if not part else 1
        times = "once" if crossing == 1 else f"{crossing} times"
        words = f"Token {star} crosses the network {times}; all 48 tokens: {count} rows."
        text(axis, x, 1.0, words, ha="left")
    choices = ", ".join(map(str, sorted(case.choices[star])))
    words = f"E = 16 experts, two on each rank; K = 4. Token {star} is on rank 1 and chose experts {choices}."
    text(axis, 0.3, 0.4, words, ha="left")
    return figure


def _two_nodes(axis: Any, x: float, case: Routed, star: int, *, by_node: bool) -> None:
    owners = case.owners(star, blocks=8)

    def place(rank: int) -> tuple[float, float]:
        return x + 0.45 + (rank // 4) * 4.9 + 0.95, 5.92 - 1.25 * (rank % 4)

    for node in range(2):
        left = x + 4.9 * node
        box(axis, left, 1.5, 2.8, 5.8, title=f"node {node}", facecolor="#FBFBFB")
        for rank in range(4 * node, 4 * node + 4):
            y = place(rank)[1]
            used = rank in owners
            edge = COLORS[0] if used else FAINT
            box(axis, left + 0.75, y - 0.42, 1.9, 0.84, facecolor="white", edgecolor=edge, linewidth=1.6 if used else 1)
            mine = [e for e in (2 * rank, 2 * rank + 1) if e in case.choices[star]]
            text(
                axis, left + 1.7, y + 0.16, f"rank {rank}", weight="bold", fontsize=8, color=INK if used else "#999999"
            )
            words = f"expert{'s' if len(mine) > 1 else ''} {', '.join(map(str, mine))}" if mine else "not needed"
            text(axis, left + 1.7, y - 0.17, words, fontsize=7.5, color=INK if used else "#999999")
    source = 1
    token(axis, x + 0.14, place(source)[1] - 0.2, str(star), [INK], size=0.42)
    _ways(axis, x, place, owners, star=star, by_node=by_node)


def _ways(axis: Any, x: float, place: Any, owners: list[int], *, star: int, by_node: bool) -> None:
    near, far = [p for p in owners if p < 4], [p for p in owners if p >= 4]
    relay_y = place(5)[1]
    for rank in near:
        y = place(rank)[1]
        bend = "arc3,rad=0" if rank == 1 else f"arc3,rad={0.25 if rank > 1 else -0.25}"
        arrow(
            axis,
            (x + 0.36, relay_y + (-0.22 if rank > 1 else 0.22 if rank < 1 else 0)),
            (x + 0.75, y),
            connectionstyle=bend,
        )
    if by_node:
        arrow(axis, (x + 2.65, relay_y), (x + 4.9 + 0.12, relay_y), LOST, linewidth=2.6)
        token(axis, x + 4.9 + 0.14, relay_y - 0.21, str(star), [INK], size=0.42)
        for rank in far:
            arrow(axis, (x + 5.38, relay_y + 0.2 * ((rank < 5) - (rank > 5))), (x + 5.65, place(rank)[1]))
    else:
        for rank in far:
            arrow(axis, (x + 2.65, relay_y), (x + 5.65, place(rank)[1]), LOST, linewidth=2.0)
    text(axis, x + 3.85, 6.95, "network", color=LOST, fontsize=8.5)
