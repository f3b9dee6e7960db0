"""From addresses to rows of token ids: each lane streams one shard at a time, in blocks that are shuffled.

A reader is given the addresses of a lane as the order has them, or some of them, and keeps the raw bytes of at most one
block of members. Bad data is never passed over silently.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from moekit.lm.permutations import BLOCK, Address, block_permutation, drawn
from moekit.lm.shard_members import shard_members
from moekit.lm.shards import Shard, ShardError
from moekit.lm.token_rows import NO_TOKEN, BadData, Batching, Member, bad_data_policy, member_row


class MemberStream:
    """The members of a shard from front to end, and what is wrong with their number.

    Args:
        path: of the shard.
        members: from `moekit.lm.shard_members.shard_members`.
        promised: how many there are by the manifest; None is unknown.

    Attributes:
        num_read: how many came so far.
    """

    def __init__(self, path: str, members: Iterator[Member], *, promised: int | None) -> None:
        self.path, self.promised, self._members = path, promised, members
        self.num_read = 0
        self._end: ShardError | None = None

    def next(self) -> Member | None:
        """Return the next member; None at the end, or where the shard is broken."""
        if self._end is not None:
            return None
        try:
            member = next(self._members, None)
        except ShardError as error:
            self._end = ShardError(str(error), "broken shard")
            return None
        if member is None:
            self._end = ShardError(
                f"shard {self.path} holds {self.num_read} sequences; its manifest says {self.promised}. "
                "The shard or the manifest is damaged or out of date: write it again",
                "missing sequences",
            )
        else:
            self.num_read += 1
        return member

    def absence(self) -> ShardError:
        """Return why a member is not there, after `next` returned None."""
        assert self._end is not None
        return ShardError(str(self._end), self._end.reason)  # a new one: each raise lengthens an error's traceback

    def finish(self, on_bad: BadData) -> None:
        """Read on to the end, and report what no promised member stands for: surplus ones, and a break behind all."""
        while self.next() is not None:
            pass
        end = self.absence()
        surplus = 0 if self.promised is None else self.num_read - self.promised
        if surplus > 0:
            message = (
                f"shard {self.path} holds {self.num_read} sequences; its manifest says {self.promised}. "
                "The shard or the manifest is out of date: write it again"
            )
            on_bad(ShardError(message, "surplus sequences"), surplus)
        elif surplus == 0 and end.reason == "broken shard":
            on_bad(end, 1)


def unread_data(shards: Sequence[Shard], batching: Batching) -> dict[str, int]:
    """Look into the shards that are empty by their manifest, which no order visits, for sequences that would be lost.

    Args:
        shards: of any sources; those with sequences are not opened.
        batching: says how shards are opened, and what to do about bad data.

    Returns:
        Reason to number of sequences.

    Raises:
        ShardError: if there are any and they are not to be skipped.

    Example:
        >>> import tempfile
        >>> from moekit.lm.shards import read_manifest, write_shards
        >>> from moekit.lm.token_rows import RowFormat
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [shard] = read_manifest(write_shards(folder, [[1, 2], [3, 4]]))
        ...     unread_data([shard._replace(num_sequences=0)], Batching(1, RowFormat(1, 5), on_bad="skip"))
        {'surplus sequences': 2}
    """
    skipped = Counter[str]()
    on_bad = bad_data_policy(batching.on_bad, skipped)
    for shard in shards:
        if not shard.num_sequences:
            members = shard_members(shard.path, data_key=batching.data_key, allow_commands=batching.allow_commands)
            MemberStream(shard.path, members, promised=0).finish(on_bad)
    return dict(skipped)


class RowReader:
    """Reads rows by address, with one open shard for each lane.

    Args:
        sources: the shards of each source.
        batching: its format of rows, and how shards are opened.
        seed: of the run; it decides the order within a shard and where in longer members a row starts.
        on_bad: what to do about bad data; where it returns, the row is all -1.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Shard]],
        batching: Batching,
        *,
        seed: int,
        on_bad: BadData,
    ) -> None:
        self._sources, self._format, self._seed, self._on_bad = sources, batching.row_format, seed, on_bad
        self._open_members = partial(shard_members, data_key=batching.data_key, allow_commands=batching.allow_commands)
        self._open: dict[tuple[int, int], _OpenShard] = {}

    def read(self, addresses: Sequence[Address], slots: Sequence[int]) -> Tensor:
        """Read some of the next addresses of the order.

        Args:
            addresses: all of them, also those that others read: where they end a shard, it is closed here too.
            slots: the places in ``addresses`` to read, n of them, ascending.

        Returns:
            (n, seq_len + 1) int64; -1 where there is no token.

        Raises:
            ShardError: if the policy raises it; it names shard and member.
        """
        rows = torch.full((len(slots), self._format.seq_len + 1), NO_TOKEN)
        places = dict(zip(slots, rows, strict=True))
        for slot, address in enumerate(addresses):
            if slot in places:
                self._read_into(places[slot], address)
            elif self._is_last(address):
                self._open.pop((address.source, address.lane), None)
        return rows

    def close(self) -> None:
        """Close every shard."""
        self._open.clear()

    def _read_into(self, row: Tensor, address: Address) -> None:
        shard = self._at(address)
        try:
            member = shard.member(address.position)
            row.copy_(member_row(shard.path, member, self._format, window=partial(self._window, address)))
        except ShardError as error:
            self._on_bad(error, 1)
        if self._is_last(address):
            del self._open[address.source, address.lane]
            shard.finish(self._on_bad)

    def _window(self, address: Address, starts: int) -> int:
        key = f"{address.source}/{address.data_pass}/{address.shard}/{address.position}"
        return drawn(f"window/{self._seed}/{key}") % starts

    def _at(self, address: Address) -> "_OpenShard":
        lane = (address.source, address.lane)
        shard = self._open.get(lane)
        if shard is None or not shard.holds(address):
            self._open.pop(lane, None)
            path, promised, _ = self._sources[address.source][address.shard]
            members = MemberStream(str(path), self._open_members(str(path)), promised=promised)
            shard = self._open[lane] = _OpenShard(members, address, promised, seed=self._seed)
        return shard

    def _is_last(self, address: Address) -> bool:
        return address.position + 1 == self._sources[address.source][address.shard].num_sequences


class _OpenShard:
    """A shard that is being read in shuffled blocks, of which the raw members of one are kept."""

    def __init__(self, members: MemberStream, address: Address, promised: int, *, seed: int) -> None:
        self.path, self.finish = members.path, members.finish
        self._members, self._address, self._promised, self._seed = members, address, promised, seed
        self._block, self._contents, self._order = -1, list[Member | None](), list[int]()

    def holds(self, address: Address) -> bool:
        mine = self._address
        return (mine.data_pass, mine.shard) == (address.data_pass, address.shard)

    def member(self, position: int) -> Member:
        block, offset = divmod(position, BLOCK)
        if block != self._block:
            self._load(block)
        index = self._order[offset]
        member, self._contents[index] = self._contents[index], None  # each is asked for once
        if member is None:
            raise self._members.absence()
        return member

    def _load(self, block: int) -> None:
        self._contents = []
        while self._members.num_read < block * BLOCK and self._members.next() is not None:
            pass
        size = min(BLOCK, self._promised - block * BLOCK)
        self._contents = [self._members.next() for _ in range(size)]
        self._order = block_permutation(block, size, seed=self._seed, address=self._address)
        self._block = block
