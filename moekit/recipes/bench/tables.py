"""The layer benchmark's report as JSON, as Markdown, and on the terminal."""

import json
from functools import partial
from statistics import median
from typing import Any

from moekit.recipes.bench.layer import Report, Row, Table
from moekit.recipes.bench.stages import Stage, shares

HEADINGS = (
    "", "forward ms", "fwd + bwd ms", "inference ms", "TFLOP/s", "of the bound", "forward", "inference", "held MiB",
    "peak MiB",
)  # fmt: skip


def as_json(report: Report) -> str:
    """Write a report as JSON: seconds of every round, bytes, fractions.

    Args:
        report: of ``bench_layer``.

    Returns:
        A text that ends in a newline.
    """
    tables = [
        {
            **table.shape._asdict(),
            **{name: getattr(table, name) for name in ("load", "device", "dtype", "precision", "imbalance", "empty")},
            "rows": [{**row._asdict(), "memory": row.memory and row.memory._asdict()} for row in table.rows],
            "stages": {name: [_rated(stage) for stage in stages] for name, stages in table.stages.items()},
        }
        for table in report.tables
    ]
    return json.dumps({"machine": dict(report.machine), "tables": tables}, indent=1) + "\n"


def as_markdown(report: Report) -> str:
    """Write a report as Markdown: a table for each shape and load, and one for each layer's stages.

    Args:
        report: of ``bench_layer``.

    Returns:
        A text that ends in a newline.
    """
    lines = [f"{name}: {value}  " for name, value in report.machine.items()]
    lines += [
        "",
        "Times are medians; fractions are medians over rounds of the same run. Inference is the forward with gradients "
        "off. GB/s and TFLOP/s of stages are of the best round.",
        "",
    ]
    for table in report.tables:
        lines += [f"## {title(table)}", "", *_markdown(HEADINGS, rows_of(table)), ""]
        lines += [f"- {note}" for note in notes_of(table)]
        for name, stages in table.stages.items():
            lines += ["", *_markdown(stage_headings(name), stages_of(stages)), ""]
    return "\n".join(lines)


def title(table: Table) -> str:
    """Say what a table is about.

    Args:
        table: of a report.

    Returns:
        One line.
    """
    s = table.shape
    sizes = f"T {s.tokens:,}, D {s.dim:,}, F {s.hidden:,}, E {s.experts}, K {s.k}"
    load = f"{table.load}: largest load {table.imbalance:.2f} of the mean, {table.empty} experts empty"
    by = " by TF32" if table.precision == "tf32" else ""
    return f"{s.name} ({sizes}), {table.device} {table.dtype}{by}, {load}"


def rows_of(table: Table) -> list[tuple[str, ...]]:
    """Lay out the rows that have numbers, as texts under ``HEADINGS``.

    Args:
        table: of a report.

    Returns:
        A tuple each.
    """
    return [_cells(row, (1 - row.dropped) * 3 * table.shape.flops) for row in table.rows if not row.skipped]


def notes_of(table: Table) -> list[str]:
    """Say which rows have no numbers, and why, and which drop a part of the rows that the bound computes.

    Args:
        table: of a report.

    Returns:
        A line each.

    Example:
        >>> from moekit.recipes.bench.shapes import LayerShape
        >>> rows = [Row("mine", dropped=0.25), Row("yours", skipped="not installed")]
        >>> notes = notes_of(Table(LayerShape("", 8, 8, 8, 4, 2), "hot", "cpu", "float32", 2.0, 0, rows, {}))
        >>> print("\\n".join(notes))
        mine: 25.0% of the T K rows are dropped; TFLOP/s and fractions count the others
        yours: not installed
    """
    told = "of the T K rows are dropped; TFLOP/s and fractions count the others"
    notes = {row.name: row.skipped or (f"{row.dropped:.1%} {told}" if row.dropped else "") for row in table.rows}
    return [f"{name}: {note}" for name, note in notes.items() if note]


def stage_headings(name: str) -> tuple[str, ...]:
    """Return the headings above a layer's stages.

    Args:
        name: of the layer.

    Returns:
        A text for each column.
    """
    return f"stage of {name}", "ms", "share", "GB/s", "TFLOP/s"


def stages_of(stages: list[Stage]) -> list[tuple[str, ...]]:
    """Lay out the stages of a layer, as texts under ``stage_headings``.

    Args:
        stages: of a layer.

    Returns:
        A tuple each.
    """
    return [
        (
            stage.name,
            f"{median(stage.seconds) * 1e3:.3f}",
            f"{share:.0%}",
            f"{stage.gigabytes_per_second:.4g}",
            f"{stage.teraflops:.4g}" if stage.flops else "",
        )
        for stage, share in zip(stages, shares(stages), strict=True)
    ]


def _rated(stage: Stage) -> dict[str, Any]:
    return {**stage._asdict(), "GB/s": stage.gigabytes_per_second, "TFLOP/s": stage.teraflops}


def _cells(row: Row, flops: float) -> tuple[str, ...]:
    measured = row.forward, row.both, row.inference
    times = [f"{median(seconds) * 1e3:.2f}" if seconds else "-" for seconds in measured]
    related = row.fraction, row.forward_fraction, row.inference_fraction
    fractions = ["-" if each is None else f"{each:.2f}" for each in related]
    held, peak = (None, None) if row.memory is None else row.memory
    sizes = ["-" if each is None else f"{each / 2**20:.1f}" for each in (held, peak)]
    return (row.name, *times, f"{flops / median(row.both) / 1e12:.4g}", *fractions, *sizes)


def _markdown(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    aligned = ["---", *["--:"] * (len(headings) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (headings, aligned, *rows)]


def print_report(report: Report, console: Any) -> None:
    """Print a report's tables. At 120 columns nothing in them is cut.

    Args:
        report: of ``bench_layer``.
        console: a ``rich.console.Console``.
    """
    from moekit.lm.consoles import print_lines

    say = partial(print_lines, console)
    for name, value in report.machine.items():
        say(f"{name}: {value}")
    for table in report.tables:
        say(f"\n{title(table)}\n")
        stages = [(stage_headings(name), stages_of(each)) for name, each in table.stages.items()]
        for headings, rows in ((HEADINGS, rows_of(table)), *stages):
            console.print(_on_terminal(headings, rows))
            say("")
        for note in notes_of(table):
            say(f"  {note}")


def _on_terminal(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> Any:
    """Lay a table out for the terminal: units below what they are of, two columns of space and no lines between."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable

    shown = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    name, *others = headings
    shown.add_column(name, overflow="fold", no_wrap=True)
    for heading in others:
        shown.add_column("\n".join(heading.rsplit(" ", 1)), justify="right", overflow="fold", no_wrap=True)
    for cells in rows:
        shown.add_row(*cells)
    return shown
