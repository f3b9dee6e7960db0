"""The program ``moekit tune``: finds the fastest tiles for layers of given shapes, and writes them to a file."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from moekit.experts.tile_files import read_tiles
from moekit.lm.consoles import print_lines, wide_console
from moekit.recipes.bench.devices import CUDA, device_of
from moekit.recipes.bench.program import DTYPES, check_file
from moekit.recipes.bench.shapes import GPU_SHAPES, shape_of
from moekit.recipes.tuning.files import write_tiles
from moekit.recipes.tuning.report import Tuned, size_words, tile_words
from moekit.recipes.tuning.tune import layer_size, tune


@dataclass(frozen=True)
class TuneSettings:
    """Find the fastest tiles of the fused layer's kernels for layers of your shapes, on this machine's CUDA device."""

    shape: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """T,D,F,E,K, or olmoe-1b-7b, sonic-default, mixtral-8x7b, openlm-small; one or several, as often as you like.
    Without any, these four."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of tokens and experts; bfloat16 and float16 share their tiles."""
    mlp: bool = False
    """Experts with one up-projection, where the default are gated ones."""
    precision: Literal["ieee", "tf32"] = "ieee"
    """Of float32 products."""
    rounds: int = 9
    """How often the best candidates are measured, in turn."""
    workers: int | None = None
    """Processes that compile; without it one for each CPU core, at most 12; 0 for none."""
    device: str = "cuda"
    """Which CUDA device."""
    write: Path | None = None
    """File to write the tiles to; entries for other layers that are in it stay."""


def main(arguments: list[str] | None = None, *, prog: str = "moekit tune") -> None:
    """Run the program.

    Args:
        arguments: the words of the command line.
        prog: its name in messages.

    Raises:
        SystemExit: with a message, if a word makes no sense, there is no CUDA device, or a file cannot be written.
    """
    settings = tyro.cli(TuneSettings, args=arguments, prog=prog)
    try:
        run(settings, wide_console())
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"{prog}: {error}") from error


def run(settings: TuneSettings, console: Console) -> list[Tuned]:
    """Measure; print and write what was found for a layer before the next is measured.

    Args:
        settings: of the program.
        console: to print to.

    Returns:
        What was found.

    Raises:
        ValueError: if a setting makes no sense, there is no CUDA device, or the file to write is no table of tiles.
        OSError: if the file cannot be read or written.
        RuntimeError: if kernels do not run.
    """
    device = device_of(settings.device, expected=CUDA)
    shapes = [shape_of(name) for names in settings.shape for name in names] or list(GPU_SHAPES.values())
    if settings.write is not None:  # before a minute of measuring, not after
        _check_file(settings.write)
    sizes = [layer_size(shape, DTYPES[settings.dtype], gated=not settings.mlp) for shape in shapes]
    say = partial(print_lines, console)
    entries = 0  # in the file, once something was written

    def keep(tuned: Tuned) -> None:
        nonlocal entries
        console.print(_comparison_table(tuned))
        for each in tuned.skipped:
            say(f"  skipped: {each}")
        if settings.write is not None:
            entries = len(write_tiles(settings.write, [tuned.entry]))

    try:
        return tune(
            sizes,
            device=device,
            rounds=settings.rounds,
            precision=settings.precision,
            workers=settings.workers,
            tell=say,
            done=keep,
        )
    finally:
        if entries:
            exact = settings.dtype != "float32" or settings.precision == "ieee"
            options = "" if exact else f'precision="{settings.precision}", '
            use = f"fused_layer({options}tiles=from_table(read_tiles(PATH)))"
            say(f"{settings.write}: {entries} entries. Use them: {use}")


def _comparison_table(tuned: Tuned) -> Table:
    """Lay out what was found for a size of layer."""
    table = Table(title=size_words(tuned.size), title_justify="left")
    for heading in ("product", "rule ms", "best ms", "ratio", "TFLOP/s", "tile"):
        table.add_column(heading, justify="left" if heading in ("product", "tile") else "right", no_wrap=True)
    for row in tuned.comparisons:
        numbers = (
            f"{row.ruled_seconds * 1e3:.3f}",
            f"{row.seconds * 1e3:.3f}",
            f"{row.ruled_seconds / row.seconds:.2f}",
        )
        kept = " (the rule's)" if row.tile == row.ruled else ""
        table.add_row(row.product, *numbers, f"{row.flops / row.seconds / 1e12:.1f}", tile_words(row.tile) + kept)
    return table


def _check_file(path: Path) -> None:
    check_file(path)
    if path.exists():
        read_tiles(path)
