import errno
import gc
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
import weakref
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moekit.lm import shard_readers
from moekit.lm.batches import Batching, Reading, RowFormat, open_stream, read_validation
from moekit.lm.orders import Address, DataExhausted
from moekit.lm.row_workers import WorkerRows, _failure_of, _signals_held_back
from moekit.lm.shard_writing import shard_bytes
from moekit.lm.shards import Shard, ShardError, read_manifest

SEQ_LEN = 3


def write(folder, sizes, *, first=0):
    """Write shards of the given sizes; the tokens of a sequence say its number, in the order of the shards."""
    folder.mkdir(exist_ok=True)
    lines = []
    for shard, size in enumerate(sizes):
        rows = [[number] * (SEQ_LEN + 1) for number in range(first, first + size)]
        (folder / f"{shard:08d}.tar").write_bytes(shard_bytes(rows, first=first))
        lines.append(json.dumps({"shard": f"{shard:08d}", "num_sequences": size}))
        first += size
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return read_manifest(folder / "manifest.jsonl")


@pytest.fixture
def sources(tmp_path):
    return [write(tmp_path / "a", [9, 0, 14, 5, 22]), write(tmp_path / "b", [4, 3], first=1000)]


def batching(batch_size, *, seq_len=SEQ_LEN, **options):
    return Batching(batch_size, RowFormat(seq_len, vocab_size=5000), **options)


def stream_of(sources, weights=None, *, batch_size=4, seed=3, lanes=4, max_passes=None, workers=0, **options):
    reading = Reading(sources, batching(batch_size, **options), seed, weights, lanes, max_passes)
    return open_stream(reading, workers=workers)


def ids(stream, batches):
    return [token for _ in range(batches) for token in next(stream).ids[:, 0].tolist()]


def global_ids(sources, world_size, batches, **options):
    """Put the ranks' batches together again."""
    streams = [stream_of(sources, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    parts = torch.stack([torch.stack([next(stream).ids for _ in range(batches)]) for stream in streams], dim=2)
    return parts.flatten(1, 2)[:, :, 0].flatten().tolist()


def test_batches_have_the_documented_shape(sources):
    stream = stream_of(sources, batch_size=6, rank=1, world_size=2)
    assert stream.addresses == ()
    batch = next(stream)
    assert batch.ids.shape == (3, SEQ_LEN + 1)
    assert batch.ids.dtype == torch.int64
    assert (batch.num_inputs, batch.num_targets, batch.has_padding) == (9, 9, False)
    assert iter(stream) is stream
    assert not torch.equal(next(stream).ids, batch.ids)
    assert len(stream.addresses) == 6


def test_addresses_say_where_the_global_batch_comes_from(sources):
    streams = [stream_of(sources, rank=rank, world_size=2) for rank in (0, 1)]
    first = [0, 9, 9, 23, 28]
    for _ in range(20):
        rows = torch.stack([next(stream).ids[:, 0] for stream in streams], dim=1).flatten().tolist()
        assert streams[0].addresses == streams[1].addresses
        for number, address in zip(rows, streams[0].addresses, strict=True):
            start = first[address.shard] if address.source == 0 else 1000 + 4 * address.shard
            assert 0 <= number - start < sources[address.source][address.shard].num_sequences


@pytest.mark.parametrize("sizes", [[31], [0, 40], [1, 0, 7, 0, 33, 12, 2], [3, 0, 40, 1, 1, 17, 0, 0, 25, 8, 40, 2, 9]])
def test_all_ranks_together_have_every_sequence_of_a_pass_once(tmp_path, sizes):
    shards, total = write(tmp_path / "a", sizes), sum(sizes)
    alone = global_ids([shards], 1, 2 * total // 60 + 1, batch_size=60)
    assert sorted(alone[:total]) == sorted(alone[total : 2 * total]) == list(range(total))
    assert alone[:total] != alone[total : 2 * total]
    for world_size in (2, 3, 4, 5):
        assert global_ids([shards], world_size, len(alone) // 60, batch_size=60) == alone


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
@pytest.mark.parametrize(("workers", "lanes", "world_size"), [(1, 4, 1), (2, 4, 2), (3, 7, 2), (2, 1, 1)])
def test_workers_do_not_change_a_bit(sources, workers, lanes, world_size):
    options = {"batch_size": 10, "lanes": lanes, "rank": world_size - 1, "world_size": world_size}
    with closing(stream_of(sources, [0.6, 0.4], workers=workers, **options)) as stream:
        plain = stream_of(sources, [0.6, 0.4], **options)
        for _ in range(15):
            batch, expected = next(stream), next(plain)
            assert torch.equal(batch.ids, expected.ids)
            assert batch[1:] == expected[1:]
            assert (stream.passes, stream.addresses) == (plain.passes, plain.addresses)
            assert stream.state_dict() == plain.state_dict()  # what was read ahead does not show
    assert plain.passes == (1, 8)


class LargestComputed(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operator has computed."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and func not in (torch.ops.aten.empty.memory_format,):
            changes = any(each.alias_info is not None for each in func._schema.returns)
            if not changes or func.name() == "aten::copy_":  # a view computes nothing
                self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("workers", [1, 2])
def test_the_main_process_leaves_whole_batches_to_the_workers(sources, workers):
    with closing(stream_of(sources, workers=workers, batch_size=8)) as stream:
        next(stream)
        with LargestComputed() as mode:
            next(stream)
    assert mode.elements == (SEQ_LEN + 1 if workers > 1 else 0)  # so torch wakes no threads
    with LargestComputed() as mode:
        next(stream_of(sources, batch_size=8))
    assert mode.elements == 8 * (SEQ_LEN + 1)


def read_without_files(sources, pipe):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # of a semaphore and no more, shared memory included
    with closing(stream_of(sources, workers=2, batch_size=256)) as stream:
        pipe.send([next(stream).ids.sum().item() for _ in range(3)])


def test_workers_go_on_where_shared_memory_is_full(sources):
    plain = stream_of(sources, batch_size=256)
    ours, theirs = multiprocessing.Pipe()
    main = multiprocessing.get_context("fork").Process(target=read_without_files, args=(sources, theirs))
    main.start()
    try:
        assert ours.poll(20), "the workers' rows were lost"
        assert ours.recv() == [next(plain).ids.sum().item() for _ in range(3)]
    finally:
        main.kill()
        main.join()


@pytest.mark.parametrize(("world_size", "lanes"), [(2, 4), (4, 4), (2, 8)])
def test_ranks_open_their_own_shards_alone(tmp_path, monkeypatch, world_size, lanes):
    opened = Counter()
    monkeypatch.setattr(
        shard_readers,
        "shard_members",
        lambda path, _real=shard_readers.shard_members, **_: opened.update([path]) or _real(path),
    )
    shards = write(tmp_path / "a", [20] * 16)
    per_rank = []
    for rank in range(world_size):
        opened.clear()
        stream = stream_of([shards], batch_size=8, lanes=lanes, rank=rank, world_size=world_size)
        assert len(ids(stream, 40)) == 320 // world_size
        assert set(opened.values()) == {1}
        per_rank.append(set(opened))
    assert [len(paths) for paths in per_rank] == [16 // world_size] * world_size
    assert set.union(*per_rank) == {shard.path for shard in shards}


@pytest.mark.parametrize(("world_size", "lanes"), [(1, 4), (2, 4), (4, 8)])
def test_the_workers_of_a_rank_share_its_lanes(world_size, lanes):
    addresses = [Address(0, slot % lanes, 0, slot % lanes, 0) for slot in range(16)]
    for rank in range(world_size):
        reading = Reading([], batching(16, rank=rank, world_size=world_size), seed=0, lanes=lanes)
        read = Counter(reading.owners(addresses, 2))
        assert read[0] == read[1]


def test_a_saved_position_continues_exactly_from_every_step(sources):
    unbroken = stream_of(sources, [0.7, 0.3])
    states, drawn = [], []
    for _ in range(40):  # 3 passes of one source, 7 of the other
        states.append(json.dumps(unbroken.state_dict()))  # so it is plain data
        drawn.append(ids(unbroken, 1))
    assert min(unbroken.passes) >= 2
    resumed = stream_of(sources, [0.7, 0.3])
    for step in random.Random(0).sample(range(40), 40):  # again and again, into a stream that has moved
        resumed.load_state_dict(json.loads(states[step]))
        assert json.dumps(resumed.state_dict()) == states[step]
        for expected in drawn[step : step + 3]:
            assert ids(resumed, 1) == expected


def test_a_position_is_resumed_twice_under_other_workers_ranks_and_batch_sizes(sources):
    expected = ids(stream_of(sources, [0.7, 0.3]), 30)
    with closing(stream_of(sources, [0.7, 0.3], workers=2)) as stream:
        ids(stream, 5)
        saved = json.loads(json.dumps(stream.state_dict()))
    with closing(stream_of(sources, [0.7, 0.3], workers=1)) as stream:
        next(stream)
        stream.load_state_dict(saved)
        assert ids(stream, 6) == expected[20:44]
        again = stream.state_dict()
    twos = [stream_of(sources, [0.7, 0.3], rank=rank, world_size=2) for rank in (0, 1)]
    for stream in twos:
        stream.load_state_dict(again)
    assert [one for _ in range(5) for pair in zip(*(ids(s, 1) for s in twos), strict=True) for one in pair] == (
        expected[44:64]
    )
    other = stream_of(sources, [0.7, 0.3], batch_size=8)
    other.load_state_dict(saved)
    # A lane serves a slot, so other batches are drawn from the lanes in another order; what is left is the same.
    rest = 8 * ((42 - 14) // 8)
    assert Counter(i >= 1000 for i in ids(other, rest // 8)) == Counter(i >= 1000 for i in expected[20 : 20 + rest])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_pass_is_whole_whatever_batch_sizes_it_was_read_in(tmp_path, batch_size):
    shards = write(tmp_path / "a", [9, 0, 14, 5, 20])
    first = stream_of([shards])
    drawn = ids(first, 4)
    other = stream_of([shards], batch_size=batch_size)
    other.load_state_dict(first.state_dict())
    drawn += ids(other, -(-32 // batch_size))
    assert sorted(drawn[:48]) == list(range(48))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "is for seed 3; this stream has 4"),
        ({"weights": [0.6, 0.4]}, r"is for weights \[0.7, 0.3\]; this stream has \[0.6, 0.4\]"),
        ({"lanes": 2}, "is for lanes 4; this stream has 2"),
        ({"seq_len": 2}, "is for seq_len 3; this stream has 2"),
        ({"swap": True}, r"is for num_sequences \[50, 7\]; this stream has \[7, 50\]"),
        ({"rename": True}, "is for shards .* Resume with the same data, sequence length, weights"),
    ],
)
def test_a_position_of_other_data_is_refused(sources, change, message):
    saved = stream_of(sources, [0.7, 0.3]).state_dict()
    others = sources[::-1] if change.pop("swap", False) else sources
    if change.pop("rename", False):
        others = [[Shard("other.tar", shard.num_sequences) for shard in source] for source in sources]
    with pytest.raises(ValueError, match=message):
        stream_of(others, **{"weights": [0.7, 0.3]} | change).load_state_dict(saved)


def test_data_may_be_moved(sources, tmp_path):
    stream = stream_of(sources)
    ids(stream, 3)
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = [[Shard(shard.path.replace("/a/", "/moved/"), shard.num_sequences) for shard in s] for s in sources]
    resumed = stream_of(moved)
    resumed.load_state_dict(stream.state_dict())
    assert len(set(ids(resumed, 3))) == 12


def test_shards_of_one_name_in_two_folders_are_told_apart(tmp_path):
    for name, first in (("x", 0), ("y", 8)):
        write(tmp_path / name, [8], first=first)
    manifest = tmp_path / "manifest.jsonl"
    lines = [json.dumps({"shard": f"{name}/00000000", "num_sequences": 8}) for name in "xy"]
    manifest.write_text("\n".join(lines))
    shards = read_manifest(manifest)
    saved = stream_of([shards]).state_dict()
    with pytest.raises(ValueError, match="is for shards"):
        stream_of([shards[::-1]]).load_state_dict(saved)
    older = hashlib.blake2b(b"00000000.tar 8\n" * 2, digest_size=8).hexdigest()  # without the folders
    saved["origin"]["shards"] = [older]
    stream = stream_of([shards])
    stream.load_state_dict(saved)
    assert sorted(ids(stream, 4)) == list(range(16))
    assert stream.state_dict()["origin"]["shards"] != [older]


def test_the_last_pass_ends_with_an_error_and_the_position_stays(sources):
    stream = stream_of(sources, max_passes=1)
    assert len(set(ids(stream, 14))) == 56  # of 57
    before = stream.state_dict()
    for _ in range(2):
        with pytest.raises(DataExhausted, match="--multiple-data-passes"):
            next(stream)
    assert stream.state_dict() == before
    with closing(stream_of(sources, max_passes=1, workers=1)) as stream:
        ids(stream, 14)
        with pytest.raises(DataExhausted, match="--multiple-data-passes"):
            next(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_alone(sources, workers):
    before = torch.get_rng_state(), random.getstate()
    with closing(stream_of(sources, workers=workers)) as stream:
        ids(stream, 5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def spoil(shard, *, keep=1024 + 516):
    """Leave of a shard its first member, and half of its second."""
    path = Path(shard.path)
    path.write_bytes(path.read_bytes()[:keep])


def test_skipped_sequences_are_counted_and_shapes_stay(sources):
    clean = stream_of(sources)
    expected = [next(clean).ids for _ in range(14)]
    spoil(sources[0][2])
    plain = stream_of(sources, on_bad="skip")
    with closing(stream_of(sources, on_bad="skip", workers=2)) as stream:
        for rows in expected:
            batch = next(plain)
            there = batch.ids >= 0
            assert torch.equal(batch.ids[there], rows[there])
            assert batch.num_inputs == there[:, :-1].sum()
            assert batch.num_targets == there[:, 1:].sum()
            assert batch.has_padding == (not there.all())
            ahead = next(stream)
            assert torch.equal(ahead.ids, batch.ids)
            assert ahead[1:] == batch[1:]
            assert stream.skipped == plain.skipped  # not what was skipped ahead
    assert plain.skipped == {"broken shard": 13}
    plain.load_state_dict(clean.state_dict())
    assert plain.skipped == {"broken shard": 13}  # since the stream was opened


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_data_stop_with_their_own_message(sources, workers):
    spoil(sources[0][2])
    with closing(stream_of(sources, workers=workers)) as stream:
        before = [stream.state_dict()]
        with pytest.raises(ShardError, match=r"a/00000002\.tar cannot be read") as error:
            before.extend(stream.state_dict() for _ in stream)
        assert "--on-bad-data skip" in str(error.value)
        assert "Traceback" not in str(error.value)
        assert error.value.reason == "broken shard"
        assert stream.state_dict() == before[-1]
        with pytest.raises(ShardError, match=re.escape(str(error.value))):
            next(stream)


def test_commands_that_are_not_allowed_stop_in_a_worker_as_here():
    shards = [Shard("pipe:cat nothing", 5)]
    for workers in (0, 1):
        with (
            closing(stream_of([shards], on_bad="skip", workers=workers)) as stream,
            pytest.raises(ValueError, match="--allow-pipe-commands"),
        ):
            next(stream)


@pytest.mark.parametrize("error", [b"\xff".decode, partial(json.loads, "["), partial(open, "/none"), partial(int, "x")])
def test_any_error_of_a_worker_is_told_in_its_own_words(error):
    """Some kinds of errors are made of more than words: a TypeError of the main process hid them."""
    with pytest.raises((ValueError, OSError)) as raised:
        error()
    failure = _failure_of(raised.value)
    with pytest.raises((ValueError, OSError), match=re.escape(str(raised.value))):
        raise failure.kind(*failure.arguments)
    assert isinstance(raised.value, failure.kind)


def test_a_worker_that_is_killed_is_an_error_and_the_stream_can_go_on(sources):
    expected = ids(stream_of(sources), 12)
    with closing(stream_of(sources, workers=2)) as stream:
        assert ids(stream, 2) == expected[:8]
        saved = stream.state_dict()
        os.kill(multiprocessing.active_children()[-1].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"worker .*(killed by signal|exited unexpectedly|ended from outside)"):
            ids(stream, 1000)
        stream.load_state_dict(saved)  # torch raises wherever the main process is when it notices
        assert ids(stream, 10) == expected[8:]
    assert not multiprocessing.active_children()


def test_workers_leave_signals_to_the_main_process(sources):
    expected = ids(stream_of(sources), 40)
    with closing(stream_of(sources, workers=2)) as stream:
        drawn = ids(stream, 1)
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGINT)
            os.kill(process.pid, signal.SIGTERM)
            status = Path(f"/proc/{process.pid}/status")
            if status.exists():  # and not only blocked, as they are while workers start
                ignored = int(re.search(r"SigIgn:\s*(\w+)", status.read_text())[1], 16)
                assert all(ignored >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM))
        assert drawn + ids(stream, 39) == expected


def test_workers_start_where_no_signals_can_be_held_back(monkeypatch):
    monkeypatch.delattr(signal, "pthread_sigmask")  # as on Windows
    with _signals_held_back():
        pass


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="starts workers in another way")
@pytest.mark.parametrize("error", [OSError(errno.EAGAIN, "no more"), MemoryError("full")], ids=str)
def test_workers_that_were_started_end_where_others_cannot_be(monkeypatch, sources, error):
    """They ignore SIGTERM, by which Python would end them before it waits for them."""
    fork, started = os.fork, []

    def fork_once():
        if started:
            raise error
        started.append(fork())
        return started[0]

    monkeypatch.setattr(os, "fork", fork_once)
    message = r"2 data workers cannot be started \(\[Errno \d+\] no more\)\. Use fewer --workers, or .*ulimit -u|^full$"
    with pytest.raises((OSError, MemoryError), match=message):
        ids(stream_of(sources, workers=2), 1)
    assert len(started) == 1
    assert not multiprocessing.active_children()


def test_closing_ends_the_workers_and_the_next_batch_starts_them_again(sources):
    expected = ids(stream_of(sources), 4)
    stream = stream_of(sources, workers=2)
    drawn = ids(stream, 2)
    assert len(multiprocessing.active_children()) == 2
    start = time.monotonic()
    stream.close()
    stream.close()
    assert time.monotonic() - start < 4
    assert not multiprocessing.active_children()
    assert drawn + ids(stream, 2) == expected
    del stream
    assert not multiprocessing.active_children()


def test_nothing_is_said_and_nothing_hangs_at_exit(sources):
    code = f"""
import multiprocessing, torch
from moekit.lm.batches import Batching, Reading, RowFormat, open_stream
from moekit.lm.shards import read_manifest
shards = read_manifest({os.path.dirname(sources[0][0].path) + "/manifest.jsonl"!r})
stream = open_stream(Reading([shards], Batching(4, RowFormat(3, 5000)), seed=0), workers=2)
next(stream)
assert len(multiprocessing.active_children()) == 2
print(torch.get_num_threads() > 0)
"""
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "True\n", "")
    assert time.monotonic() - start < 30


def open_and_wait(sources, pipe):
    stream = stream_of(sources, workers=2)
    next(stream)
    pipe.send([process.pid for process in multiprocessing.active_children()])
    time.sleep(60)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_no_worker_outlives_a_main_process_that_is_killed(sources):
    ours, theirs = multiprocessing.Pipe()
    main = multiprocessing.get_context("fork").Process(target=open_and_wait, args=(sources, theirs))
    main.start()
    assert ours.poll(30)
    workers = ours.recv()
    assert len(workers) == 2
    assert all(map(running, workers))
    main.kill()
    main.join()
    deadline = time.monotonic() + 15
    while any(map(running, workers)):
        assert time.monotonic() < deadline, "orphans are left"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "workers is -1; expected at least 0"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"world_size": 3}, "batch_size is 4, which 3 ranks cannot share evenly"),
        ({"rank": 1}, "rank is 1 of world_size 1"),
        ({"on_bad": "warn"}, "on_bad is 'warn'; expected 'raise' or 'skip'"),
        ({"weights": [1.0]}, "there are 1 weights"),
        ({"lanes": 0}, "lanes is 0"),
        ({"sources": []}, "there is no source"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_read(options, message):
    options = {"sources": [[Shard("absent", 5)], [Shard("absent", 5)]]} | options
    with pytest.raises(ValueError, match=message):
        stream_of(**options)


def validation(shards, *, batch_size=6, num_sequences=None, **options):
    return read_validation(shards, batching(batch_size, **options), num_sequences=num_sequences)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[5, 0, 8], [12], [1]])
def test_validation_has_every_sequence_once_in_order_and_equal_batches(tmp_path, bare, world_size, sizes):
    shards, total = write(tmp_path / "v", sizes), sum(sizes)
    if bare:
        shards = [shard.path for shard in shards]
    seen = {}
    for rank in range(world_size):
        batches = list(validation(shards, rank=rank, world_size=world_size))
        assert len(batches) == -(-total // 6)
        for batch, indices, skipped in batches:
            assert batch.ids.shape == (6 // world_size, SEQ_LEN + 1)
            assert skipped == {}
            assert torch.equal(batch.ids, indices.unsqueeze(1).expand(-1, SEQ_LEN + 1))  # -1 where there is no row
            assert batch.num_targets == SEQ_LEN * (indices >= 0).sum()
            there = indices[indices >= 0]
            assert set((there % world_size).tolist()) <= {rank}
            seen |= dict.fromkeys(there.tolist(), rank)
    assert sorted(seen) == list(range(total))


@pytest.mark.parametrize("number", [1, 6, 7, 12, 99])
def test_validation_can_be_cut(tmp_path, number):
    shards = write(tmp_path / "v", [5, 8])
    indices = torch.cat([batch.indices for batch in validation(shards, num_sequences=number)])
    assert indices[indices >= 0].tolist() == list(range(min(number, 13)))


def test_validation_skips_and_counts_each_finding_once(tmp_path):
    shards = write(tmp_path / "v", [5, 8, 5])
    spoil(shards[1])
    surplus = [*shards[:2], Shard(shards[2].path, 4)]
    for bare, expected, total in [
        (False, {"broken shard": 7, "surplus sequences": 1}, 17),
        (True, {"broken shard": 1}, 11),
    ]:
        given, skipped = ([shard.path for shard in shards] if bare else surplus), Counter()
        lengths = set()
        for rank in range(3):
            batches = list(validation(given, rank=rank, world_size=3, on_bad="skip"))
            for batch in batches:
                skipped.update(batch.skipped)
            lengths.add((len(batches), max(batch.indices.max().item() for batch in batches) // 3))
        assert skipped == expected
        assert len({length for length, _ in lengths}) == 1
        assert max(last for _, last in lengths) == (total - 1) // 3


@pytest.mark.parametrize("bare", [False, True])
def test_validation_stops_at_bad_data(tmp_path, bare):
    shards = write(tmp_path / "v", [5, 8])
    spoil(shards[1])
    with pytest.raises(ShardError, match=r"v/00000001.tar cannot be read .*--on-bad-data skip"):
        list(validation([shard.path for shard in shards] if bare else shards))


def test_surplus_behind_a_full_batch_stops_every_rank(tmp_path):
    (shard,) = write(tmp_path / "v", [7])
    for rank in range(2):
        with pytest.raises(ShardError, match="holds 7 sequences; its manifest says 6"):
            list(validation([Shard(shard.path, 6)], rank=rank, world_size=2))


def test_validation_takes_the_front_of_longer_members(tmp_path):
    (tmp_path / "long.tar").write_bytes(shard_bytes([list(range(10))], first=0))
    (batch,) = validation([str(tmp_path / "long.tar")], batch_size=1)
    assert batch.batch.ids.tolist() == [[0, 1, 2, 3]]


def test_validation_checks_its_arguments_at_once(tmp_path):
    with pytest.raises(ValueError, match="batch_size is 0"):
        validation([], batch_size=0)
    with pytest.raises(ValueError, match="num_sequences is 0; expected at least 1, or None for all"):
        validation([], num_sequences=0)
    with pytest.raises(ValueError, match="the validation shards hold no sequences"):
        list(validation(write(tmp_path / "v", [0])))


def test_validation_reads_as_it_goes(tmp_path):
    first, second = write(tmp_path / "v", [13, 8])
    os.remove(second.path)
    batches = validation([first, second])
    assert [next(batches).indices[0] for _ in range(2)] == [0, 6]
    assert not tarfile.is_tarfile(tmp_path / "v" / "manifest.jsonl")


@pytest.mark.parametrize("close", [True, False])
def test_rows_of_workers_that_are_gone_leave_nothing_to_be_done_at_exit(sources, close):
    reading = Reading(sources, batching(4), 3)
    rows = WorkerRows(reading, reading.order().state_dict(), workers=1)
    left = weakref.ref(rows._at_exit)
    if close:
        rows.close()
    del rows
    gc.collect()
    assert left() is None
