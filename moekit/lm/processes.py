"""Worker processes that end quietly: at Ctrl-C, when their parent is killed, and when a task fails."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

Label = TypeVar("Label")


def available_cores() -> int:
    """Count the cores that this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def process_pool(workers: int, *, preload: str) -> Iterator[Executor]:
    """Start worker processes, and on the way out wait for the tasks under way; those that wait are cancelled.

    A plain fork would copy a process that may have threads (torch's, the tokenizer's, the progress bar's) and could
    deadlock on a lock that one of them holds. So workers are forked from a server that has imported the module and
    runs nothing ("forkserver"): safe, as quick, and the imports are shared. Where there is no such server, each worker
    starts anew ("spawn").

    Args:
        workers: how many.
        preload: the module whose functions are the tasks.

    Yields:
        The pool.

    Raises:
        ValueError: if ``workers`` is below 1.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; expected at least 1")
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    with starting_processes():  # to the end, for a pool starts them as they are needed
        with _without_interrupts():  # what is started here ignores Ctrl-C for life: stopping is the parent's business
            if method == "forkserver":
                context.set_forkserver_preload([preload])
                multiprocessing.forkserver.ensure_running()
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        try:
            yield pool
        finally:
            with _without_interrupts():
                pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def starting_processes() -> Iterator[None]:
    """Keep processes that start anew from importing modules of the current folder, where a ``types.py`` may lie.

    Python starts them by ``python -c``, which looks there first. As soon as they run, they get this process's
    ``sys.path``, so modules beside a user's own script are found as before.

    Example:
        >>> with starting_processes():
        ...     os.environ["PYTHONSAFEPATH"]
        '1'
    """
    name = "PYTHONSAFEPATH"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def run_in_order(
    executor: Executor, tasks: Iterable[tuple[Label, Callable[[], Any]]], *, most: int
) -> Iterator[tuple[Label, Any]]:
    """Run tasks side by side, with no more than so many begun and not yet handed out, so that memory stays bounded.

    Args:
        executor: where to.
        tasks: pairs of a label and a function without arguments.
        most: how many results or tasks may wait.

    Yields:
        Label and result of each task, in the order of the tasks.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> with ThreadPoolExecutor(2) as executor:
        ...     list(run_in_order(executor, [("a", lambda: 1), ("b", lambda: 2)], most=2))
        [('a', 1), ('b', 2)]
    """
    waiting: deque[tuple[Label, Future[Any]]] = deque()
    for label, task in tasks:
        waiting.append((label, executor.submit(task)))
        if len(waiting) >= most:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()  # returns when the parent is gone, even by kill -9, which leaves workers waiting for tasks for ever
    os._exit(1)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
