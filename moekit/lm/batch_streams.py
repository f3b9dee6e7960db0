"""The stream that `moekit.lm.batches.open_stream` opens, on a node of ``torchdata.nodes``.

Its state is the position of the batches that were handed out; what workers have read ahead does not enter it.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

from torchdata.nodes import BaseNode

from moekit.lm.orders import Address, Order
from moekit.lm.row_workers import LocalRows, Reading, WorkerRows
from moekit.lm.shards import Shard
from moekit.lm.token_rows import Batch


class Stream:
    """An iterator over batches that can be saved in the middle and continued exactly.

    Args:
        reading: what is read, and which part of it is this rank's.
        workers: processes that read ahead; 0 reads in this one.
    """

    def __init__(self, reading: Reading, *, workers: int) -> None:
        self._order = reading.order()
        self._origin = _origin(reading, self._order)
        # As older versions wrote them: shards of one name in two folders could not be told apart.
        self._older = {"shards": [_digest(shards, [shard.file_name for shard in shards]) for shards in reading.sources]}
        self._batches = _Batches(self._order, reading, workers=workers)

    @property
    def passes(self) -> tuple[int, ...]:
        """How often each source was used up so far."""
        return self._order.passes

    @property
    def skipped(self) -> Mapping[str, int]:
        """Sequences that this rank left out as bad since the stream was opened, by reason."""
        return dict(self._batches.skipped)

    @property
    def addresses(self) -> Sequence[Address]:
        """Of the last global batch, in slot order; empty before the first."""
        return self._batches.addresses

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            DataExhausted: if the allowed passes hold no further whole batch; the position stays.
            ShardError: if there is bad data and it is not to be skipped; the position stays.
            RuntimeError: if a worker was ended from outside; the position stays.
        """
        batch: Batch = next(self._batches)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it depends on, made of ints, floats, strings, lists and dicts alone."""
        return {"origin": self._origin, "position": self._batches.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state_dict` returned, under any number of ranks and workers and any batch size.

        Raises:
            ValueError: if it is none, or was saved for other data, weights, seed, lanes or sequence length.
        """
        origin, position = (state.get("origin"), state.get("position")) if isinstance(state, Mapping) else (None, None)
        if not isinstance(origin, Mapping) or not isinstance(position, Mapping) or not position:
            raise ValueError(
                f"the saved position is damaged: it is {str(state)[:80]}; expected what state_dict returns"
            )
        for key, value in self._origin.items():
            if origin.get(key) not in (value, self._older.get(key, value)):
                raise ValueError(
                    f"the saved position is for {key} {origin.get(key)}; this stream has {value}. Resume with the same "
                    "data, sequence length, weights (--train-data-mix-weights), seed (--seed) and lanes "
                    "(--data-lanes), or start without the saved position"
                )
        self._batches.reset(dict(position))

    def close(self) -> None:
        """End the workers and close the files. The position stays, and the next batch would start them again."""
        self._batches.close()


def _origin(reading: Reading, order: Order) -> dict[str, Any]:
    """Say what a position depends on: under anything else, it would point to other data."""
    return {
        "seed": reading.seed,
        "weights": order.weights,
        "lanes": reading.lanes,
        "seq_len": reading.batching.row_format.seq_len,
        "num_sequences": [sum(shard.num_sequences for shard in source) for source in reading.sources],
        "shards": [_digest(shards, [shard.full_name for shard in shards]) for shards in reading.sources],
    }


def _digest(shards: Sequence[Shard], names: Sequence[str]) -> str:
    # By name and not by path: data may be moved as a whole.
    lines = "".join(f"{name} {shard.num_sequences}\n" for name, shard in zip(names, shards, strict=True))
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


class _Batches(BaseNode[Batch]):
    """Yields the batches of this rank; its state is the position in the order."""

    def __init__(self, order: Order, reading: Reading, *, workers: int) -> None:
        super().__init__()
        self._order, self._reading, self._workers = order, reading, workers
        self._start = order.state_dict()
        self._rows: LocalRows | WorkerRows | None = None
        self.addresses: tuple[Address, ...] = ()
        self.skipped = Counter[str]()

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.close()
        self._order.load_state_dict(initial_state or self._start)

    def next(self) -> Batch:
        position = self._order.state_dict()
        try:
            addresses = self._order.step(self._reading.batching.batch_size)
            rows = self._started(position).read(addresses)
        except BaseException:
            self._order.load_state_dict(position)
            self.close()
            raise
        self.addresses = addresses
        self.skipped.update(rows.skipped)
        return rows.batch

    def get_state(self) -> dict[str, Any]:
        return self._order.state_dict()

    def close(self) -> None:
        rows, self._rows = self._rows, None
        if rows is not None:
            rows.close()

    def _started(self, position: Mapping[str, Any]) -> LocalRows | WorkerRows:
        if self._rows is None and self._workers:
            self._rows = WorkerRows(self._reading, position, workers=self._workers)
        elif self._rows is None:
            self._rows = LocalRows(self._reading)
        return self._rows
