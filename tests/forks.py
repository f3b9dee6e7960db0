"""Programs that start in milliseconds: forked from a process that has imported what they need."""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Self

# Reads a line for each program and answers with its process id, then with how it ended. The child leaves the loop, and
# ends as Python ends: by the end of the script, by an exception, or by sys.exit.
_SERVER = """
import importlib, json, os, runpy, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    words, output = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), 1)
os.dup2(1, 2)
kind, sys.argv = words[0], words[1:] if words[0] == "-m" else words
if kind == "-c":
    sys.argv = ["-c", *words[2:]]
    exec(words[1], {"__name__": "__main__", "__builtins__": __builtins__})
elif kind == "-m":
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
else:
    sys.path[0] = os.path.dirname(words[0])
    runpy.run_path(words[0], run_name="__main__")
"""


class ForkServer:
    """A process with modules imported; each program is a fork of it, and one runs at a time.

    Args:
        modules: what is imported; nothing that starts threads.
        environment: of the server and of its programs.
        folder: where they start; by default where this process is.
    """

    def __init__(self, *modules: str, environment: Mapping[str, str], folder: str | None = None) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=dict(environment),
        )

    def start(self, *words: str) -> "Program":
        """Start a program by the words that would follow ``python``: a script, ``-m`` module or ``-c`` code."""
        assert self._server.stdin is not None
        output = tempfile.NamedTemporaryFile()  # noqa: SIM115  it is closed by Program.ended
        self._server.stdin.write(json.dumps([words, output.name]) + "\n")
        self._server.stdin.flush()
        return Program(int(self.answer(60)), self, output)

    def answer(self, limit: float) -> str:
        """Read a line of the server's.

        Raises:
            TimeoutError: if there is none within ``limit`` seconds, or the server has ended.
        """
        assert self._server.stdout is not None
        ready, _, _ = select.select([self._server.stdout], [], [], limit)
        line = self._server.stdout.readline() if ready else ""
        if not line:
            raise TimeoutError(f"the fork server said nothing within {limit} s; its status is {self._server.poll()}")
        return line

    def close(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Program:
    """A program that runs: its process id, and how it ends."""

    def __init__(self, pid: int, server: ForkServer, output: "tempfile._TemporaryFileWrapper[bytes]") -> None:
        self.pid = pid
        self._server, self._output, self._status = server, output, None

    def ended(self, limit: float) -> tuple[int, str]:
        """Wait for the end; return the exit status, that of a signal being negative, and what was written.

        Raises:
            TimeoutError: after ``limit`` seconds; the program is killed.
        """
        try:
            status = int(self._server.answer(limit))
        except TimeoutError:
            os.kill(self.pid, 9)
            raise
        with self._output as file:
            return status, file.read().decode()
