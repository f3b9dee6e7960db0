"""Stopping a run between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether somebody asked to stop; true after the first signal.

    Attributes:
        name: the signal's name, or None.

    Example:
        >>> bool(StopRequest())
        False
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn Ctrl-C or SIGTERM into a request that the loop reads between steps.

    A second Ctrl-C acts at once. A second SIGTERM does not: launchers and schedulers send several, to a process and to
    its group, and each would otherwise end the process before its checkpoint is written. SIGKILL is there for haste.

    Yields:
        The request.

    Example:
        >>> with stop_on_signals() as stop:
        ...     signal.raise_signal(signal.SIGINT)
        ...     stop.name
        'SIGINT'
    """
    request = StopRequest()
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, frame: FrameType | None) -> None:
        request.name = request.name or signal.Signals(number).name
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    for number in signals:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number in signals:
            signal.signal(number, previous[number])
