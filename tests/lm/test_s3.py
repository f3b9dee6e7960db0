"""Reading from S3: a server of moto's on this machine stands for it."""

import json
import multiprocessing

import pytest
import torch
from s3_server import forget_connections, s3_server
from stored_rows import read_shard, stored_rows

from moekit.lm.shards import Shard, ShardError, read_manifest, shard_bytes, shard_members
from moekit.lm.urls import open_url, read_text_url

ROWS = torch.arange(7 * 5).view(7, 5)
BIG = bytes(range(256)) * 2**17  # 32 MiB
URL = "s3://bucket/data/manifest.jsonl"


@pytest.fixture(scope="module", autouse=True)
def client():
    """A client of the server, which holds a manifest with two shards; the environment points to the server."""
    with s3_server() as client:
        client.create_bucket(Bucket="bucket")
        put = lambda key, body: client.put_object(Bucket="bucket", Key=key, Body=body)  # noqa: E731
        put("data/00000000.tar", shard_bytes(ROWS[:4].tolist(), first=0))
        put("data/00000001.tar", shard_bytes(ROWS[4:].tolist(), first=4))
        lines = [json.dumps({"shard": f"{i:08d}", "num_sequences": n}) for i, n in enumerate((4, 3))]
        put("data/manifest.jsonl", "\n".join(lines).encode())
        put("big", BIG)
        yield client


@pytest.fixture
def fresh():
    forget_connections()
    yield
    forget_connections()


@pytest.mark.parametrize("url", [URL, f"pipe:aws s3 cp {URL} -"])
def test_manifest_and_shards_are_read(url):
    files = (("00000000.tar", 4), ("00000001.tar", 3))
    assert read_manifest(url) == [Shard(f"s3://bucket/data/{name}", count, name) for name, count in files]
    assert stored_rows(url) == ROWS.tolist()
    assert list(read_shard("pipe:aws s3 cp s3://bucket/data/00000001.tar -")) == ROWS[4:].tolist()


def in_child(use):
    """Run in a forked process, as a worker of a DataLoader, and return what it found."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(use()))
    process.start()
    sender.close()
    found = receiver.recv()  # EOFError if it died
    process.join(30)
    assert process.exitcode == 0
    return found


def sequences():
    return stored_rows(URL)


@pytest.mark.usefixtures("fresh")
def test_a_forked_worker_reads_whether_its_parent_did_or_not():
    assert in_child(sequences) == ROWS.tolist()
    assert sequences() == ROWS.tolist()
    assert [in_child(sequences) for _ in range(2)] == [ROWS.tolist()] * 2
    assert sequences() == ROWS.tolist()


def test_a_forked_worker_reads_while_its_parent_has_a_file_open():
    with open_url("s3://bucket/big") as stream:
        head = stream.read(2**20)
        assert in_child(lambda: read_text_url(URL)).count("num_sequences") == 2
        assert head + stream.read() == BIG


def test_workers_of_a_data_loader_read():
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            worker = torch.utils.data.get_worker_info()
            return iter(map(torch.tensor, read_shard(read_manifest(URL)[worker.id].path)))

    assert len(sequences()) == 7
    loader = torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(row.tolist() for row in loader) == ROWS.tolist()


def test_one_pass_asks_for_each_byte_about_once(monkeypatch):
    import s3fs

    asked = []
    fetch = s3fs.core.S3File._fetch_range

    def counting(file, start, end):
        asked.append((start, end))
        return fetch(file, start, end)

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counting)
    with open_url("s3://bucket/big") as stream:
        pieces = list(iter(lambda: stream.read(2**20), b""))
    assert b"".join(pieces) == BIG
    assert sum(end - start for start, end in asked) <= len(BIG) + 2**20
    assert 3 <= len(asked) <= 5  # 8 MiB each, and what was asked for
    assert max(end - start for start, end in asked) <= 9 * 2**20


@pytest.mark.parametrize("url", ["s3://bucket/absent", "s3://no-such-bucket/a"])
def test_absent_objects_and_buckets_are_named(url):
    with pytest.raises(FileNotFoundError, match=f"there is nothing at {url}: no such object, or no such bucket"):
        read_text_url(url)
    with pytest.raises(ShardError, match=f"shard {url} cannot be read .*no such object") as caught:
        next(shard_members(url))
    assert caught.value.reason == "broken shard"


def test_an_absent_manifest_says_how_to_make_one():
    with pytest.raises(FileNotFoundError, match=r"no manifest at s3://bucket/absent\. Make one .*moekit\.lm\.tokenize"):
        read_manifest("s3://bucket/absent")


def test_a_folder_is_no_file():
    with pytest.raises(OSError, match=r"cannot read s3://bucket/data \(IsADirectoryError: it is a folder"):
        read_text_url("s3://bucket/data")


def test_a_shard_that_is_missing_fails_when_it_is_read(client):
    client.put_object(Bucket="bucket", Key="gap/m.jsonl", Body=b'{"shard": "0", "num_sequences": 1}\n')
    (shard,) = read_manifest("s3://bucket/gap/m.jsonl")
    assert shard == Shard("s3://bucket/gap/0.tar", 1, "0.tar")
    with pytest.raises(ShardError, match=r"there is nothing at s3://bucket/gap/0\.tar"):
        list(read_shard(shard.path))


def test_what_fails_while_reading_is_named_too(client):
    client.put_object(Bucket="bucket", Key="fleeting", Body=BIG)
    with open_url("s3://bucket/fleeting") as stream:
        client.delete_object(Bucket="bucket", Key="fleeting")
        with pytest.raises(FileNotFoundError, match="there is nothing at s3://bucket/fleeting: no such object"):
            stream.read(2**20)


def test_a_shard_that_is_cut_short_is_noticed(client):
    content = shard_bytes(ROWS.tolist(), first=0)
    client.put_object(Bucket="bucket", Key="cut.tar", Body=content[:2048])
    with pytest.raises(ShardError, match="without the end-of-archive mark"):
        list(read_shard("s3://bucket/cut.tar"))


HELP = r"check the credentials \(AWS_ACCESS_KEY_ID .*AWS_ENDPOINT_URL if the store is not Amazon's"


@pytest.mark.usefixtures("fresh")
def test_public_data_need_no_credentials(client, monkeypatch):
    client.put_object(Bucket="bucket", Key="public", Body=b"for all", ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert read_text_url("pipe:aws s3 cp --no-sign-request s3://bucket/public -") == "for all"
    with pytest.raises(PermissionError, match=rf"cannot read {URL} \(PermissionError: Forbidden\)\. On S3, {HELP}"):
        read_text_url(URL)


@pytest.mark.usefixtures("fresh")
def test_an_endpoint_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        OSError, match=rf"cannot read {URL} \(EndpointConnectionError: .*127\.0\.0\.1:9.* On S3, {HELP}"
    ):
        read_text_url(URL)
