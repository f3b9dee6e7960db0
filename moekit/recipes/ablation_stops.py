"""Which signal stopped an ablation, for its exit status."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stops_seen() -> Iterator[Callable[[], signal.Signals | None]]:
    """Note Ctrl-C and SIGTERM, also those that a run's own ``stop_on_signals`` answers, which tells nobody.

    It changes no handler, so it goes inside a ``stop_on_signals``: without one a signal ends the process.

    Yields:
        A function that returns the first of the two that came, or None.

    Example:
        >>> from moekit.lm.signals import stop_on_signals
        >>> with stop_on_signals(), stops_seen() as stopped:
        ...     with stop_on_signals():
        ...         signal.raise_signal(signal.SIGTERM)
        ...     stopped().name
        'SIGTERM'
    """
    found: list[signal.Signals] = []
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # Python writes the number of each signal there

    def stopped() -> signal.Signals | None:
        try:
            while numbers := os.read(reader, 4096):
                found.extend(signal.Signals(number) for number in numbers if number in _STOPS)
        except BlockingIOError:  # nothing more to read
            pass
        return found[0] if found else None

    try:
        yield stopped
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
