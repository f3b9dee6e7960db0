"""What a whole MoE layer costs beside its arithmetic, and what it holds: moekit's backends, the dense bound, and peers.

Rows of a table are measured in turn, round by round, so that what disturbs the machine disturbs them alike. Needs torch
alone: ``moekit bench layer`` is the program around it.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch

from moekit.experts.tile_files import layer_tiles
from moekit.experts.tiles import LayerSize, LayerTiles
from moekit.recipes.backends import choose_backend, float32_products
from moekit.recipes.bench.dense import dense_bound, dense_expert
from moekit.recipes.bench.devices import device_of, on_device
from moekit.recipes.bench.peers import peer_rows
from moekit.recipes.bench.rows import Build, Case, Contender, loads_of, make_case, moekit_rows, try_build
from moekit.recipes.bench.shapes import LayerShape
from moekit.recipes.bench.stages import Stage, measure_stages
from moekit.recipes.bench.times import Memory, Round, measure_memory, run_once

BOUND = "dense bound"


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        name: of the backend or the peer.
        forward: seconds of each round's forward, with all that a backward needs.
        both: seconds of each round's forward and backward.
        inference: seconds of each round's forward with gradients off; empty if it does not run so.
        memory: bytes held and at the peak.
        fraction: of the dense bound's speed, forward and backward: the median over rounds of the two rows' ratio, times
            the share of the rows that are not dropped.
        forward_fraction: the same, of the forward.
        inference_fraction: the same, of the forward with gradients off.
        skipped: why there are no numbers, or "".
        dropped: share of the T K rows that a capacity limit leaves out.
    """

    name: str
    forward: Sequence[float] = ()
    both: Sequence[float] = ()
    inference: Sequence[float] = ()
    memory: Memory | None = None
    fraction: float | None = None
    forward_fraction: float | None = None
    inference_fraction: float | None = None
    skipped: str = ""
    dropped: float = 0.0


class Table(NamedTuple):
    """The rows of one shape under one load.

    Attributes:
        shape: of the layer.
        load: one of ``LOADS``.
        device: of the tensors.
        dtype: of tokens and experts.
        imbalance: the largest expert's rows as a multiple of the mean.
        empty: experts without a row.
        rows: the dense bound first.
        stages: of layers whose stages are measured alone, by ``measure_stages``.
        precision: of float32 products on CUDA, "ieee" or "tf32", by torch's own setting; else "".
    """

    shape: LayerShape
    load: str
    device: str
    dtype: str
    imbalance: float
    empty: int
    rows: list[Row]
    stages: Mapping[str, list[Stage]]
    precision: str = ""


class Report(NamedTuple):
    """Everything that was measured.

    Attributes:
        machine: what the numbers are from.
        tables: one for each shape and load.
    """

    machine: Mapping[str, str]
    tables: list[Table]


def bench_layer(
    shapes: Sequence[LayerShape],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    loads: Sequence[str] = ("uniform",),
    rounds: int = 9,
    only: Sequence[str] = (),
    rows: Mapping[str, Build] = {},
    tiles: Callable[[LayerSize], LayerTiles] = layer_tiles,
    tell: Callable[[str], object] = lambda line: None,
    done: Callable[[Report], object] = lambda report: None,
) -> Report:
    """Measure whole MoE layers, forward and backward, against the dense bound of the same run.

    Float32 products on CUDA are exact or by TF32 as ``torch.set_float32_matmul_precision`` was told.

    Args:
        shapes: of layers.
        device: "cpu", or a CUDA device.
        dtype: of tokens and experts.
        loads: how experts are loaded, of ``LOADS``.
        rounds: how often each row is measured, in turn with the others.
        only: beginnings of the names of rows to measure beside the bound; empty measures all.
        rows: of your own, by name, after the others: each builds what is run from a ``Case``. ``of_layer`` of
            ``moekit.recipes.bench.rows`` does so around an expert layer.
        tiles: chooses the tiles of ``fused_layer``'s kernels, in its rows, in that of ``auto``, and in its stages.
        tell: gets a line of progress now and then.
        done: gets the report after each table, which is the last one's if what comes next does not fit the memory.

    Returns:
        Report. Rows that do not work here, or are not installed, say why.

    Raises:
        ValueError: if there are no rounds, no such device, a word of ``only`` is the beginning of no row, or a name in
            ``rows`` is that of another row.

    Example:
        >>> from moekit.recipes.bench.shapes import shape_of
        >>> report = bench_layer([shape_of("16,8,8,4,2")], rounds=1, only=["loop", "scattermoe"])
        >>> [(row.name, row.skipped) for row in report.tables[0].rows]
        [('dense bound', ''), ('loop', ''), ('scattermoe', "No module named 'scattermoe'")]

        A layer of your own beside ``auto``:

        >>> from functools import partial
        >>> from moekit.dispatch import dropless
        >>> from moekit.experts import loop, swiglu
        >>> from moekit.recipes import expert_layer
        >>> from moekit.recipes.bench.rows import of_layer
        >>> mine = expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=loop))  # or any ExpertLayer
        >>> rows = {"mine": partial(of_layer, layer=mine)}
        >>> report = bench_layer([shape_of("16,8,8,4,2")], rounds=1, only=["auto", "mine"], rows=rows)
        >>> [row.name for row in report.tables[0].rows if row.fraction > 0]
        ['dense bound', 'auto', 'mine']
    """
    if rounds < 1:
        raise ValueError(f"bench_layer: rounds = {rounds}; expected at least 1.")
    builds, place = _chosen(only, rows), device_of(device, given="bench_layer: device =")
    report = Report(describe_machine(device, dtype), [])
    for shape in shapes:
        for load in loads:
            tell(f"{shape.name}, {load}: {len(builds) + 1} rows, {rounds} rounds")
            with on_device(place):
                case = make_case(shape, load, device=device, dtype=dtype)._replace(tiles=tiles)
                table = _table(case, builds, rounds, tell)
            report.tables.append(table)
            done(report)
    return report


def describe_machine(device: str, dtype: torch.dtype) -> dict[str, str]:
    """Say what a measurement was made on.

    Args:
        device: of the tensors.
        dtype: of the experts.

    Returns:
        Name to text.

    Example:
        >>> sorted(describe_machine("cpu", torch.float32))
        ['auto', 'device', 'python', 'torch']
    """
    if torch.device(device).type == "cuda":
        what = torch.cuda.get_device_name(device)
    else:
        what = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"
    choice = choose_backend(device, dtype)
    return {
        "device": what,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "auto": f"{choice.name} ({choice.reason})",
    }


def _chosen(only: Sequence[str], rows: Mapping[str, Build]) -> dict[str, Build]:
    builds = {"dense expert": dense_expert, **moekit_rows(), **peer_rows()}
    taken = [name for name in rows if name in (BOUND, *builds)]
    if taken:
        raise ValueError(f"bench_layer: rows = {taken}, which there are already; give rows of your own other names.")
    builds |= rows
    wrong = [word for word in only if not any(name.startswith(word) for name in (BOUND, *builds))]
    if wrong:
        raise ValueError(
            f"bench_layer: only = {wrong}, the beginning of no row; rows are {'; '.join((BOUND, *builds))}."
        )
    return {name: build for name, build in builds.items() if not only or name.startswith(tuple(only))}


def _table(case: Case, builds: Mapping[str, Build], rounds: int, tell: Callable[[str], object]) -> Table:
    torch.compiler.reset()  # every table compiles the same code anew, which Dynamo does a few times only
    imbalance, empty = loads_of(case)  # before an hour of measuring, for where no token is routed there is no layer
    contenders: dict[str, Contender] = {}
    skipped: dict[str, str] = {}
    for name, build in {BOUND: dense_bound, **builds}.items():
        built = try_build(build, case)
        if isinstance(built, str):
            skipped[name] = built
            tell(f"  {name}: skipped, {built}")
        else:
            contenders[name] = built
            if built.no_inference:
                tell(f"  {name}: no inference, {built.no_inference}")
    measured: dict[str, list[Round]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            measured[name].append(run_once(contender))
    rows = [
        Row(name, skipped=skipped[name])
        if name in skipped
        else row_of(
            name,
            measured[name],
            measured.get(BOUND, []),
            memory=measure_memory(contenders[name]),
            dropped=contenders[name].dropped,
        )
        for name in (BOUND, *builds)
    ]
    device, dtype = str(case.x.device), str(case.x.dtype).removeprefix("torch.")
    stages = measure_stages(case, rounds, fused="fused_layer" in contenders, tell=tell)
    precision = float32_products() if case.x.is_cuda and case.x.dtype == torch.float32 else ""
    return Table(case.shape, case.load, device, dtype, imbalance, empty, rows, stages, precision)


def row_of(
    name: str, rounds: list[Round], bound: list[Round], *, memory: Memory | None = None, dropped: float = 0.0
) -> Row:
    """Sum up a row's rounds, and relate each to the bound's of the same round.

    Args:
        name: of the row.
        rounds: its measurements.
        bound: those of the dense bound, as many; none gives no fractions.
        memory: of the row.
        dropped: share of the bound's rows that the row does without.

    Returns:
        Row.

    Example:
        >>> row_of("half as fast", [Round(2.0, 6.0, 2.0)] * 3, [Round(1.0, 3.0, 1.0)] * 3).fraction
        0.5
    """
    (forward, both, inference), bounds = _by_kind(rounds), _by_kind(bound)
    times = forward, both, inference
    of_forward, of_both, of_inference = (_fraction(*each, kept=1 - dropped) for each in zip(times, bounds, strict=True))
    return Row(name, forward, both, inference, memory, of_both, of_forward, of_inference, dropped=dropped)


def _by_kind(rounds: list[Round]) -> list[tuple[float, ...]]:
    """Return the seconds of each field of the rounds; none of a field that was not measured."""
    fields = ((getattr(each, field) for each in rounds) for field in Round._fields)
    return [tuple(seconds for seconds in field if seconds is not None) for field in fields]


def _fraction(times: Sequence[float], bound: Sequence[float], *, kept: float) -> float | None:
    return kept * median(b / t for t, b in zip(times, bound, strict=True)) if times and bound else None
