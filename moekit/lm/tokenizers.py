"""Tokenizers: bytes, which need nothing installed, and byte-level BPEs, trained on the spot or read from a file.

In those made here, id 0 is end-of-text, as in OpenLM's shards, and any text comes back exactly from
``decode(encode(text))``. A file from elsewhere may have end-of-text at any id, and may normalize text (GPT-NeoX's
composes Unicode characters, NFC), so that the normal form comes back. One that changes text otherwise is refused.
"""

import functools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moekit.lm.byte_level import check_byte_level, check_texts_come_back, token_texts, without_surprises
from moekit.lm.files import write_whole

END_OF_TEXT = "<|endoftext|>"
_NAMED = "moekit.byte_level_bpe"  # a tokenizer.json, wrapped with the name of its end-of-text
_MOST_UNUSED = 2**24  # ids without a token; tables have a row for each


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
    """A byte-level BPE. Made by `train_bpe` or `load_tokenizer`.

    Special tokens are never matched in a text: ``<|endoftext|>`` in a document encodes to ordinary ids.

    Args:
        backend: a ``tokenizers.Tokenizer`` whose model is a byte-level BPE.
        end_of_text: the id that ends a document.
        token: the name of that id.

    Raises:
        ValueError: if the id has another name, or the name in a text would be matched.
    """

    def __init__(self, backend: Any, *, end_of_text: int = 0, token: str = END_OF_TEXT) -> None:
        if backend.id_to_token(end_of_text) != token:
            raise ValueError(
                f"id {end_of_text} of the tokenizer is {backend.id_to_token(end_of_text)!r}; expected {token!r}"
            )
        backend.encode_special_tokens = True
        self._backend, self.end_of_text, self.end_of_text_token = backend, end_of_text, token
        if end_of_text in self.encode(token):
            raise ValueError(f"the text {token!r} encodes to end-of-text; make it a special token of the tokenizer")

    @functools.cached_property
    def vocab_size(self) -> int:
        """V, the largest id plus one."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @property
    def name(self) -> str:
        """The kind and V, such as ``"bpe-1024"``."""
        return f"bpe-{self.vocab_size}"

    def encode(self, text: str) -> list[int]:
        """Map a text to ids. See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Map several texts to ids in parallel. See `Tokenizer`.

        Raises:
            ValueError: if a text has a lone surrogate, or the library fails at one, as at a regex that takes too long.
        """
        for text in texts:
            _utf8(text)
        try:
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust: no Exception, and no other process can unpickle it
                raise
            raise ValueError(
                f"the tokenizer {self.name} fails at a text: {error}. A regex of its tokenizer.json may take too long; "
                "mend the file, or give another tokenizer"
            ) from error
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        """Map ids to a text. See `Tokenizer`. Special tokens show as their names."""
        return b"".join(self._texts[i] for i in _checked(ids, self)).decode("utf-8", errors="replace")

    def token_bytes(self) -> list[int]:
        """Count the bytes of text of each id: none for special tokens and for ids without a token."""
        special = (i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)
        unwritten = {*special, self.end_of_text}
        return [0 if i in unwritten else len(text) for i, text in enumerate(self._texts)]

    def to_json(self) -> str:
        """Return the tokenizer as JSON, in the format of Hugging Face's ``tokenizer.json``."""
        return str(self._backend.to_str())

    @functools.cached_property
    def _texts(self) -> list[bytes]:
        return token_texts(self._backend)


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
        if tokenizer.end_of_text_token != END_OF_TEXT:  # the format has no place for the name
            parts = {"end_of_text": tokenizer.end_of_text_token, "tokenizer": json.loads(text)}
            text = json.dumps({"type": _NAMED, **parts})
    elif isinstance(tokenizer, ByteTokenizer):
        text = json.dumps({"type": "moekit.byte"})
    else:
        raise TypeError(f"cannot save a {type(tokenizer).__name__}; expected a ByteTokenizer or a BpeTokenizer")
    write_whole(path, text)


def load_tokenizer(path: str | os.PathLike[str], *, end_of_text: str | None = None) -> ByteTokenizer | BpeTokenizer:
    """Read a tokenizer that `save_tokenizer` wrote, or a byte-level BPE's ``tokenizer.json`` of Hugging Face's format.

    Args:
        path: the JSON file.
        end_of_text: the token that ends a document; None takes the one that `save_tokenizer` noted, else
            ``<|endoftext|>``.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no such tokenizer, has no such token, or one that a document may have; or if it loses
            text, or adds some.
        ModuleNotFoundError: if it is a BPE and the package ``tokenizers`` is not installed.
    """
    text = Path(path).read_bytes()
    try:
        content = json.loads(text.decode("utf-8"))
        if content == {"type": "moekit.byte"}:
            return ByteTokenizer()
        if content.get("type") == _NAMED:
            end_of_text, content = end_of_text or content["end_of_text"], content["tokenizer"]
        token = end_of_text or END_OF_TEXT
        check_byte_level(content)
        backend = _tokenizers().Tokenizer.from_str(json.dumps(without_surprises(content, end_of_text=token)))
        _check_ids(content, backend)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(
            f"{path} is no tokenizer that save_tokenizer wrote, nor a tokenizer.json of a byte-level BPE: {error}. "
            "Write it again, or give another"
        ) from error
    tokenizer = _with_end_of_text(path, backend, token)
    try:
        check_texts_come_back(content, backend, encode_batch=tokenizer.encode_batch)
    except ValueError as error:
        raise ValueError(
            f"the tokenizer {path} does not give texts back: {error}. Look in it for a normalizer other than NFC, "
            "add_prefix_space, a Split with Removed, and added tokens with lstrip or rstrip; mend it, or give another"
        ) from error
    return tokenizer


def _with_end_of_text(path: str | os.PathLike[str], backend: Any, token: str) -> BpeTokenizer:
    try:
        i = backend.token_to_id(token)
        tokenizer = None if i is None else BpeTokenizer(backend, end_of_text=i, token=token)
    except (TypeError, ValueError) as error:  # no text, or none that has UTF-8, or one that a document may have
        raise ValueError(
            f"the tokenizer {path} cannot end documents with {token!r}: {error}. Mend the file, or name another "
            "end-of-text"
        ) from error
    if tokenizer is None:
        special = sorted(added.content for added in backend.get_added_tokens_decoder().values() if added.special)[:20]
        raise ValueError(
            f"the tokenizer {path} has no token {token!r} to end documents with; its special tokens are {special}. "
            "Name its end-of-text"
        )
    return tokenizer


def _check_ids(content: Any, backend: Any) -> None:
    """Refuse ids that the library reads as others, so that shards would mean other text, and ids beyond any table.

    The library numbers added tokens anew if the file leaves a gap before them.
    """
    for added in content.get("added_tokens") or []:
        i = backend.token_to_id(added["content"])
        if i != added["id"]:
            raise ValueError(f"its added token {added['content']!r} has the id {added['id']}, which is read as {i}")
    ids = backend.get_vocab(with_added_tokens=True).values()
    if max(ids) - len(ids) > _MOST_UNUSED:
        raise ValueError(
            f"its largest id is {max(ids)}, though it has {len(ids)} tokens; expected at most {_MOST_UNUSED} ids "
            "without a token, for tables have a row for each id"
        )


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """Count the bytes of UTF-8 that each id stands for, so that a loss per token becomes bits per byte.

    With nats per token x_i over the targets t_i, bits per byte is sum(x_i) / (ln 2 * sum(token_bytes[t_i])). Unlike the
    loss per token, it can be compared between vocabularies.

    Args:
        tokenizer: a `ByteTokenizer` or a `BpeTokenizer`.

    Returns:
        (V,) int64, 0 for end-of-text, other special tokens, and ids without a token.

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
        lengths = tokenizer.token_bytes()
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
