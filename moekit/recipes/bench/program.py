"""The program ``moekit bench``: the layer benchmark from the command line."""

import os
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from moekit.lm.consoles import print_lines, wide_console
from moekit.lm.files import replaceable, write_whole
from moekit.recipes.automatic import tiles_of
from moekit.recipes.bench.devices import device_of
from moekit.recipes.bench.layer import Report, bench_layer
from moekit.recipes.bench.shapes import CPU_SHAPES, GPU_SHAPES, LOADS, shape_of
from moekit.recipes.bench.tables import as_json, as_markdown, print_report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BenchLayerSettings:
    """Measure whole MoE layers by backend, against the dense bound of the same run and any installed peer."""

    shape: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """T,D,F,E,K, or olmoe-1b-7b, sonic-default, mixtral-8x7b, openlm-small, cpu-8, cpu-32, cpu-16, cpu-64; one or
    several, as often as you like; one that is given twice is measured once. Without any, the four for the device."""
    device: str = ""
    """cpu, or cuda; without it, CUDA where there is a device."""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Of tokens and experts; without it, float32 on the CPU and bfloat16 on CUDA."""
    precision: Literal["", "ieee", "tf32"] = ""
    """Of float32 products on CUDA, the bound's and every row's: exact, or of TF32's ten bits; without it, as torch is
    set, which is exact unless this process changed it."""
    load: tuple[str, ...] = ("uniform",)
    """How experts are loaded: uniform, zipf, hot, dead; several make a table each, one given twice makes one."""
    rounds: int = 9
    """How often each row is measured, in turn with the others."""
    only: tuple[str, ...] = ()
    """Beginnings of the names of rows to measure beside the bound."""
    tiles: Path | None = None
    """File of `moekit tune --write`, by which the kernels of fused_layer are cut into tiles, in its rows and stages and
    where auto takes it; without it, by what comes with the package."""
    json: Path | None = None
    """File to write every round's times to."""
    markdown: Path | None = None
    """File to write the tables to."""


def main(arguments: list[str] | None = None, *, prog: str = "moekit bench") -> None:
    """Run the program.

    Args:
        arguments: the words of the command line, of which the first says what to measure: layer.
        prog: its name in messages.

    Raises:
        SystemExit: with a message, if a word makes no sense or a file cannot be written.
    """
    what, *words = arguments or ["--help"]
    if what in ("-h", "--help"):
        print(f"usage: {prog} layer ...\n\n`{prog} layer --help` lists the flags.")
        return
    if what != "layer":
        raise SystemExit(f"{prog}: nothing to measure is called {what!r}; expected: layer")
    settings = tyro.cli(BenchLayerSettings, args=words, prog=f"{prog} layer")
    try:
        run(settings, wide_console())
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"{prog} layer: {error}") from error


def check_file(path: Path) -> None:
    """Raise unless a file can be written, or written again.

    Args:
        path: of the file.

    Raises:
        ValueError: if its folder is not there, it is no file but something else, or it cannot be written.

    Example:
        >>> check_file(Path("report.json"))
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first.")
    if path.is_dir():
        raise ValueError(f"{path}: it is a folder; give the name of a file.")
    if not replaceable(path):
        raise ValueError(f"{path}: it is a device or a pipe, and is replaced as a whole; give the name of a file.")
    if not all(os.access(each, os.W_OK) for each in (path.parent, path) if each.exists()):
        raise ValueError(f"{path}: it cannot be written; give a place that can.")


def run(settings: BenchLayerSettings, console: Console) -> None:
    """Measure, print and write.

    Args:
        settings: of the program.
        console: to print to.

    Raises:
        ValueError: if a setting makes no sense.
        OSError: if a file cannot be written.
        MemoryError: if a case does not fit the CPU; files hold the tables before it.
        torch.OutOfMemoryError: if a case does not fit the device; the same holds.
    """
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device_of(device).type == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise ValueError(
            f"--device {device}, and torch finds no CUDA device here; use --device cpu, or look at moekit doctor."
        )
    dtype = settings.dtype or ("bfloat16" if on_cuda else "float32")
    names = tuple(chain(*settings.shape)) or tuple(GPU_SHAPES if on_cuda else CPU_SHAPES)
    shapes = list(dict.fromkeys(shape_of(name) for name in names))
    _check_settings(settings, device=device, on_cuda=on_cuda, dtype=dtype)
    tiles = tiles_of(settings.tiles, flag="--tiles")
    measured: list[Report] = []

    def keep(report: Report) -> None:
        if settings.tiles is not None:
            report = report._replace(machine={**report.machine, "tiles": str(settings.tiles)})
        measured[:] = [report]
        _write(report, settings)

    before = torch.get_float32_matmul_precision()
    try:
        if settings.precision:
            torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
        bench_layer(
            shapes,
            device=device,
            dtype=DTYPES[dtype],
            loads=tuple(dict.fromkeys(settings.load)),
            rounds=settings.rounds,
            only=settings.only,
            tiles=tiles,
            tell=partial(print_lines, console),
            done=keep,
        )
    finally:
        torch.set_float32_matmul_precision(before)
        for report in measured:
            print_report(report, console)


def _check_settings(settings: BenchLayerSettings, *, device: str, on_cuda: bool, dtype: str) -> None:
    unknown = set(settings.load) - set(LOADS)
    if unknown:
        raise ValueError(f"--load {', '.join(sorted(unknown))}; expected some of {', '.join(LOADS)}.")
    if not settings.load:
        raise ValueError(f"--load has nothing after it; expected some of {', '.join(LOADS)}, or leave it out.")
    files = [path for path in (settings.json, settings.markdown) if path is not None]
    for path in files:  # before an hour of measuring, not after
        check_file(path)
    if len({os.path.realpath(path) for path in files}) < len(files):
        raise ValueError(f"--json and --markdown are both {settings.json}; give each a file of its own.")
    if settings.precision and not (on_cuda and dtype == "float32"):
        raise ValueError(
            f"--precision {settings.precision} with {dtype} on {device}; it is of float32 products on CUDA alone. "
            f"Leave it out, or give --dtype float32 and --device cuda."
        )
    if settings.tiles is not None and not on_cuda:
        raise ValueError(
            f"--tiles {settings.tiles} on {device}; they are of fused_layer's kernels, which run on CUDA alone. "
            f"Leave it out, or give --device cuda."
        )


def _write(report: Report, settings: BenchLayerSettings) -> None:
    if settings.json is not None:
        write_whole(settings.json, as_json(report))
    if settings.markdown is not None:
        write_whole(settings.markdown, as_markdown(report))
