"""Measuring which tiles are fastest for a fused layer's products on this device; needs torch and Triton alone."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch

from moekit.experts.tile_tables import entry_of
from moekit.experts.tiles import LayerSize, Tile, capability_of, is_narrow, ruled_tiles
from moekit.recipes.bench.devices import CUDA, device_of, on_device
from moekit.recipes.bench.shapes import LayerShape
from moekit.recipes.tuning.candidates import WEIGHT_PRODUCTS, candidates_of, fitting, shortlist, with_bands, with_rule
from moekit.recipes.tuning.compiling import Compile, Job, compiling
from moekit.recipes.tuning.products import (
    Operands,
    ProductRun,
    differs,
    draw_operands,
    miniature,
    products_flops,
    schedule_of,
)
from moekit.recipes.tuning.report import Comparison, Tuned, lines_of, tile_words
from moekit.recipes.tuning.times import Timer, cuda_seconds

Failures = dict[tuple[str, Tile], str]
"""Why tiles of products are not to be taken."""

_GLANCES = 3  # rounds of the first look at all candidates


def layer_size(shape: LayerShape, dtype: torch.dtype, *, gated: bool = True) -> LayerSize:
    """Return the size that the tiles of a dropless layer are chosen by.

    Args:
        shape: of the layer.
        dtype: of tokens and experts.
        gated: whether there are two up-projections.

    Returns:
        LayerSize.

    Example:
        >>> layer_size(LayerShape("", 16, 8, 32, 4, 2), torch.bfloat16).assignments
        32
    """
    return LayerSize(dtype, shape.rows, shape.experts, shape.dim, shape.hidden, gated)


def tune(
    sizes: Sequence[LayerSize],
    *,
    device: torch.device | str = "cuda",
    candidates: Callable[[LayerSize], Mapping[str, Sequence[Tile]]] = candidates_of,
    rounds: int = 9,
    precision: str = "ieee",
    workers: int | None = None,
    timer: Timer | None = None,
    tell: Callable[[str], object] = print,
    done: Callable[[Tuned], object] | None = None,
) -> list[Tuned]:
    """Find the fastest tiles of the six products of each size of layer.

    Kernels are compiled first, in processes beside each other. All candidates are looked at for three rounds; the best
    are tried with every band, their outputs held against the rule's tile's, and measured for ``rounds`` rounds in turn.
    Of those the tiles are taken that fit each other and whose sum is least. Times are medians of launches back to back,
    on operands as they are in the layer, for a routing that loads experts equally but for chance.

    Synchronises with the host.

    Args:
        sizes: of the layers; their capability becomes the device's, their precision ``precision``.
        device: to measure on.
        candidates: the tiles to try, by product; the rule's is tried too.
        rounds: how often the best are measured.
        precision: of float32 products, "ieee" or "tf32".
        workers: how many processes compile; None is one for each CPU core, at most 12, and 0 compiles in this one. A
            script that uses any needs ``if __name__ == "__main__":``.
        timer: measures; None is ``cuda_seconds``.
        tell: is given lines on the way.
        done: is given what was found for a size as soon as it is, before the next is measured; None tells its lines.

    Returns:
        One for each size; their entries make a table.

    Raises:
        ValueError: if there is no such device, or the candidates have no tiles that fit each other.
        RuntimeError: if the rule's own tile does not run, or a compiling process dies.

    Example:
        >>> tune([], device="cpu", timer=lambda runs, rounds: {}, tell=lambda line: None)
        []
    """
    device = device_of(str(device), given="tune: device =", expected=CUDA)
    if timer is None and (device.type != "cuda" or not torch.cuda.is_available()):
        here = "this machine has none" if device.type == "cuda" else f"the device is {device}"
        raise ValueError(
            f"tune measures kernels on a CUDA device; {here}. Take a table that was written on another machine, or "
            f"none: fused_layer() chooses by rule."
        )
    if rounds < 1:
        raise ValueError(f"tune: rounds = {rounds}; expected at least 1.")
    measure = timer or cuda_seconds
    done = done or (lambda tuned: tell("\n".join(lines_of(tuned))))
    capability, narrow = capability_of(device), is_narrow(device)
    sizes = [size._replace(capability=capability, narrow=narrow, precision=precision) for size in sizes]
    tried = [with_rule(candidates(size), size) for size in sizes]
    with on_device(device), compiling(workers) as compile_jobs:
        check = partial(_failures, device=device, compile_jobs=compile_jobs)
        tell(f"compiling {sum(len(each) for tiles in tried for each in tiles.values())} candidates")
        failures = check(list(zip(sizes, tried, strict=True)))  # of all sizes at once: many kernels are the same
        found = []
        for size, tiles, failed in zip(sizes, tried, failures, strict=True):
            run = _runs_of(size, device)
            tuned = _tune_size(size, tiles, failed, run=run, check=check, measure=measure, rounds=rounds)
            found.append(tuned._replace(entry=tuned.entry._replace(origin=_origin(device))))
            done(found[-1])
    return found


def _tune_size(
    size: LayerSize,
    tiles: Mapping[str, Sequence[Tile]],
    failed: Failures,
    *,
    run: Callable[[str, Tile], ProductRun],
    check: Callable[..., list[Failures]],
    measure: Timer,
    rounds: int,
) -> Tuned:
    ruled = ruled_tiles(size)._asdict()
    glances = {
        name: measure({tile: run(name, tile) for tile in each if (name, tile) not in failed}, _GLANCES)
        for name, each in tiles.items()
    }
    best = {name: (ruled[name], *with_bands(shortlist(name, times))) for name, times in glances.items()}
    failed |= check([(size, best)])[0]
    times = {}
    for name, each in best.items():
        runs = {tile: run(name, tile) for tile in dict.fromkeys(each) if (name, tile) not in failed}
        wrong = _wrong(runs, ruled[name])
        failed |= {(name, tile): why for tile, why in wrong.items()}
        times[name] = measure({tile: runs[tile] for tile in runs if tile not in wrong}, rounds)
    chosen, flops = fitting(times), products_flops(size)
    comparisons = tuple(
        Comparison(name, ruled[name], times[name][ruled[name]], tile, times[name][tile], flops[name])
        for name, tile in chosen._asdict().items()
    )
    skipped = tuple(f"{name} {tile_words(tile)}: {why}" for (name, tile), why in failed.items())
    return Tuned(size, entry_of(size, chosen, origin=""), comparisons, skipped)


def _failures(
    tried: list[tuple[LayerSize, Mapping[str, Sequence[Tile]]]],
    *,
    device: torch.device,
    compile_jobs: Compile,
) -> list[Failures]:
    """Return for each size why products and tiles cannot run."""
    jobs = [
        {(name, tile): Job(miniature(size), name, tile, str(device)) for name in tiles for tile in tiles[name]}
        for size, tiles in tried
    ]
    reasons = compile_jobs([job for each in jobs for job in each.values()])
    failures = [{key: reasons[job] for key, job in each.items() if reasons[job]} for each in jobs]
    for (size, _), failed in zip(tried, failures, strict=True):
        for name, tile in ruled_tiles(size)._asdict().items():
            if (name, tile) in failed:
                raise RuntimeError(f"the rule's tile of {name}, {tile_words(tile)}, does not run: {failed[name, tile]}")
    return failures


def _runs_of(size: LayerSize, device: torch.device) -> Callable[[str, Tile], ProductRun]:
    align_of_rows = ruled_tiles(size).grad_up.k

    @cache
    def matrices() -> Operands:
        return draw_operands(size, align=align_of_rows, device=device)

    @cache
    def operands(align: int) -> Operands:
        return (
            matrices() if align == align_of_rows else draw_operands(size, align=align, device=device, like=matrices())
        )

    @cache
    def plan(align: int, height: int) -> Any:
        return schedule_of(operands(align), height)

    def run(product: str, tile: Tile) -> ProductRun:
        align = tile.k if product in WEIGHT_PRODUCTS else align_of_rows
        return ProductRun(product, tile, operands(align), plan(align, tile.m), size.precision)

    return run


def _wrong(runs: Mapping[Tile, ProductRun], ruled: Tile) -> dict[Tile, str]:
    """Return of which tiles the output differs from the rule's, and by how much."""
    product, expected = runs[ruled].product, runs[ruled]()
    found = {
        tile: differs(run(), expected, product=product, total=run.operands.total)
        for tile, run in runs.items()
        if tile != ruled
    }
    return {tile: why for tile, why in found.items() if why}


def _origin(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{name}, torch {torch.__version__}{_triton_version()}"


def _triton_version() -> str:
    with suppress(importlib.metadata.PackageNotFoundError):  # some builds of torch bring it under another name
        return f", triton {importlib.metadata.version('triton')}"
    return ""
