import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.lm.urls import expand_braces, join_url, open_url, parent_url, read_text_url, resolve_url


@pytest.mark.parametrize("text", ["a/b.tar", "/a/b.tar", "s3://bucket/a.tar", "gs://bucket/a b.tar", "file:///a", ""])
def test_paths_and_urls_stay(text):
    assert resolve_url(text) == text
    assert resolve_url(text, allow_commands=True) == text


@pytest.mark.parametrize(
    "command",
    [
        "aws s3 cp s3://bucket/a.tar -",
        "  aws   s3 cp\ts3://bucket/a.tar  - ",
        "aws s3 cp --no-progress --quiet s3://bucket/a.tar -",
        "aws s3 cp s3://bucket/a.tar - --only-show-errors",
        "aws --no-sign-request s3 cp s3://bucket/a.tar -",
        "aws s3 cp 's3://bucket/a.tar' -",
        'aws s3 cp "s3://bucket"/a.tar "-"',
        "'aws' s3 cp s3://bucket/a.tar -",
    ],
)
@pytest.mark.parametrize("allow_commands", [False, True])
def test_a_copy_to_stdout_is_a_url(command, allow_commands):
    assert resolve_url(f"pipe:{command}", allow_commands=allow_commands) == "s3://bucket/a.tar"


def test_blanks_in_a_quoted_url_stay():
    assert resolve_url("pipe:aws s3 cp 's3://bucket/a b.tar' -") == "s3://bucket/a b.tar"


@pytest.mark.parametrize(
    "command",
    [
        "",
        "cat a.tar",
        "aws s3 cp s3://bucket/a.tar",
        "aws s3 cp s3://bucket/a.tar b.tar",
        "aws s3 cp - s3://bucket/a.tar",
        "aws s3 mv s3://bucket/a.tar -",
        "aws s3 cp a.tar -",
        "aws s3 cp s3://bucket/a.tar - | gunzip",
        "aws s3 cp s3://bucket/a.tar -; rm -r data",
        "aws s3 cp s3://bucket/a.tar - ; rm -r data",
        "aws s3 cp s3://bucket/a.tar - && true",
        "aws s3 cp s3://bucket/a.tar - # comment",
        "aws s3 cp s3://bucket/$NAME.tar -",
        "aws s3 cp s3://bucket/`id`.tar -",
        "aws s3 cp --profile other s3://bucket/a.tar -",
        "aws s3 cp --endpoint-url http://a s3://bucket/a.tar -",
        "aws s3 cp --range bytes=0-9 s3://bucket/a.tar -",
        "aws s3 cp 's3://bucket/a.tar -",
        "sudo aws s3 cp s3://bucket/a.tar -",
    ],
)
def test_other_commands_need_permission(command):
    text = f"pipe:{command}"
    with pytest.raises(ValueError, match=r"would run a command; .*--allow-pipe-commands if you trust") as caught:
        resolve_url(text)
    assert repr(text) in str(caught.value)
    assert resolve_url(text, allow_commands=True) == text


def test_no_command_runs_without_permission(tmp_path):
    with pytest.raises(ValueError, match="--allow-pipe-commands"):
        read_text_url(f"pipe:touch {tmp_path}/ran")
    assert not list(tmp_path.iterdir())


def test_a_local_file_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789")
    for url in (str(path), f"file://{path}"):
        with open_url(url) as stream:
            assert [stream.read(4), stream.read(4), stream.read(4), stream.read(4)] == [b"0123", b"4567", b"89", b""]
        with open_url(url) as stream:
            assert (stream.read(1), stream.read()) == (b"0", b"123456789")
        assert read_text_url(url) == "0123456789"


def test_absent_files_are_named(tmp_path):
    for url, words in (
        (f"{tmp_path}/absent", "there is no file at"),
        (f"file://{tmp_path}/absent", "there is nothing at"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{words} {url}"):
            read_text_url(url)


def test_a_folder_is_no_file(tmp_path):
    for url in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(OSError, match=r"[Ii]s a directory"):
            read_text_url(url)


def test_texts_are_utf_8(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=rf"{path} is no UTF-8 text .*expected a text file"):
        read_text_url(str(path))


def test_unknown_schemes_are_named():
    with pytest.raises(OSError, match=r"cannot read foo://a/b \(ValueError: Protocol not known: foo\)"):
        read_text_url("foo://a/b")


def test_without_fsspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"s3://a/b needs fsspec, and s3fs for S3 .*pip install 'moekit\[s3\]'"
    ):
        read_text_url("s3://a/b")


def test_errors_of_the_caller_stay_as_they_are(tmp_path):
    (tmp_path / "a").touch()
    for url in (f"{tmp_path}/a", f"file://{tmp_path}/a", "pipe:yes", "pipe:exit 3"):
        with pytest.raises(KeyError, match="mine"), open_url(url, allow_commands=True):
            raise KeyError("mine")


def test_the_output_of_a_command_is_read():
    assert read_text_url("pipe:printf 'a b' | tr a c", allow_commands=True) == "c b"
    with open_url("pipe:printf 12345", allow_commands=True) as stream:
        assert [stream.read(2), stream.read(2), stream.read(2), stream.read(2)] == [b"12", b"34", b"5", b""]


def test_a_command_does_not_read_our_input():
    ours, (reading, writing) = os.dup(0), os.pipe()
    os.write(writing, b"meant for another")
    os.close(writing)
    os.dup2(reading, 0)
    try:
        assert read_text_url("pipe:cat", allow_commands=True) == ""
    finally:
        os.dup2(ours, 0)
        os.close(ours)
        os.close(reading)


def read_until(url, *, size):
    """Read until something comes short."""
    with open_url(url, allow_commands=True) as stream:
        while len(stream.read(size)) == size:
            pass
        pytest.fail("the end of a command that failed was handed out")


@pytest.mark.parametrize("size", [-1, 2, 3, 100])
def test_a_command_that_fails_is_an_error_at_the_end_of_its_output(size):
    with pytest.raises(OSError, match="the command 'printf ab; exit 7' failed with exit status 7; run it by hand"):
        read_until("pipe:printf ab; exit 7", size=size)
    with pytest.raises(OSError, match="failed with exit status 127"):
        read_until("pipe:moekit-no-such-command 2>/dev/null", size=size)


@pytest.mark.parametrize("command", ["exec yes", "yes; exit $?", "cat /dev/zero"])
def test_a_command_may_be_left_early(command):
    with open_url(f"pipe:{command}", allow_commands=True) as stream:
        assert len(stream.read(3)) == 3


def test_only_the_broken_pipe_is_forgiven():
    with pytest.raises(OSError, match="failed with exit status 7"):  # noqa: SIM117
        with open_url("pipe:yes; exit 7", allow_commands=True) as stream:
            stream.read(3)
    with pytest.raises(OSError, match="failed with exit status 141"):
        read_text_url("pipe:exit 141", allow_commands=True)
    with pytest.raises(OSError, match="failed with exit status 141"), open_url("pipe:exit 141", allow_commands=True):
        pass  # nothing is read, yet there was nothing to leave early


def children() -> set[str]:
    """Return the processes that this one started and that are not reaped, those that ended included."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_commands_leave_no_process_and_no_file_behind():
    before, started = len(os.listdir("/proc/self/fd")), children()
    for _ in range(3):
        with open_url("pipe:yes", allow_commands=True) as stream:
            stream.read(3)
    assert len(os.listdir("/proc/self/fd")) == before
    assert children() <= started


@pytest.mark.parametrize(
    ("url", "parent", "beside"),
    [
        ("s3://bucket/a/b.jsonl", "s3://bucket/a", "s3://bucket/a/c.tar"),
        ("s3://bucket/b.jsonl", "s3://bucket", "s3://bucket/c.tar"),
        ("pipe:aws s3 cp s3://bucket/a/b.jsonl -", "s3://bucket/a", "s3://bucket/a/c.tar"),
        ("/a/b.jsonl", "/a", "/a/c.tar"),
        ("a/b.jsonl", "a", "a/c.tar"),
        ("b.jsonl", "", "c.tar"),
        ("/b.jsonl", "/", "/c.tar"),
    ],
)
def test_parents(url, parent, beside):
    assert parent_url(url) == parent
    assert join_url(parent, "c.tar") == beside


def test_a_command_lies_nowhere():
    with pytest.raises(ValueError, match="'pipe:cat a' is a command, which has no folder"):
        parent_url("pipe:cat a")


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("", [""]),
        ("a.tar", ["a.tar"]),
        ("shard_{00000008..00000011}.tar", [f"shard_000000{i}.tar" for i in ("08", "09", "10", "11")]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..011}", ["008", "009", "010", "011"]),
        ("{0..2}", ["0", "1", "2"]),
        ("{7..7}", ["7"]),
        ("{a,b}", ["a", "b"]),
        ("{a,,b}c", ["ac", "c", "bc"]),
        ("{1..3,x}", ["1..3", "x"]),
        ("s3://bucket/{train,val}/{0..1}.tar", [f"s3://bucket/{n}/{i}.tar" for n in ("train", "val") for i in (0, 1)]),
        ("pipe:aws s3 cp s3://b/{0..1}.tar -", ["pipe:aws s3 cp s3://b/0.tar -", "pipe:aws s3 cp s3://b/1.tar -"]),
    ],
)
def test_braces(text, texts):
    assert expand_braces(text) == texts


@given(
    groups=st.lists(st.lists(st.text("abc", min_size=1, max_size=2), min_size=2, max_size=3), max_size=3),
    first=st.integers(0, 120),
    count=st.integers(1, 20),
    width=st.integers(1, 5),
)
def test_braces_stand_for_every_combination(groups, first, count, width):
    numbers = [f"{number:0{width}d}" for number in range(first, first + count)]
    texts = [""]
    for group in [*groups, numbers]:
        texts = [text + "/" + part for text in texts for part in group]
    pattern = "".join("/{" + ",".join(group) + "}" for group in groups) + f"/{{{numbers[0]}..{numbers[-1]}}}"
    assert expand_braces(pattern) == texts


@pytest.mark.parametrize("text", ["{", "}", "a{0..1", "a0..1}", "{a,{b,c}}", "}{", "{0..1}}", "{{0..1}"])
def test_braces_must_be_closed_and_flat(text):
    with pytest.raises(
        ValueError, match=r"the braces of .* are nested or not closed; expected such as shard_\{000\.\."
    ):
        expand_braces(text)


@pytest.mark.parametrize("group", ["", "a", "3..1", "a..c", "0..", "..3", "-1..3", "0..9..2", "0...3", "0..²"])
def test_braces_must_hold_a_list_or_a_range(group):
    with pytest.raises(ValueError, match=r"is neither a list \{a,b\} nor an ascending range") as caught:
        expand_braces(f"x{{{group}}}")
    assert f"{{{group}}} of 'x" in str(caught.value)


def test_braces_must_not_stand_for_too_much():
    with pytest.raises(ValueError, match=r"\{0\.\.1000000\} of .* stands for more than 1,000,000 names"):
        expand_braces("{0..1000000}")
    with pytest.raises(ValueError, match="stands for more than"):
        expand_braces("{0..999999999999999999999999}")
    with pytest.raises(ValueError, match=r"stands for 1,001,000 names; expected at most 1,000,000"):
        expand_braces("{0..1000}{0..999}")
