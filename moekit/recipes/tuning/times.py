"""Measuring many kernels in turn on a CUDA device."""

from collections.abc import Callable, Mapping
from statistics import median

import torch

from moekit.experts.tiles import Tile
from moekit.recipes.bench.times import queue_launches

Timer = Callable[[Mapping[Tile, Callable[[], object]], int], dict[Tile, float]]


def cuda_seconds(runs: Mapping[Tile, Callable[[], object]], rounds: int) -> dict[Tile, float]:
    """Measure runs in turn, round by round, by events on the current device.

    A launch that is not measured goes before two that are, so that the caches hold what they would; every other round
    goes backwards.

    Args:
        runs: by tile.
        rounds: how often.

    Returns:
        The median of the seconds of one run, by tile.
    """
    seconds: dict[Tile, list[float]] = {tile: [] for tile in runs}
    for turn in range(rounds):
        order = list(runs)[:: -1 if turn % 2 else 1]
        queued = {tile: queue_launches(runs[tile], 2) for tile in order}
        torch.cuda.synchronize()
        for tile, read in queued.items():
            seconds[tile].append(read())
    return {tile: median(each) for tile, each in seconds.items()}
