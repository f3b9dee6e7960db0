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
    """Turn the first Ctrl-C or SIGTERM into a request that the loop reads between steps; a second one acts at once.

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
        request.name = signal.Signals(number).name
        for each in signals:
            signal.signal(each, previous[each])

    for number in signals:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number in signals:
            signal.signal(number, previous[number])
