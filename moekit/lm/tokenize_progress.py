"""What a tokenizing run shows: a bar on a terminal, a line at every tenth elsewhere, and a summary."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from rich import progress as bars
from rich.console import Console

from moekit.lm.consoles import print_lines
from moekit.lm.tokenize_parts import Tally


class Progress(Protocol):
    """Shows how far a stage of the work is."""

    def __call__(self, stage: str, done: int, total: int, words: str) -> None:
        """Show that ``done`` of ``total`` is done, with more in words."""
        ...


@contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """Open a display of progress.

    Args:
        console: where to.

    Yields:
        The function to call.

    Example:
        >>> with show_progress(Console(force_terminal=False)) as progress:
        ...     progress("tokenizing", 1, 4, "10 tokens")
        tokenizing 25%, 10 tokens
    """
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        bars.TextColumn("[bold]{task.description}"), bars.BarColumn(None), bars.TaskProgressColumn(),
        bars.TextColumn("{task.fields[words]}"), bars.TimeElapsedColumn(), bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    )  # fmt: skip
    with bars.Progress(*columns, console=console, expand=True) as shown:
        yield _Bars(shown)


class Summary(NamedTuple):
    """What a run made.

    Attributes:
        tally: documents, tokens, and what was left out.
        sequences: in all shards.
        shards: how many.
        padding: tokens of padding.
        new_tokens: tokens that this run encoded; a run before it may have encoded others.
    """

    tally: Tally
    sequences: int
    shards: int
    padding: int
    new_tokens: int

    def lines(self, *, length: int, seconds: float) -> list[str]:
        """Say it in words.

        Args:
            length: tokens per sequence.
            seconds: that the run took.

        Returns:
            Lines of text.
        """
        tally = self.tally
        rate = f", {self.new_tokens / seconds:,.0f} tokens/s" if self.new_tokens else ""
        lines = [
            f"{tally.documents:,} documents, {tally.tokens:,} tokens, {self.sequences:,} sequences of {length:,}, "
            f"{self.shards:,} shards",
            f"padding {self.padding:,} tokens, {self.padding / (self.sequences * length):.2%}; {seconds:,.1f} s{rate}",
        ]
        left_out = ([f"{tally.empty:,} empty"] if tally.empty else []) + [
            f"{number:,} bad ({reason})" for reason, number in tally.bad.items()
        ]
        return [*lines, f"left out: {', '.join(left_out)}"] if left_out else lines


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console, self._last = console, ("", 0)

    def __call__(self, stage: str, done: int, total: int, words: str) -> None:
        here = (stage, 10 * done // max(total, 1))
        if here != self._last:
            self._last = here
            print_lines(self._console, f"{stage} {done / max(total, 1):.0%}, {words}")


class _Bars:
    def __init__(self, shown: bars.Progress) -> None:
        self._shown = shown
        self._tasks: dict[str, bars.TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, words: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._shown.add_task(stage, words="")
        self._shown.update(self._tasks[stage], completed=done, total=total, words=words)
