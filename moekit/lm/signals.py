"""Stopping a run between two steps, and a program with what it has begun cleaned up."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequest:
    """Whether somebody asked to stop; true after the first signal.

    Attributes:
        name: the signal's name, or None.
        ends_process: set by a program that ends because of it. A SIGTERM that comes later then does nothing: the
            program's last lines and its status stay those of the first.

    Example:
        >>> bool(StopRequest())
        False
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.ends_process = False

    def __bool__(self) -> bool:
        return self.name is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn Ctrl-C or SIGTERM into a request that the loop reads between steps.

    A second Ctrl-C acts at once. A second SIGTERM does not: launchers and schedulers send several, to a process and to
    its group, and each would otherwise end the process before its checkpoint is written. SIGKILL is there for haste.
    The handlers that were there before come back at the end, but for ``ends_process``.

    One inside another asks both: an ablation hears of a signal that a run of it has answered, and a run of one that
    came before it began.

    Outside the main thread, where Python lets nobody handle signals, the handlers stay as they are and nobody asks.

    Yields:
        The request.

    Example:
        >>> with stop_on_signals() as stop:
        ...     signal.raise_signal(signal.SIGINT)
        ...     stop.name
        'SIGINT'
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in signals}
    around = previous[signal.SIGTERM]
    if isinstance(around, _Handler):
        request.name = around._request.name
    handler = _Handler(request, around if isinstance(around, _Handler) else None, previous[signal.SIGINT])
    for number in signals:
        signal.signal(number, handler)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, previous[signal.SIGINT])
        # not our handler, which Python takes away before it ends
        signal.signal(signal.SIGTERM, signal.SIG_IGN if request.ends_process else previous[signal.SIGTERM])


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the program by an exception, as Ctrl-C does, so that files that are half written are removed.

    Python's own answer ends the process where it stands. A second SIGTERM does nothing, so that it cannot come between.
    The handler that was there before comes back at the end. Outside the main thread it stays as it is.

    Raises:
        SystemExit: with status 143, at SIGTERM.

    Example:
        >>> with exit_on_sigterm():
        ...     signal.raise_signal(signal.SIGTERM)
        Traceback (most recent call last):
        SystemExit: 143
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(exit_status("SIGTERM"))

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def interrupted(prog: str) -> SystemExit:
    """Say on standard error that Ctrl-C ended a program, where nothing is to be gone on with.

    Args:
        prog: its name.

    Returns:
        What the program ends with, of status 130.

    Example:
        >>> interrupted("moekit bench").code
        130
    """
    print(f"{prog}: interrupted", file=sys.stderr)
    return SystemExit(exit_status("SIGINT"))


def exit_status(stopped_by: str) -> int:
    """Return the status of a program that was stopped, as shells expect it.

    Args:
        stopped_by: the signal's name, or who else it was.

    Returns:
        128 and the signal's number; 1 if it was no signal of this process.

    Example:
        >>> exit_status("SIGINT"), exit_status("another rank")
        (130, 1)
    """
    return 128 + signal.Signals[stopped_by] if stopped_by in signal.Signals.__members__ else 1


class _Handler:
    """Asks for a stop, here and around; and lets the next Ctrl-C do what it did before all of them."""

    def __init__(self, request: StopRequest, around: "_Handler | None", interrupt: Any) -> None:
        self._request, self._around = request, around
        self._interrupt: Any = interrupt if around is None else around._interrupt

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._ask(signal.Signals(number).name)
        signal.signal(signal.SIGINT, self._interrupt)

    def _ask(self, name: str) -> None:
        self._request.name = self._request.name or name
        if self._around is not None:
            self._around._ask(name)
