"""The time line of ``chunked``, simulated; and who owns what in a grid of ranks."""

from typing import Any, NamedTuple

from drawings.shapes import COLORS, FAINT, INK, box, canvas, text
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moekit.parallel import costs
from moekit.parallel.layouts import Layout, part_of, replicated, spread_experts
from moekit.parallel.link_times import h100_machine, seconds
from moekit.parallel.payloads import Shape

_OLMOE = Shape(8192, 2048, 1024, 64, 8)
_FLOPS = 400e12


class Job(NamedTuple):
    """A piece of work on the link or on the GPU."""

    lane: str
    chunk: int
    kind: str
    start: float
    end: float


def simulate(num_chunks: int) -> list[Job]:
    """Run the forward of ``chunked`` on one link and one GPU, each doing one thing at a time.

    Two streams take the chunks in turn; within a stream everything waits for what came before.
    """
    shape = _OLMOE._replace(tokens=_OLMOE.tokens // num_chunks)
    layout = spread_experts(16, shape.experts, shape.hidden, ranks_per_node=8)
    sent = [entry for entry in costs.hierarchical(shape, layout, ranks_per_node=8) if not entry.backward]
    machine = h100_machine()
    back = seconds([entry for entry in sent if entry.name == "outputs"], machine)
    there = seconds(sent, machine) - back
    steps = (("link", "there", there), ("GPU", "experts", shape.flops / 3 / _FLOPS), ("link", "back", back))
    free, ready, done = {"link": 0.0, "GPU": 0.0}, [0.0, 0.0], [0] * num_chunks
    jobs: list[Job] = []
    while len(jobs) < 3 * num_chunks:
        waiting = [
            chunk
            for chunk in range(num_chunks)
            if done[chunk] < 3 and all(done[c] == 3 for c in range(chunk % 2, chunk, 2))
        ]
        chunk = min(waiting, key=lambda c: (max(ready[c % 2], free[steps[done[c]][0]]), c))
        lane, kind, length = steps[done[chunk]]
        start = max(ready[chunk % 2], free[lane])
        jobs.append(Job(lane, chunk, kind, start, start + length))
        free[lane] = ready[chunk % 2] = start + length
        done[chunk] += 1
    return jobs


def draw_chunked() -> Figure:
    """Draw the time lines of one, two and four chunks."""
    figure, axis = canvas(16.4, 7.4)
    cases = {number: simulate(number) for number in (1, 2, 4)}
    last = max(job.end for jobs in cases.values() for job in jobs)
    unit = 13.6 / last
    for row, (number, jobs) in enumerate(cases.items()):
        y = 5.35 - 2.05 * row
        total = max(job.end for job in jobs)
        text(
            axis,
            0.3,
            y + 1.35,
            "not chunked" if number == 1 else f"chunked, num_chunks = {number}",
            ha="left",
            weight="bold",
        )
        text(axis, 2.3 + total * unit, y + 1.35, f"{1e3 * total:.2f} ms", ha="right", weight="bold")
        for lane, below in (("link", 0.58), ("GPU", 0.0)):
            text(axis, 2.15, y + below + 0.25, lane, ha="right")
            axis.add_patch(Rectangle((2.3, y + below), last * unit, 0.5, facecolor="#F3F3F3", edgecolor="none"))
        for job in jobs:
            _bar(axis, job, y + (0.58 if job.lane == "link" else 0.0), unit)
    words = (
        "Forward of OLMoE's layer on two nodes (hierarchical exchange, 8,192 tokens per GPU): links as in "
        "`moekit traffic`, experts at 400 TFLOP/s.\nOne colour is one chunk: tokens go out (plain), experts run on the "
        "GPU, sums come back (hatched). The bytes are the same; the waiting is less."
    )
    text(axis, 0.3, 0.5, words, ha="left", linespacing=1.5)
    return figure


def _bar(axis: Any, job: Job, y: float, unit: float) -> None:
    look: dict[str, Any] = {"hatch": "///"} if job.kind == "back" else {}
    x, width = 2.3 + job.start * unit, (job.end - job.start) * unit
    axis.add_patch(Rectangle((x, y), width, 0.5, facecolor=COLORS[job.chunk], edgecolor="white", linewidth=0.8, **look))
    if width > 0.7:
        patch = {"facecolor": COLORS[job.chunk], "edgecolor": "none", "pad": 1.0}
        text(axis, x + width / 2, y + 0.25, job.kind, color="white", fontsize=7.5, weight="bold", bbox=patch)


def draw_grids() -> Figure:
    """Draw who owns what for some numbers of ranks and experts."""
    figure, axis = canvas(16.4, 9.0)
    panels = (
        (0.3, 8.7, "8 ranks, 8 experts: one each", spread_experts(8, 8, 8)),
        (8.4, 8.7, "8 ranks, 4 experts: F is cut in 2", spread_experts(8, 4, 8)),
        (0.3, 5.6, "8 ranks, 8 experts, --moe-expert-ranks 4: 2 replicas", spread_experts(8, 8, 8, expert_ranks=4)),
        (8.4, 5.6, "6 ranks, 4 experts: 2 blocks (gcd), 3 replicas", spread_experts(6, 4, 8)),
        (0.3, 2.35, "8 ranks, 8 experts, no exchange: 8 replicas", replicated(8, 8)),
    )
    for x, y, title, layout in panels:
        text(axis, x, y, title, ha="left", weight="bold")
        _grid(axis, x, y - 0.3, layout)
    words = (
        "A box is a rank, its colour its block of experts. The bar is F, and what is\n"
        "filled is the slice that the rank holds. A dashed frame holds replicas: FSDP\n"
        "shards their parameters over the frame. Tokens travel along a line of boxes\n"
        "(all_to_all), and between slices of one colour (tensor_parallel)."
    )
    text(axis, 8.4, 1.0, words, ha="left", linespacing=1.5)
    return figure


def _grid(axis: Any, x: float, top: float, layout: Layout) -> None:
    blocks = layout.expert_ranks
    across = blocks if blocks > 1 else 8
    size = 7.7 / max(across, 4)
    for rank in range(layout.world_size):
        part = part_of(layout, rank)
        column, row = rank % across, rank // across
        at = (x + column * size, top - 1.05 * (row + 1))
        color = COLORS[part.block]
        box(axis, at[0], at[1], size - 0.14, 0.92, facecolor="white", edgecolor=color, linewidth=1.6)
        text(axis, at[0] + size / 2 - 0.07, at[1] + 0.72, f"rank {rank}", fontsize=7.5, weight="bold")
        owned = part.experts(layout.num_experts)
        words = f"expert {owned[0]}" if len(owned) == 1 else f"exp. {owned[0]}-{owned[-1]}"
        text(axis, at[0] + size / 2 - 0.07, at[1] + 0.45, words, fontsize=7 if len(owned) == 1 else 7.5)
        width = (size - 0.34) / part.slices
        for number in range(part.slices):
            look: dict[str, Any] = {"facecolor": color} if number == part.hidden else {"facecolor": "white"}
            corner = (at[0] + 0.1 + number * width, at[1] + 0.12)
            axis.add_patch(Rectangle(corner, width, 0.16, edgecolor=FAINT, linewidth=0.6, **look))
    if layout.replicas > 1:
        for block in range(blocks if blocks > 1 else 1):
            wide = size if blocks > 1 else 8 * size
            rows = layout.replicas if blocks > 1 else 1
            frame: dict[str, Any] = {"facecolor": "none", "edgecolor": INK, "linestyle": (0, (4, 2)), "linewidth": 1.0}
            axis.add_patch(Rectangle((x - 0.07 + block * wide, top - 1.05 * rows - 0.07), wide, 1.05 * rows, **frame))
