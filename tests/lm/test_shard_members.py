import gc
import glob
import gzip
import io
import json
import os
import pickle
import re
import tarfile
import time
from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moekit.lm import shard_members as module
from moekit.lm.shards import ShardError, parse_member, shard_bytes, shard_members

ROWS = [[i, 10 * i, 100 * i] for i in range(4)]
zipped = partial(gzip.compress, mtime=0)  # the same bytes, and so the same names of tests, in every process


def entry(name, content=b"[1, 2]", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, io.BytesIO(content)


def tar_of(*entries, form=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for member, content in entries:
            tar.addfile(member, content)
    return buffer.getvalue()


# WebDataset's writer stores times as floats, so each member has an extended header.
EXTENDED = tar_of(*(entry(f"{i}.json", json.dumps(row).encode(), mtime=1.5 + i) for i, row in enumerate(ROWS)))
LONG_NAMES = tar_of(*(entry(f"{i}{'x' * 150}.json") for i in range(3)), form=tarfile.GNU_FORMAT)
TARS = {"ustar": shard_bytes(ROWS, first=0), "pax": EXTENDED, "gnu": LONG_NAMES}


def members_of(folder, content, **options):
    """Return the members that can be read, and the error that ended it, if any."""
    path = folder / "shard.tar"
    path.write_bytes(content)
    found = []
    try:
        for member in shard_members(str(path), **options):
            found.append(member)
    except ShardError as raised:
        error = raised
    else:
        return found, None
    assert str(path) in str(error)
    return found, error


@pytest.mark.parametrize("kind", TARS)
def test_members_come_in_order(tmp_path, kind):
    members, error = members_of(tmp_path, TARS[kind])
    assert error is None
    with tarfile.open(fileobj=io.BytesIO(TARS[kind])) as tar:
        assert members == [(member.name, tar.extractfile(member).read()) for member in tar]
    assert len(members) in (3, 4)


def end_of_members(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        last = tar.getmembers()[-1]
        return last.offset_data + -(-last.size // 512) * 512


@pytest.mark.parametrize("kind", TARS)
def test_every_cut_is_noticed(tmp_path, kind):
    content = TARS[kind]
    whole, _ = members_of(tmp_path, content)
    end = end_of_members(content)
    for length in [*range(0, end + 513, 64), *range(511, end + 512, 512), end + 1, end + 511]:
        members, error = members_of(tmp_path, content[:length])
        assert members == whole[: len(members)]
        if length < end + 512:
            assert error is not None, length
            assert error.reason == "broken shard"
        else:
            assert (members, error) == (whole, None)


def test_a_cut_between_two_members_is_named(tmp_path):
    content = TARS["ustar"]
    members, error = members_of(tmp_path, content[:2048])
    assert [name for name, _ in members] == ["00000000.json", "00000001.json"]
    assert "it ends without the end-of-archive mark" in str(error)
    with tarfile.open(fileobj=io.BytesIO(content[:2048])) as tar:
        assert len(tar.getmembers()) == 2  # tarfile itself says nothing


@pytest.mark.parametrize("kind", TARS)
@given(data=st.data())
def test_flipped_bytes_are_noticed_or_harm_nothing_else(tmp_path_factory, kind, data):
    folder = tmp_path_factory.getbasetemp()
    content = bytearray(TARS[kind])
    end = end_of_members(content) + 1024
    # A name without a checksum ("gnu"), or two flips that leave a checksum as it was, may make a member look like a
    # companion, which a data key passes over: only its count tells.
    data_key = None if kind == "gnu" else data.draw(st.sampled_from([None, "json"]))
    most = 3 if data_key is None else 1
    places = data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=most, unique=True))
    for place in places:
        content[place] ^= data.draw(st.integers(1, 255))
    whole, _ = members_of(folder, TARS[kind])
    members, error = members_of(folder, bytes(content), data_key=data_key)
    if error is None:
        assert [len(content) for _, content in members] == [len(content) for _, content in whole]
        changed = sum(a != b for a, b in zip(members, whole, strict=True))
        assert changed <= len(places)
    for name, content in members:
        try:
            assert set(map(type, parse_member(name, content))) <= {int}
        except ShardError as bad:
            assert bad.reason == "bad member"  # noqa: PT017


@given(content=st.binary(max_size=2048))
@example(content=b"\0" * 511)
def test_noise_is_no_shard(tmp_path_factory, content):
    members, error = members_of(tmp_path_factory.getbasetemp(), content)
    assert not members
    if len(content) < 512 or any(content):
        assert error is not None


def test_a_hole_in_a_file_is_noticed(tmp_path):
    content = bytearray(TARS["ustar"])
    content[1024:2048] = bytes(1024)  # as a download leaves that reserves the file first
    members, error = members_of(tmp_path, bytes(content))
    assert len(members) == 1
    assert "there are data after the end-of-archive mark" in str(error)


def test_an_empty_archive_has_no_members(tmp_path):
    assert members_of(tmp_path, tar_of()) == ([], None)
    assert members_of(tmp_path, tar_of(), data_key="json") == ([], None)


@pytest.fixture(params=["this Python's", "strict"])
def refuses_below_zero(request, monkeypatch):
    """Newer Pythons refuse sizes below 0 (CVE-2025-8194), by an exception that ``tarfile`` may take for an end."""
    own = tarfile.TarInfo._block

    def strict(self, count):
        if count < 0:
            raise tarfile.InvalidHeaderError("invalid offset")
        return own(self, count)

    if request.param == "strict":
        monkeypatch.setattr(tarfile.TarInfo, "_block", strict)
    try:
        tarfile.TarInfo()._block(-1)
    except tarfile.InvalidHeaderError:
        return True
    return False


@pytest.mark.parametrize("size", [64 * 2**20 + 1, 2**40, -1])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.DIRTYPE])
def test_no_absurd_size_is_believed(tmp_path, size, kind, refuses_below_zero):
    member, _ = entry("a.json")
    member.size, member.type = size, kind
    members, error = members_of(tmp_path, member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert not members
    assert error.reason == "broken shard"
    if size < 0 and refuses_below_zero and kind != tarfile.DIRTYPE:  # which has no blocks to count
        assert "cannot be read as a whole tar: invalid offset" in str(error)
    elif kind in (tarfile.REGTYPE, tarfile.DIRTYPE):
        assert f"member 'a.json' claims {size} bytes; expected at most 64 MiB" in str(error)
    elif size > 0:
        assert re.search(r"a header claims \d+ bytes; expected at most 1 MiB of all headers of a member", str(error))
    else:
        assert "cannot be read as a whole tar: end of file header" in str(error)


@pytest.mark.parametrize("before", [0, 2])
def test_no_absurd_size_of_an_extended_header_is_believed(tmp_path, before, refuses_below_zero):
    for size in ("99999999999", "-512"):
        member, content = entry("a.json", pax_headers={"size": size})
        members, error = members_of(tmp_path, tar_of(*(entry(f"{i}.json") for i in range(before)), (member, content)))
        assert len(members) == before
        refused = refuses_below_zero and size.startswith("-")
        assert ("a header is damaged" if refused else f"claims {size} bytes") in str(error)


def long_named(size):
    """Write a header of a name so long, and the name, for the member that follows; in GNU's format."""
    member, _ = entry("long", b"")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, size
    return member.tobuf(tarfile.GNU_FORMAT) + b"n" * size + bytes(-size % 512)


@pytest.mark.parametrize("sizes", [[2 * 2**20], [2**19, 2**19]])
def test_headers_that_would_fill_memory_are_an_error(tmp_path, sizes):
    content = b"".join(map(long_named, sizes)) + tar_of(entry("a.json"))
    members, error = members_of(tmp_path, tar_of(entry("0.json"))[:1024] + content)
    assert [name for name, _ in members] == ["0.json"]
    assert error.reason == "broken shard"
    assert re.search(r"a header claims \d+ bytes; expected at most 1 MiB of all headers of a member", str(error))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_some_kibibytes_and_large_members_are_read(tmp_path, form):
    names = [f"{i}{'x' * 8192}.json" for i in range(200)]  # in all over 1 MiB
    content = b"[" + b" " * 2**21 + b"]"  # more than headers may have
    members, error = members_of(tmp_path, tar_of(*map(entry, names), entry("large.json", content), form=form))
    assert error is None
    assert [name for name, _ in members] == [*names, "large.json"]
    assert members[-1][1] == content


def test_endless_extended_headers_are_an_error(tmp_path):
    member, _ = entry("a", b"")
    member.type = tarfile.XHDTYPE
    _, error = members_of(tmp_path, member.tobuf(tarfile.USTAR_FORMAT) * 3000 + bytes(1024))
    assert error.reason == "broken shard"


def test_folders_are_passed_over_and_links_have_no_content(tmp_path):
    folder = entry("d", b"", type=tarfile.DIRTYPE)
    links = [
        entry(name, b"", type=kind, linkname="d/a.json")
        for name, kind in (("b.json", tarfile.SYMTYPE), ("b.cls", tarfile.LNKTYPE))
    ]
    content = tar_of(folder, entry("d/a.json"), *links, entry("c.json", b"[3]"))
    expected = [("d/a.json", b"[1, 2]"), ("b.json", None), ("b.cls", None), ("c.json", b"[3]")]
    assert members_of(tmp_path, content) == (expected, None)
    assert members_of(tmp_path, content, data_key="json") == ([expected[0], expected[1], expected[3]], None)
    with pytest.raises(ShardError, match=r"member 'b\.json' cannot be read: it is no regular file") as caught:
        parse_member("b.json", None)
    assert caught.value.reason == "bad member"


def test_a_missing_shard_is_broken(tmp_path):
    for path in (tmp_path / "absent.tar", tmp_path):
        with pytest.raises(ShardError, match="cannot be read as a whole tar") as caught:
            next(shard_members(str(path)))
        assert caught.value.reason == "broken shard"


def test_the_data_key_passes_over_companions(tmp_path):
    content = tar_of(
        entry("a.json", b"[1]"),
        entry("a.cls", b"7"),
        entry("a.xjson", b"8"),
        entry("x/b.v2.json", b"[2]"),
        entry("b.json.gz"),
    )
    assert members_of(tmp_path, content, data_key="json") == ([("a.json", b"[1]"), ("x/b.v2.json", b"[2]")], None)
    assert len(members_of(tmp_path, content)[0]) == 5
    members, error = members_of(tmp_path, content, data_key="txt")
    assert not members
    assert error.reason == "bad member"
    found = "cls, json, json.gz, v2.json, xjson"
    mend = "Set --data-key, or --val-data-key if the shard is of --val-data"
    assert str(error).endswith(f"ends in .txt; found {found}. {mend}")
    with pytest.raises(ValueError, match=r"data_key is 'npy'; expected one of txt, json, json\.gz"):
        next(shard_members(str(tmp_path / "shard.tar"), data_key="npy"))


def headers_in_memory() -> int:
    gc.collect()  # those of other tests may wait in cycles
    return sum(issubclass(type(thing), tarfile.TarInfo) for thing in gc.get_objects())


def test_headers_are_not_kept(tmp_path):
    (tmp_path / "shard.tar").write_bytes(shard_bytes([[1]] * 100, first=0))
    before = headers_in_memory()
    for name, _ in shard_members(str(tmp_path / "shard.tar")):
        if name == "00000099.json":
            assert headers_in_memory() < before + 50


def test_a_failing_command_is_a_broken_shard(tmp_path):
    (tmp_path / "shard.tar").write_bytes(TARS["ustar"])
    command = f"pipe:head -c 2048 {tmp_path}/shard.tar; exit 3"
    found = []
    with pytest.raises(ShardError, match="failed with exit status 3"):
        found.extend(name for name, _ in shard_members(command, allow_commands=True))
    members = shard_members(f"pipe:cat {tmp_path}/shard.tar; exit 3", allow_commands=True)
    with pytest.raises(ShardError, match="failed with exit status 3"):
        list(members)
    with pytest.raises(ValueError, match="--allow-pipe-commands") as caught:
        next(shard_members(command))
    assert not isinstance(caught.value, ShardError)


def open_pipes():
    return [link for link in map(os.path.realpath, glob.iglob("/proc/self/fd/*")) if "/pipe:" in link]


def test_a_reader_may_stop_early(tmp_path):
    (tmp_path / "shard.tar").write_bytes(TARS["ustar"])
    before = open_pipes()
    members = shard_members(f"pipe:cat {tmp_path}/shard.tar; yes", allow_commands=True)
    assert next(members)[0] == "00000000.json"
    assert len(open_pipes()) > len(before)
    members.close()
    assert open_pipes() == before


@pytest.mark.parametrize(
    ("name", "content", "tokens"),
    [
        ("x.json", b"[1,2 ,\n3]", [1, 2, 3]),
        ("x.json", b"[]", []),
        ("x.json", b"[-1, -9223372036854775808, 9223372036854775807]", [-1, -(2**63), 2**63 - 1]),
        ("x.json.gz", zipped(b"[4]"), [4]),
        ("x.json.gz", zipped(b"[4,") + zipped(b"5]"), [4, 5]),
        ("x.txt", b"""[7, '<|endoftext|>', 9, "<|endoftext|>"]""", [7, 0, 9, 0]),
        ("x.txt", str(ROWS[3]).encode(), ROWS[3]),
    ],
)
def test_members_are_parsed(name, content, tokens):
    assert parse_member(name, content) == tokens


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"[1, 2", "Expecting"),
        ("x.json", b"", "Expecting value"),
        ("x.json", b"\xff\xfe\x00", "codec can't decode"),
        ("x.json", b'{"a": 1}', "it is no list of ints"),
        ("x.json", b"7", "it is no list of ints"),
        ("x.json", b'[1, "a"]', "cannot be interpreted as an integer"),
        ("x.json", b"[1, '<|endoftext|>']", "Expecting value"),
        ("x.json", b"[1, 2.5]", "cannot be interpreted as an integer"),
        ("x.json", b"[1, 2.0]", "cannot be interpreted as an integer"),
        ("x.json", b"[1, NaN]", "cannot be interpreted as an integer"),
        ("x.json", b"[1, true]", "it is no list of ints"),
        ("x.json", b"[false]", "it is no list of ints"),
        ("x.json", "[1, true]".encode("utf-16"), "codec can't decode"),
        ("x.json", b"[1, null]", "cannot be interpreted as an integer"),
        ("x.json", b"[[1]]", "cannot be interpreted as an integer"),
        ("x.json", b"[9223372036854775808]", "int too big"),
        ("x.json", b"[-9223372036854775809]", "int too big"),
        ("x.json", b"[" + b"9" * 5000 + b"]", "Exceeds the limit"),
        ("x.json", b"[" * 100_000, "recursion"),
        ("x.json.gz", b"[1, 2]", "Not a gzipped file"),
        ("x.json.gz", b"", "Expecting value"),
        ("x.json.gz", zipped(b"[1, 2]")[:-1], "ended before"),
        ("x.json.gz", zipped(b"[1, 2]")[:-8] + bytes(8), "CRC check failed"),
        ("x.json.gz", zipped(b"[1, 2]")[:10] + b"\xff" * 20, "invalid block type"),
        ("x.json.gz", zipped(b"[1, 2]") + b"more", "Not a gzipped file"),
        ("x.txt", b"__import__('os')", "Expecting value"),
        ("x.txt", b"(1, 2)", "Expecting value"),
        ("x.txt", b"[1, 'a']", "Expecting value"),
        ("x.npy", b"", "its name ends in none of .json, .json.gz, .txt"),
        ("json", b"[1]", "its name ends in none of .json, .json.gz, .txt"),
    ],
)
def test_bad_members_are_named(name, content, message):
    with pytest.raises(ShardError, match=f"member '{name}' cannot be read: .*Write the shard again") as caught:
        parse_member(name, content)
    assert caught.value.reason == "bad member"
    assert message in str(caught.value)


def test_a_gzip_bomb_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 2**20)
    assert parse_member("x.json.gz", zipped(b"[1]" + b" " * (2**20 - 3))) == [1]
    with pytest.raises(ShardError, match="it decompresses to more than 1 MiB"):
        parse_member("x.json.gz", zipped(b"[1]" + b" " * (2**20 - 2)))


def test_the_error_survives_other_processes():
    error = pickle.loads(pickle.dumps(ShardError("broken", "bad member")))
    assert (str(error), error.reason) == ("broken", "bad member")
    assert ShardError("broken").reason == "broken shard"


def seconds(use):
    start = time.perf_counter()
    for _ in range(20):
        use()
    return (time.perf_counter() - start) / 20


@pytest.mark.parametrize("name", ["x.json", "x.txt"])
def test_parsing_costs_little_more_than_json(name):
    content = json.dumps(list(range(50_000 - 2049, 50_000))).encode()
    times = [(seconds(lambda: parse_member(name, content)), seconds(lambda: json.loads(content))) for _ in range(9)]
    ours, json_alone = map(min, zip(*times, strict=True))
    assert ours < 6 * json_alone  # 1.3 times, 0.13 ms, when the machine is idle; a Python literal takes 20 times
