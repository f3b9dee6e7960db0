import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.lm.tokenizers import (
    BpeTokenizer,
    ByteTokenizer,
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    train_bpe,
)

TEXTS = [
    "Fellow-Citizens of the Senate and House of Representatives: " * 5,
    "def f(x):\n    return x + 1\n\n" * 5,
    "über naïve café 中文 \U0001f600\x00",
]
TOKENIZERS = [ByteTokenizer(), train_bpe(TEXTS, vocab_size=300)]
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))

both = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)


@both
@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert int(token_bytes(tokenizer)[ids].sum()) == len(text.encode())


@both
@pytest.mark.parametrize("text", ["", "\x00", "  two  spaces \r\n\t", "\U0001f468‍\U0001f469‍\U0001f467", "Ġ Ċ é", "﻿bom"])
def test_awkward_texts_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@both
def test_the_name_of_end_of_text_does_not_end_a_document(tokenizer):
    text = "before<|endoftext|>after"
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text == 0
    assert 0 not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*tokenizer.encode("a"), 0]) == "a<|endoftext|>"


@both
def test_batch_equals_single(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


@both
def test_lone_surrogate_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"character 2 of the text, '\\ud800', is a lone surrogate"):
        tokenizer.encode("ab\ud800")


@both
def test_ids_outside_the_vocabulary_are_named(tokenizer):
    with pytest.raises(ValueError, match=rf"id {tokenizer.vocab_size} is outside"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(ValueError, match="id -1 is outside"):
        tokenizer.decode([-1])


@both
def test_half_a_character_decodes_to_the_replacement_mark(tokenizer):
    first_byte = tokenizer.encode("\U0001f601")[:1]
    assert tokenizer.decode(first_byte) in {"�", "��", "���"}


@both
def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("an older file")
    save_tokenizer(tokenizer, path)
    loaded = load_tokenizer(path)
    assert type(loaded) is type(tokenizer)
    assert (loaded.name, loaded.vocab_size) == (tokenizer.name, tokenizer.vocab_size)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert 0 not in loaded.encode("<|endoftext|>")
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(ByteTokenizer(), path)
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_tokenizer(TOKENIZERS[1], path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"type": "WordPiece"}}'])
def test_load_refuses_other_files(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer that save_tokenizer wrote"):
        load_tokenizer(path)


def test_other_tokenizers_are_refused(tmp_path):
    with pytest.raises(TypeError, match="cannot save a object"):
        save_tokenizer(object(), tmp_path / "x.json")
    with pytest.raises(TypeError, match="cannot count bytes of a object"):
        token_bytes(object())


def test_bpe_training_is_deterministic_and_has_the_size_asked_for():
    first, second = (train_bpe(iter(TEXTS), vocab_size=300) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert first.vocab_size == 300
    assert first.name == "bpe-300"


def test_bpe_file_is_the_format_of_hugging_face(tmp_path):
    import tokenizers

    save_tokenizer(TOKENIZERS[1], tmp_path / "tokenizer.json")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode(TEXTS[0]).ids == TOKENIZERS[1].encode(TEXTS[0])
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]["<|endoftext|>"] == 0


def test_bpe_learns_merges():
    assert len(TOKENIZERS[1].encode(TEXTS[0])) < 0.6 * len(TEXTS[0].encode())


def test_token_bytes_of_every_id():
    assert token_bytes(ByteTokenizer()).tolist() == [0] + [1] * 256
    lengths = token_bytes(TOKENIZERS[1])
    assert lengths.dtype == torch.int64
    assert lengths[0] == 0
    assert lengths[1:257].eq(1).all()
    assert lengths[257:].ge(2).all()


def test_vocab_size_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 256; a byte-level BPE needs at least 257"):
        train_bpe(["a"], vocab_size=256)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'moekit\[data\]'"):
        train_bpe(["a"], vocab_size=300)


def test_backend_must_have_end_of_text_first():
    import tokenizers

    with pytest.raises(ValueError, match="id 0 of the tokenizer is None"):
        BpeTokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))


def test_load_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        load_tokenizer(Path(tmp_path) / "absent.json")
