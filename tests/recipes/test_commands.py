"""The line that a hint names, as the program was really started."""

import sys
from pathlib import Path

import pytest

from moekit.recipes.commands import command_line

SCRIPT = {"prog": "train_moe.py", "launch": "python examples/train_moe.py"}
CONSOLE = {"prog": "moekit train", "launch": "moekit train"}


@pytest.fixture
def moekit(tmp_path, monkeypatch) -> str:
    """A console script that a shell finds."""
    path = tmp_path / "bin/moekit"
    path.parent.mkdir()
    path.write_text("#!/usr/bin/python")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    return str(path)


@pytest.mark.parametrize(
    ("started", "script", "names", "line"),
    [
        (
            ["python3", "-u", "../e/train_moe.py"],
            None,
            SCRIPT,
            "python3 -u ../e/train_moe.py --name 'a b'",
        ),
        (["python", "-m", "moekit"], "/m/moekit/__main__.py", CONSOLE, "python -m moekit train --name 'a b'"),
        (["/v/bin/python", "{moekit}"], None, CONSOLE, "moekit train --name 'a b'"),
        (["/v/bin/python", "/v/bin/moekit"], None, CONSOLE, "/v/bin/moekit train --name 'a b'"),
    ],
)
def test_a_program_names_the_line_that_started_it(monkeypatch, moekit, started, script, names, line):
    started = [word.format(moekit=moekit) for word in started]
    if started[1] == "/v/bin/moekit":  # not on the path
        Path(moekit).unlink()
    given = [*names["prog"].split()[1:], "--name", "a b"]
    monkeypatch.setattr(sys, "argv", [script or started[-1], *given])
    monkeypatch.setattr(sys, "orig_argv", [*started, *given])
    assert command_line(["--name", "a b"], **names) == line


def test_a_call_from_python_and_a_rank_of_torchrun_name_what_is_known(monkeypatch):
    assert command_line(["--name", "a b"], **SCRIPT) == "python examples/train_moe.py --name 'a b'"
    monkeypatch.setattr("moekit.recipes.commands.under_torchrun", lambda: True)
    assert command_line(["--name", "a b"], **SCRIPT) == "(the same torchrun line)"
