"""Unequal tasks on the CPU's threads: each task on one thread, but for those that are too large for it.

A parallel loop inside every operator makes all threads wait for the slowest one each time: with hundreds of operators
of a few hundred microseconds that costs more than it gains, and ruins everything once another program wants a core.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_WORTH_THREADS = 1e8  # operations, about a millisecond of one core; starting threads takes a tenth of that
_SOFT = 1  # omp_pause_soft of OpenMP 5.0, section 3.2.44: what the program has set stays


def share(costs: Sequence[int], prepare: Callable[[], Callable[[int], None]]) -> None:
    """Do task i, for every cost i, where the results must not depend on who does it.

    A task of more than half a thread's fair share is done by all threads together, the way torch always does it; then
    each thread takes one of the rest at a time, the largest first.

    Args:
        costs: of the tasks, in floating-point operations.
        prepare: called once by each thread; returns what does a task, with memory of its own.

    Example:
        >>> done = []
        >>> share([3, 0, 5], lambda: done.append)
        >>> done
        [2, 0, 1]
    """
    threads = torch.get_num_threads()
    order = sorted(range(len(costs)), key=lambda task: -costs[task])
    together, alone = divided(costs, order, threads)
    if together:
        do = prepare()
        for task in together:
            do(task)
    if alone:
        _in_threads(deque(alone), prepare, threads)


def divided(costs: Sequence[int], order: list[int], threads: int) -> tuple[list[int], list[int]]:
    """Divide tasks into those that all threads do together, and those that each does alone.

    Example:
        >>> divided([60 * 10**9, *[10**9] * 40], list(range(41)), 2)[0]
        [0]
    """
    total = sum(costs)
    if threads == 1 or total < _WORTH_THREADS:
        return order, []
    together = [task for task in order if 2 * threads * costs[task] > total]
    return together, order[len(together) :]


def _in_threads(tasks: deque[int], prepare: Callable[[], Callable[[int], None]], threads: int) -> None:
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        torch.set_num_threads(1)
        # A new thread begins outside inference mode, where torch refuses to write into what was made inside; and with
        # gradients enabled, with which it refuses out=.
        with torch.inference_mode(inference), torch.no_grad():
            do = prepare()
            while True:
                try:
                    task = tasks.popleft()
                except IndexError:
                    return
                do(task)

    _end_waiting()
    try:
        with ThreadPoolExecutor(max(threads - 1, 1)) as pool:  # this thread works too
            others = [pool.submit(work) for _ in range(threads - 1)]
            work()
            for each in others:
                each.result()
    finally:
        torch.set_num_threads(threads)  # torch's threads of later days begin with what was set last, anywhere


def _end_waiting() -> None:
    """Send OpenMP's threads home, which after an operator wait for the next one in a loop that takes their core.

    GNU's run around for some milliseconds; those that the next operator needs are started again.
    """
    pause = getattr(ctypes.pythonapi, "omp_pause_resource_all", None)  # of whatever the process has loaded
    if pause is not None:
        pause(_SOFT)
