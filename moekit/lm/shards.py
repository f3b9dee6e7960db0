"""Reading token sequences from disk, in OpenLM's format: tar shards beside a manifest.

A shard is a tar with one member per sequence of ``seq_len + 1`` tokens, ``00000042.json``, a JSON list of ints. The
manifest has one JSON line per shard, ``{"shard": "00000000", "num_sequences": 2048}``. Read as well: ``.json.gz``
members, ``.txt`` members (a Python list literal), and the older key ``num_chunks``. Both may lie on S3.

`moekit.lm.shard_writing` writes them, `moekit.lm.shard_members` reads one shard, `moekit.lm.urls` opens files.

References:
    open_lm, https://github.com/mlfoundations/open_lm, ``open_lm/file_utils.py`` and ``open_lm/datapreprocess``.
"""

import json
import os
import posixpath
from typing import NamedTuple

from moekit.lm.shard_members import DATA_KEYS, Reason, ShardError, parse_member, shard_members
from moekit.lm.shard_writing import MANIFEST, pack, shard_bytes, write_shards
from moekit.lm.urls import is_remote, join_url, parent_url, read_text_url, resolve_url

__all__ = [
    "DATA_KEYS",
    "MANIFEST",
    "Reason",
    "Shard",
    "ShardError",
    "pack",
    "parse_member",
    "read_manifest",
    "shard_bytes",
    "shard_members",
    "write_shards",
]

_HOW_TO_MAKE_ONE = (
    "Make one from texts with python -m moekit.lm.tokenize, or prepare the embedded corpora with "
    "moekit.lm.preparation.prepare"
)


class Shard(NamedTuple):
    """One line of a manifest.

    Attributes:
        path: the tar file, a local path or a URL.
        num_sequences: how many sequences it holds, by the manifest.
        name: of the file, relative to the manifest's folder; "" is the last part of ``path``.
    """

    path: str
    num_sequences: int
    name: str = ""

    @property
    def full_name(self) -> str:
        """What tells the shard from others of its manifest wherever both lie."""
        return self.name or self.file_name

    @property
    def file_name(self) -> str:
        """The last part of the path, which shards in several folders may share."""
        return str(self.path).rpartition("/")[2]


def read_manifest(path: str | os.PathLike[str], *, allow_commands: bool = False) -> list[Shard]:
    """Read a manifest, and check that its shards are there if it is a local file.

    Args:
        path: the manifest, a local path, a URL or ``pipe:aws s3 cp URL -``; JSON lines, with or without a final
            newline. Shards lie beside it. Those behind a URL are not looked up: reading one that is missing fails.
        allow_commands: as in `moekit.lm.urls.resolve_url`. Yet no other command can be a manifest, since shards lie
            beside it and a command has no folder.

    Returns:
        The shards in file order.

    Raises:
        FileNotFoundError: if the manifest or a shard is not there.
        IsADirectoryError: if ``path`` is a folder.
        OSError: if the manifest cannot be read.
        ValueError: if a line is no JSON object with ``shard``, a name, and ``num_sequences`` (or ``num_chunks``), a
            shard is named twice, there is no line, or ``path`` is another command.
    """
    url = resolve_url(os.fspath(path), allow_commands=allow_commands)
    folder = parent_url(url)
    if not is_remote(url) and os.path.isdir(url):
        raise IsADirectoryError(f"{url} is a folder; expected a manifest file, such as {os.path.join(url, MANIFEST)}")
    if not is_remote(url) and os.path.exists(url) and not os.path.isfile(url):  # a device has no end, a pipe may wait
        raise OSError(f"{url} is a device or a pipe; expected a manifest file. {_HOW_TO_MAKE_ONE}")
    try:
        lines = read_text_url(url).split("\n")  # not splitlines, which cuts at separators that JSON strings may hold
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no manifest at {url}. {_HOW_TO_MAKE_ONE}") from error
    shards = [_manifest_line(url, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not shards:
        raise ValueError(f"manifest {url} is empty; expected one JSON line per shard. {_HOW_TO_MAKE_ONE}")
    _check_names(url, [shard.name for shard in shards])
    return [shard._replace(path=join_url(folder, shard.path)) for shard in shards]


def _manifest_line(manifest: str, number: int, line: str) -> Shard:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} of manifest {manifest} is no JSON ({error}): {line[:80]!r}") from error
    count = entry.get("num_sequences", entry.get("num_chunks")) if isinstance(entry, dict) else None
    name = entry.get("shard") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name or type(count) is not int or not 0 <= count < 2**63:
        raise ValueError(
            f"line {number} of manifest {manifest} is {line[:80]!r}; expected an object like "
            '{"shard": "00000000", "num_sequences": 2048}'
        )
    if os.path.isabs(name) or is_remote(name) or ".." in name.split("/") or "\0" in name:
        raise ValueError(
            f"line {number} of manifest {manifest} names the shard {name!r}; expected the name of a file beside the "
            "manifest, neither absolute nor with '..'. Move the manifest to its shards"
        )
    name = posixpath.normpath(name)
    name = name if name.endswith(".tar") else f"{name}.tar"
    return Shard(name, count, name)


def _check_names(manifest: str, names: list[str]) -> None:
    seen = set[str]()
    for name in names:
        if name in seen:
            raise ValueError(f"manifest {manifest} names the shard {name} twice; no data may repeat. Remove one line")
        seen.add(name)
    if is_remote(manifest):
        return
    for name in names:
        if not os.path.isfile(join_url(parent_url(manifest), name)):
            raise FileNotFoundError(
                f"manifest {manifest} names the shard {name}, which is not beside it. "
                "Copy the shard there, or remove its line"
            )
