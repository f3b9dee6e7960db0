"""Token sequences on disk, in OpenLM's format: tar shards beside a manifest.

A shard is a tar with one member per sequence of ``seq_len + 1`` tokens, ``00000042.json``, a JSON list of ints. The
manifest has one JSON line per shard, ``{"shard": "00000000", "num_sequences": 2048}``. Read as well: ``.json.gz``
members, ``.txt`` members (a Python list literal), and the older key ``num_chunks``.

References:
    open_lm, https://github.com/mlfoundations/open_lm, ``open_lm/file_utils.py`` and ``open_lm/datapreprocess``.
"""

import ast
import gzip
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

MANIFEST = "manifest.jsonl"
_HOW_TO_MAKE_ONE = (
    "Make one with moekit.lm.shards.write_shards, or prepare the embedded corpora with moekit.lm.preparation.prepare"
)


class Shard(NamedTuple):
    """One line of a manifest.

    Attributes:
        path: the tar file.
        num_sequences: how many sequences it holds, by the manifest.
    """

    path: Path
    num_sequences: int


def pack(documents: Iterable[Sequence[int]], *, seq_len: int, end_of_text: int) -> Tensor:
    """Cut documents into sequences, back to back and without overlap.

    Every document is followed by end-of-text. The last sequence is filled by going on from the first document again.
    Since a sequence has ``seq_len + 1`` tokens, its last one is a target and never an input, as in OpenLM.

    Args:
        documents: token ids of each document, in order.
        seq_len: inputs per sequence, at least 1.
        end_of_text: the id to put after each document.

    Returns:
        (num_sequences, seq_len + 1) int32.

    Raises:
        ValueError: if there is no document, or ``seq_len`` is below 1.

    Example:
        >>> pack([[1, 2, 3], [4, 5]], seq_len=3, end_of_text=0).tolist()
        [[1, 2, 3, 0], [4, 5, 0, 1]]
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; expected at least 1")
    pieces = [torch.tensor([*document, end_of_text], dtype=torch.int32) for document in documents]
    if not pieces:
        raise ValueError("there is no document to pack; expected at least one")
    stream = torch.cat(pieces)
    num_sequences = -(-len(stream) // (seq_len + 1))
    wrapped = torch.arange(num_sequences * (seq_len + 1)) % len(stream)
    return stream[wrapped].view(num_sequences, seq_len + 1)


def write_shards(
    folder: str | os.PathLike[str],
    sequences: Tensor | Iterable[Sequence[int]],
    *,
    sequences_per_shard: int = 2048,
) -> Path:
    """Write sequences as numbered shards, then their manifest. The same sequences give the same bytes.

    Each file appears under its name when it is whole, and the manifest last, so that a reader who finds a manifest
    finds what it promises.

    Args:
        folder: where to; made if need be. It must not hold a manifest already.
        sequences: (num_sequences, seq_len + 1) ints, or an iterable of such rows.
        sequences_per_shard: most sequences in one tar.

    Returns:
        The path of the manifest.

    Raises:
        ValueError: if there are no sequences, or ``sequences_per_shard`` is below 1.
        FileExistsError: if the folder holds a manifest.
        TypeError: if the sequences are a tensor of floats.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest = write_shards(folder, [[1, 2, 3], [4, 5, 6]])
        ...     print(manifest.name, [shard.path.name for shard in read_manifest(manifest)])
        ...     print(list(read_shard(manifest.with_name("00000000.tar"))), load_sequences(manifest).shape)
        manifest.jsonl ['00000000.tar']
        [[1, 2, 3], [4, 5, 6]] torch.Size([2, 3])
    """
    if sequences_per_shard < 1:
        raise ValueError(f"sequences_per_shard is {sequences_per_shard}; expected at least 1")
    if isinstance(sequences, Tensor) and sequences.is_floating_point():
        raise TypeError(f"sequences are {sequences.dtype}; expected integer token ids. Convert them with .long()")
    manifest = Path(folder) / MANIFEST
    if manifest.exists():
        raise FileExistsError(f"{manifest} exists; shards are never overwritten. Remove the folder or give another")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    rows = (row.tolist() if isinstance(row, Tensor) else [int(token) for token in row] for row in sequences)
    lines = []
    for number in itertools.count():
        chunk = list(itertools.islice(rows, sequences_per_shard))
        if not chunk:
            break
        name = f"{number:08d}"
        _write_whole(manifest.with_name(f"{name}.tar"), _tar(chunk, first=number * sequences_per_shard))
        lines.append(json.dumps({"shard": name, "num_sequences": len(chunk)}) + "\n")
    if not lines:
        raise ValueError(f"there are no sequences to write to {folder}; expected at least one")
    _write_whole(manifest, "".join(lines).encode())
    return manifest


def read_manifest(path: str | os.PathLike[str]) -> list[Shard]:
    """Read a manifest and check that its shards are there.

    Args:
        path: the manifest, JSON lines, with or without a final newline.

    Returns:
        The shards in file order.

    Raises:
        FileNotFoundError: if the manifest or a shard is not there.
        IsADirectoryError: if ``path`` is a folder.
        ValueError: if a line is no JSON object with ``shard`` and ``num_sequences`` (or ``num_chunks``), or there is
            no line.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a manifest file, such as {path / MANIFEST}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no manifest at {path}. {_HOW_TO_MAKE_ONE}")
    lines = path.read_text(encoding="utf-8").splitlines()
    shards = [_manifest_line(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not shards:
        raise ValueError(f"manifest {path} is empty; expected one JSON line per shard. {_HOW_TO_MAKE_ONE}")
    for shard in shards:
        if not shard.path.is_file():
            raise FileNotFoundError(
                f"manifest {path} names the shard {shard.path.name}, which is not beside it. "
                "Copy the shard there, or remove its line"
            )
    return shards


def read_shard(path: str | os.PathLike[str]) -> Iterator[list[int]]:
    """Read a shard from front to end, one sequence at a time.

    In ``.txt`` members the string ``<|endoftext|>``, which OpenLM's old scripts leave in, is id 0.

    Args:
        path: the tar file.

    Yields:
        The token ids of each member, as they are written.

    Raises:
        ValueError: if the file is no tar, is cut short, or a member is no list of ints; it names shard and member.
    """
    for _, tokens in _members(Path(path)):
        yield tokens


def load_sequences(
    manifest: str | os.PathLike[str], *, seq_len: int | None = None, vocab_size: int | None = None
) -> Tensor:
    """Load all sequences of a manifest, and check them.

    Args:
        manifest: path of the manifest.
        seq_len: inputs per sequence, so ``seq_len + 1`` tokens; None takes the length of the first sequence.
        vocab_size: V; every id must be in [0, V). None leaves ids unchecked.

    Returns:
        (num_sequences, seq_len + 1) int32, in the order of the shards and members.

    Raises:
        FileNotFoundError: if the manifest or a shard is not there.
        ValueError: if a shard is damaged, holds another number of sequences than the manifest says, a sequence has
            another length, or an id is outside the vocabulary; it names shard and member.
    """
    length = None if seq_len is None else seq_len + 1
    tensors = []
    for path, num_sequences in read_manifest(manifest):
        names, rows = [], []
        for name, tokens in _members(path):
            length = len(tokens) if length is None else length
            if len(tokens) != length or length < 2:
                raise ValueError(
                    f"member {name} of shard {path} has {len(tokens)} tokens; expected {max(length, 2)}, one more than "
                    "the sequence length. Set the model's sequence length to fit the data, or tokenize it again"
                )
            names.append(name)
            rows.append(tokens)
        if len(rows) != num_sequences:
            raise ValueError(
                f"shard {path} holds {len(rows)} sequences; manifest {manifest} says {num_sequences}. "
                "The shard or the manifest is damaged or out of date: write it again"
            )
        if rows:
            tensors.append(_checked(path, names, torch.tensor(rows), vocab_size))
    if not tensors:
        raise ValueError(f"the shards of manifest {manifest} hold no sequences. {_HOW_TO_MAKE_ONE}")
    return torch.cat(tensors)


def _checked(path: Path, names: list[str], rows: Tensor, vocab_size: int | None) -> Tensor:
    low, high = (-(2**31), 2**31) if vocab_size is None else (0, vocab_size)
    outside = (rows < low) | (rows >= high)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"member {names[row]} of shard {path} has the id {int(rows[row, column])} at position {column}; "
            f"expected ids in [{low}, {high}). Give the vocabulary size of the tokenizer that made the shards"
        )
    return rows.to(torch.int32)


def _tar(rows: list[list[int]], *, first: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, row in enumerate(rows, start=first):
            content = json.dumps(row).encode()
            member = tarfile.TarInfo(f"{number:08d}.json")  # its time, owner and mode are constants by default
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)


def _manifest_line(path: Path, number: int, line: str) -> Shard:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} of manifest {path} is no JSON ({error}): {line[:80]!r}") from error
    count = entry.get("num_sequences", entry.get("num_chunks")) if isinstance(entry, dict) else None
    name = entry.get("shard") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not isinstance(count, int) or count < 0:
        raise ValueError(
            f"line {number} of manifest {path} is {line[:80]!r}; expected an object like "
            '{"shard": "00000000", "num_sequences": 2048}'
        )
    return Shard(path.parent / f"{name}.tar", count)


def _members(path: Path) -> Iterator[tuple[str, list[int]]]:
    try:
        with tarfile.open(path, mode="r|") as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    yield member.name, _parse(path, member.name, file.read())
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"shard {path} is no tar file, or is cut short ({error}): write or copy it again") from error


def _parse(path: Path, name: str, content: bytes) -> list[int]:
    try:
        if name.endswith(".json"):
            tokens = json.loads(content)
        elif name.endswith(".json.gz"):
            tokens = json.loads(gzip.decompress(content))
        elif name.endswith(".txt"):
            literal = ast.literal_eval(content.decode())
            tokens = [0 if token == "<|endoftext|>" else token for token in literal]
        else:
            raise ValueError("its name ends in none of .json, .json.gz, .txt")
        if not isinstance(tokens, list) or not set(map(type, tokens)) <= {int}:
            raise ValueError("it is no list of ints")
    except (ValueError, SyntaxError, TypeError, OSError, EOFError) as error:
        raise ValueError(f"member {name} of shard {path} cannot be read: {error}. Write the shard again") from error
    return tokens
