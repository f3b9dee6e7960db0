import io
import json
import tarfile
from collections import Counter

import pytest
import torch

from moekit.lm import shard_readers, token_rows
from moekit.lm.orders import Address, Order, block_permutation
from moekit.lm.shard_readers import RowReader
from moekit.lm.shards import Shard, ShardError
from moekit.lm.token_rows import Batching, RowFormat, bad_data_policy, row_of

FORMAT = RowFormat(seq_len=3, vocab_size=1000)


def write(path, members, *, promised=None, cut=None):
    """Write a tar of members: tokens, bytes, or None for a link; ``cut`` bytes are all that is left of it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, tokens in enumerate(members):
            content = tokens if isinstance(tokens, bytes) else json.dumps(tokens or []).encode()
            member = tarfile.TarInfo(f"{number:04d}.json")
            member.size = len(content)
            if tokens is None:
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "0000.json", 0
            tar.addfile(member, io.BytesIO(content))
    path.write_bytes(buffer.getvalue()[:cut])
    return Shard(str(path), len(members) if promised is None else promised)


def good(number):
    return [[i % 1000] * 4 for i in range(number)]


def reader(shards, *, on_bad="raise", row_format=FORMAT, seed=0):
    skipped = Counter()
    policy = bad_data_policy(on_bad, skipped)
    return RowReader([shards], Batching(1, row_format), seed=seed, on_bad=policy), skipped


def addresses_of(shard, number, *, start=0, lane=0, data_pass=0):
    return [Address(0, lane, data_pass, shard, position) for position in range(start, number)]


def read_all(shard, **options):
    rows, skipped = reader([shard], **options)
    addresses = addresses_of(0, shard.num_sequences)
    return rows.read(addresses, range(len(addresses))), skipped


def test_a_shard_is_read_once_in_shuffled_blocks(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(
        shard_readers,
        "shard_members",
        lambda path, _real=shard_readers.shard_members, **_: opened.append(path) or _real(path),
    )
    rows, _ = read_all(write(tmp_path / "a.tar", good(600)))
    assert rows.dtype == torch.int64
    assert rows[:, 0].tolist() == [
        256 * block + member
        for block, size in enumerate((256, 256, 88))
        for member in block_permutation(block, size, seed=0, address=Address(0, 0, 0, 0, 0))
    ]
    assert torch.equal(rows, rows[:, :1].expand(-1, 4))
    assert len(opened) == 1


def test_only_what_is_asked_for_is_parsed_and_one_block_is_held(tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setattr(
        token_rows,
        "parse_member",
        lambda *member, _real=token_rows.parse_member: parsed.append(member) or _real(*member),
    )
    rows, _ = reader([write(tmp_path / "a.tar", good(600))])
    addresses = addresses_of(0, 600)
    slots = range(0, 599, 7)
    assert len(rows.read(addresses[:599], slots)) == len(parsed) == len(slots)
    held = rows._open[0, 0]._contents
    assert sum(member is not None for member in held) <= 88


def test_lanes_read_their_own_shards_and_others_ends_close_them(tmp_path):
    shards = [write(tmp_path / f"{i}.tar", [[100 * i + j] * 4 for j in range(4)]) for i in range(3)]
    rows, _ = reader(shards)
    steps = [
        [*addresses_of(0, 2), *addresses_of(1, 2, lane=1)],
        [*addresses_of(0, 4, start=2), *addresses_of(1, 4, start=2, lane=1), *addresses_of(2, 1, lane=1)],
    ]
    drawn = torch.cat([rows.read(steps[0], [0, 3]), rows.read(steps[1], [0, 4])])
    assert [row[0].item() // 100 for row in drawn] == [0, 1, 0, 2]
    assert set(rows._open) == {(0, 1)}  # lane 0's shard was read to its end by someone else
    rows.close()
    assert not rows._open


def test_a_reader_can_start_in_the_middle_and_go_on_in_a_later_pass(tmp_path):
    shard = write(tmp_path / "a.tar", good(600))
    whole, _ = read_all(shard)
    rows, _ = reader([shard])
    late = addresses_of(0, 600, start=300)
    assert torch.equal(rows.read(late, range(300)), whole[300:])
    rows.read(addresses_of(0, 9), range(9))
    again = rows.read(addresses_of(0, 600, data_pass=1), range(600))
    assert sorted(again[:, 0].tolist()) == list(range(600))
    assert not torch.equal(again, whole)


def test_special_ids(tmp_path):
    row = row_of([5, -1, -2, 999], FORMAT, where="m", window=lambda starts: 0)
    assert row == [5, -1, 998, 999]


def test_longer_members_give_a_window_that_the_seed_and_the_place_decide(tmp_path):
    shard = write(tmp_path / "a.tar", [list(range(100 * i, 100 * i + 10)) for i in range(9)])
    rows, _ = read_all(shard)
    assert torch.equal(rows.diff(dim=1), torch.ones(9, 3, dtype=torch.int64))
    starts = (rows[:, 0] % 100).tolist()
    assert set(starts) <= set(range(7))
    assert len(set(starts)) > 2
    assert torch.equal(read_all(shard)[0], rows)
    reader_of_two, _ = reader([shard, shard])
    other = reader_of_two.read(addresses_of(1, 9, lane=5), range(9))
    assert sorted((other[:, 0] % 100).tolist()) != sorted(starts)


@pytest.mark.parametrize(("starts", "window"), [(1, [0, 1, 2, 3]), (4, [3, 4, 5, 6])])
def test_a_window_may_be_first_or_last(starts, window):
    def last(number):
        assert number == starts
        return number - 1

    assert row_of(list(range(3 + starts)), FORMAT, where="m", window=last) == window


BAD = [
    ([1, 2, 3], "short sequence", "has 3 tokens; expected at least 4"),
    ([1, 2, 3, 1000], "id outside vocabulary", r"has the id 1000 at position 3; expected ids in \[0, 1000\)"),
    ([1, -3, 3, 4], "id outside vocabulary", "has the id -3 at position 1"),
    (b"[1, 2", "bad member", "cannot be read"),
    ([1, 2, 3, "x"], "bad member", "member .* cannot be read"),
    (None, "bad member", "it is no regular file"),
]


@pytest.mark.parametrize(("tokens", "reason", "message"), BAD)
def test_bad_members(tmp_path, tokens, reason, message):
    shard = write(tmp_path / "a.tar", [*good(3), tokens, [7] * 4])
    with pytest.raises(ShardError, match=message) as error:
        read_all(shard)
    assert error.value.reason == reason
    for words in (shard.path, "0003.json", "--on-bad-data skip"):
        assert words in str(error.value)
    rows, skipped = read_all(shard, on_bad="skip")
    assert sorted(rows[:, 0].tolist()) == [-1, 0, 1, 2, 7]
    assert rows[rows[:, 0] < 0].tolist() == [[-1] * 4]
    assert skipped == {reason: 1}


def test_a_shard_with_fewer_members_than_promised(tmp_path):
    shard = write(tmp_path / "a.tar", good(5), promised=300)
    with pytest.raises(
        ShardError, match=r"a\.tar holds 5 sequences; its manifest says 300.*--on-bad-data skip"
    ) as error:
        read_all(shard)
    assert error.value.reason == "missing sequences"
    rows, skipped = read_all(shard, on_bad="skip")
    assert sorted(rows[:, 0].tolist()) == [-1] * 295 + list(range(5))
    assert skipped == {"missing sequences": 295}


def test_a_shard_with_more_members_than_promised(tmp_path):
    shard = write(tmp_path / "a.tar", good(9), promised=5)
    with pytest.raises(ShardError, match=r"a\.tar holds 9 sequences; its manifest says 5.*--on-bad-data skip") as error:
        read_all(shard)
    assert error.value.reason == "surplus sequences"
    rows, skipped = read_all(shard, on_bad="skip")
    assert sorted(rows[:, 0].tolist()) == list(range(5))
    assert skipped == {"surplus sequences": 4}


def test_surplus_is_counted_by_whoever_reads_the_last(tmp_path):
    shard = write(tmp_path / "a.tar", good(9), promised=5)
    counts = []
    for slots in ([0, 2], [1, 3, 4]):
        rows, skipped = reader([shard], on_bad="skip")
        rows.read(addresses_of(0, 5), slots)
        counts.append(dict(skipped))
    assert counts == [{}, {"surplus sequences": 4}]


def test_a_shard_that_breaks_in_the_middle(tmp_path):
    shard = write(tmp_path / "a.tar", good(300), cut=1024 * 280 + 100)  # header and content take 512 bytes each
    with pytest.raises(ShardError, match=r"a\.tar cannot be read .*--on-bad-data skip") as error:
        read_all(shard)
    assert error.value.reason == "broken shard"
    rows, skipped = read_all(shard, on_bad="skip")
    assert sorted(rows[:, 0].tolist()) == [-1] * 20 + list(range(280))
    assert skipped == {"broken shard": 20}


def test_a_shard_that_breaks_behind_its_last_member(tmp_path):
    shard = write(tmp_path / "a.tar", good(5), cut=1024 * 5)
    with pytest.raises(ShardError, match=r"a\.tar cannot be read"):
        read_all(shard)
    rows, skipped = read_all(shard, on_bad="skip")
    assert (rows >= 0).all()
    assert skipped == {"broken shard": 1}


def test_a_shard_that_is_not_there(tmp_path):
    rows, skipped = read_all(Shard(str(tmp_path / "absent.tar"), 3), on_bad="skip")
    assert rows.tolist() == [[-1] * 4] * 3
    assert skipped == {"broken shard": 3}


def test_bad_data_does_not_change_what_comes_after_it(tmp_path):
    members = good(40)
    clean = [write(tmp_path / "a.tar", members), write(tmp_path / "b.tar", members)]
    bad = [write(tmp_path / "c.tar", [*members[:7], [1], *members[8:]]), write(tmp_path / "d.tar", members, cut=30_000)]
    order = Order([[40, 40]], seed=0, lanes=2)
    step = order.step(80)
    expected = reader(clean)[0].read(step, range(80))
    rows = reader(bad, on_bad="skip")[0].read(step, range(80))
    there = rows[:, 0] >= 0
    assert 60 < there.sum() < 79
    assert torch.equal(rows[there], expected[there])


def test_words_are_checked():
    with pytest.raises(ValueError, match=r"on_bad is 'ignore'; expected 'raise' or 'skip' \(--on-bad-data\)"):
        bad_data_policy("ignore", Counter())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"row_format": RowFormat(0, 9)}, "seq_len is 0; expected at least 1"),
        ({"row_format": RowFormat(9, 0)}, "vocab_size is 0; expected at least 1"),
        ({"rank": 2}, "rank is 2 of world_size 2; expected 0 <= rank < world_size"),
        ({"rank": -1}, "rank is -1 of world_size 2"),
        ({"batch_size": 5}, "batch_size is 5, which 2 ranks cannot share evenly; expected a multiple of 2"),
        ({"on_bad": "no"}, "on_bad is 'no'"),
        ({"data_key": "tx"}, "data_key is 'tx'; expected one of txt, json, json.gz"),
    ],
)
def test_bad_arguments(arguments, message):
    right = Batching(4, FORMAT, world_size=2)
    right.check()
    with pytest.raises(ValueError, match=message):
        right._replace(**arguments).check()
