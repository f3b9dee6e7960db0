import gzip
import io
import json
import os
import re
import tarfile
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekit.lm.shards import load_sequences, pack, read_manifest, read_shard, write_shards

ROWS = torch.arange(7 * 5).view(7, 5)


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def manifest_of(folder, members, *, count=None):
    tar_of(folder / "00000000.tar", members)
    manifest = folder / "manifest.jsonl"
    manifest.write_text(json.dumps({"shard": "00000000", "num_sequences": len(members) if count is None else count}))
    return manifest


@given(
    documents=st.lists(st.lists(st.integers(1, 99), max_size=9), min_size=1, max_size=6),
    seq_len=st.integers(1, 12),
)
def test_pack_is_the_joined_stream_cut_and_wrapped_round(documents, seq_len):
    packed = pack(documents, seq_len=seq_len, end_of_text=0)
    stream = [token for document in documents for token in (*document, 0)]
    flat = packed.flatten().tolist()
    assert packed.shape[1] == seq_len + 1
    assert packed.dtype == torch.int32
    assert 0 <= len(flat) - len(stream) <= seq_len
    assert flat == [stream[i % len(stream)] for i in range(len(flat))]


def test_pack_refuses_nothing_and_no_length():
    with pytest.raises(ValueError, match="there is no document to pack"):
        pack([], seq_len=4, end_of_text=0)
    with pytest.raises(ValueError, match="seq_len is 0; expected at least 1"):
        pack([[1]], seq_len=0, end_of_text=0)


@pytest.mark.parametrize("rows", [ROWS, ROWS.tolist(), iter(ROWS.tolist())], ids=["tensor", "lists", "iterator"])
def test_write_and_load(tmp_path, rows):
    manifest = write_shards(tmp_path / "new" / "folder", rows, sequences_per_shard=3)
    assert manifest == tmp_path / "new" / "folder" / "manifest.jsonl"
    assert [(shard.path.name, shard.num_sequences) for shard in read_manifest(manifest)] == [
        ("00000000.tar", 3),
        ("00000001.tar", 3),
        ("00000002.tar", 1),
    ]
    assert sorted(path.name for path in manifest.parent.iterdir()) == [
        *(f"0000000{i}.tar" for i in range(3)),
        "manifest.jsonl",
    ]
    loaded = load_sequences(manifest, seq_len=4, vocab_size=35)
    assert loaded.dtype == torch.int32
    assert torch.equal(loaded.long(), ROWS)
    assert list(read_shard(manifest.with_name("00000001.tar"))) == ROWS[3:6].tolist()


def test_the_same_sequences_give_the_same_bytes(tmp_path, monkeypatch):
    first = write_shards(tmp_path / "a", ROWS, sequences_per_shard=4)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    second = write_shards(tmp_path / "b", ROWS, sequences_per_shard=4)
    for path in first.parent.iterdir():
        assert path.read_bytes() == (second.parent / path.name).read_bytes()


def test_the_format_is_openlm_s(tmp_path):
    manifest = write_shards(tmp_path, ROWS[:1])
    assert manifest.read_text() == '{"shard": "00000000", "num_sequences": 1}\n'
    with tarfile.open(tmp_path / "00000000.tar") as tar:
        assert tar.getnames() == ["00000000.json"]
        assert json.load(tar.extractfile("00000000.json")) == [0, 1, 2, 3, 4]
        assert tar.getmembers()[0].mtime == 0


def test_member_names_are_unique_over_shards(tmp_path):
    manifest = write_shards(tmp_path, ROWS, sequences_per_shard=2)
    names = []
    for shard in read_manifest(manifest):
        with tarfile.open(shard.path) as tar:
            names += tar.getnames()
    assert names == [f"0000000{i}.json" for i in range(7)]


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    written = []
    replace = os.replace
    monkeypatch.setattr("os.replace", lambda a, b: (written.append(b.name), replace(a, b)))
    write_shards(tmp_path, ROWS, sequences_per_shard=4)
    assert written == ["00000000.tar", "00000001.tar", "manifest.jsonl"]


def test_write_refuses(tmp_path):
    with pytest.raises(ValueError, match="sequences_per_shard is 0; expected at least 1"):
        write_shards(tmp_path, ROWS, sequences_per_shard=0)
    with pytest.raises(ValueError, match="there are no sequences to write"):
        write_shards(tmp_path, [])
    write_shards(tmp_path, ROWS)
    with pytest.raises(FileExistsError, match=r"manifest\.jsonl exists; shards are never overwritten"):
        write_shards(tmp_path, ROWS)


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize("key", ["num_sequences", "num_chunks"])
def test_manifest_keys_and_final_newline(tmp_path, key, end):
    for name in ("b", "a"):
        (tmp_path / f"{name}.tar").touch()
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps({"shard": name, key: count}) for name, count in (("b", 2), ("a", 1))) + end)
    assert [tuple(shard) for shard in read_manifest(path)] == [(tmp_path / "b.tar", 2), (tmp_path / "a.tar", 1)]


def test_missing_manifest_says_how_to_make_one(tmp_path):
    path = tmp_path / "absent.jsonl"
    with pytest.raises(FileNotFoundError, match=re.escape(f"no manifest at {path}. Make one with moekit")):
        read_manifest(path)
    with pytest.raises(IsADirectoryError, match=r"is a folder; expected a manifest file, such as .*manifest\.jsonl"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"shard": "0", "num_sequences": 1}\n{"shard": oops}', "line 2 of manifest .* is no JSON"),
        ('{"shard": "0"}', 'line 1 of manifest .*expected an object like {"shard": "00000000", "num_sequences": 2048}'),
        ('{"num_sequences": 1}', "line 1 of manifest .*expected an object"),
        ('{"shard": "0", "num_sequences": "1"}', "line 1 of manifest .*expected an object"),
        ('["0", 1]', "line 1 of manifest .*expected an object"),
        ("\n", "is empty; expected one JSON line per shard"),
    ],
)
def test_bad_manifests(tmp_path, text, message):
    path = tmp_path / "manifest.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_manifest(path)


def test_missing_shard_is_named(tmp_path):
    manifest = write_shards(tmp_path, ROWS, sequences_per_shard=4)
    (tmp_path / "00000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"names the shard 00000001\.tar, which is not beside it"):
        read_manifest(manifest)


def test_every_kind_of_member_is_read(tmp_path):
    manifest = manifest_of(
        tmp_path,
        {
            "a.json": b"[1, 2, 3]",
            "b.json.gz": gzip.compress(b"[4, 5, 6]"),
            "c.txt": b"[7, '<|endoftext|>', 9]",
            "folder/d.json": b"[10,11,12]",
        },
    )
    assert load_sequences(manifest, vocab_size=13).tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 9], [10, 11, 12]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"[1, 2", "cannot be read"),
        ("x.json", b'{"a": 1}', "it is no list of ints"),
        ("x.json", b'[1, "a"]', "it is no list of ints"),
        ("x.json", b"[1, 2.5]", "it is no list of ints"),
        ("x.json", b"[1, true]", "it is no list of ints"),
        ("x.json.gz", b"[1, 2]", "cannot be read"),
        ("x.txt", b"__import__('os')", "cannot be read"),
        ("x.txt", b"(1", "cannot be read"),
        ("x.npy", b"", "its name ends in none of .json, .json.gz, .txt"),
    ],
)
def test_bad_members_are_named(tmp_path, name, content, message):
    tar_of(tmp_path / "s.tar", {"good.json": b"[1, 2]", name: content})
    with pytest.raises(ValueError, match=rf"member {re.escape(name)} of shard .*s\.tar cannot be read.*") as caught:
        list(read_shard(tmp_path / "s.tar"))
    assert message in str(caught.value)


def test_damaged_tars_are_named(tmp_path):
    manifest = write_shards(tmp_path, ROWS)
    shard = tmp_path / "00000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(b"not a tar at all" * 100)
    with pytest.raises(ValueError, match=r"shard .*00000000\.tar is no tar file, or is cut short"):
        load_sequences(manifest)
    for length in (0, 512 + 3, 1024 + 100, 4 * 512):
        shard.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"00000000\.tar"):
            load_sequences(manifest)


def test_count_must_equal_the_manifest(tmp_path):
    manifest = manifest_of(tmp_path, {"a.json": b"[1, 2]"}, count=2)
    with pytest.raises(ValueError, match=r"00000000\.tar holds 1 sequences; manifest .* says 2"):
        load_sequences(manifest)


@pytest.mark.parametrize("content", [b"[1]", b"[1, 2, 3]", b"[]"])
def test_length_must_fit(tmp_path, content):
    manifest = manifest_of(tmp_path, {"a.json": b"[1, 2]", "b.json": content})
    message = rf"member b.json of shard .* has {len(json.loads(content))} tokens; expected 2"
    with pytest.raises(ValueError, match=message):
        load_sequences(manifest)
    with pytest.raises(ValueError, match=r"member a\.json of shard .* has 2 tokens; expected 10"):
        load_sequences(manifest, seq_len=9)


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_ids_must_be_in_the_vocabulary(tmp_path, bad):
    manifest = manifest_of(tmp_path, {"a.json": b"[1, 2]", "b.json": json.dumps([3, bad]).encode()})
    message = rf"member b.json of shard .* has the id {bad} at position 1; expected ids in \[0, 4\)"
    with pytest.raises(ValueError, match=message):
        load_sequences(manifest, vocab_size=4)


def test_ids_are_kept_as_written_without_a_vocabulary_and_never_wrap(tmp_path):
    manifest = manifest_of(tmp_path, {"a.json": b"[-1, 2147483647]"})
    assert load_sequences(manifest).tolist() == [[-1, 2**31 - 1]]
    manifest = manifest_of(tmp_path, {"a.json": b"[1, 2147483648]"})
    with pytest.raises(ValueError, match="has the id 2147483648 at position 1"):
        load_sequences(manifest)


def test_reading_is_fast(tmp_path):
    manifest = write_shards(tmp_path, torch.arange(2000 * 129).view(2000, 129))
    start = time.perf_counter()
    assert len(load_sequences(manifest)) == 2000
    assert time.perf_counter() - start < 4  # 0.2 s when the machine is idle


def test_floats_are_no_token_ids(tmp_path):
    with pytest.raises(TypeError, match=r"torch.float32; expected integer token ids"):
        write_shards(tmp_path, torch.zeros(2, 3))
    assert not list(tmp_path.iterdir())
