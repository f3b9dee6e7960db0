"""The rows of a rank, step after step, read in this process or in worker processes with the same result.

Every worker walks through the whole order from the same position, and reads the lanes that are its own. Each step it
hands over one item, be it without rows, so that the strict turns of torch's DataLoader keep all steps in order.
"""

import atexit
import math
import multiprocessing
import multiprocessing.util  # so that its function at exit is registered before ours, and so runs after it
import signal
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from moekit.lm.orders import Address, DataExhausted, Order
from moekit.lm.processes import starting_processes
from moekit.lm.shard_readers import RowReader
from moekit.lm.shards import Shard, ShardError
from moekit.lm.token_rows import Batch, Batching, bad_data_policy, batch_of

_PREFETCHED_STEPS = 4  # for each worker
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Reading(NamedTuple):
    """What a stream reads, and which part of it is this rank's.

    Attributes:
        sources: the shards of each source, see `moekit.lm.shards.read_manifest`.
        batching: how they become batches.
        seed: the same seed gives the same batches.
        weights: one positive number per source; their scale does not matter. None: in proportion to the number of
            sequences, so that all sources are used up at the same rate.
        lanes: shards of a source that are read at the same time, over all ranks; part of what decides the order.
        max_passes: how often a source may be gone through; None is without end.
    """

    sources: Sequence[Sequence[Shard]]
    batching: Batching
    seed: int
    weights: Sequence[float] | None = None
    lanes: int = 8
    max_passes: int | None = None

    def order(self) -> Order:
        """Return the order, at its start."""
        counts = [[shard.num_sequences for shard in source] for source in self.sources]
        return Order(counts, self.weights, seed=self.seed, lanes=self.lanes, max_passes=self.max_passes)

    def slots(self) -> range:
        """Return the places of this rank's rows in the global batch."""
        return range(self.batching.rank, self.batching.batch_size, self.batching.world_size)

    def owners(self, addresses: Sequence[Address], workers: int) -> list[int]:
        """Return which of this rank's workers reads each of its slots: its lanes take turns."""
        stride = math.gcd(self.lanes, self.batching.world_size)  # between the lanes of a rank
        return [addresses[slot].lane // stride % workers for slot in self.slots()]


class Rows(NamedTuple):
    """What was read for one step.

    Attributes:
        batch: n rows. They are counted where they are read, in a worker by one thread: the main process may have many,
            and to wake them for these few numbers takes milliseconds, in which a GPU waits.
        skipped: sequences left out as bad, by reason.
    """

    batch: Batch
    skipped: Mapping[str, int]


class LocalRows:
    """The rows of a rank, or of one of its workers, read in this process.

    Args:
        reading: what to read.
        worker: number of the worker.
        workers: how many there are.
    """

    def __init__(self, reading: Reading, *, worker: int = 0, workers: int = 1) -> None:
        self._reading, self._worker, self._workers = reading, worker, workers
        self._skipped = Counter[str]()
        self._reader = RowReader(
            reading.sources,
            reading.batching,
            seed=reading.seed,
            on_bad=bad_data_policy(reading.batching.on_bad, self._skipped),
        )

    def read(self, addresses: Sequence[Address]) -> Rows:
        """Read the rows of the next step.

        Args:
            addresses: of the global batch.

        Returns:
            The rows in slot order, n of them.

        Raises:
            ShardError: if there is bad data and it is not to be skipped.
        """
        owners = self._reading.owners(addresses, self._workers)
        slots = [slot for slot, owner in zip(self._reading.slots(), owners, strict=True) if owner == self._worker]
        self._skipped.clear()
        return Rows(batch_of(self._reader.read(addresses, slots)), dict(self._skipped))

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        self._reader.close()


class _Failure(NamedTuple):
    """An error of a worker, as a value: raised in the main process again, without the worker's traceback."""

    kind: type[Exception]
    arguments: tuple[Any, ...]


class _Sent(NamedTuple):
    """Rows on their way from a worker."""

    ids: Any  # a tensor in shared memory, or a numpy array
    counts: tuple[Any, ...]
    skipped: Mapping[str, int]


class _Share(IterableDataset[_Sent | _Failure]):
    """What a worker runs."""

    def __init__(self, reading: Reading, position: Mapping[str, Any]) -> None:
        self._reading, self._position = reading, position

    def __iter__(self) -> Iterator[_Sent | _Failure]:
        info = get_worker_info()
        assert info is not None
        order, rows = self._reading.order(), LocalRows(self._reading, worker=info.id, workers=info.num_workers)
        order.load_state_dict(self._position)
        try:
            while True:
                yield _sent(rows.read(order.step(self._reading.batching.batch_size)))
        except DataExhausted:  # whoever asks for that step has been told by its own order
            return
        except ShardError as error:
            yield _Failure(ShardError, (str(error), error.reason))
        except (ValueError, OSError, ImportError) as error:
            yield _failure_of(error)


def _sent(rows: Rows) -> _Sent:
    """Make rows ready to be sent: a tensor that is shared later, by torch's thread, is lost where /dev/shm is full.

    An array goes through the pipe, half of it where a worker is killed: the main process may then wait for the rest.
    """
    ids, *counts = rows.batch
    try:
        shared: Any = ids.share_memory_()
    except RuntimeError:
        shared = ids.numpy()
    return _Sent(shared, tuple(counts), rows.skipped)


def _failure_of(error: Exception) -> _Failure:
    """Keep an error's words, and its kind; of one that is made of more than words, as UnicodeDecodeError, the base."""
    for kind in type(error).__mro__:
        with suppress(TypeError):
            kind(str(error))
            return _Failure(kind, (str(error),))
    raise error


class WorkerRows:
    """The rows of a rank from ``workers`` processes, read ahead.

    The processes ignore SIGINT and SIGTERM, since this one decides when to end; they end with it, however it ends.

    Args:
        reading: what to read.
        position: of the order, from its ``state_dict``.
        workers: at least 1.

    Raises:
        OSError: if so many processes cannot be started.
    """

    def __init__(self, reading: Reading, position: Mapping[str, Any], *, workers: int) -> None:
        self._reading, self._workers = reading, workers
        loader = DataLoader(
            _Share(reading, position),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=_PREFETCHED_STEPS,
            collate_fn=_unchanged,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # else it would draw from the global one
        )
        before = set(multiprocessing.active_children())
        try:
            with _signals_held_back(), starting_processes():
                self._items: Any = iter(loader)
        except BaseException as error:
            _kill(_new_since(before))  # else Python would wait for them at its end, who ignore that they are to end
            if not isinstance(error, OSError):
                raise
            raise OSError(
                f"{workers} data workers cannot be started ({error}). Use fewer --workers, or allow more processes and "
                "open files: ulimit -u, ulimit -n"
            ) from error
        self._processes = _new_since(before)
        self._at_exit = partial(_close_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)
        weakref.finalize(self, atexit.unregister, self._at_exit).atexit = False  # where it is dropped without ``close``

    def read(self, addresses: Sequence[Address]) -> Rows:
        """Put the rows of the next step together.

        Args:
            addresses: of the global batch; those that follow ``position``, step after step.

        Returns:
            The rows in slot order, n of them.

        Raises:
            ShardError: if there is bad data and it is not to be skipped.
            RuntimeError: if a process was ended from outside.
        """
        items = [self._next_item() for _ in range(self._workers)]
        skipped = Counter[str]()
        for item in items:
            skipped.update(item.skipped)
        return Rows(_merged([item.batch for item in items], self._reading.owners(addresses, self._workers)), skipped)

    def close(self) -> None:
        """End the processes; those that do not end by themselves are killed."""
        atexit.unregister(self._at_exit)
        # The loader's iterator ends its workers when it goes, and has no other way to be told. It does not go by
        # itself as long as an error's traceback refers to it. Torch may only now notice that a worker was killed.
        with suppress(RuntimeError):
            self._items.__del__()
        _kill(self._processes)
        self._processes = []

    def _next_item(self) -> Rows:
        try:
            item: _Sent | _Failure = next(self._items)
        except (RuntimeError, OSError, EOFError, StopIteration) as error:  # a pipe breaks, or torch notices the end
            if isinstance(error, RuntimeError) and all(process.is_alive() for process in self._processes):
                raise
            raise RuntimeError(
                f"a data worker of rank {self._reading.batching.rank} was ended from outside ({error}). "
                "If the machine ran out of memory, use fewer --workers"
            ) from error
        if isinstance(item, _Failure):
            raise item.kind(*item.arguments)
        return Rows(Batch(torch.as_tensor(item.ids), *item.counts), item.skipped)


def _new_since(before: set[BaseProcess]) -> list[BaseProcess]:
    return [process for process in multiprocessing.active_children() if process not in before]


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def _merged(parts: Sequence[Batch], owners: Sequence[int]) -> Batch:
    """Put the rows of each worker in their places, of which ``owners`` names the worker."""
    if len(parts) == 1:
        return parts[0]
    ids = torch.empty(len(owners), parts[0].ids.shape[1], dtype=torch.int64)
    for worker, part in enumerate(parts):
        places = [place for place, owner in zip(ids, owners, strict=True) if owner == worker]
        for place, row in zip(places, part.ids, strict=True):  # one by one: so few numbers wake no threads of torch
            place.copy_(row)
    _, inputs, targets, padded = zip(*parts, strict=True)
    return Batch(ids, sum(inputs), sum(targets), any(padded))


def _close_at_exit(rows: "weakref.ref[WorkerRows]") -> None:
    if (left := rows()) is not None:
        left.close()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Hold signals back while workers start, which would not ignore them yet; Windows holds none back."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _unchanged(item: Any) -> Any:
    return item
