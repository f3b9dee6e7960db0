import gzip
import io
import json
import re
import tarfile
import time

import pytest
import torch
from stored_rows import read_shard, stored_rows

from moekit.lm.shards import Shard, ShardError, read_manifest, write_shards

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


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize("key", ["num_sequences", "num_chunks"])
def test_manifest_keys_and_final_newline(tmp_path, key, end):
    for name in ("b", "a"):
        (tmp_path / f"{name}.tar").touch()
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps({"shard": name, key: count}) for name, count in (("b", 2), ("a", 1))) + end)
    expected = [(f"{tmp_path}/b.tar", 2, "b.tar"), (f"{tmp_path}/a.tar", 1, "a.tar")]
    assert [tuple(shard) for shard in read_manifest(path)] == expected


def test_missing_manifest_says_how_to_make_one(tmp_path):
    path = tmp_path / "absent.jsonl"
    with pytest.raises(
        FileNotFoundError,
        match=re.escape(f"no manifest at {path}. Make one from texts with python -m moekit.lm.tokenize"),
    ):
        read_manifest(path)
    with pytest.raises(IsADirectoryError, match=r"is a folder; expected a manifest file, such as .*manifest\.jsonl"):
        read_manifest(tmp_path)


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
    assert stored_rows(manifest) == [[1, 2, 3], [4, 5, 6], [7, 0, 9], [10, 11, 12]]


def test_ids_and_lengths_are_kept_as_written(tmp_path):
    manifest = manifest_of(tmp_path, {"a.json": b"[-1, 2147483648]", "b.json": b"[-2, 3, 4]", "c.json": b"[]"})
    assert stored_rows(manifest) == [[-1, 2**31], [-2, 3, 4], []]


def test_reading_is_fast(tmp_path):
    manifest = write_shards(tmp_path, torch.arange(2000 * 129).view(2000, 129))
    start = time.perf_counter()
    assert len(stored_rows(manifest)) == 2000
    assert time.perf_counter() - start < 4  # 0.2 s when the machine is idle


LINE = '{"shard": "0", "num_sequences": 1}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LINE + '\n{"shard": oops}', "line 2 of manifest .* is no JSON"),
        ("[" * 100_000, "line 1 of manifest .* is no JSON"),
        ('{"shard": "0"}', 'line 1 of manifest .*expected an object like {"shard": "00000000", "num_sequences": 2048}'),
        ('{"num_sequences": 1}', "line 1 of manifest .*expected an object"),
        ('{"shard": "", "num_sequences": 1}', "line 1 of manifest .*expected an object"),
        ('{"shard": 0, "num_sequences": 1}', "line 1 of manifest .*expected an object"),
        ('{"shard": "0", "num_sequences": "1"}', "line 1 of manifest .*expected an object"),
        ('{"shard": "0", "num_sequences": -1}', "line 1 of manifest .*expected an object"),
        ('{"shard": "0", "num_sequences": 9223372036854775808}', "line 1 of manifest .*expected an object"),
        ('{"shard": "0", "num_sequences": 1.0}', "line 1 of manifest .*expected an object"),
        ('{"shard": "0", "num_sequences": true}', "line 1 of manifest .*expected an object"),
        ('["0", 1]', "line 1 of manifest .*expected an object"),
        (
            '{"shard": "/tmp/0", "num_sequences": 1}',
            "names the shard '/tmp/0'; expected the name of a file beside the manifest",
        ),
        ('{"shard": "../0", "num_sequences": 1}', r"'\.\./0'; expected .*neither absolute nor with '\.\.'"),
        ('{"shard": "s3://bucket/0", "num_sequences": 1}', "'s3://bucket/0'; expected the name of a file"),
        ('{"shard": "0\\u0000", "num_sequences": 1}', "expected the name of a file beside the manifest"),
        ('{"shard": "pipe:true", "num_sequences": 1}', "which is not beside it"),
        (LINE + "\n" + LINE, r"names the shard 0\.tar twice; no data may repeat"),
        (LINE + "\n" + LINE.replace("0", "0.tar", 1), r"names the shard 0\.tar twice; no data may repeat"),
        (LINE + "\n" + LINE.replace("0", "./0", 1), r"names the shard 0\.tar twice; no data may repeat"),
        ("\n", "is empty; expected one JSON line per shard"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1"), "is no UTF-8 text"),
    ],
)
def test_bad_manifests(tmp_path, text, message):
    (tmp_path / "0.tar").touch()
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_manifest(path)


def test_a_name_may_have_its_extension_and_a_folder(tmp_path):
    (tmp_path / "part").mkdir()
    tar_of(tmp_path / "part" / "0.tar", {"a.json": b"[1, 2]"})
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"shard": "part/0.tar", "num_sequences": 1}')
    assert read_manifest(path) == [Shard(f"{tmp_path}/part/0.tar", 1, "part/0.tar")]


def test_line_separators_of_unicode_do_not_cut_a_line(tmp_path):
    (tmp_path / "a\u2028b.tar").touch()
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps({"shard": "a\u2028b", "num_sequences": 1}, ensure_ascii=False), encoding="utf-8")
    assert read_manifest(path) == [Shard(f"{tmp_path}/a\u2028b.tar", 1, "a\u2028b.tar")]


def test_no_command_is_a_manifest(tmp_path):
    with pytest.raises(ValueError, match=r"would run a command.*--allow-pipe-commands"):
        read_manifest(f"pipe:touch {tmp_path}/ran")
    with pytest.raises(ValueError, match="is a command, which has no folder"):
        read_manifest(f"pipe:touch {tmp_path}/ran", allow_commands=True)
    assert not list(tmp_path.iterdir())


def test_a_command_is_a_shard_where_allowed(tmp_path):
    tar_of(tmp_path / "0.tar", {"a.json": b"[1, 2]"})
    command = f"pipe:cat {tmp_path}/0.tar"
    assert list(read_shard(command, allow_commands=True)) == [[1, 2]]
    with pytest.raises(ValueError, match="--allow-pipe-commands"):
        next(read_shard(command))


def reason_of(manifest, message, **options):
    with pytest.raises(ShardError, match=message) as caught:
        stored_rows(manifest, **options)
    return caught.value.reason


def test_damaged_shards_are_named(tmp_path):
    manifest = write_shards(tmp_path, ROWS)
    (tmp_path / "00000000.tar").write_bytes(b"not a tar at all" * 100)
    message = r"shard .*/00000000\.tar cannot be read as a whole tar: invalid header\. Write or copy it again"
    assert reason_of(manifest, message) == "broken shard"
    tar_of(tmp_path / "00000000.tar", {"a.json": b"[1, 2"})
    message = r"^member 'a\.json' cannot be read: .*\. Write the shard again"
    assert reason_of(manifest, message) == "bad member"


def test_the_data_key_picks_members(tmp_path):
    manifest = manifest_of(tmp_path, {"a.json": b"[1, 2]", "a.txt": b"[3, 4]"}, count=1)
    assert stored_rows(manifest, data_key="txt") == [[3, 4]]
    assert list(read_shard(tmp_path / "00000000.tar", data_key="json")) == [[1, 2]]
    assert reason_of(manifest, "found json, txt. Set --data-key", data_key="json.gz") == "bad member"
