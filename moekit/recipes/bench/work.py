"""Something to measure, and how much it does."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Work(NamedTuple):
    """Something to run.

    Attributes:
        run: does it, and returns what comes of it.
        nbytes: that have to be read and written at least.
        flops: of its products; 0 if it has none.
    """

    run: Callable[[], Any]
    nbytes: int
    flops: int = 0
