"""Malformed data for the training program: manifests, tars and their members.

A maker damages a copy of good data, or writes a bad file, in a folder of its own, and returns the flags that lead the
program to it.
"""

import gzip
import io
import itertools
import json
import random
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

Maker = Callable[[random.Random, Path], "Trial"]
Damage = Callable[[random.Random, bytes], bytes]
MANIFEST = "manifest.jsonl"
SHARDS = ("00000000.tar", "00000001.tar", "00000002.tar")  # of four sequences each


class Trial(NamedTuple):
    """A malformed input.

    Attributes:
        flags: that name it.
        names: of which a message about it has at least one.
        oracle: who says whether it is bad: "train", "val-manifest" or "val-data" (the data, read independently),
            "checkpoint" (its checksums), "refused" (it always is), or "either" (it may be harmless).
    """

    flags: Sequence[str]
    names: Sequence[str]
    oracle: str = "refused"


def flipped(rng: random.Random, content: bytes) -> bytes:
    """Change one to eight bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, content: bytes) -> bytes:
    """Keep the front."""
    return content[: rng.randrange(len(content))]


def garbage(rng: random.Random, content: bytes) -> bytes:
    """Replace everything by random bytes."""
    return rng.randbytes(rng.choice([1, 511, 4096]))


def nothing(rng: random.Random, content: bytes) -> bytes:
    """Replace everything by nothing, or by white space."""
    return rng.choice([b"", b"", b"\n", b" \n\t\n"])


def in_place(path: Path, kind: str) -> None:
    """Put a folder, or a link to itself, in the place of a file."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name)


# Manifests.

_COUNTS = {
    "wrong type": ['"4"', '"four"', "null", "[4]", '{"n": 4}', "true", "false"],
    "not whole": ["4.0", "4.5", "4e0", "1e400", "NaN", "Infinity", "-Infinity"],
    "out of range": ["-1", "-4", "0", "1" + "0" * 30, "1" + "0" * 400, "1" * 5000, str(2**63), str(2**63 - 1)],
    "not the shard's": ["3", "5", "1", "12"],
}
_NAMES = [
    ["../data/00000001", "..", "a/../../b", "..\\\\00000001", "./00000001", ".//00000001.tar"],
    ["/etc/passwd", "s3://bucket/a", "file:///a", "", " ", "00000009", "00000001.tgz", "0" * 5000],
    ["a\\u0000b", "\\ud800", "00000001\\n", "\\u202e00000001"],
]


def _count(kind: str) -> Damage:
    return lambda rng, content: content.replace(b": 4}", f": {rng.choice(_COUNTS[kind])}}}".encode(), 1)


def _name(group: int) -> Damage:
    return lambda rng, content: content.replace(b'"00000001"', f'"{rng.choice(_NAMES[group])}"'.encode())


def _line(rng: random.Random, content: bytes) -> bytes:
    deep = "[" * 100_000
    objects = ["[]", "4", "null", '"00000001"', "{", "{}", '{"shard": "00000001"}', '{"num_sequences": 4}', deep]
    return (
        content.splitlines()[0] + b"\n" + rng.choice([*objects, '{"shards": "00000001", "num_sequences": 4}']).encode()
    )


def _twice(rng: random.Random, content: bytes) -> bytes:
    line = rng.choice(content.splitlines())
    return content + rng.choice([line, line.replace(b'", "num', b'.tar", "num'), b'{"shard": "00000000", ' + line[1:]])


def _encoded(rng: random.Random, content: bytes) -> bytes:
    text = content.decode()
    return rng.choice(
        [text.encode("utf-16"), text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode(), text.encode("utf-32")]
    )


MANIFESTS: tuple[Damage | str, ...] = (
    *(flipped, cut, garbage, nothing, "folder", "loop", _line, _twice, _encoded),
    *(_count(kind) for kind in _COUNTS),
    *(_name(group) for group in range(len(_NAMES))),
)


def manifest(damage: Damage | str) -> Maker:
    """Damage the manifest of the training data."""

    def make(rng: random.Random, root: Path) -> Trial:
        path = root / "data" / MANIFEST
        _damage(path, damage, rng)
        return Trial(["--dataset-manifest", str(path)], [MANIFEST, *SHARDS], "train")

    return make


# Tars.


def _cut_at_block(rng: random.Random, content: bytes) -> bytes:
    return content[: 512 * rng.randrange(len(content) // 512)]


def _members(content: bytes) -> list[bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        starts = [member.offset for member in tar.getmembers()] + [tar.offset]
    return [content[start:end] for start, end in itertools.pairwise(starts)]


def _moved(rng: random.Random, content: bytes) -> bytes:
    members = _members(content)
    change = rng.choice(["swap", "drop", "twice", "gap"])
    at = rng.randrange(len(members) - 1)
    if change == "swap":
        members[at], members[at + 1] = members[at + 1], members[at]
    elif change == "drop":
        del members[at]
    else:
        members.insert(at, members[at] if change == "twice" else bytes(rng.choice([512, 1024])))
    return b"".join(members) + bytes(1024)


def _header(**fields: bytes) -> Damage:
    """Change a header, with a checksum that fits."""
    places = {"name": (0, 100), "size": (124, 136), "kind": (156, 157), "link": (157, 257)}

    def change(rng: random.Random, content: bytes) -> bytes:
        members = _members(content)
        at = rng.randrange(len(members))
        header = bytearray(members[at])
        for field, value in fields.items():
            start, end = places[field]
            header[start:end] = value.ljust(end - start, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header[:512])
        return b"".join([*members[:at], bytes(header), *members[at + 1 :]]) + bytes(1024)

    return change


def _size(rng: random.Random, content: bytes) -> bytes:
    sizes = [b"77777777777\0", b"00000000000\0", b"00000000777\0", b"-0000000001\0", b"x" * 12, b"\0" * 12]
    wide = [b"\x80" + size.to_bytes(11) for size in (2**40, 2**80, 10)] + [b"\xff" * 12, b"\xff" * 4 + bytes(8)]
    return _header(size=rng.choice(sizes + wide))(rng, content)


def _renamed(rng: random.Random, content: bytes) -> bytes:
    names = [
        b"a.bin",
        b"a",
        b"a.txt",
        b"a.json.gz",
        b"../a.json",
        b"/a.json",
        b"",
        b"a.JSON",
        b"\xff\xfe.json",
        b"a.json/",
    ]
    return _header(name=rng.choice(names))(rng, content)


def _kind(rng: random.Random, content: bytes) -> bytes:
    return _header(kind=rng.choice([b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"L", b"K", b"x", b"g", b"Z"]))(
        rng, content
    )


def _other_format(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("a.json", "[1, 2]")
        return buffer.getvalue()
    return rng.choice([gzip.compress(content), gzip.compress(content)[:99], b"[1, 2, 3]\n", bytes(10240), bytes(512)])


def _tail(rng: random.Random, content: bytes) -> bytes:
    end = sum(map(len, _members(content)))
    return content[:end] + rng.choice(
        [b"", bytes(100), bytes(512), bytes(1024) + b"x", bytes(512) + content, b"\1" * 512]
    )


TARS: tuple[Damage | str, ...] = (
    *(flipped, cut, _cut_at_block, _size, _renamed, _kind, _other_format, _tail, _moved),
    *(flipped, cut, _cut_at_block, garbage, nothing, "folder", "loop", "renamed"),
)


def tar(damage: Damage | str) -> Maker:
    """Damage a shard of the training or of the validation data."""

    def make(rng: random.Random, root: Path) -> Trial:
        role = rng.choice(["train", "train", "val-manifest", "val-data"])
        folder = root / ("data" if role == "train" else "val")
        shard = rng.choice(SHARDS)
        _damage(folder / shard, damage, rng)
        return Trial(_flags(role, folder), [shard], role)

    return make


def _flags(role: str, folder: Path) -> list[str]:
    if role == "val-data":
        return ["--val-data", f"{folder}/{{00000000..00000002}}.tar"]
    return ["--dataset-manifest" if role == "train" else "--val-manifest", str(folder / MANIFEST)]


def _damage(path: Path, damage: Damage | str, rng: random.Random) -> None:
    if damage == "renamed":
        path.rename(path.with_suffix(rng.choice([".tgz", ".TAR", "", ".tar.gz"])))
    elif isinstance(damage, str):
        in_place(path, damage)
    else:
        path.write_bytes(damage(rng, path.read_bytes()))


# Members.


def _one_id(*values: str) -> Damage:
    def change(rng: random.Random, content: bytes) -> bytes:
        ids = json.loads(content)
        at = rng.randrange(len(ids))
        words = [*map(str, ids[:at]), rng.choice(values), *map(str, ids[at + 1 :])]
        return f"[{', '.join(words)}]".encode()

    return change


def _length(rng: random.Random, content: bytes) -> bytes:
    ids = json.loads(content)
    return json.dumps(rng.choice([ids[:-1], ids[:1], [], ids + ids, [*ids, 3], ids * 50])).encode()


def _whole(*contents: str) -> Damage:
    return lambda rng, content: rng.choice(contents).encode()


def _written(rng: random.Random, content: bytes) -> bytes:
    text = content.decode()
    ways = [text[:-1], text[1:], text + "]", text + text, text.replace(",", ";"), text.replace(", ", ""), f"{text},"]
    return rng.choice(
        [*(way.encode() for way in ways), text.encode("utf-16"), text.encode("utf-8-sig"), content + b"\xff"]
    )


MEMBERS: tuple[Damage, ...] = (
    *(flipped, cut, nothing, garbage, _length, _written, _length, flipped, _written),
    _one_id("1.0", "1e2", "0.5", "-0.0", "NaN", "Infinity", "1e999"),
    _one_id('"3"', '"<|endoftext|>"', "null", "true", "false", "[3]", "{}", "[[[]]]"),
    _one_id("-3", "512", "513", "50432", str(2**31), str(2**63), str(-(2**63) - 1), "9" * 100, "9" * 5000),
    _one_id("-1", "-2", "511", "0", "00", "+1", "0x1", "1_0", ""),
    _whole("null", "{}", "3", '"[1, 2]"', "[[1, 2]]", '{"0": 1, "0": 2}', '{"a": 1, "a": [1]}', "NaN"),
    _whole("[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000, "[" + "1," * 9, "[]"),
)


def member(damage: Damage) -> Maker:
    """Damage the content of a member, in a tar that is whole."""

    def make(rng: random.Random, root: Path) -> Trial:
        role = rng.choice(["train", "train", "val-manifest", "val-data"])
        folder = root / ("data" if role == "train" else "val")
        path = folder / rng.choice(SHARDS)
        with tarfile.open(path) as old:
            contents = {entry.name: old.extractfile(entry).read() for entry in old.getmembers()}  # type: ignore[union-attr]
        name = rng.choice(list(contents))
        contents[name] = damage(rng, contents[name])
        with tarfile.open(path, "w") as new:
            for each, content in contents.items():
                entry = tarfile.TarInfo(each)
                entry.size = len(content)
                new.addfile(entry, io.BytesIO(content))
        return Trial(_flags(role, folder), [name], role)

    return make
