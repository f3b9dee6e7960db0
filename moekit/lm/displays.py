"""What a training run shows while it runs: a live panel on a terminal, plain lines elsewhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from moekit.lm.consoles import print_lines

_BLOCKS = " ▁▂▃▄▅▆▇█"


class LayerLoad(NamedTuple):
    """How one MoE layer uses its experts.

    Attributes:
        layer: index of the block.
        load: share of assignments per expert, E numbers; then those of the simple experts.
        max_violation: max load over mean load, minus 1, of the E feed-forward networks.
        drop_rate: share of assignments dropped.
        entropy: mean entropy of a token's router, in nats.
        dead_experts: networks without an assignment.
        assignments: of all experts before any drop; for a soft router, the slots of sequences that have a token.
        tokens: that the router saw, padding not counted.
        simple_experts: how many of ``load``, at its end, are of experts that are no networks, and cost nothing.
    """

    layer: int
    load: Sequence[float]
    max_violation: float
    drop_rate: float
    entropy: float
    dead_experts: int
    assignments: int
    tokens: int
    simple_experts: int = 0


class StepReport(NamedTuple):
    """One logged training step.

    Attributes:
        step: optimizer steps done.
        steps: steps in all.
        loss: cross-entropy, nats per token.
        balance: mean over MoE layers of the balancing loss; None where there is no such loss. At perfect balance it is
            1, or K for a loss that counts per token.
        lr: learning rate.
        tokens_per_second: since the last report.
        layers: one per MoE layer.
        mfu: model FLOPs utilization; None where the peak of the device is not known.
    """

    step: int
    steps: int
    loss: float
    balance: float | None
    lr: float
    tokens_per_second: float
    layers: Sequence[LayerLoad]
    mfu: float | None = None


class Display(Protocol):
    """Shows a run's progress."""

    def update(self, report: StepReport) -> None:
        """Show a step."""
        ...

    def say(self, text: str) -> None:
        """Print a line that stays."""
        ...


@contextmanager
def show_training(console: Console, steps: int, *, done: int = 0) -> Iterator[Display]:
    """Open a display for a run: live if the console is a terminal, else plain lines.

    A live one prints standard error too, above itself; a quiet console has none, which would keep that back.

    Args:
        console: where to.
        steps: steps in all.
        done: steps that a resumed run has behind it.

    Yields:
        The display.

    Example:
        >>> with show_training(Console(force_terminal=False, width=100), 2) as display:
        ...     display.say("hello")
        hello
    """
    if not console.is_terminal or console.quiet:
        yield _Lines(console, done)
        return
    live = _Panel(console, steps, done)
    with live.live:
        yield live


def load_bar(load: Sequence[float]) -> str:
    """Draw loads as one block per expert; half height is a perfectly balanced load, full height twice that or more.

    Args:
        load: share of assignments per expert.

    Returns:
        One character per expert; a space is an expert without an assignment.

    Example:
        >>> load_bar([0.25, 0.5, 0.25, 0.0])
        '▄█▄ '
    """
    tops = [min(share * len(load) / 2, 1.0) for share in load]
    return "".join(_BLOCKS[max(round(top * 8), 1 if top > 0 else 0)] for top in tops)


class _TimeLeft:
    """Tells the seconds that are left by the mean pace of this launch, however rare its reports are."""

    def __init__(self, console: Console, done: int) -> None:
        self._now, self._start, self._done = console.get_time, console.get_time(), done

    def at(self, report: StepReport) -> float:
        return (self._now() - self._start) / max(report.step - self._done, 1) * (report.steps - report.step)


class _Lines:
    def __init__(self, console: Console, done: int) -> None:
        self._console, self._left = console, _TimeLeft(console, done)

    def update(self, report: StepReport) -> None:
        loads = "".join(f"  L{layer.layer} {load_bar(layer.load)}" for layer in report.layers)
        balance = "" if report.balance is None else f"balance {report.balance:.2f}  "
        mfu = "" if report.mfu is None else f"MFU {report.mfu:.1%}  "
        left = f"left {self._left.at(report):.0f} s"
        self.say(
            f"step {report.step:>5}/{report.steps}  loss {report.loss:.3f}  {balance}"
            f"{report.tokens_per_second:,.0f} tokens/s  {mfu}{left}{loads}{_worst(report.layers)}"
        )

    def say(self, text: str) -> None:
        print_lines(self._console, text)


class _Panel:
    def __init__(self, console: Console, steps: int, done: int) -> None:
        columns = (
            TextColumn("[bold]training"),
            BarColumn(None),
            TaskProgressColumn(),
            TextColumn("{task.fields[step]}"),
        )
        times = (TimeElapsedColumn(), TextColumn("left"), TextColumn("[progress.remaining]{task.fields[left]}"))
        self._progress = Progress(*columns, *times, console=console, expand=True)
        self._task = self._progress.add_task("train", total=steps, completed=done, step="", left="-:--:--")
        self._left = _TimeLeft(console, done)
        self.live = Live(Group(self._progress), console=console, refresh_per_second=4)

    def update(self, report: StepReport) -> None:
        left, step = timedelta(seconds=round(self._left.at(report))), f"{report.step}/{report.steps}"
        self._progress.update(self._task, completed=report.step, step=step, left=str(left))
        balance = () if report.balance is None else (("   balance ", "dim"), f"{report.balance:.2f}")
        mfu = () if report.mfu is None else (("   MFU ", "dim"), f"{report.mfu:.1%}")
        numbers = Text.assemble(
            ("loss ", "dim"), (f"{report.loss:.3f}", "bold green"), *balance,
            ("   lr ", "dim"), f"{report.lr:.1e}", ("   tokens/s ", "dim"), f"{report.tokens_per_second:,.0f}", *mfu,
        )  # fmt: skip
        self.live.update(Group(self._progress, numbers, _loads(report.layers)))

    def say(self, text: str) -> None:
        self.live.console.print(text, highlight=False, markup=False)


def _worst(layers: Sequence[LayerLoad]) -> str:
    """Say how bad loads are in the layer where they are worst; logs have no room for every layer."""
    if not layers:
        return ""
    violation, dropped = max(layer.max_violation for layer in layers), max(layer.drop_rate for layer in layers)
    dead = sum(layer.dead_experts for layer in layers)
    return f"  max violation {violation:.2f}  dropped {dropped:.1%}  dead {dead}"


def _loads(layers: Sequence[LayerLoad]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("MoE layer", "expert load", "max violation", "dropped", "router entropy", "dead"):
        table.add_column(name)
    for layer in layers:
        table.add_row(
            str(layer.layer), Text(load_bar(layer.load), style="cyan on grey15"), f"{layer.max_violation:.2f}",
            f"{layer.drop_rate:.1%}", f"{layer.entropy:.2f}", str(layer.dead_experts),
        )  # fmt: skip
    return table
