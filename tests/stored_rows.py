"""All sequences of a manifest, as they are written."""

from os import PathLike

from moekit.lm.shards import read_manifest, read_shard


def stored_rows(manifest: str | PathLike[str], *, data_key: str | None = None) -> list[list[int]]:
    """Return the token ids of each member, in the order of the shards."""
    return [row for shard in read_manifest(manifest) for row in read_shard(shard.path, data_key=data_key)]
