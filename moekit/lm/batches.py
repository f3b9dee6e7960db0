"""From shards to batches: shuffled passes over each source, mixed per sequence, resumed exactly.

The work is done by a chain of ``torchdata.nodes``: one `_Passes` per source, an `_Interleave` over them, and the
library's own ``Batcher`` and ``Mapper``. Callers see only `BatchStream`.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torchdata.nodes import BaseNode, Batcher, Mapper

from moekit.lm.shards import load_sequences


class BatchStream(Protocol):
    """An iterator over batches that can be saved in the middle and continued exactly.

    Attributes:
        passes: how often each source was read to its end so far.
    """

    @property
    def passes(self) -> tuple[int, ...]: ...  # noqa: D102

    def __iter__(self) -> Iterator[Tensor]: ...

    def __next__(self) -> Tensor:
        """Return the next batch, (B, seq_len + 1) int64: inputs are all but the last column, targets but the first."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position, made of ints, floats, strings, lists and dicts alone."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state_dict` returned."""
        ...


def mixed_batches(
    manifests: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    *,
    batch_size: int,
    seed: int,
    vocab_size: int | None = None,
) -> BatchStream:
    """Load the sequences of several manifests, and stream them with `mixed_sequences`.

    Args:
        manifests: one manifest per source, see `moekit.lm.shards`.
        weights: one positive number per source, see `mixed_sequences`.
        batch_size: B, sequences per batch.
        seed: the same seed gives the same batches.
        vocab_size: V, to check every id against; None leaves ids unchecked.

    Returns:
        The stream, at its start.

    Raises:
        FileNotFoundError: if a manifest or a shard is not there.
        ValueError: if a shard is damaged, or for what `mixed_sequences` raises it.

    Example:
        >>> import tempfile
        >>> from moekit.lm.shards import write_shards
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifests = [write_shards(f"{folder}/{i}", [[i, i], [i, i]]) for i in (0, 1)]
        ...     stream = mixed_batches(manifests, [0.75, 0.25], batch_size=4, seed=0)
        >>> next(stream).tolist()
        [[0, 0], [0, 0], [1, 1], [0, 0]]
    """
    # What costs no reading is checked first: tars may be large.
    _check(manifests, weights, batch_size)
    sources = [load_sequences(manifest, vocab_size=vocab_size) for manifest in manifests]
    return mixed_sequences(sources, weights, batch_size=batch_size, seed=seed)


def mixed_sequences(
    sources: Sequence[Tensor], weights: Sequence[float] | None = None, *, batch_size: int, seed: int
) -> BatchStream:
    """Stream endless batches from several sources in memory, mixed per sequence in the proportions of the weights.

    Each next sequence comes from the source that is furthest behind its share, so that after n sequences every source
    has given its share of n to within one sequence (a few, with many sources), whatever the sizes of the sources. A
    source gives each of its sequences once per pass, in an order drawn from the seed, the source's place in the list
    and the number of the pass.

    Args:
        sources: (num_sequences, seq_len + 1) ints each, see `moekit.lm.shards.load_sequences`.
        weights: one positive number per source; their scale does not matter. None: in proportion to the number of
            sequences, so that all sources are used up at the same rate.
        batch_size: B, sequences per batch.
        seed: the same seed gives the same batches.

    Returns:
        The stream, at its start.

    Raises:
        ValueError: if there is no source, the weights are not one positive number per source, ``batch_size`` is below
            1, a source is empty, or the sources' sequences differ in length.

    Example:
        >>> stream = mixed_sequences([torch.zeros(5, 2), torch.ones(5, 2)], [2, 1], batch_size=3, seed=0)
        >>> next(stream).tolist(), next(stream).tolist()
        ([[0, 0], [1, 1], [0, 0]], [[0, 0], [1, 1], [0, 0]])
    """
    _check(sources, weights, batch_size)
    shapes = [tuple(source.shape) for source in sources]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or len({shape[1] for shape in shapes}) > 1:
        raise ValueError(
            f"the sources have the shapes {shapes}; expected (num_sequences, seq_len + 1) with the same seq_len. "
            "Tokenize all sources with one sequence length"
        )
    return _Stream(sources, weights or [len(source) for source in sources], batch_size=batch_size, seed=seed)


def validation_batches(
    manifest: str | os.PathLike[str], *, batch_size: int, vocab_size: int | None = None
) -> list[Tensor]:
    """Cut all sequences of a manifest into batches, in order, each sequence once.

    Args:
        manifest: the manifest, see `moekit.lm.shards`.
        batch_size: B, sequences per batch; the last batch may have fewer.
        vocab_size: V, to check every id against; None leaves ids unchecked.

    Returns:
        Batches of (B, seq_len + 1) int64, views of one tensor.

    Raises:
        FileNotFoundError: if the manifest or a shard is not there.
        ValueError: if ``batch_size`` is below 1, or a shard is damaged.

    Example:
        >>> import tempfile
        >>> from moekit.lm.shards import write_shards
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest = write_shards(folder, [[1, 2], [3, 4], [5, 6]])
        ...     [batch.tolist() for batch in validation_batches(manifest, batch_size=2)]
        [[[1, 2], [3, 4]], [[5, 6]]]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    return list(load_sequences(manifest, vocab_size=vocab_size).long().split(batch_size))


def _check(sources: Sequence[Any], weights: Sequence[float] | None, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    if not sources:
        raise ValueError("there is no source; expected at least one manifest")
    if weights is not None and len(weights) != len(sources):
        raise ValueError(
            f"there are {len(weights)} weights, {list(weights)}, for {len(sources)} manifests; "
            "expected one per manifest"
        )
    if weights is not None and not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights are {list(weights)}; expected positive numbers. Leave out a source you do not want")


class _Stream:
    """The `BatchStream` over a chain of nodes."""

    def __init__(self, sources: Sequence[Tensor], weights: Sequence[float], *, batch_size: int, seed: int) -> None:
        # What a position depends on: under anything else, it would point to other data.
        self._origin = {
            "seed": seed,
            "weights": [float(weight) for weight in weights],
            "num_sequences": [len(source) for source in sources],
        }
        self._passes = [_Passes(source, seed=seed, source=number) for number, source in enumerate(sources)]
        self._chain = Mapper(Batcher(_Interleave(self._passes, weights), batch_size), _stack)

    @property
    def passes(self) -> tuple[int, ...]:
        return tuple(source.state_dict()["passes"] for source in self._passes)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        batch: Tensor = next(self._chain)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"origin": self._origin, "position": self._chain.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, value in self._origin.items():
            if state["origin"][key] != value:
                raise ValueError(
                    f"the saved position is for {key} {state['origin'][key]}; this stream has {value}. "
                    "Resume with the same data, weights and seed, or start without the saved position"
                )
        self._chain.reset(state["position"])


class _Passes(BaseNode[Tensor]):
    """Yields the rows of a tensor, pass after pass without end, each pass in its own random order."""

    def __init__(self, sequences: Tensor, *, seed: int, source: int) -> None:
        super().__init__()
        self._sequences = sequences
        self._seed = f"{seed}/{source}"

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        state = initial_state or {"passes": 0, "position": 0}
        self._start(state["passes"], position=state["position"])

    def next(self) -> Tensor:
        row = self._sequences[self._order[self._position]]
        self._position += 1
        if self._position == len(self._order):
            self._start(self._pass + 1, position=0)
        return row

    def get_state(self) -> dict[str, Any]:
        return {"passes": self._pass, "position": self._position}

    def _start(self, number: int, *, position: int) -> None:
        digest = hashlib.blake2b(f"{self._seed}/{number}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        self._order = torch.randperm(len(self._sequences), generator=generator).tolist()
        self._pass, self._position = number, position


class _Interleave(BaseNode[Tensor]):
    """Yields from the source that is furthest behind its share; of equals, the first. Not random."""

    def __init__(self, sources: Sequence[BaseNode[Tensor]], weights: Sequence[float]) -> None:
        super().__init__()
        self._sources = sources
        self._shares = [weight / sum(weights) for weight in weights]

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        states = initial_state["sources"] if initial_state else itertools.repeat(None, len(self._sources))
        for source, state in zip(self._sources, states, strict=True):
            source.reset(state)
        self._taken = list(initial_state["taken"]) if initial_state else [0] * len(self._sources)

    def next(self) -> Tensor:
        number = sum(self._taken) + 1
        behind = [share * number - taken for share, taken in zip(self._shares, self._taken, strict=True)]
        chosen = behind.index(max(behind))
        self._taken[chosen] += 1
        return next(self._sources[chosen])

    def get_state(self) -> dict[str, Any]:
        return {"taken": list(self._taken), "sources": [source.state_dict() for source in self._sources]}


def _stack(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(rows)).long()
