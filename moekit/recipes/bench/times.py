"""Measuring: a row's seconds of a round and its bytes between forward and backward, and launches on CUDA alone.

On CUDA it is the current device that is measured, which has to be that of the tensors: see ``on_device``.
"""

import math
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.recipes.bench.rows import Contender


class Round(NamedTuple):
    """Seconds of one run.

    Attributes:
        forward: until y is there, with all that a backward needs.
        both: until all gradients are there.
        inference: until y is there, with gradients off; None if it does not run so.
    """

    forward: float
    both: float
    inference: float | None


class Memory(NamedTuple):
    """Bytes beside leaves, output and gradients.

    Attributes:
        held: between forward and backward.
        peak: the most that was allocated at any time, output and gradients included; None on the CPU, whose allocator
            does not count.
    """

    held: int
    peak: int | None


class Work(NamedTuple):
    """Something to run, and how much it does.

    Attributes:
        run: does it, and returns what comes of it.
        nbytes: that have to be read and written at least.
        flops: of its products; 0 if it has none.
    """

    run: Callable[[], Any]
    nbytes: int
    flops: int = 0


# Runs on CUDA before the one that counts, and about how long they last: a device at its limit of power lowers its clock
# only after a while, and what ran before would decide when.
_AHEAD, _AHEAD_SECONDS = 5, 0.2


def run_once(contender: Contender) -> Round:
    """Run forward and backward once, then forward with gradients off if it runs so, and measure.

    On CUDA it is the device's time of the last of several runs that are queued together, as the layers of a model are:
    the host's time hides behind the runs before, unless the host takes longer for a run than the device. They last long
    enough that the device is as hot as in a model, whatever ran before. And autograd stays in this thread: a model's
    backward wakes another once, not once a layer.

    Args:
        contender: to run; it has run before.

    Returns:
        Round.
    """
    return _on_cuda(contender) if contender.grad.is_cuda else _on_cpu(contender)


def _on_cpu(contender: Contender) -> Round:
    start = time.perf_counter()
    y = contender.forward()
    between = time.perf_counter()
    torch.autograd.grad(y, contender.leaves, contender.grad)
    end = time.perf_counter()
    del y
    alone = None if contender.no_inference else _seconds_alone(contender)
    return Round(between - start, end - start, alone)


@torch.no_grad()
def _seconds_alone(contender: Contender) -> float:
    start = time.perf_counter()
    contender.forward()
    return time.perf_counter() - start


def _on_cuda(contender: Contender) -> Round:
    start, between, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))

    def run() -> None:
        torch.autograd.grad(contender.forward(), contender.leaves, contender.grad)

    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(_count_ahead(run)):
            run()
        start.record()
        y = contender.forward()
        between.record()
        grads = torch.autograd.grad(y, contender.leaves, contender.grad)
        end.record()
        torch.cuda.synchronize()
    del grads
    alone = None if contender.no_inference else _cuda_seconds_alone(contender)
    return Round(start.elapsed_time(between) / 1e3, start.elapsed_time(end) / 1e3, alone)


@torch.no_grad()
def _cuda_seconds_alone(contender: Contender) -> float:
    seconds = queue_launches(contender.forward, 1, ahead=_count_ahead(contender.forward))
    torch.cuda.synchronize()
    return seconds()


def _count_ahead(run: Callable[[], object]) -> int:
    """Say how many runs to queue before the one that counts, by the time of a few, for which it waits."""
    seconds = queue_launches(run, _AHEAD)
    torch.cuda.synchronize()
    return max(_AHEAD, math.ceil(_AHEAD_SECONDS / seconds()))


def queue_launches(run: Callable[[], object], count: int, *, ahead: int = 1) -> Callable[[], float]:
    """Queue runs on the current CUDA device between two events, behind some that are not measured.

    Does not wait for them, so that others can be queued behind.

    Args:
        run: to launch.
        count: how many runs are measured together.
        ahead: how many are not measured.

    Returns:
        A function () -> seconds of one run, to be called after ``torch.cuda.synchronize()``.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(ahead):
        run()
    start.record()
    for _ in range(count):
        run()
    end.record()
    return lambda: start.elapsed_time(end) / 1e3 / count


def measure_memory(contender: Contender) -> Memory:
    """Measure what a row holds between forward and backward, and on CUDA its peak.

    On CUDA by the allocator's counts; on the CPU by the tensors that autograd holds when the forward is done, a storage
    counted once.

    Args:
        contender: to run.

    Returns:
        Memory.
    """
    if not contender.grad.is_cuda:
        return Memory(_saved(contender), None)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = contender.forward()
    grown = torch.cuda.memory_allocated() - before
    held = grown - y.nbytes if grown >= y.nbytes else grown  # a bound and a graph write to memory that was there before
    grads = torch.autograd.grad(y, contender.leaves, contender.grad)
    del grads
    torch.cuda.synchronize()
    return Memory(held, torch.cuda.max_memory_allocated() - before)


class _Saved:
    """What autograd keeps in place of a tensor, for as long as it keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # a result with its history would keep itself


def _saved(contender: Contender) -> int:
    packed: list[weakref.ref[_Saved]] = []

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        packed.append(weakref.ref(saved))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        y = contender.forward()
    known = {tensor.untyped_storage().data_ptr() for tensor in (*contender.leaves, y)}
    alive = [saved.tensor.untyped_storage() for each in packed if (saved := each()) is not None]
    storages = {storage.data_ptr(): storage.nbytes() for storage in alive}
    return sum(size for at, size in storages.items() if at not in known)
