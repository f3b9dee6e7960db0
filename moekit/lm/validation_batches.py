"""Validation data: every sequence once, in order, shared out over ranks, one batch at a time."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.lm.batch_streams import Batch, batch_of
from moekit.lm.shard_members import shard_members
from moekit.lm.shard_readers import MemberStream
from moekit.lm.shards import Shard, ShardError
from moekit.lm.token_rows import NO_TOKEN, BadData, Member, RowFormat, bad_data_policy, check_arguments, member_row


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
    *,
    batch_size: int,
    seq_len: int,
    vocab_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_sequences: int | None = None,
    on_bad: str = "raise",
    data_key: str | None = None,
    allow_commands: bool = False,
) -> Iterator[ValidationBatch]:
    """Read all sequences of some shards in order, each once, holding one batch at a time.

    Rank r has the sequences r, r + W, r + 2 W, ... All ranks get equally many batches: what the last lacks is -1. Every
    rank streams all shards, and parses what is its own. Of sequences longer than ``seq_len + 1``, the front is taken.

    Args:
        shards: lines of a manifest, or bare paths and URLs of tars whose number of sequences is not known.
        batch_size: sequences per batch over all ranks, a multiple of ``world_size``.
        seq_len: inputs per sequence.
        vocab_size: V, to check every id against.
        rank: r, number of this process.
        world_size: W, how many processes share the sequences.
        num_sequences: how many to read at most; None reads all.
        on_bad: "raise", or "skip" to count bad sequences and have -1 in their places.
        data_key: extension of the members to read; None takes all members.
        allow_commands: run ``pipe:COMMAND`` in a shell.

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
        ...     for batch, indices, _ in read_validation(shards, batch_size=2, seq_len=1, vocab_size=3):
        ...         print(batch.ids.tolist(), indices.tolist())
        [[0, 0], [1, 1]] [0, 1]
        [[2, 2], [-1, -1]] [2, -1]
    """
    row_format = RowFormat(seq_len, vocab_size)
    check_arguments(
        row_format, batch_size=batch_size, rank=rank, world_size=world_size, on_bad=on_bad, data_key=data_key
    )
    if num_sequences is not None and num_sequences < 1:
        raise ValueError(f"num_sequences is {num_sequences}; expected at least 1, or None for all")
    return _validation_batches(
        shards,
        partial(shard_members, data_key=data_key, allow_commands=allow_commands),
        batch_size=batch_size,
        row_format=row_format,
        rank=rank,
        world_size=world_size,
        num_sequences=num_sequences,
        on_bad=on_bad,
    )


def _validation_batches(
    shards: Sequence[Shard | str],
    open_members: Callable[[str], Iterator[Member]],
    *,
    batch_size: int,
    row_format: RowFormat,
    rank: int,
    world_size: int,
    num_sequences: int | None,
    on_bad: str,
) -> Iterator[ValidationBatch]:
    skipped = Counter[str]()
    rows = _rows_in_order(
        shards,
        open_members,
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
