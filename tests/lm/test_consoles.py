"""What programs print is what users named."""

import errno
import io
import os
import sys

import pytest
from rich.live import Live
from rich.table import Table

from moekit.lm.consoles import plain_console, print_lines, print_warnings, wide_console
from moekit.lm.streams import print_text

NAME = "[/v1] a[bold]b :car:"


@pytest.mark.parametrize("make", [plain_console, wide_console])
def test_names_are_printed_as_they_are_wherever_they_stand(capsys, make):
    console, table = make(), Table(NAME, "x", title="t")
    table.add_row(NAME, "x")
    console.print(table)
    console.print(f"picture: {NAME}")
    console.rule(NAME)
    print_lines(console, NAME, NAME)
    print_warnings(console, NAME)
    assert capsys.readouterr().out.count(NAME) == 7


def test_a_pipe_has_the_columns_that_tables_need_unless_the_user_says_how_many(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert (plain_console().width, plain_console(piped=180).width) == (120, 180)
    monkeypatch.setenv("COLUMNS", "90")
    assert (plain_console(piped=180).width, wide_console().width) == (90, 120)


@pytest.mark.parametrize(("encoding", "half"), [("ascii", "~"), ("latin-1", "\xb1"), ("utf-8", "\xb1")])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_terminal_without_the_characters_ends_no_run(monkeypatch, encoding, half, errors):
    """As an old cluster's, whose locale is C or of one byte a character; a file's name may have bytes of any."""
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding=encoding, errors=errors))
    console, table = plain_console(), Table("a", "b", title="\u4e2d")
    table.add_row("\u2581\u2588", "3 \xb1 1")
    console.print(table)
    print_lines(console, "runs/\udcff")
    console.rule()
    sys.stdout.flush()
    printed = said.getvalue()
    assert b"runs/\xff\n" in printed
    assert f"3 {half} 1".encode(encoding) in printed
    if encoding != "utf-8":
        assert b" 18 " in printed
        assert b"?" in printed
        assert b"\n" + b"-" * 100 in printed
        assert b"|" in printed
    else:
        assert "\u2581\u2588 \u2502".encode() in printed


def test_a_reader_that_goes_away_ends_no_run(monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    console = plain_console()
    monkeypatch.setattr(sys, "stdout", Closed())
    for _ in range(3):
        print_lines(console, "for nobody")
    assert capsys.readouterr().err.count("nobody reads standard output any more") == 1


class Failing(io.StringIO):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_terminal_that_is_closed_or_a_full_disk_ends_no_run(monkeypatch, capsys, number):
    console = plain_console()
    with Live("progress", console=console, auto_refresh=False):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Failing(number))
            print_lines(console, "for nobody", "again")
        print_lines(console, "nor after it")
    said = capsys.readouterr()
    assert said.err.count(f"standard output cannot be written to ([Errno {number}] {os.strerror(number)});") == 1
    assert "nor after it" not in said.out


def test_standard_error_may_be_gone_with_it(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Failing(errno.EPIPE))
    console = plain_console()
    print_lines(console, "for nobody")
    print_text("nor this")
    assert console.quiet


def test_a_text_is_printed_in_characters_that_there_are(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    print_text("a/\u6c34 \u2588")
    assert raw.getvalue() == b"a/? 8\n"


@pytest.mark.parametrize("columns", ["0", "", "wide"])
def test_columns_that_are_none_leave_a_pipe_as_wide_as_tables_need(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert plain_console().width == 120


def test_what_a_stream_does_with_such_characters_by_itself_stays(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace"))
    plain_console()
    assert sys.stdout.errors == "backslashreplace"
