"""Run files of tests under Triton's interpreter, each in a fork of this process, which has imported torch and Triton.

A program that ``interpreted.run_interpreted`` starts once: a line of its input is a file, and a line of its output is
the exit status and the output of that file's tests, as JSON.
"""

import json
import os
import signal
import sys
import tempfile

import pytest
import triton.runtime.interpreter  # noqa: F401

import moekit.experts.fused  # noqa: F401

LIMIT = 600  # seconds for a file
OPTIONS = ["-q", "-x", "-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin"]


def run(file: str) -> tuple[int, str]:
    """Run a file's tests in a fork; return exit status and output."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT)
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
            status = pytest.main([*OPTIONS, file])
            sys.stdout.flush()
            os._exit(status)
        _, ended = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(ended), output.read()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(line.rstrip("\n"))), flush=True)
