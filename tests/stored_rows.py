"""All sequences of a shard or a manifest, as they are written."""

from collections.abc import Iterator
from contextlib import closing
from os import PathLike, fspath

from moekit.lm.shards import parse_member, read_manifest, shard_members


def read_shard(
    path: str | PathLike[str], *, data_key: str | None = None, allow_commands: bool = False
) -> Iterator[list[int]]:
    """Yield the token ids of each member, from front to end."""
    with closing(shard_members(fspath(path), data_key=data_key, allow_commands=allow_commands)) as members:
        yield from (parse_member(*member) for member in members)


def stored_rows(manifest: str | PathLike[str], *, data_key: str | None = None) -> list[list[int]]:
    """Return the token ids of each member, in the order of the shards."""
    return [row for shard in read_manifest(manifest) for row in read_shard(shard.path, data_key=data_key)]
