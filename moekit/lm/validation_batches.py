"""Validation data: every sequence once, in order, shared out over ranks, one batch at a time."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.lm.shard_members import shard_members
from moekit.lm.shard_readers import MemberStream
from moekit.lm.shards import Shard, ShardError
from moekit.lm.token_rows import (
    NO_TOKEN,
    BadData,
    Batch,
    Batching,
    Member,
    RowFormat,
    bad_data_policy,
    batch_of,
    member_row,
)


class ValidationBatch(NamedTuple):
    """A rank's rows of one validation batch.

    Attributes:
        batch: ids and what they hold.
        indices: (b,) int64, the place of each row among all sequences; -1 where there is no row.
        skipped: sequences left out as bad on the way to this batch, by reason; over all ranks, each counts once.
    """

    batch: Batch
    indices: Tensor
    skipped: Mapping[str, int]


def read_validation(
    shards: Sequence[Shard | str],
    batching: Batching,
    *,
    num_sequences: int | None = None,
) -> Iterator[ValidationBatch]:
    """Read all sequences of some shards in order, each once, holding one batch at a time.

    All ranks get equally many batches: what the last lacks is -1. Every rank streams all shards, and parses what is its
    own. Of sequences longer than ``seq_len + 1``, the front is taken.

    Args:
        shards: lines of a manifest, or bare paths and URLs of tars whose number of sequences is not known.
        batching: how they become batches.
        num_sequences: how many to read at most; None reads all.

    Returns:
        The batches.

    Raises:
        ValueError: if an argument is not as described; while reading, if there are no sequences at all.
        ShardError: while reading, if there is bad data and it is not to be skipped.

    Example:
        >>> import tempfile
        >>> from moekit.lm.shards import read_manifest, write_shards
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shards = read_manifest(write_shards(folder, [[i, i] for i in range(3)]))
        ...     for batch, indices, _ in read_validation(shards, Batching(2, RowFormat(seq_len=1, vocab_size=3))):
        ...         print(batch.ids.tolist(), indices.tolist())
        [[0, 0], [1, 1]] [0, 1]
        [[2, 2], [-1, -1]] [2, -1]
    """
    batching.check()
    if num_sequences is not None and num_sequences < 1:
        raise ValueError(f"num_sequences is {num_sequences}; expected at least 1, or None for all")
    return _validation_batches(shards, batching, num_sequences)


def _validation_batches(
    shards: Sequence[Shard | str], batching: Batching, num_sequences: int | None
) -> Iterator[ValidationBatch]:
    batch_size, row_format, rank, world_size, on_bad, data_key, allow_commands = batching
    skipped = Counter[str]()
    rows = _rows_in_order(
        shards,
        partial(shard_members, data_key=data_key, allow_commands=allow_commands),
        # What concerns a whole shard stops every rank, but is counted by one.
        on_bad=bad_data_policy(on_bad, skipped if rank == 0 else Counter()),
    )
    read = partial(_read_row, row_format=row_format, on_bad=bad_data_policy(on_bad, skipped))
    for number, block in enumerate(_blocks(itertools.islice(rows, num_sequences), batch_size)):
        mine = block[rank::world_size]
        ids = torch.full((batch_size // world_size, row_format.seq_len + 1), NO_TOKEN)
        for row, found in zip(ids, mine, strict=False):
            read(row, found)
        indices = torch.full((len(ids),), -1)
        indices[: len(mine)] = number * batch_size + rank + world_size * torch.arange(len(mine))
        yield ValidationBatch(batch_of(ids), indices, dict(skipped))
        skipped.clear()


class _Found(NamedTuple):
    path: str
    member: Member | ShardError


def _rows_in_order(
    shards: Sequence[Shard | str], open_members: Callable[[str], Iterator[Member]], *, on_bad: BadData
) -> Iterator[_Found]:
    for shard in shards:
        path, promised = (shard, None) if isinstance(shard, str) else (str(shard.path), shard.num_sequences)
        members = MemberStream(path, open_members(path), promised=promised)
        for _ in itertools.count() if promised is None else range(promised):
            member = members.next()
            if member is None and promised is None:
                break
            yield _Found(path, members.absence() if member is None else member)
        members.finish(on_bad)


def _blocks(rows: Iterator[_Found], size: int) -> Iterator[list[_Found]]:
    # One row ahead: what is found behind the last row of a shard belongs to the batch of that row.
    ahead = next(rows, None)
    if ahead is None:
        raise ValueError("the validation shards hold no sequences; expected at least one")
    while ahead is not None:
        block = [ahead, *itertools.islice(rows, size - 1)]
        ahead = next(rows, None)
        yield block


def _read_row(row: Tensor, found: _Found, *, row_format: RowFormat, on_bad: BadData) -> None:
    try:
        if isinstance(found.member, ShardError):
            raise found.member
        row.copy_(member_row(found.path, found.member, row_format, window=lambda starts: 0))
    except ShardError as error:
        on_bad(error, 1)
