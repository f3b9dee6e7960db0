"""From documents to shards, once: what training reads lies in a cache folder, in the format of a real run.

::

    CACHE/<key>/prepared.json              what was made, and the size of every file
                tokenizer.json
                speeches/train/            manifest.jsonl, 00000000.tar, ...
                speeches/validation/
                python/train/ ...

The key covers everything the files depend on, so nothing in the cache is ever out of date.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.lm import corpora
from moekit.lm.corpora import Document
from moekit.lm.folder_locks import FolderLock
from moekit.lm.shards import MANIFEST, pack, read_manifest, write_shards
from moekit.lm.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, save_tokenizer, train_bpe

FORMAT = 2  # raise it when the same documents would give other files
TOKENIZER_CHARACTERS = 8_000_000  # a BPE learns little from more
_RECORD = "prepared.json"
_TOKENIZER = "tokenizer.json"


class PreparedDomain(NamedTuple):
    """The shards of one domain.

    Attributes:
        train: manifest of the training sequences.
        validation: manifest of the sequences of the held-out documents.
    """

    train: Path
    validation: Path


class PreparedCorpus(NamedTuple):
    """What training needs of the data.

    Attributes:
        folder: where everything lies.
        tokenizer: the tokenizer that made the shards.
        domains: name to shards, in a fixed order.
    """

    folder: Path
    tokenizer: Tokenizer
    domains: Mapping[str, PreparedDomain]


def prepare(
    *,
    tokenizer_name: str = "bpe-1024",
    seq_len: int = 128,
    cache: str | os.PathLike[str] | None = None,
    domains: Mapping[str, Sequence[Document]] | None = None,
    weights: Mapping[str, float] | None = None,
    progress: Callable[[str], None] | None = None,
) -> PreparedCorpus:
    """Make tokenizer and shards on first use; find them at once on every later use.

    Everything is made in a temporary folder that gets its name at the end, and is locked until then. So a process that
    is killed leaves nothing half done, and of two that work at the same time the second discards its copy. A damaged
    folder is made again, with a warning.

    The documents are split by `corpora.split`, the same for every tokenizer and sequence length. A BPE learns from the
    training documents alone, mixed by ``weights``.

    Args:
        tokenizer_name: ``"byte"``, or ``"bpe-V"`` with V the size of the vocabulary, such as ``"bpe-1024"``.
        seq_len: inputs per sequence.
        cache: the folder of all caches; None takes `corpora.cache_dir`.
        domains: name to documents; None takes the two embedded domains.
        weights: name to the domain's share of the BPE's training text. None takes `corpora.MIXING_WEIGHTS` for the
            embedded domains and equal shares for others.
        progress: called with a line of text before each step that takes time.

    Returns:
        Folder, tokenizer and manifests.

    Raises:
        ValueError: if the tokenizer's name, ``seq_len``, the names of the domains, or the weights make no sense, or a
            domain has fewer than two documents.
        ModuleNotFoundError: if a package of the extra ``moekit[data]`` is needed and not installed.
        OSError: if the cache cannot be made or written to, there is no room in it, or another program removes files
            from it meanwhile.
    """
    vocab_size = _vocab_size(tokenizer_name)
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; expected at least 1")
    if weights is None:
        weights = corpora.MIXING_WEIGHTS if domains is None else dict.fromkeys(domains, 1.0)
    names = list(corpora.MIXING_WEIGHTS if domains is None else domains)
    _check_names(names, weights)
    say = progress or (lambda line: None)
    cache = corpora.cache_dir() if cache is None else Path(cache)
    folder = cache / _key(tokenizer_name, seq_len, domains, {name: weights[name] for name in names})
    fault = _fault(folder, names)
    if fault is not None:
        if folder.exists():
            warnings.warn(f"the cache {folder} is damaged: {fault}. It is made again.", stacklevel=2)
        _make(cache)
        _sweep(cache)
        with _temporary(folder) as built:
            say("reading the documents")
            documents = corpora.embedded() if domains is None else domains
            with _naming(cache):
                _build(built, documents, weights, vocab_size, seq_len, say)
                _install(built, folder, names)
        say(f"prepared {folder}")
    return _open(folder, names)


def _vocab_size(tokenizer_name: str) -> int | None:
    kind, _, size = tokenizer_name.partition("-")
    if tokenizer_name == "byte":
        return None
    if kind == "bpe" and size.isdecimal() and int(size) >= 257:
        return int(size)
    raise ValueError(
        f"the tokenizer is {tokenizer_name!r}; expected 'byte', or 'bpe-V' with V >= 257, as in 'bpe-1024'"
    )


def _check_names(names: Sequence[str], weights: Mapping[str, float]) -> None:
    if not names:
        raise ValueError("domains is empty; expected at least one")
    for name in names:
        if not name or name.startswith(".") or set(name) & set("/\\:"):
            raise ValueError(f"the domain {name!r} cannot name a folder; use letters, digits, '-' and '_'")
        if weights.get(name, 0) <= 0:
            raise ValueError(f"the weight of domain {name!r} is {weights.get(name)}; expected a number above 0")


def _key(
    tokenizer_name: str, seq_len: int, domains: Mapping[str, Sequence[Document]] | None, weights: Mapping[str, float]
) -> str:
    parts = [FORMAT, TOKENIZER_CHARACTERS, tokenizer_name, seq_len, list(weights.items())]
    if tokenizer_name != "byte":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # its absence is an error of train_bpe
            parts.append(importlib.metadata.version("tokenizers"))
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8)
    if domains is None:
        digest.update(corpora.embedded_version().encode())
    else:
        for name, documents in domains.items():
            digest.update(json.dumps([name, documents]).encode())
    return f"{tokenizer_name}-{seq_len}-{digest.hexdigest()}"


def _build(
    folder: Path,
    domains: Mapping[str, Sequence[Document]],
    weights: Mapping[str, float],
    vocab_size: int | None,
    seq_len: int,
    say: Callable[[str], None],
) -> None:
    splits = {name: corpora.split(documents) for name, documents in domains.items()}
    if vocab_size is None:
        tokenizer: Tokenizer = ByteTokenizer()
    else:
        say(f"training a BPE of {vocab_size} tokens")
        tokenizer = train_bpe(
            _sample({name: train for name, (train, _) in splits.items()}, weights), vocab_size=vocab_size
        )
    save_tokenizer(tokenizer, folder / _TOKENIZER)
    written = [folder / _TOKENIZER]
    for name, parts in splits.items():
        for part, documents in zip(PreparedDomain._fields, parts, strict=True):
            say(f"writing {name}/{part}")
            ids = tokenizer.encode_batch([document.text for document in documents])
            sequences = pack(ids, seq_len=seq_len, end_of_text=tokenizer.end_of_text)
            manifest = write_shards(folder / name / part, _shuffled(sequences) if part == "train" else sequences)
            written += [*(Path(shard.path) for shard in read_manifest(manifest)), manifest]
    for path in written:
        if not path.is_file():
            raise FileNotFoundError(f"{path} was removed while the cache was prepared; start again")
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in written}
    (folder / _RECORD).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))


def _shuffled(sequences: Tensor) -> Tensor:
    """Mix documents over shards, since a shard is read from front to end."""
    return sequences[torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))]


def _sample(domains: Mapping[str, Sequence[Document]], weights: Mapping[str, float]) -> list[str]:
    """Take documents of each domain in the proportions of the weights, as much as the scarcest allows."""
    sizes = {name: sum(len(document.text) for document in documents) for name, documents in domains.items()}
    total = sum(weights[name] for name in domains)
    room = min(TOKENIZER_CHARACTERS, *(sizes[name] * total / weights[name] for name in domains))
    texts = []
    for name, documents in domains.items():
        # A small domain may have no document that fits; one is always taken.
        taken = corpora.take(documents, size=room * weights[name] / total) or documents[:1]
        texts += [document.text for document in taken]
    return texts


def _fault(folder: Path, domains: Sequence[str]) -> str | None:
    """Say what is wrong with a prepared folder, or None if nothing is."""
    try:
        files = dict(json.loads((folder / _RECORD).read_text())["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{_RECORD} is missing or cannot be read"
    manifests = [f"{name}/{part}/{MANIFEST}" for name in domains for part in PreparedDomain._fields]
    for name in (_TOKENIZER, *manifests):
        if name not in files:
            return f"{_RECORD} does not name {name}"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


def _make(cache: Path) -> None:
    with _naming(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass


@contextlib.contextmanager
def _naming(cache: Path) -> Iterator[None]:
    """Say of an error which folder it is about, and what helps."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"cannot write into the cache {cache} ({error.strerror or error}). Set MOEKIT_CACHE to another folder"
        ) from error


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    built = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with FolderLock(built, flag="MOEKIT_CACHE"):  # so that it is not swept
            built.chmod(0o755)  # mkdtemp gives a folder to its owner alone, and a cache may be shared
            yield built
    finally:
        shutil.rmtree(built, ignore_errors=True)


def _install(built: Path, folder: Path, names: Sequence[str]) -> None:
    if folder.exists() and _fault(folder, names) is not None:
        with _temporary(folder) as grave, contextlib.suppress(FileNotFoundError):
            os.rename(folder, grave / "damaged")
    try:
        os.rename(built, folder)
    except OSError:  # another process was first
        if _fault(folder, names) is not None:
            raise


def _sweep(cache: Path) -> None:
    """Remove temporary folders that a killed process left a day ago or more; clocks differ, so a lock is heeded."""
    for left in cache.glob(".*-*.*"):
        with contextlib.suppress(OSError):
            if left.is_dir() and time.time() - left.stat().st_mtime > 86_400:
                with FolderLock(left, flag="MOEKIT_CACHE", waits=False):
                    shutil.rmtree(left)


def _open(folder: Path, names: Sequence[str]) -> PreparedCorpus:
    domains = {
        name: PreparedDomain(*(folder / name / part / MANIFEST for part in PreparedDomain._fields)) for name in names
    }
    return PreparedCorpus(folder, load_tokenizer(folder / _TOKENIZER), domains)
