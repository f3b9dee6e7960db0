"""Unequal tasks on the CPU's threads: each task on one thread, but for those that are too large for it.

A parallel loop inside every operator makes all threads wait for the slowest one each time: with hundreds of operators
of a few hundred microseconds that costs more than it gains, and ruins everything once another program wants a core.
"""

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

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
    raised: deque[BaseException] = deque(maxlen=1)

    def work() -> None:
        _use_threads(1)
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

    def work_beside() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    # No executor: those of concurrent.futures end before the program's last threads do.
    others = [threading.Thread(target=work_beside) for _ in range(threads - 1)]  # this thread works too
    _end_waiting()
    try:
        with suppress(RuntimeError):  # none starts in atexit from Python 3.12 on: then this thread does what there is
            for each in others:
                each.start()
        work()
    finally:
        _use_threads(threads)
        for each in others:
            if each.is_alive():
                each.join()
    if raised:
        raise raised.pop()


def _use_threads(number: int) -> None:
    """Set how many threads torch uses for what this thread calls.

    ``torch.set_num_threads`` also sets what threads begin with that call torch for the first time, anywhere in the
    process, and keep. OpenMP and MKL can be told for this thread alone, where they are found. Where they are not, or
    are not what torch counts by, it is torch that is told.
    """
    torch.get_num_threads()  # a thread that begins takes up the process's number here, not later
    openmp, mkl = _function("omp_set_num_threads"), _function("MKL_Set_Num_Threads_Local")
    if openmp is not None and (mkl is not None or not torch.backends.mkl.is_available()):
        openmp(number)
        if mkl is not None:
            mkl(number)
    if torch.get_num_threads() != number:
        torch.set_num_threads(number)


def _end_waiting() -> None:
    """Send OpenMP's threads home, which after an operator wait for the next one in a loop that takes their core.

    GNU's run around for some milliseconds; those that the next operator needs are started again.
    """
    pause = _function("omp_pause_resource_all")
    if pause is not None:
        pause(_SOFT)


@lru_cache(maxsize=8)
def _function(name: str) -> Any:
    """Find a C function where torch's calls find it: in what the whole process sees, then in torch's own libraries."""
    for library in (ctypes.pythonapi, ctypes.PyDLL(torch._C.__file__)):
        found = getattr(library, name, None)
        if found is not None:
            return found
    return None
