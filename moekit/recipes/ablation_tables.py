"""The table of an ablation: a row for each router; printed, as Markdown, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from moekit.lm.ablation_plots import Dots, plot_ablation
from moekit.recipes.ablation_summaries import Spread, Summary


def headings(rows: Sequence[Summary]) -> list[str]:
    """Name the columns.

    Args:
        rows: at least one.

    Returns:
        As many as ``cells`` gives for each.
    """
    rest = ("experts/token", "max violation", "dead", "dropped", "tokens/s", "causal", "verdict")
    return ["router", *_sets(rows), f"vs {rows[0].label}", *rest]


def cells(row: Summary, rows: Sequence[Summary]) -> list[str]:
    """Write a row.

    Args:
        row: of a router.
        rows: all of the table; the first is what the others are compared with.

    Returns:
        Texts; a loss that is not comparable has a star, and so has a difference of which either loss is not. One over
        fewer seeds than the ablation has says so: ``4.500 (1 of 2)``.
    """
    star = "*" if row.leaks_evaluation else ""
    either = "*" if row.leaks_evaluation or rows[0].leaks_evaluation else ""
    losses = [_loss(row.losses[name], row.seeds, star) if name in row.losses else "-" for name in _sets(rows)]
    against = "-" if row.against is None else _loss(row.against, row.seeds, either, sign="+")
    if not row.losses:
        return [row.label, *losses, against, *["-"] * 6, row.verdict]
    return [
        row.label,
        *losses,
        against,
        f"{row.experts_per_token:.2f}",
        f"{row.max_violation:.2f}",
        f"{row.dead_experts:g}",
        f"{row.drop_rate:.1%}",
        f"{row.tokens_per_second:,.0f}",
        "no" if row.leaks_evaluation else "evaluation" if row.leaks_training else "yes",
        row.verdict,
    ]


def notes(rows: Sequence[Summary], *, first: str | None = None) -> list[str]:
    """Say what the columns are.

    Args:
        rows: at least one.
        first: label of the first router that was asked for, of which there may be no row yet; None is that of the rows.

    Returns:
        Sentences, one a line.
    """
    told = [
        *_notes_on_losses(rows),
        *_note_on_first(rows, first),
        "experts/token, max violation (worst layer; 0 is balanced) and dead experts (all layers): on all validation "
        "sets together, without simple experts, which cost nothing. dropped: in training, the mean of the steps that "
        "were logged. Means over seeds.",
        "collapsed: a loss that is not finite; an expert without any validation token (dead); or a loss not below that "
        "of a prediction without context on the same tokens: how often each occurs in the set's first million, or in "
        "all that are scored if those are more (unigram). In any seed.",
    ]
    if any(row.leaks_evaluation for row in rows):
        told.append("* not comparable: its output depends on later tokens, so it sees what it predicts.")
        if rows[0].leaks_evaluation:
            told[-1] += f" That of {rows[0].label} does, so no difference from it is comparable."
    if any(row.leaks_training and not row.leaks_evaluation for row in rows):
        told.append("causal in evaluation: trained with what depends on later tokens, evaluated without.")
    older = [row.label for row in rows if row.older]
    if older:
        told.append(
            f"{', '.join(older)}: with runs of an older version, whose experts/token are of the first batch of each "
            "set, loads weighed by tokens, and unigram the entropy of the set's first million tokens. Remove their "
            "folders to do them again."
        )
    counting = [row.label for row in rows if row.counts_all]
    if counting:
        told.append(
            f"{', '.join(counting)}: with runs of an older version, whose experts/token, max violation and dead count "
            "simple experts too, and experts/token the slots of sequences without a token. Remove their folders to do "
            "them again."
        )
    if any(row.verdict.startswith("failed") for row in rows):
        told.append("failed: an error ended a run, whose numbers are missing; its folder has error.txt. In any seed.")
    return told


def printed(rows: Sequence[Summary], *, first: str | None = None) -> Table:
    """Lay rows out for a terminal.

    Args:
        rows: at least one.
        first: see ``notes``.

    Returns:
        A table to print.
    """
    caption = "\n".join(notes(rows, first=first))
    table = Table(title="routers", title_justify="left", caption=caption, caption_justify="left")
    for heading in headings(rows):
        justify = "left" if heading in ("router", "causal", "verdict") else "right"
        table.add_column(heading.replace("/", "/\n").replace(" ", "\n"), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*cells(row, rows), style=None if row.verdict == "trains" else "yellow")
    return table


def markdown(rows: Sequence[Summary], *, first: str | None = None) -> str:
    """Write rows as a Markdown table with notes.

    Args:
        rows: at least one.
        first: see ``notes``.

    Returns:
        The text.
    """
    names = headings(rows)
    rule = ["---" if name in ("router", "causal", "verdict") else "---:" for name in names]
    lines = [names, rule, *(cells(row, rows) for row in rows)]
    table = "".join(f"| {' | '.join(each.replace('*', chr(92) + '*') for each in line)} |\n" for line in lines)
    return table + "\n" + "\n\n".join(note.replace("* not", "\\* not") for note in notes(rows, first=first)) + "\n"


def draw(path: Path, rows: Sequence[Summary]) -> Path:
    """Draw the losses of all routers, with a line at the mean of the first.

    There is no line if all runs of the first failed, or its losses are not comparable.

    Args:
        path: of the PNG.
        rows: at least one.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    sets = _sets(rows)
    dots = [
        Dots(_dots_label(row), {name: row.losses[name].values for name in sets}, comparable=not row.leaks_evaluation)
        for row in rows
        if row.losses
    ]
    means = {name: each.mean for name, each in rows[0].losses.items()}
    return plot_ablation(path, dots, sets=sets, baseline=means if means and not rows[0].leaks_evaluation else None)


def _sets(rows: Sequence[Summary]) -> list[str]:
    return next((list(row.losses) for row in rows if row.losses), [])


def _notes_on_losses(rows: Sequence[Summary]) -> list[str]:
    spreads = [each for row in rows for each in (*row.losses.values(), row.against) if each is not None]
    if not spreads:  # every run failed
        return []
    seeds = rows[0].seeds
    told = [
        f"Validation loss, nats per token: mean ± half the range over {seeds} seed{'s' if seeds != 1 else ''}; "
        f"vs {rows[0].label}: the same seed's difference, averaged over the sets."
    ]
    if any(_few(each, seeds) for each in spreads):
        told.append(
            f"(n of {seeds}): over n seeds alone, as other runs failed, had no finite loss, or are not done. Losses "
            f"over different seeds are compared in the column vs {rows[0].label} alone."
        )
    return told


def _note_on_first(rows: Sequence[Summary], first: str | None) -> list[str]:
    if first in (None, rows[0].label):
        return []
    return [f"{first}, the first router, has no run that has ended yet: differences are from {rows[0].label} instead."]


def _loss(spread: Spread, seeds: int, star: str, *, sign: str = "") -> str:
    text, few = format(spread.mean, f"{sign}.3f"), _few(spread, seeds)
    text += "" if len(spread.values) == 1 else f" ± {spread.half_range:.3f}"
    return f"{text}{star} ({few})" if few else f"{text}{star}"


def _dots_label(row: Summary) -> str:
    few = _few(next(iter(row.losses.values())), row.seeds)
    return f"{row.label} ({few} seeds)" if few else row.label


def _few(spread: Spread, seeds: int) -> str:
    return f"{len(spread.values)} of {seeds}" if len(spread.values) < seeds else ""
