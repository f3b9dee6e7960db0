"""Streaming the members of one tar shard, and parsing each into token ids. Nothing that is lost goes unnoticed.

``tarfile`` ends quietly where a header is damaged or the file stops between two members. Here both are errors, as is
anything but zeros after the end of the archive.

References:
    POSIX pax and ustar formats: an archive ends with two blocks of 512 zeros.
    open_lm, https://github.com/mlfoundations/open_lm, ``open_lm/data.py`` (kinds of members).
"""

import array
import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Generator
from contextlib import closing
from typing import Literal, get_args

from moekit.lm.urls import ByteStream, is_remote, open_url, resolve_url

Reason = Literal[
    "broken shard",
    "bad member",
    "short sequence",
    "id outside vocabulary",
    "missing sequences",
    "surplus sequences",
]
DATA_KEYS = ("txt", "json", "json.gz")
MAX_MEMBER_BYTES = 64 * 2**20  # as stored, and decompressed; a sequence of 2049 tokens takes about 12 KiB
_MAX_HEADER_BYTES = 2**20  # of one member; tarfile keeps all extended headers in a row, and some copy those before
_BLOCK = 512
_AT_ONCE = 2**20  # bytes to pass over


class ShardError(ValueError):
    """A shard that cannot be used as its manifest promises.

    Attributes:
        reason: what kind of failure it is, for counting.
    """

    def __init__(self, message: str, reason: Reason = "broken shard") -> None:
        # The reason has a default because torch's DataLoader raises a worker's error again from its message alone.
        super().__init__(message)
        self.reason: Reason = reason
        assert reason in get_args(Reason)


def shard_members(
    path: str, *, data_key: str | None = None, allow_commands: bool = False
) -> Generator[tuple[str, bytes | None]]:
    """Stream the members of a shard in file order, holding one at a time.

    Args:
        path: a local path, URL or ``pipe:`` command, as in `moekit.lm.urls.open_url`.
        data_key: extension of the members that hold tokens, "txt", "json" or "json.gz"; others are passed over as
            companions. None takes all members.
        allow_commands: run ``pipe:COMMAND`` in a shell.

    Yields:
        Name and content of each member; None stands for the content of a link, or of anything else that is no regular
        file. What is open is closed with the generator.

    Raises:
        ShardError: "broken shard" if it is missing, unreadable, no tar, damaged, cut short, even between two members,
            or claims a member larger than 64 MiB, or headers of one larger than 1 MiB; "bad member" if there are
            members and none has the extension ``data_key``.
        ValueError: if ``data_key`` is none of the three, or ``path`` is a command that is not allowed.
        ModuleNotFoundError: as `moekit.lm.urls.open_url`.
    """
    if data_key is not None and data_key not in DATA_KEYS:
        raise ValueError(f"data_key is {data_key!r}; expected one of {', '.join(DATA_KEYS)}")
    found, others = False, set[str]()
    with closing(_all_members(path, allow_commands=allow_commands)) as members:
        for name, content in members:
            if data_key is None or name.endswith(f".{data_key}"):
                found = True
                yield name, content
            else:
                others.add(name.rpartition("/")[2].partition(".")[2])
    if others and not found:
        raise ShardError(
            f"no member of shard {path} ends in .{data_key}; found {', '.join(sorted(others))}. Set --data-key, or "
            "--val-data-key if the shard is of --val-data",
            "bad member",
        )


def parse_member(name: str, content: bytes | None) -> list[int]:
    """Parse the content of a member into token ids.

    ``.json`` and ``.json.gz`` hold a JSON list of ints. ``.txt`` holds a list of ints as Python prints it, in which
    the string ``<|endoftext|>``, which OpenLM's old scripts leave in, is id 0.

    Args:
        name: of the member; its extension says how to read the content.
        content: as stored, at most 64 MiB when decompressed; None if the member is no regular file.

    Returns:
        The ids as they are written, in [-2^63, 2^63).

    Raises:
        ShardError: "bad member" if it is anything else.

    Example:
        >>> parse_member("00000000.json", b"[1, 2, 3]"), parse_member("0.txt", b"[1, '<|endoftext|>']")
        ([1, 2, 3], [1, 0])
    """
    try:
        text = _json_text(name, content).decode("utf-8")
        tokens = json.loads(text)
        # Quicker than a look at the type of each: the array refuses what is over 64 bits and what is neither int nor
        # bool, and of lists of those only true and false have an e.
        if not isinstance(tokens, list) or (array.array("q", tokens) and "e" in text):
            raise ValueError("it is no list of ints")
    except (ValueError, TypeError, RecursionError, OverflowError, OSError, EOFError, zlib.error) as error:
        raise ShardError(f"member {name!r} cannot be read: {error}. Write the shard again", "bad member") from error
    return tokens


def _json_text(name: str, content: bytes | None) -> bytes:
    if content is None:
        raise ValueError("it is no regular file")
    if name.endswith(".json"):
        return content
    if name.endswith(".json.gz"):
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            text = file.read(MAX_MEMBER_BYTES + 1)
        if len(text) > MAX_MEMBER_BYTES:
            raise ValueError(f"it decompresses to more than {MAX_MEMBER_BYTES // 2**20} MiB")
        return text
    if name.endswith(".txt"):
        # A list of ints is printed alike by Python and JSON, and JSON is parsed 20 times as fast as a literal.
        return content.replace(b"'<|endoftext|>'", b"0").replace(b'"<|endoftext|>"', b"0")
    raise ValueError("its name ends in none of .json, .json.gz, .txt")


def _all_members(path: str, *, allow_commands: bool) -> Generator[tuple[str, bytes | None]]:
    url = resolve_url(path, allow_commands=allow_commands)
    try:
        with open_url(url, allow_commands=allow_commands) as stream:
            blocks = _Blocks(stream)
            with tarfile.TarFile(fileobj=blocks) as tar:  # type: ignore[arg-type]  # it calls no other method
                # Asked again, it would read on behind a first header that is damaged.
                nothing = tar.firstmember is None  # type: ignore[attr-defined]
                while not nothing and (member := tar.next()) is not None:
                    _check_size(member)
                    blocks.left = MAX_MEMBER_BYTES
                    if not member.isdir():
                        yield member.name, _content(tar, member)
                    blocks.left = _MAX_HEADER_BYTES
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all headers otherwise
            _check_end(blocks)
    except OSError as error:
        # A store that does not answer says nothing about the data: leaving them out would change the run.
        if is_remote(url) and not isinstance(error, FileNotFoundError):
            raise
        raise _broken(path, error) from error
    # Beyond TarError: what tarfile lets through from damaged extended headers, and from many of them in a row.
    except (tarfile.TarError, EOFError, ValueError, LookupError, OverflowError, RecursionError) as error:
        raise _broken(path, error) from error


def _broken(path: str, error: Exception) -> ShardError:
    return ShardError(f"shard {path} cannot be read as a whole tar: {error}. Write or copy it again")


class _Blocks:
    """A stream as ``tarfile`` reads it, forwards.

    Attributes:
        last: what was read last, for tarfile ends without a reason.
        left: bytes that may be read until it is set anew.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream, self._place, self.last, self.left = stream, 0, b"", _MAX_HEADER_BYTES

    def tell(self) -> int:
        return self._place

    def seek(self, place: int) -> None:
        if place < self._place:
            raise tarfile.ReadError("a header points back")
        while self._place < place and self.take(min(place - self._place, _AT_ONCE)):
            pass

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:  # of an extended header, which is read at once: content has been looked at
            raise tarfile.ReadError(
                f"a header claims {size} bytes; expected at most {_MAX_HEADER_BYTES // 2**20} MiB of all headers of a "
                "member"
            )
        self.left -= size
        return self.take(size)

    def take(self, size: int) -> bytes:
        """Read so many bytes, though no header claims them."""
        self.last = self._stream.read(size)
        self._place += len(self.last)
        return self.last


def _check_size(header: tarfile.TarInfo) -> None:
    if not 0 <= header.size <= MAX_MEMBER_BYTES:
        raise tarfile.ReadError(
            f"member {header.name!r} claims {header.size} bytes; expected at most {MAX_MEMBER_BYTES // 2**20} MiB"
        )


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    if not member.isreg() or member.issparse():
        return None
    file = tar.extractfile(member)
    assert file is not None
    content = file.read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"member {member.name!r} has {len(content)} of {member.size} bytes")
    return content


def _check_end(blocks: _Blocks) -> None:
    """Refuse an end of the archive that is no block of zeros, and data behind it."""
    if len(blocks.last) < _BLOCK:
        raise tarfile.ReadError("it ends without the end-of-archive mark")
    if any(blocks.last):
        raise tarfile.ReadError("a header is damaged")
    while rest := blocks.take(_AT_ONCE):
        if any(rest):
            raise tarfile.ReadError("there are data after the end-of-archive mark")
