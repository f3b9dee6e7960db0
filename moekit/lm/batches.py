"""From shards to batches: every rank's rows of the next global batch, mixed from several sources, resumed exactly.

`moekit.lm.orders` says which sequences come next, `moekit.lm.shard_readers` reads them, `moekit.lm.row_workers` does so
ahead of time, and `moekit.lm.batch_streams` makes a chain of it.
"""

from collections.abc import Sequence

from moekit.lm.batch_streams import Batch, Stream
from moekit.lm.row_workers import Reading
from moekit.lm.shards import Shard
from moekit.lm.token_rows import RowFormat, check_arguments
from moekit.lm.validation_batches import ValidationBatch, read_validation

__all__ = ["Batch", "Stream", "ValidationBatch", "open_stream", "read_validation"]


def open_stream(
    sources: Sequence[Sequence[Shard]],
    weights: Sequence[float] | None = None,
    *,
    batch_size: int,
    seq_len: int,
    vocab_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    lanes: int = 8,
    max_passes: int | None = None,
    on_bad: str = "raise",
    data_key: str | None = None,
    allow_commands: bool = False,
) -> Stream:
    """Stream this rank's batches of one or several sources, in an order that ranks and workers do not change.

    Rank r has the rows r, r + W, r + 2 W, ... of each global batch. If ``lanes`` is a multiple of W, and ``batch_size``
    of ``lanes``, a rank reads shards of its own alone, but for the end of each pass. See `moekit.lm.orders.Order` for
    the order. No global random number generator is used.

    Args:
        sources: the shards of each source, see `moekit.lm.shards.read_manifest`.
        weights: one positive number per source; their scale does not matter. None: in proportion to the number of
            sequences, so that all sources are used up at the same rate.
        batch_size: sequences per optimizer step over all ranks, a multiple of ``world_size``.
        seq_len: inputs per sequence; of longer ones, a window drawn from the seed.
        vocab_size: V, to check every id against.
        seed: the same seed gives the same batches.
        rank: r, number of this process.
        world_size: W, how many processes share the batch.
        workers: processes that read ahead; 0 reads in this one.
        lanes: shards of a source that are read at the same time, over all ranks; part of what decides the order.
        max_passes: how often a source may be gone through; None is without end.
        on_bad: "raise", or "skip" to count bad sequences and have -1 in their places.
        data_key: extension of the members to read, "txt", "json" or "json.gz"; None takes all members.
        allow_commands: run ``pipe:COMMAND`` in a shell.

    Returns:
        The stream, at its start. Nothing is read before the first batch.

    Raises:
        ValueError: if an argument is not as described.

    Example:
        >>> import tempfile
        >>> from moekit.lm.shards import read_manifest, write_shards
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shards = read_manifest(write_shards(folder, [[i, i, i] for i in range(5)]))
        ...     stream = open_stream([shards], batch_size=4, seq_len=2, vocab_size=5, seed=0)
        ...     batch = next(stream)
        >>> batch.ids[:, 0].tolist(), batch.num_targets
        ([4, 2, 3, 0], 8)
    """
    row_format = RowFormat(seq_len, vocab_size)
    check_arguments(
        row_format, batch_size=batch_size, rank=rank, world_size=world_size, on_bad=on_bad, data_key=data_key
    )
    if workers < 0:
        raise ValueError(f"workers is {workers}; expected at least 0")
    reading = Reading(
        sources=[list(source) for source in sources],
        weights=weights,
        batch_size=batch_size,
        row_format=row_format,
        seed=seed,
        lanes=lanes,
        max_passes=max_passes,
        rank=rank,
        world_size=world_size,
        on_bad=on_bad,
        data_key=data_key,
        allow_commands=allow_commands,
    )
    return Stream(reading, workers=workers)
