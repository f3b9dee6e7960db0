"""What a byte-level BPE's ``tokenizer.json`` must have for ids to stand for bytes, and which bytes each id stands for.

In a byte-level BPE every character of a token is one byte, written as a printable character. Added tokens, such as
GPT-NeoX's runs of spaces, are ordinary text instead, and the special ones of them stand for no text at all.

References:
    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: BPE over bytes.
    https://github.com/openai/gpt-2, ``src/encoder.py``, function ``bytes_to_unicode``: the printable characters.
"""

import functools
import itertools
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
"""Bytes that no UTF-8 text has, so that a vocabulary may lack them."""

_PROBE = (
    "Two  spaces, three   and eight        of them,\ttabs\t\tand\nlines\r\n\n  of CAPITALS, ÉTÉ, été, cafe\u0301, "
    "0123456789, \u00bd \ufb01 中文 \U0001f469\u200d\U0001f4bb\u00a0\u3000\ufeff\x00"
) + "".join(map(chr, range(0x20, 0x7F)))


def _byte_alphabet() -> dict[str, int]:
    """Map the 256 characters of byte-level tokens to the bytes they stand for.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 and what follows.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def check_byte_level(content: Mapping[str, Any]) -> None:
    """Check that the content of a ``tokenizer.json`` is a byte-level BPE, in which every text has ids.

    Args:
        content: the parsed file.

    Raises:
        ValueError: if the model is no BPE, nothing turns text into bytes, tokens carry a prefix or a suffix, or the
            vocabulary lacks a byte.
        KeyError: if the file has no model or no vocabulary.
    """
    model = content["model"]
    if model.get("type", "BPE") != "BPE":  # early files of GPT-2 leave the type out
        raise ValueError(f"its model is {model['type']!r}, not 'BPE'")
    if not any(_has(content.get(part), "ByteLevel") for part in ("pre_tokenizer", "normalizer")):
        raise ValueError("its BPE is not byte-level: neither pre_tokenizer nor normalizer is 'ByteLevel'")
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(affix):
            raise ValueError(f"its tokens carry the {affix} {model[affix]!r}, so they do not stand for bytes")
    absent = {byte for char, byte in _byte_alphabet().items() if char not in model["vocab"]} - NEVER_IN_UTF8
    if absent:
        raise ValueError(f"its vocabulary lacks {len(absent)} bytes, such as {min(absent):#04x}: text would be lost")


def without_surprises(content: Mapping[str, Any], *, end_of_text: str) -> dict[str, Any]:
    """Turn off what would cut, lengthen or vary the ids of a text, and make end-of-text special.

    A special token is never matched in a text, if the library is told so; an added token that is not special always is.

    Args:
        content: the parsed ``tokenizer.json``.
        end_of_text: the token that ends a document.

    Returns:
        The content without truncation, padding and dropout.
    """
    added = [
        {**token, "special": True} if token["content"] == end_of_text else token
        for token in content.get("added_tokens") or []
    ]
    model = {**content["model"], "dropout": None}
    return {**content, "truncation": None, "padding": None, "added_tokens": added, "model": model}


def token_texts(backend: Any) -> list[bytes]:
    """List what each id stands for in a decoded text.

    Args:
        backend: a ``tokenizers.Tokenizer`` with a byte-level BPE.

    Returns:
        The bytes of each id, from 0 to the largest: of special tokens their name, of ids without a token none.
    """
    alphabet = _byte_alphabet()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    texts = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        texts[i] = _token_text(token, alphabet)
    for i, added in backend.get_added_tokens_decoder().items():
        texts[i] = added.content.encode()
    return texts


def check_texts_come_back(
    content: Mapping[str, Any], backend: Any, *, encode_batch: Callable[[Sequence[str]], list[list[int]]]
) -> None:
    """Encode texts of every kind, with the added tokens that are not special, and check that their ids stand for them.

    A tokenizer whose normalizer composes characters (NFC) may give back the composed form.

    Args:
        content: the parsed ``tokenizer.json``.
        backend: a ``tokenizers.Tokenizer`` made of it.
        encode_batch: maps texts to their ids, without special tokens.

    Raises:
        ValueError: if a text comes back as another one.

    Example:
        >>> import json, tokenizers
        >>> from moekit.lm.tokenizers import BpeTokenizer, train_bpe
        >>> backend = tokenizers.Tokenizer.from_str(train_bpe(["a"], vocab_size=257).to_json())
        >>> backend.normalizer = tokenizers.normalizers.Strip()
        >>> tokenizer = BpeTokenizer(backend)
        >>> check_texts_come_back(json.loads(tokenizer.to_json()), backend, encode_batch=tokenizer.encode_batch)
        Traceback (most recent call last):
        ValueError: '  \\nTwo  spaces, three   ' comes back as 'Two  spaces, three   and'
    """
    added = backend.get_added_tokens_decoder().values()
    ordinary = "".join(f" {token.content} " for token in added if not token.special)
    texts = [_PROBE, f"  \n{_PROBE}{ordinary}\t  "]  # one for spaces that are added in front, one for those cut off
    form = functools.partial(unicodedata.normalize, "NFC") if _has(content.get("normalizer"), "NFC") else str
    for text, ids in zip(texts, encode_batch(texts), strict=True):
        given, found = form(text), form(_decoded(backend, ids))
        if given != found:
            same = (a == b for a, b in zip(given, found, strict=False))
            start = max(0, sum(itertools.takewhile(bool, same)) - 12)
            raise ValueError(f"{given[start : start + 24]!a} comes back as {found[start : start + 24]!a}")


def _decoded(backend: Any, ids: Iterable[int]) -> str:
    """Decode a few ids, without a table of all."""
    alphabet, added = _byte_alphabet(), backend.get_added_tokens_decoder()
    texts = (added[i].content.encode() if i in added else _token_text(backend.id_to_token(i), alphabet) for i in ids)
    return b"".join(texts).decode("utf-8", errors="replace")


def _token_text(token: str, alphabet: Mapping[str, int]) -> bytes:
    known = all(char in alphabet for char in token)
    return bytes(alphabet[char] for char in token) if known else token.encode()


def _has(part: Mapping[str, Any] | None, kind: str) -> bool:
    """Say whether a pre-tokenizer or normalizer is of a kind, or has a member that is."""
    if part is None:
        return False
    members = part.get("pretokenizers") or part.get("normalizers") or []
    return part.get("type") == kind or any(_has(member, kind) for member in members)
