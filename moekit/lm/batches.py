"""From shards to batches: every rank's rows of the next global batch, mixed from several sources, resumed exactly.

`moekit.lm.orders` says which sequences come next, `moekit.lm.shard_readers` reads them, `moekit.lm.row_workers` does so
ahead of time, and `moekit.lm.batch_streams` makes a stream of it.
"""

from moekit.lm.batch_streams import Stream
from moekit.lm.row_workers import Reading
from moekit.lm.token_rows import Batch, Batching, RowFormat
from moekit.lm.validation_batches import ValidationBatch, read_validation

__all__ = [
    "Batch",
    "Batching",
    "Reading",
    "RowFormat",
    "Stream",
    "ValidationBatch",
    "open_stream",
    "read_validation",
]


def open_stream(reading: Reading, *, workers: int = 0) -> Stream:
    """Stream this rank's batches of one or several sources, in an order that ranks and workers do not change.

    If the lanes are a multiple of the ranks, a rank reads shards of its own alone, but for the end of each pass. See
    `moekit.lm.orders.Order` for the order. No global random number generator is used.

    Args:
        reading: what is read; of longer sequences, a window drawn from the seed.
        workers: processes that read ahead; 0 reads in this one.

    Returns:
        The stream, at its start. Nothing is read before the first batch.

    Raises:
        ValueError: if an argument is not as described.

    Example:
        >>> import tempfile
        >>> from moekit.lm.shards import read_manifest, write_shards
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shards = read_manifest(write_shards(folder, [[i, i, i] for i in range(5)]))
        ...     batching = Batching(batch_size=4, row_format=RowFormat(seq_len=2, vocab_size=5))
        ...     batch = next(open_stream(Reading([shards], batching, seed=0)))
        >>> batch.ids[:, 0].tolist(), batch.num_targets
        ([4, 2, 3, 0], 8)
    """
    reading.batching.check()
    if workers < 0:
        raise ValueError(f"workers is {workers}; expected at least 0")
    return Stream(reading, workers=workers)
