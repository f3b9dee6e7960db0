import json
import os
import tarfile
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stored_rows import read_shard, stored_rows

from moekit.lm.shards import pack, read_manifest, shard_bytes, write_shards

ROWS = torch.arange(7 * 5).view(7, 5)


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
    assert [(os.path.basename(shard.path), shard.num_sequences) for shard in read_manifest(manifest)] == [
        ("00000000.tar", 3),
        ("00000001.tar", 3),
        ("00000002.tar", 1),
    ]
    assert sorted(path.name for path in manifest.parent.iterdir()) == [
        *(f"0000000{i}.tar" for i in range(3)),
        "manifest.jsonl",
    ]
    assert stored_rows(manifest) == ROWS.tolist()
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


def test_floats_are_no_token_ids(tmp_path):
    with pytest.raises(TypeError, match=r"torch.float32; expected integer token ids"):
        write_shards(tmp_path, torch.zeros(2, 3))
    assert not list(tmp_path.iterdir())


def test_shard_bytes_are_what_write_shards_writes(tmp_path):
    manifest = write_shards(tmp_path, ROWS, sequences_per_shard=3)
    assert (tmp_path / "00000001.tar").read_bytes() == shard_bytes(ROWS[3:6].tolist(), first=3)
    assert len(read_manifest(manifest)) == 3


def test_shard_bytes_refuses_entries_of_tensors():
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        shard_bytes([[torch.tensor(1)]], first=0)


def test_nothing_is_left_of_a_shard_that_could_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_shards(tmp_path, ROWS)
    assert not list(tmp_path.iterdir())
