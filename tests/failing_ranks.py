"""A run of two ranks of which one fails by itself, for ``ranks.run_ranks``."""

from io import StringIO

from rich.console import Console

from moekit.lm.batch_streams import Stream
from moekit.parallel import World
from moekit.recipes.configuration import parse_settings
from moekit.recipes.train import train


def first_batch_fails(world: World, words: list[str]) -> str:
    """Train; rank 1 cannot read its first batch. Returns what the rank printed or raised."""
    console = Console(file=StringIO(), width=200)
    if world.rank == 1:
        Stream.__next__ = _fail  # type: ignore[method-assign]
    try:
        train(parse_settings(words), console, world=world)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def _fail(stream: Stream) -> None:
    raise OSError("the disk of rank 1 is gone")
