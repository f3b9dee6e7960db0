"""Tokenizers: bytes, which need nothing installed, and a byte-level BPE trained on the spot.

In both, id 0 is end-of-text, as in OpenLM's shards, and any text comes back exactly from ``decode(encode(text))``.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """The map between text and token ids.

    Attributes:
        name: what the tokenizer is called in logs and caches, such as ``"byte"`` or ``"bpe-1024"``.
        vocab_size: V; ids are in [0, V).
        end_of_text: the id that ends a document. No text encodes to it.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def end_of_text(self) -> int: ...  # noqa: D102

    def encode(self, text: str) -> list[int]:
        """Map a text to ids. No end-of-text is added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Map several texts to ids, possibly in parallel."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Map ids to a text; end-of-text shows as ``<|endoftext|>``, and bytes that are no UTF-8 as U+FFFD."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """One id per UTF-8 byte: byte b is id b + 1, and id 0 is end-of-text. V = 257. Needs nothing installed.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("Hi")
        [73, 106]
        >>> tokenizer.decode([73, 106, 0])
        'Hi<|endoftext|>'
    """

    name: str = field(default="byte", init=False)
    vocab_size: int = field(default=257, init=False)
    end_of_text: int = field(default=0, init=False)

    def encode(self, text: str) -> list[int]:
        """Map a text to ids. See `Tokenizer`."""
        return [byte + 1 for byte in _utf8(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Map several texts to ids. See `Tokenizer`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Map ids to a text. See `Tokenizer`."""
        pieces = (END_OF_TEXT.encode() if i == 0 else bytes([i - 1]) for i in _checked(ids, self))
        return b"".join(pieces).decode("utf-8", errors="replace")


class BpeTokenizer:
    """A byte-level BPE: the 256 bytes, end-of-text at id 0, and merges. Made by `train_bpe` or `load_tokenizer`.

    Args:
        backend: a ``tokenizers.Tokenizer`` whose model is a byte-level BPE with end-of-text at id 0. End-of-text must
            not be an added token, or its name in a document's text would end the document.
    """

    end_of_text = 0

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        if backend.id_to_token(0) != END_OF_TEXT:
            raise ValueError(f"id 0 of the tokenizer is {backend.id_to_token(0)!r}; expected {END_OF_TEXT!r}")

    @property
    def vocab_size(self) -> int:
        """V, the number of ids."""
        return int(self._backend.get_vocab_size())

    @property
    def name(self) -> str:
        """The kind and V, such as ``"bpe-1024"``."""
        return f"bpe-{self.vocab_size}"

    def encode(self, text: str) -> list[int]:
        """Map a text to ids. See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Map several texts to ids in parallel. See `Tokenizer`."""
        for text in texts:
            _utf8(text)
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Map ids to a text. See `Tokenizer`."""
        return str(self._backend.decode(_checked(ids, self), skip_special_tokens=False))

    def tokens(self) -> list[str]:
        """List the V tokens, one character a byte, in the order of their ids."""
        return [self._backend.id_to_token(i) for i in range(self.vocab_size)]

    def to_json(self) -> str:
        """Return the tokenizer as JSON, in the format of Hugging Face's ``tokenizer.json``."""
        return str(self._backend.to_str())


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> BpeTokenizer:
    """Train a byte-level BPE. The same texts give the same tokenizer.

    Args:
        texts: the training texts.
        vocab_size: V wanted, at least 257: the 256 bytes and end-of-text. Few texts may give fewer merges, hence
            fewer ids.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if ``vocab_size`` is below 257.
        ModuleNotFoundError: if the package ``tokenizers`` is not installed.

    Example:
        >>> tokenizer = train_bpe(["the cat and the hat"], vocab_size=260)
        >>> tokenizer.vocab_size, len(tokenizer.encode("the hat"))
        (260, 4)

    References:
        Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", ACL 2016,
        https://arxiv.org/abs/1508.07909. Over bytes: Radford et al., "Language Models are Unsupervised Multitask
        Learners", 2019.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size is {vocab_size}; a byte-level BPE needs at least 257: 256 bytes and end-of-text")
    library = _tokenizers()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained = _byte_level(library, library.models.BPE())
    trained.train_from_iterator(texts, trainer)
    # The trainer adds end-of-text as a special token, which would match its name inside a text. Without it, the id
    # stays in the vocabulary, and no merge leads there.
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return BpeTokenizer(_byte_level(library, library.models.BPE(model["vocab"], merges)))


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write a tokenizer to a JSON file, in one step: a reader sees the old file or the new one.

    Args:
        tokenizer: a `ByteTokenizer` or a `BpeTokenizer`.
        path: the file. Its folder must exist.

    Raises:
        TypeError: if the tokenizer is of another kind.
    """
    if isinstance(tokenizer, BpeTokenizer):
        text = tokenizer.to_json()
    elif isinstance(tokenizer, ByteTokenizer):
        text = json.dumps({"type": "moekit.byte"})
    else:
        raise TypeError(f"cannot save a {type(tokenizer).__name__}; expected a ByteTokenizer or a BpeTokenizer")
    handle, temporary = tempfile.mkstemp(dir=Path(path).parent, prefix=f".{Path(path).name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_tokenizer(path: str | os.PathLike[str]) -> ByteTokenizer | BpeTokenizer:
    """Read a tokenizer that `save_tokenizer` wrote.

    Args:
        path: the JSON file.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no such tokenizer.
        ModuleNotFoundError: if it is a BPE and the package ``tokenizers`` is not installed.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        if content == {"type": "moekit.byte"}:
            return ByteTokenizer()
        if content["model"]["type"] != "BPE":
            raise ValueError(f"its model is {content['model']['type']!r}")
        return BpeTokenizer(_tokenizers().Tokenizer.from_str(text))
    except ModuleNotFoundError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{path} is no tokenizer that save_tokenizer wrote: {error}. Write it again.") from error


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """Count the bytes of UTF-8 that each id stands for, so that a loss per token becomes bits per byte.

    With nats per token x_i over the targets t_i, bits per byte is sum(x_i) / (ln 2 * sum(token_bytes[t_i])). Unlike the
    loss per token, it can be compared between vocabularies.

    Args:
        tokenizer: a `ByteTokenizer` or a `BpeTokenizer`.

    Returns:
        (V,) int64, 0 for end-of-text.

    Raises:
        TypeError: if the tokenizer is of another kind.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> int(token_bytes(tokenizer)[tokenizer.encode("a é")].sum())
        4
    """
    if isinstance(tokenizer, ByteTokenizer):
        lengths = [1] * tokenizer.vocab_size
    elif isinstance(tokenizer, BpeTokenizer):
        lengths = [len(token) for token in tokenizer.tokens()]  # byte-level: one character is one byte
    else:
        raise TypeError(f"cannot count bytes of a {type(tokenizer).__name__}; expected a ByteTokenizer or BpeTokenizer")
    lengths[tokenizer.end_of_text] = 0
    return torch.tensor(lengths, dtype=torch.int64)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a BPE tokenizer needs the package 'tokenizers', which is not installed. "
            "Run: pip install 'moekit[data]'. The byte tokenizer works without it."
        ) from error
    return tokenizers


def _byte_level(library: Any, model: Any) -> Any:
    backend = library.Tokenizer(model)
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    return backend


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text, {text[error.start]!r}, is a lone surrogate, which has no UTF-8. "
            "Clean the text first: text.encode('utf-8', 'replace').decode('utf-8')"
        ) from error


def _checked(ids: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    listed = [int(i) for i in ids]
    for i in listed:
        if not 0 <= i < tokenizer.vocab_size:
            raise ValueError(f"id {i} is outside [0, {tokenizer.vocab_size}), the vocabulary of {tokenizer.name}")
    return listed
