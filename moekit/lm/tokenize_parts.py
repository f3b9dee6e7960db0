"""From documents to shuffled shards in two phases, each resumable, in memory that does not grow with the input.

::

    OUTPUT/.parts/plan.json        what is being done; another command is refused
                  tokenizer.json
                  00000000.part    phase 1: the tokens of one piece of the input
                  ...
                  index.json       the end of phase 1: sequences per part, and totals
    OUTPUT/00000000.tar            phase 2: sequences of all parts, in a random order
           ...
           tokenizer.json          so that bits per byte can be computed
           tokenize.json           plan and totals
           manifest.jsonl          the end; then .parts is removed

Every file is written inside ``.parts`` and gets its place by a rename, and what it holds depends on plan and input
alone. So a run that was killed goes on with any number of workers and ends in the same bytes.

A piece's tokens are cut into sequences from its front. What is left at the end of each piece is joined in one last
part, and only the last sequence of all is padded, with -1.
"""

import bisect
import functools
import itertools
import json
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from moekit.lm.documents import Piece, documents
from moekit.lm.files import write_whole
from moekit.lm.shards import shard_bytes
from moekit.lm.tokenizers import Tokenizer, load_tokenizer

PAD = -1
TOKENIZER = "tokenizer.json"
_HEADER_BYTES = 512  # JSON, filled up with blanks; the tokens follow
_INT32 = "i"
_SIZE = array(_INT32).itemsize
_INDEX = "index.json"
_END = bytes(2 * tarfile.BLOCKSIZE)  # of an archive
_AGAIN = "Remove {} and give the same command again, which makes anew what is not there"


class Tally(NamedTuple):
    """What documents amounted to.

    Attributes:
        documents: written.
        tokens: of them, with one end-of-text each.
        empty: documents without text, left out.
        bad: documents that cannot be read, left out, by reason.
    """

    documents: int
    tokens: int
    empty: int
    bad: dict[str, int]

    def plus(self, other: "Tally") -> "Tally":
        """Add up two tallies."""
        bad = dict(sorted((Counter(self.bad) + Counter(other.bad)).items()))
        return Tally(self.documents + other.documents, self.tokens + other.tokens, self.empty + other.empty, bad)


class Index(NamedTuple):
    """What phase 1 made.

    Attributes:
        rows: sequences in each part; the last part holds the ends of the others.
        tally: totals.
        padding: tokens of padding at the end of the last sequence.
    """

    rows: list[int]
    tally: Tally
    padding: int


class NoTextError(ValueError):
    """There are no tokens, so nothing to go on with."""


def part_path(parts: Path, number: int) -> Path:
    """Name the file of a part."""
    return parts / f"{number:08d}.part"


def encode_piece(piece: Piece, *, parts: Path, digest: str, text_key: str, skip_bad: bool) -> Tally:
    """Tokenize the documents of a piece, and write its part.

    Args:
        piece: the documents.
        parts: the folder of the parts, with the tokenizer.
        digest: tells the tokenizer from others.
        text_key: where a JSON object has its text.
        skip_bad: whether documents that cannot be read are left out and counted.

    Returns:
        What was written.

    Raises:
        BadDocument: if a document cannot be read, and ``skip_bad`` is off.
    """
    tokenizer = _tokenizer(parts / TOKENIZER, digest)
    texts: list[str] = []
    bad: Counter[str] = Counter()
    for text in itertools.chain.from_iterable(documents(block, key=text_key) for block in piece.blocks):
        if isinstance(text, str):
            texts.append(text)
        elif skip_bad:
            bad[text.reason] += 1
        else:
            raise text
    full = [text for text in texts if text]
    tokens = array(_INT32)
    for ids in tokenizer.encode_batch(full):
        tokens.extend(ids)
        tokens.append(tokenizer.end_of_text)
    tally = Tally(len(full), len(tokens), len(texts) - len(full), dict(bad))
    _write_part(part_path(parts, piece.number), tally, tokens)
    return tally


def write_index(parts: Path, number: int, *, length: int) -> Index:
    """End phase 1: join what is left at the end of each part in one last part, pad it, and add up.

    Args:
        parts: the folder of the parts.
        number: of parts.
        length: tokens per sequence.

    Returns:
        The index, which is written too.

    Raises:
        NoTextError: if there are no tokens.
        ValueError: if a part is damaged.
    """
    ends, rows, total = array(_INT32), [], Tally(0, 0, 0, {})
    for path in (part_path(parts, i) for i in range(number)):
        with open(path, "rb") as file:
            tally = _read_tally(file)
            rows.append(tally.tokens // length)
            ends.extend(_read_tokens(file, rows[-1] * length, tally.tokens % length))
        total = total.plus(tally)
    if not total.documents:
        raise NoTextError(
            f"there is no text to tokenize: {total.empty} empty and {sum(total.bad.values())} bad documents, no other"
        )
    padding = -len(ends) % length
    ends.extend([PAD] * padding)
    _write_part(part_path(parts, number), Tally(0, len(ends), 0, {}), ends)
    index = Index([*rows, len(ends) // length], total, padding)
    write_whole(parts / _INDEX, json.dumps(index))
    return index


def read_index(parts: Path, *, length: int) -> Index | None:
    """Read the index, and check that the parts are as it says.

    Args:
        parts: the folder of the parts.
        length: tokens per sequence.

    Returns:
        The index, or None before the end of phase 1.

    Raises:
        ValueError: if the index or a part is damaged, or a part is missing.
    """
    path = parts / _INDEX
    if not path.exists():
        return None
    try:
        rows, tally, padding = json.loads(path.read_text(encoding="utf-8"))
        index = Index([int(row) for row in rows], Tally(*tally), int(padding))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). {_AGAIN.format('it')}") from error
    for number, row in enumerate(index.rows):
        part = part_path(parts, number)
        if not part.exists():
            raise ValueError(f"{part} is missing. {_AGAIN.format(path)}")
        with open(part, "rb") as file:
            if _read_tally(file).tokens // length != row:
                raise _damaged(part)
    return index


def shard_places(rows: Sequence[int], *, per_shard: int, seed: int | None) -> list[Callable[[], list[tuple[int, int]]]]:
    """Decide which sequences go into which shard.

    Args:
        rows: sequences in each part.
        per_shard: most sequences in a shard.
        seed: of the random order; None keeps the order of the input.

    Returns:
        For each shard a function that lists its sequences, in order, as (part, row).

    Example:
        >>> [places() for places in shard_places([2, 1], per_shard=2, seed=None)]
        [[(0, 0), (0, 1)], [(1, 0)]]
    """
    ends = list(itertools.accumulate(rows))
    order = torch.arange(ends[-1])
    if seed is not None:
        order = torch.randperm(ends[-1], generator=torch.Generator().manual_seed(seed))

    def places(chosen: torch.Tensor) -> list[tuple[int, int]]:
        found = [(bisect.bisect_right(ends, i), i) for i in chosen.tolist()]
        return [(part, i - ends[part] + rows[part]) for part, i in found]

    return [functools.partial(places, chosen) for chosen in order.split(per_shard)]


def make_shard(places: Sequence[tuple[int, int]], *, parts: Path, target: Path, length: int, first: int) -> int:
    """Write a shard.

    Args:
        places: part and row of each sequence, in order.
        parts: the folder of the parts.
        target: the tar.
        length: tokens per sequence.
        first: the number that names the first sequence.

    Returns:
        How many sequences it holds.
    """
    rows: dict[tuple[int, int], list[int]] = {}
    for part, found in itertools.groupby(sorted(places), key=lambda place: place[0]):
        with open(part_path(parts, part), "rb") as file:
            rows |= {place: _read_tokens(file, place[1] * length, length).tolist() for place in found}
    place_whole(target, shard_bytes([rows[place] for place in places], first=first), parts=parts)
    return len(places)


def check_shard(path: Path, number: int) -> None:
    """Check that a shard that an earlier run wrote is whole, by its members' headers and its end.

    Args:
        path: of the tar.
        number: of sequences that it should hold.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            found = len(tar.getmembers())
            file.seek(max(0, path.stat().st_size - len(_END)))
            whole = file.read() == _END
    except tarfile.TarError:
        found, whole = 0, False
    if found != number or not whole:
        raise ValueError(f"{path} is damaged: it is not a whole shard of {number} sequences. {_AGAIN.format('it')}")


def place_whole(target: Path, content: str | bytes, *, parts: Path) -> None:
    """Write a file inside ``parts`` and move it to its place: a killed process leaves nothing beside the target.

    Args:
        target: on the same file system.
        content: of the file.
        parts: the folder of the parts.
    """
    os.replace(write_whole(parts / target.name, content), target)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path, digest: str) -> Tokenizer:
    return load_tokenizer(path)


def _write_part(path: Path, tally: Tally, tokens: "array[int]") -> None:
    write_whole(path, json.dumps(tally).encode().ljust(_HEADER_BYTES) + tokens.tobytes())


def _read_tokens(
    file: BinaryIO, start: int, number: int
) -> "array[int]":  # quoted: array is no generic class before Python 3.12
    file.seek(_HEADER_BYTES + start * _SIZE)
    content = file.read(number * _SIZE)
    if len(content) != number * _SIZE:
        raise _damaged(Path(file.name))
    return array(_INT32, content)


def _read_tally(file: BinaryIO) -> Tally:
    """Read the header of a part, which leaves it with as many tokens as that says."""
    path = Path(file.name)
    try:
        tally = Tally(*json.loads(file.read(_HEADER_BYTES)))
    except (ValueError, TypeError) as error:
        raise _damaged(path) from error
    if os.fstat(file.fileno()).st_size != _HEADER_BYTES + tally.tokens * _SIZE:
        raise _damaged(path)
    return tally


def _damaged(part: Path) -> ValueError:
    names = " and ".join(str(path) for path in (part, part.with_name(_INDEX)) if path.exists())
    return ValueError(f"{part} is damaged: it does not hold the tokens that it should. {_AGAIN.format(names)}")
