"""What programs print is what users named."""

import pytest
from rich.table import Table

from moekit.lm.consoles import plain_console, print_lines, print_warnings, wide_console

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
