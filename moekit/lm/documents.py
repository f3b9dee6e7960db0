"""Documents in text and JSON-lines files, read in pieces of whole documents whose borders depend on the files alone.

A text file is one document. In JSON lines (``.jsonl``, ``.ndjson``, ``.json``) every line is an object with the text
under a key. Either may be compressed (``.gz``). Suffixes may be in capitals. A link's own suffixes count, unless
those of the file that it leads to say more of this.
"""

import glob
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

JSON_LINES = (".jsonl", ".ndjson", ".json")
OTHER_FORMATS = (".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".parquet", ".arrow")


class Block(NamedTuple):
    """Consecutive lines of a JSON-lines file, or a whole text file.

    Attributes:
        path: the file.
        first_line: the number of the first line, from 1; 0 for a text file.
        lines: their bytes, with line ends; of a text file one entry, the whole.
    """

    path: str
    first_line: int
    lines: Sequence[bytes]


class Piece(NamedTuple):
    """Documents to be tokenized together.

    Attributes:
        number: of the piece, from 0.
        blocks: where its documents are.
        position: bytes on disk, over all files, up to its end.
    """

    number: int
    blocks: Sequence[Block]
    position: int


class BadDocument(ValueError):
    """A document that cannot be read.

    Attributes:
        reason: in few words, the same for all of a kind.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


def find_files(patterns: Iterable[str]) -> list[Path]:
    """Find the files that paths, folders and globs name.

    Args:
        patterns: paths of files; of folders, for all files below them that are not hidden, linked folders included;
            and globs.

    Returns:
        Absolute paths, each file once, sorted. Of several names of a file the one whose suffixes say most is taken.

    Raises:
        FileNotFoundError: if a pattern matches no file.
        ValueError: if it is a URL, or a file has a format that is not read.
    """
    found: dict[Path, set[Path]] = {}  # the names of each file
    for pattern in patterns:
        if "://" in pattern:
            raise ValueError(f"the input {pattern} is a URL; expected local files. Copy it here first")
        # A file whose name has brackets is itself, not a glob.
        matches = [Path(each) for each in ([pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True))]
        files = [file for match in matches if match.exists() for file in _below(match, seen=set())]
        if not files:
            raise FileNotFoundError(f"the input {pattern!r} matches no file; expected a file, a folder or a glob")
        for file in files:
            found.setdefault(file.resolve(), set()).add(_telling_name(file))
    for file in itertools.chain.from_iterable(found.values()):
        suffix, packed = _kind(file)
        if suffix in OTHER_FORMATS:
            given = "".join(file.suffixes[-1 - packed :])
            raise ValueError(f"{file} is {given}; expected text or JSON lines, plain or .gz. Convert it first")
    return sorted(min(names, key=lambda name: (-_says(name), name.is_symlink(), name)) for names in found.values())


def in_capitals(file: Path) -> bool:
    """Say whether a suffix that decides how a file is read has capitals: such suffixes used to be passed over.

    Args:
        file: its path.

    Example:
        >>> in_capitals(Path("A.JSONL")), in_capitals(Path("A.jsonl"))
        (True, False)
    """
    kinds = (".gz", *JSON_LINES)
    return any(suffix.lower() in kinds and suffix not in kinds for suffix in file.suffixes[-2:])


def read_pieces(files: Iterable[Path], *, piece_bytes: int) -> Iterator[Piece]:
    """Read files from front to end, in pieces of whole documents.

    Args:
        files: the files, in order.
        piece_bytes: a piece ends with the first document that makes it this large, or twice as large at a file's
            beginning. A larger document is a piece of its own.

    Yields:
        The pieces. The same files give the same pieces.

    Raises:
        ValueError: if a ``.gz`` is damaged.
        OSError: if a file cannot be read.
    """
    number = size = position = 0
    held: list[Block] = []
    for block, position in _blocks(files, piece_bytes):
        held.append(block)
        size += sum(map(len, block.lines))
        if size >= piece_bytes:
            yield Piece(number, held, position)
            number, size, held = number + 1, 0, []
    if held:
        yield Piece(number, held, position)


def documents(block: Block, *, key: str) -> Iterator[str | BadDocument]:
    """Take the texts out of a block.

    Args:
        block: lines, or a whole text file.
        key: where a line's object has its text.

    Yields:
        The text of each document, or what is wrong with it. Blank lines are no documents.
    """
    for number, line in enumerate(block.lines, start=block.first_line):
        if block.first_line and not line.strip():
            continue
        where = f"{block.path} line {number}" if block.first_line else block.path
        try:
            text = _decoded(where, line)
            yield _under_key(where, text, key) if block.first_line else text
        except BadDocument as error:
            yield error


def _below(path: Path, *, seen: set[Path]) -> Iterator[Path]:
    """Yield the files at or below a path; links may lead in circles, so a folder that was seen is passed over."""
    if path.is_file():
        yield path
    elif path.is_dir() and (folder := path.resolve()) not in seen:
        seen.add(folder)
        for name in os.listdir(folder):
            child = folder / name
            if not name.startswith(".") and child.exists():  # not if a link leads nowhere, or to itself by others
                yield from _below(child, seen=seen)


def _telling_name(file: Path) -> Path:
    """Follow a link to its file; return the name on the way whose suffixes say most of how to read it, the first."""
    names = [file.parent.resolve() / file.name]
    while names[-1].is_symlink():
        target = names[-1].parent / names[-1].readlink()
        names.append(target.parent.resolve() / target.name)
    return max(names, key=_says)


def _says(name: Path) -> int:
    """Count the suffixes of a name that say how its file is read."""
    suffix, packed = _kind(name)
    return packed + (suffix in (*JSON_LINES, *OTHER_FORMATS))


def _kind(name: Path) -> tuple[str, bool]:
    """Return the suffix that says what a file holds, in small letters, and whether it is compressed."""
    packed = name.suffix.lower() == ".gz"
    return (name.with_suffix("") if packed else name).suffix.lower(), packed


def _blocks(files: Iterable[Path], size: int) -> Iterator[tuple[Block, int]]:
    before = 0
    for path in files:
        suffix, packed = _kind(path)
        lines_of = suffix in JSON_LINES
        with open(path, "rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if packed else raw
            first = 1 if lines_of else 0
            try:
                while lines := (file.readlines(size) if lines_of else [file.read()]):
                    yield Block(str(path), first, lines), before + raw.tell()
                    if not lines_of:
                        break
                    first += len(lines)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path} is no gzip file, or is damaged ({error}): copy it again") from error
            before += raw.seek(0, 2)


def _decoded(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocument("no UTF-8", f"{where} is no UTF-8: {error}") from error


def _under_key(where: str, line: str, key: str) -> str:
    try:
        entry = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise BadDocument("no JSON object", f"{where} is no JSON object ({error}): {line[:80]!r}") from error
    if not isinstance(entry, dict):
        raise BadDocument("no JSON object", f"{where} is {line[:80]!r}; expected a JSON object")
    text = entry.get(key)
    if not isinstance(text, str):
        message = f"{where} has no text under {key!r}; its keys are {list(entry)[:10]}. Choose another with --text-key"
        raise BadDocument("no text under the key", message)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadDocument("no UTF-8", f"{where} has a lone surrogate, which is no UTF-8: {error}") from error
    return text
