"""What a byte-level BPE's ``tokenizer.json`` must have for ids to stand for bytes, and which bytes each id stands for.

In a byte-level BPE every character of a token is one byte, written as a printable character. Added tokens, such as
GPT-NeoX's runs of spaces, are ordinary text instead, and the special ones of them stand for no text at all.

References:
    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: BPE over bytes.
    https://github.com/openai/gpt-2, ``src/encoder.py``, function ``bytes_to_unicode``: the printable characters.
"""

from collections.abc import Mapping
from typing import Any

NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
"""Bytes that no UTF-8 text has, so that a vocabulary may lack them."""


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
    if not any(_turns_to_bytes(content.get(part)) for part in ("pre_tokenizer", "normalizer")):
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
        known = all(char in alphabet for char in token)
        texts[i] = bytes(alphabet[char] for char in token) if known else token.encode()
    for i, added in backend.get_added_tokens_decoder().items():
        texts[i] = added.content.encode()
    return texts


def _turns_to_bytes(part: Mapping[str, Any] | None) -> bool:
    if part is None:
        return False
    members = part.get("pretokenizers") or part.get("normalizers") or []
    return part.get("type") == "ByteLevel" or any(map(_turns_to_bytes, members))
