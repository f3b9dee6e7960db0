"""Measuring many kernels in turn on a CUDA device."""

from collections.abc import Callable, Mapping
from statistics import median

import torch

from moekit.experts.tiles import Tile

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
        events = {}
        for tile in list(runs)[:: -1 if turn % 2 else 1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            runs[tile]()
            start.record()
            runs[tile]()
            runs[tile]()
            end.record()
            events[tile] = start, end
        torch.cuda.synchronize()
        for tile, (start, end) in events.items():
            seconds[tile].append(start.elapsed_time(end) / 2e3)
    return {tile: median(each) for tile, each in seconds.items()}
