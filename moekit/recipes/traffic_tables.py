"""The tables of ``moekit traffic``: strategies down, numbers of GPUs across."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from moekit.parallel.link_times import not_hidden
from moekit.parallel.payloads import Sent


class Prediction(NamedTuple):
    """One strategy on one number of GPUs.

    Attributes:
        seconds: of communication per layer, forward and backward.
        sent: what one rank sends in that time.
    """

    seconds: float
    sent: Sent


Predictions = Mapping[str, Sequence[Prediction | None]]  # strategy to one for each number of GPUs, or None


def time_table(gpus: Sequence[int], predictions: Predictions, *, compute: float, chunks: int) -> Table:
    """Lay out milliseconds, the least of each column in bold, and what ``chunked`` leaves of it below.

    Args:
        gpus: one number for each column.
        predictions: of every strategy.
        compute: seconds that the experts take.
        chunks: that the exchange is cut into.

    Returns:
        A ``rich.table.Table``.
    """
    table = _table("milliseconds per MoE layer, forward + backward", gpus)
    best = [cheapest(predictions, column) for column in range(len(gpus))]
    for name, row in predictions.items():
        cells = ["-" if found is None else _milliseconds(found.seconds) for found in row]
        table.add_row(name, *(Text(c, "bold") if name == b else c for c, b in zip(cells, best, strict=True)))
    exchanges = [_at(predictions, name, column).seconds for column, name in enumerate(best)]
    left = [not_hidden(exchange, compute, num_chunks=chunks) for exchange in exchanges]
    table.add_section()
    table.add_row("the experts' compute", *[_milliseconds(compute)] * len(gpus))
    table.add_row(f"cheapest, chunked x {chunks}", *map(_milliseconds, left))
    return table


def byte_table(gpus: Sequence[int], predictions: Predictions, *, network: bool) -> Table:
    """Lay out the megabytes that one GPU sends.

    Args:
        gpus: one number for each column.
        predictions: of every strategy.
        network: count what goes to other nodes, else what goes to GPUs of its node.

    Returns:
        A ``rich.table.Table``.
    """
    where = "over the network" if network else "inside its node"
    table = _table(f"megabytes that a GPU sends {where}", gpus)
    for name, row in predictions.items():
        sent = [None if found is None else found.sent.network if network else found.sent.node for found in row]
        table.add_row(name, *("-" if size is None else _megabytes(size) for size in sent))
    return table


def _megabytes(size: float) -> str:
    """Write bytes as megabytes: what is not zero does not look so."""
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.3g}"


def cheapest(predictions: Predictions, column: int) -> str:
    """Name the strategy that takes the least time; of equal ones the first.

    Args:
        predictions: of every strategy.
        column: index of the number of GPUs.

    Returns:
        Its name.
    """
    there = [name for name, row in predictions.items() if row[column] is not None]
    return min(there, key=lambda name: _at(predictions, name, column).seconds)


def cheapest_lines(gpus: Sequence[int], predictions: Predictions) -> list[str]:
    """Say which strategy is the cheapest on which numbers of GPUs.

    Args:
        gpus: one number for each column.
        predictions: of every strategy.

    Returns:
        A line per strategy that is the cheapest anywhere.
    """
    places: dict[str, list[str]] = {}
    for column, world_size in enumerate(gpus):
        places.setdefault(cheapest(predictions, column), []).append(f"{world_size:,}")
    return [f"cheapest on {', '.join(numbers)} GPUs: {name}" for name, numbers in places.items()]


def _at(predictions: Predictions, name: str, column: int) -> Prediction:
    found = predictions[name][column]
    assert found is not None
    return found


def _table(title: str, gpus: Sequence[int]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("GPUs", overflow="fold")
    for world_size in gpus:
        table.add_column(f"{world_size:,}", justify="right", no_wrap=True)
    return table


def _milliseconds(time: float) -> str:
    milliseconds = 1e3 * time
    digits = 2 if milliseconds < 9.995 else 1 if milliseconds < 99.95 else 0
    return f"{milliseconds:,.{digits}f}"
