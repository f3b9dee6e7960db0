"""Compiling kernels in many processes at once: what they leave in Triton's cache on the disk, this one finds there."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import NamedTuple

import torch

from moekit.experts.tiles import LayerSize, Tile
from moekit.lm.processes import starting_processes
from moekit.recipes.bench.devices import on_device
from moekit.recipes.tuning.candidates import WEIGHT_PRODUCTS
from moekit.recipes.tuning.products import ProductRun, draw_operands, schedule_of

MOST_WORKERS = 12


class Job(NamedTuple):
    """A kernel to compile.

    Attributes:
        size: of a layer, small enough to run at once.
        product: a field of ``LayerTiles``.
        tile: of the product.
        device: its name.
    """

    size: LayerSize
    product: str
    tile: Tile
    device: str


Compile = Callable[[Sequence[Job]], dict[Job, str]]


def try_job(job: Job) -> str:
    """Run a product once, so that its kernel is compiled.

    Args:
        job: what to run.

    Returns:
        Why it cannot run, in a line; empty if it ran.
    """
    align = job.tile.k if job.product in WEIGHT_PRODUCTS else 64
    device = torch.device(job.device)
    try:
        with on_device(device):
            operands = draw_operands(job.size, align=align, device=device)
            plan = schedule_of(operands, job.tile.m)
            ProductRun(job.product, job.tile, operands, plan, job.size.precision)()
            if device.type == "cuda":
                torch.cuda.synchronize()
    except Exception as error:  # a report: compilers fail in as many ways as there are releases of them
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return ""


@contextmanager
def compiling(workers: int | None = None) -> Iterator[Compile]:
    """Start processes that compile, and stop them at the end.

    Args:
        workers: how many; None is one for each CPU core, at most 12; 0 compiles in this process.

    Yields:
        A function from jobs to why each cannot run; empty for those that can. It raises RuntimeError if a process dies.

    Example:
        >>> with compiling(0) as compile_jobs:
        ...     compile_jobs([])
        {}
    """
    count = min(MOST_WORKERS, os.cpu_count() or 1) if workers is None else workers
    if count == 0:
        yield lambda jobs: {job: try_job(job) for job in dict.fromkeys(jobs)}
        return
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    with (
        starting_processes(),
        ProcessPoolExecutor(count, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        yield lambda jobs: _in_pool(pool, list(dict.fromkeys(jobs)))


def _in_pool(pool: ProcessPoolExecutor, jobs: list[Job]) -> dict[Job, str]:
    try:
        return dict(zip(jobs, pool.map(try_job, jobs), strict=True))
    except BrokenProcessPool as error:
        raise RuntimeError(
            'a process that compiles kernels died. In a script, call tune below `if __name__ == "__main__":`, for each '
            "process imports it; on a machine with little memory take fewer: tune(workers=2), or 0 for none."
        ) from error
