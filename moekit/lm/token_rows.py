"""From the members of a shard to rows of token ids and batches of them, and what is done about bad ones."""

from array import array
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.lm.shard_members import DATA_KEYS, ShardError, parse_member

NO_TOKEN = -1  # OpenLM's padding, and what stands in for bad data: no input, and no target
_END_OF_DOCUMENT = -2

Member = tuple[str, bytes | None]  # name and content; see `moekit.lm.shard_members.shard_members`
BadData = Callable[[ShardError, int], None]
"""What to do about bad data: given the error, and how many sequences it concerns."""


class RowFormat(NamedTuple):
    """What a row of token ids looks like.

    Attributes:
        seq_len: inputs per row, which has one token more.
        vocab_size: V; ids are in [0, V).
    """

    seq_len: int
    vocab_size: int


class Batching(NamedTuple):
    """How shards become batches of rows, and which rows of them are this rank's: r, r + W, r + 2 W, ... of each batch.

    Attributes:
        batch_size: rows per batch over all ranks, a multiple of ``world_size``.
        row_format: of the rows.
        rank: r, number of this process.
        world_size: W, how many processes share the batches.
        on_bad: "raise", or "skip" to count bad sequences and have -1 in their places.
        data_key: extension of the members to read, "txt", "json" or "json.gz"; None takes all members.
        allow_commands: run ``pipe:COMMAND`` in a shell.
    """

    batch_size: int
    row_format: RowFormat
    rank: int = 0
    world_size: int = 1
    on_bad: str = "raise"
    data_key: str | None = None
    allow_commands: bool = False

    def check(self) -> None:
        """Check what all readers of batches are given, before anything is read.

        Raises:
            ValueError: if a size is below 1, the ranks cannot share the batch evenly, the rank is none of them, or a
                word is unknown.

        Example:
            >>> Batching(8, RowFormat(128, 256), rank=1, world_size=2, on_bad="skip").check()
        """
        for name, size in [("batch_size", self.batch_size), *self.row_format._asdict().items()]:
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank} of world_size {self.world_size}; expected 0 <= rank < world_size")
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size is {self.batch_size}, which {self.world_size} ranks cannot share evenly; "
                f"expected a multiple of {self.world_size}"
            )
        bad_data_policy(self.on_bad, Counter())
        if self.data_key is not None and self.data_key not in DATA_KEYS:
            raise ValueError(f"data_key is {self.data_key!r}; expected one of {', '.join(DATA_KEYS)}")


class Batch(NamedTuple):
    """A rank's rows of one optimizer step.

    Attributes:
        ids: (b, seq_len + 1) int64; inputs are all but the last column, targets all but the first. -1 where there is no
            token, neither as input nor as target.
        num_inputs: how many inputs are tokens.
        num_targets: how many targets are, and follow one.
        has_padding: whether there is any -1.
    """

    ids: Tensor
    num_inputs: int
    num_targets: int
    has_padding: bool


def batch_of(ids: Tensor) -> Batch:
    """Count what a batch holds.

    Args:
        ids: (b, seq_len + 1) int64.

    Example:
        >>> import torch
        >>> batch_of(torch.tensor([[3, 1, 2], [4, 5, -1]])).num_targets
        3
    """
    there = ids >= 0
    return Batch(ids, int(there[:, :-1].sum()), int(real_targets(ids).sum()), not bool(there.all()))


def real_targets(ids: Tensor) -> Tensor:
    """Return which targets are predicted: tokens that follow a token. What follows a hole has nothing to go by.

    Args:
        ids: (b, seq_len + 1) integers; -1 where there is no token.

    Returns:
        (b, seq_len) bool.

    Example:
        >>> import torch
        >>> real_targets(torch.tensor([[5, -1, 7, 8, -1]]))
        tensor([[False, False,  True, False]])
    """
    there = ids >= 0
    return there[:, :-1] & there[:, 1:]


def stop(error: ShardError, sequences: int) -> None:
    """Raise the error, with how to go on in spite of it."""
    raise ShardError(f"{error}. To leave out bad data and count it, add --on-bad-data skip", error.reason) from error


def counting(skipped: Counter[str]) -> BadData:
    """Return a policy that counts, by reason, into ``skipped``."""

    def count(error: ShardError, sequences: int) -> None:
        skipped[error.reason] += sequences

    return count


def bad_data_policy(word: str, skipped: Counter[str]) -> BadData:
    """Choose what to do about bad data.

    Args:
        word: "raise", or "skip" to go on without it.
        skipped: where "skip" counts the sequences, by reason.

    Returns:
        The policy.

    Raises:
        ValueError: if it is another word.

    Example:
        >>> skipped = Counter()
        >>> bad_data_policy("skip", skipped)(ShardError("member 7 is too short", "short sequence"), 1)
        >>> skipped
        Counter({'short sequence': 1})
    """
    if word == "raise":
        return stop
    if word == "skip":
        return counting(skipped)
    raise ValueError(f"on_bad is {word!r}; expected 'raise' or 'skip' (--on-bad-data)")


def row_of(tokens: list[int], row_format: RowFormat, *, where: str, window: Callable[[int], int]) -> list[int]:
    """Turn the ids of a member into a row.

    The id -2, OpenLM's end of document, becomes V - 2 as it does there; -1, its padding, stays.

    Args:
        tokens: ids as the member has them.
        row_format: of the row.
        where: name of the member and its shard, for messages.
        window: given how many starts there are, where in longer members to start.

    Returns:
        ``seq_len + 1`` ids, each in [0, V) or -1.

    Raises:
        ShardError: "short sequence" or "id outside vocabulary".

    Example:
        >>> row_of([5, 7, -2, -1], RowFormat(seq_len=3, vocab_size=10), where="member 0", window=lambda starts: 0)
        [5, 7, 8, -1]
    """
    length, vocab_size = row_format.seq_len + 1, row_format.vocab_size
    if len(tokens) < length:
        raise ShardError(
            f"{where} has {len(tokens)} tokens; expected at least {length}, one more than the sequence length. "
            "Set the model's sequence length to fit the data, or tokenize it again",
            "short sequence",
        )
    if len(tokens) > length:
        start = window(len(tokens) - row_format.seq_len)
        tokens = tokens[start : start + length]
    if min(tokens) < 0:
        tokens = [vocab_size + token if token == _END_OF_DOCUMENT else token for token in tokens]
    if min(tokens) < NO_TOKEN or max(tokens) >= vocab_size:
        column = next(i for i, token in enumerate(tokens) if not NO_TOKEN <= token < vocab_size)
        raise ShardError(
            f"{where} has the id {tokens[column]} at position {column}; expected ids in [0, {vocab_size}), or -1 for "
            "padding. Give the vocabulary size of the tokenizer that made the shards",
            "id outside vocabulary",
        )
    return tokens


def member_row(path: str, member: Member, row_format: RowFormat, *, window: Callable[[int], int]) -> Tensor:
    """Parse a member of a shard into a row.

    Args:
        path: of the shard, for messages.
        member: name and content.
        row_format: of the row.
        window: see `row_of`.

    Returns:
        (seq_len + 1,) int64.

    Raises:
        ShardError: if it cannot be; it names shard and member.
    """
    name, content = member
    try:
        tokens = parse_member(name, content)
    except ShardError as error:
        raise ShardError(f"shard {path}: {error}", error.reason) from error
    row = row_of(tokens, row_format, where=f"member {name} of shard {path}", window=window)
    return torch.frombuffer(array("q", row), dtype=torch.int64)
