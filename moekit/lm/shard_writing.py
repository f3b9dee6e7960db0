"""Writing token sequences to disk, in OpenLM's format: tar shards beside a manifest. `moekit.lm.shards` reads them."""

import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moekit.lm.files import write_whole

MANIFEST = "manifest.jsonl"


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
        >>> from moekit.lm.shards import read_manifest
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest = write_shards(folder, [[1, 2, 3], [4, 5, 6]])
        ...     print(manifest.name, [os.path.basename(shard.path) for shard in read_manifest(manifest)])
        manifest.jsonl ['00000000.tar']
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
        write_whole(manifest.with_name(f"{name}.tar"), shard_bytes(chunk, first=number * sequences_per_shard))
        lines.append(json.dumps({"shard": name, "num_sequences": len(chunk)}) + "\n")
    if not lines:
        raise ValueError(f"there are no sequences to write to {folder}; expected at least one")
    write_whole(manifest, "".join(lines))
    return manifest


def shard_bytes(rows: Iterable[Sequence[int]], *, first: int) -> bytes:
    """Return a whole shard: a tar with one ``.json`` member per sequence. The same rows give the same bytes.

    Args:
        rows: token ids of each sequence, as Python ints.
        first: the number that names the first member; the others count on.

    Returns:
        The content of the tar file.

    Raises:
        TypeError: if an id is no Python int, such as an entry of a tensor.

    Example:
        >>> content = shard_bytes([[1, 2, 3]], first=41)
        >>> with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        ...     print(tar.getnames(), tar.extractfile("00000041.json").read())
        ['00000041.json'] b'[1, 2, 3]'
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, row in enumerate(rows, start=first):
            content = json.dumps(list(row)).encode()
            member = tarfile.TarInfo(f"{number:08d}.json")  # its time, owner and mode are constants by default
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
