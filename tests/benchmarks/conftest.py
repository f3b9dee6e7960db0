"""Measure a stage, relate it to its reference row of the same session, and print one table at the end.

Enabled by ``make bench``. In the normal run every body executes once, on a tiny shape.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from shapes import Shape, shape_id, tiny


class Row(NamedTuple):
    """One measurement: seconds of the best and the median round, and work per second of the best one in ``unit``."""

    group: str
    name: str
    best: float
    median: float
    tokens_per_second: float
    rate: float
    unit: str
    reference: str
    fraction: float | None


_ROWS: pytest.StashKey[list[Row]] = pytest.StashKey()
_SCALE = {"TFLOP/s": 1e12, "GB/s": 1e9}


@pytest.fixture
def shape(request: pytest.FixtureRequest, benchmark) -> Shape:
    return tiny(request.param) if benchmark.disabled else request.param


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark) -> Callable[..., None]:
    """Give ``measure(body, shape, stage=, name=, reference=, work=, unit=)``.

    ``work`` is what one call does at least, in floating-point operations or bytes. A row states its rate as a fraction
    of that of the row ``reference``, if this session measured that one before, at the same stage and shape.
    """

    def run(
        body: Callable[[], object], shape: Shape, *, stage: str, name: str, reference: str, work: float, unit: str
    ) -> None:
        if benchmark.disabled:
            benchmark(body)
            return
        benchmark.group = f"{stage}, {shape_id(shape)}, {str(shape.dtype).removeprefix('torch.')}"
        body()  # the first call allocates, and on CUDA compiles
        benchmark(_synchronised(body) if shape.device == "cuda" else body)
        times = benchmark.stats.stats
        rate = work / times.min / _SCALE[unit]
        rows = request.config.stash.setdefault(_ROWS, [])
        rates = {row.name: row.rate for row in rows if row.group == benchmark.group} | {name: rate}
        fraction = rate / rates[reference] if reference in rates else None
        speed = shape.tokens / times.min
        row = Row(benchmark.group, name, times.min, times.median, speed, rate, unit, reference, fraction)
        rows.append(row)
        benchmark.extra_info.update({"tokens/s": round(speed), unit: rate, f"fraction of {reference}": fraction})

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_ROWS, [])
    if rows:
        terminalreporter.section("moekit benchmarks")
        terminalreporter.write_line(markdown(rows))


def markdown(rows: list[Row]) -> str:
    """Lay measurements out, a table for each stage and shape; rates and fractions are those of the best round."""
    lines = ["Rates and fractions are taken from the best round; the median tells how noisy the machine was.", ""]
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        unit, reference = members[0].unit, members[0].reference
        lines += [f"**{group}**", "", f"| | best ms | median ms | Mtokens/s | {unit} | of {reference} |"]
        lines += ["| --- | --: | --: | --: | --: | --: |"]
        lines += [
            f"| {row.name} | {row.best * 1e3:.3f} | {row.median * 1e3:.3f} | {row.tokens_per_second / 1e6:.3f} "
            f"| {row.rate:.3f} | {'-' if row.fraction is None else f'{row.fraction:.2f}'} |"
            for row in members
        ]
        lines += [""]
    return "\n".join(lines)


def _synchronised(body: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        body()
        torch.cuda.synchronize()

    return run
