import json
import re
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
@settings(max_examples=200)
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


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("\ud800", r"'utf-8' codec can't encode character '\\ud800'"),
        (5, "'int' object"),
        ("a", "the text 'a' encodes to end-of-text; make it a special token"),
    ],
)
def test_a_token_that_cannot_end_documents_is_told_with_the_file(tmp_path, token, why):
    path = tmp_path / "tokenizer.json"
    content = json.loads(TOKENIZERS[1].to_json())
    path.write_text(json.dumps({"type": "moekit.byte_level_bpe", "end_of_text": token, "tokenizer": content}))
    with pytest.raises(ValueError, match=rf"tokenizer {re.escape(str(path))} cannot end documents with .*: {why}"):
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


def foreign_file(path, *, end_of_text="<|endoftext|>", special=True, **changes):
    """Write a tokenizer.json as other projects do: end-of-text last, runs of spaces as added tokens, NFC."""
    import tokenizers as library

    backend = library.Tokenizer(library.models.BPE())
    backend.normalizer = library.normalizers.NFC()
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS, library.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    backend.add_special_tokens(["<|padding|>"])
    backend.add_tokens([library.AddedToken("    ", normalized=True), library.AddedToken("ñandú", normalized=True)])
    backend.add_tokens([library.AddedToken(end_of_text, special=special)])
    content = json.loads(backend.to_str())
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_a_foreign_tokenizer_is_read(tmp_path):
    path = foreign_file(tmp_path / "tokenizer.json", truncation=None)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.name) == (284, 283, "bpe-284")
    text = "def f():\n    return 'ñandú' # über 中文 \U0001f600"
    ids = tokenizer.encode(text)
    assert {281, 282} <= set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]
    lengths = token_bytes(tokenizer)
    assert lengths.shape == (284,)
    assert int(lengths[ids].sum()) == len(text.encode())
    assert lengths[280:].tolist() == [0, 4, len("ñandú".encode()), 0]


@pytest.mark.parametrize("special", [True, False])
def test_names_of_special_tokens_in_a_text_are_text(tmp_path, special):
    tokenizer = load_tokenizer(foreign_file(tmp_path / "tokenizer.json", special=special))
    text = "a<|endoftext|>b<|padding|> <|endoftext|>"
    ids = tokenizer.encode(text)
    assert not {280, 283} & set(ids)
    assert tokenizer.decode(ids) == text
    assert int(token_bytes(tokenizer)[ids].sum()) == len(text)
    assert tokenizer.decode([*tokenizer.encode("a"), 283]) == "a<|endoftext|>"


@given(text=ANY_TEXT)
def test_any_text_comes_back_in_normal_form(foreign, text):
    import unicodedata

    normal = unicodedata.normalize("NFC", text)
    ids = foreign.encode(text)
    assert foreign.end_of_text not in ids
    assert foreign.decode(ids) == normal
    assert int(token_bytes(foreign)[ids].sum()) == len(normal.encode())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return load_tokenizer(foreign_file(tmp_path_factory.mktemp("foreign") / "tokenizer.json"))


def test_the_library_agrees_where_no_special_token_is_named(tmp_path):
    import tokenizers as library

    path = foreign_file(tmp_path / "tokenizer.json")
    other = library.Tokenizer.from_file(str(path))
    for text in TEXTS:
        assert load_tokenizer(path).encode(text) == other.encode(text).ids


def test_truncation_and_padding_of_a_file_are_not_applied(tmp_path):
    import tokenizers as library

    path = foreign_file(tmp_path / "tokenizer.json")
    cutting = library.Tokenizer.from_file(str(path))
    cutting.enable_truncation(3)
    cutting.enable_padding(length=9)
    cutting.save(str(path))
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]
    assert len(tokenizer.encode("a")) == 1


def test_another_end_of_text_is_named_and_kept(tmp_path):
    path = foreign_file(tmp_path / "tokenizer.json", end_of_text="</s>")
    with pytest.raises(
        ValueError, match=r"no token '<\|endoftext\|>' .* special tokens are \['</s>', '<\|padding\|>'\]"
    ):
        load_tokenizer(path)
    tokenizer = load_tokenizer(path, end_of_text="</s>")
    save_tokenizer(tokenizer, tmp_path / "copy.json")
    copy = load_tokenizer(tmp_path / "copy.json")
    assert copy.end_of_text == tokenizer.end_of_text == 283
    assert copy.encode("a</s>b") == tokenizer.encode("a</s>b")
    assert 283 not in copy.encode("a</s>b")


def test_a_foreign_tokenizer_is_saved_in_its_own_format(tmp_path):
    import tokenizers as library

    tokenizer = load_tokenizer(foreign_file(tmp_path / "tokenizer.json"))
    save_tokenizer(tokenizer, tmp_path / "copy.json")
    assert load_tokenizer(tmp_path / "copy.json").to_json() == tokenizer.to_json()
    assert library.Tokenizer.from_file(str(tmp_path / "copy.json")).encode(TEXTS[0]).ids == tokenizer.encode(TEXTS[0])


def test_tokenizers_that_would_lose_text_are_refused(tmp_path):
    path = foreign_file(tmp_path / "tokenizer.json")
    content = json.loads(path.read_text())
    model = content["model"]
    few = {token: i for token, i in model["vocab"].items() if token != "Ġ"}
    added = [{**token, "id": token["id"] + 5} for token in content["added_tokens"]]
    for change, words in [
        ({"pre_tokenizer": {"type": "Whitespace"}, "normalizer": None}, "not byte-level"),
        ({"model": {**model, "vocab": few, "merges": []}}, "lacks 1 bytes, such as 0x20"),
        ({"model": {**model, "end_of_word_suffix": "</w>"}}, "carry the end_of_word_suffix '</w>'"),
        ({"added_tokens": added}, r"added token '<\|padding\|>' has the id 285, which is read as 280"),
    ]:
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=words):
            load_tokenizer(path)


def added_token(**changes):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"id": 284, "content": "<tool>", **flags, **changes}


def split_off(pattern, behavior, *, invert=False):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def changed_file(path, *, normalizer="as it is", before=(), added=(), **byte_level):
    """Change a foreign tokenizer.json: its normalizer, what comes before the bytes, its added tokens."""
    content = json.loads(foreign_file(path).read_text())
    if normalizer != "as it is":
        content["normalizer"] = normalizer
    last = {**content["pre_tokenizer"], **byte_level}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*before, last]}
    # The library panics at tokens of spaces that its normalizer strips.
    content["added_tokens"] = [*({**token, "normalized": False} for token in content["added_tokens"]), *added]
    path.write_text(json.dumps(content))
    return path


STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"normalizer": STRIP}, r"'  \\nTwo  spaces.*' comes back as 'Two  spaces"),
        ({"normalizer": {**STRIP, "strip_left": False}}, r"d\\xfa  ?\\t  ' comes back as '.*d\\xfa'"),
        ({"normalizer": {"type": "Lowercase"}}, "'Two  .*' comes back as 'two  "),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, "as 'two  "),
        ({"normalizer": {"type": "NFD"}}, r"'f CAPITALS, \\xc9.*' comes back as 'f CAPITALS, E\\u0301"),
        ({"normalizer": {"type": "NFKC"}}, r"cafe\\u0301, .*' comes back as '.*caf\\xe9, "),
        ({"add_prefix_space": True}, "'Two .*' comes back as ' Two "),
        ({"before": [split_off(r"\s+", "Removed")]}, "'Two  spaces.*' comes back as 'Twospaces"),
        ({"before": [split_off("\t", "Removed")]}, r"\\ttabs.*' comes back as '.*,tabs"),
        ({"before": [{"type": "CharDelimiterSplit", "delimiter": "|"}]}, r"z{\|}~' comes back as '.*z{}~"),
        ({"added": [added_token(lstrip=True)]}, "  <tool> .*' comes back as '.*[^ ]<tool> "),
        ({"added": [added_token(rstrip=True)]}, "<tool> .*' comes back as '.*<tool>"),
    ],
)
def test_tokenizers_that_change_texts_are_refused(tmp_path, changes, lost):
    path = changed_file(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(
        ValueError, match=rf"tokenizer {re.escape(str(path))} does not give texts back: .*{lost}.* mend it, or"
    ):
        load_tokenizer(path)


WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}, "before": [split_off(WORDS, "Isolated")], "use_regex": False},  # as Qwen's
        {"normalizer": None, "before": [split_off(WORDS, "Isolated")], "use_regex": False},  # as Llama 3's
        {
            "normalizer": None,
            "before": [split_off(WORDS, "Removed", invert=True)],
            "use_regex": False,
        },  # all is a match
        {"normalizer": None, "before": [{"type": "Digits", "individual_digits": True}]},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
        {"added": [added_token(), added_token(id=285, content="\u0958"), added_token(id=286, content="  ")]},
        {"added": [added_token(special=True, lstrip=True, rstrip=True)]},
    ],
)
def test_tokenizers_that_keep_texts_are_read(tmp_path, changes):
    tokenizer = load_tokenizer(changed_file(tmp_path / "tokenizer.json", **changes))
    text = "  As  <tool>  it's,\r\n\tÉté 12345 "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_loading_makes_no_table_of_all_ids(tmp_path):
    assert "_texts" not in vars(load_tokenizer(foreign_file(tmp_path / "tokenizer.json")))


def split_by(path, regex):
    """Write a tokenizer.json that splits texts by a regex before its bytes."""
    content = json.loads(foreign_file(path).read_text())
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    sequence = {"type": "Sequence", "pretokenizers": [split, {**content["pre_tokenizer"], "use_regex": False}]}
    path.write_text(json.dumps({**content, "pre_tokenizer": sequence}))
    return path


def test_byte_level_inside_a_sequence_is_found(tmp_path):
    path = split_by(tmp_path / "tokenizer.json", "\\d")
    assert load_tokenizer(path).decode(load_tokenizer(path).encode("a 12\n b")) == "a 12\n b"


def test_a_panic_of_the_library_is_an_error_that_names_the_tokenizer(tmp_path, capfd):
    tokenizer = load_tokenizer(split_by(tmp_path / "tokenizer.json", "(?:x+x+)+y"))
    with pytest.raises(ValueError, match=r"the tokenizer bpe-284 fails at a text: .*retry-limit.*mend the file"):
        tokenizer.encode("x" * 28)
    assert "panicked" in capfd.readouterr().err


def test_an_interrupt_while_encoding_stays_one(tmp_path):
    class Interrupted:
        def encode_batch_fast(self, texts, add_special_tokens):
            raise KeyboardInterrupt

    tokenizer = load_tokenizer(foreign_file(tmp_path / "tokenizer.json"))
    tokenizer._backend = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


def with_largest_id(path, largest):
    """Write a tokenizer.json whose last learned token has another id."""
    content = json.loads(foreign_file(path).read_text())
    vocab = content["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] = largest
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("largest", [4_000_000_000, 284 + 2**24 + 1])
def test_ids_far_above_the_number_of_tokens_are_refused(tmp_path, largest):
    path = with_largest_id(tmp_path / "tokenizer.json", largest)
    with pytest.raises(ValueError, match=rf"its largest id is {largest}, though it has 284 tokens; expected at most"):
        load_tokenizer(path)


def test_some_ids_without_a_token_are_taken(tmp_path):
    assert load_tokenizer(with_largest_id(tmp_path / "tokenizer.json", 5000)).vocab_size == 5001
