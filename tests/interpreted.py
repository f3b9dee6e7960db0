"""Where kernels run in tests: on the GPU, or, without one, under Triton's interpreter in a process of its own.

Triton decides when it is imported whether to interpret, and Inductor may import it too: so never in this process.
"""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="runs in the process that test_under_the_interpreter starts"
)
starts_interpreter = pytest.mark.skipif(INTERPRETED, reason="this is that process")


def run_interpreted(file: str) -> None:
    """Run a file's tests under the interpreter; fail with their output if one fails, or none ran."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{file}\n")
    server.stdin.flush()
    status, said = json.loads(server.stdout.readline())
    assert status == 0, said  # 5 is that no test was found
    assert " passed" in said, said


@cache
def _server() -> "subprocess.Popen[str]":
    """Start the process that runs files, once in this one: to import torch and Triton takes two seconds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins take two seconds to import
    words = [sys.executable, str(Path(__file__).with_name("interpreter_server.py"))]
    server = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # which ends its input
    return server


def _sort_by_numpy() -> None:
    """Give the interpreter numpy's sort: its own is a network of reductions, one number at a time, a second for 700."""
    import numpy
    import triton.language
    from triton.runtime.interpreter import TensorHandle

    def ascending(x: Any, dim: int = -1) -> Any:
        return triton.language.core.tensor(TensorHandle(numpy.sort(x.handle.data, dim), x.handle.dtype), x.type)

    triton.language.sort = ascending


def _patch_once() -> None:
    """Let the interpreter put its functions into Triton's modules once a kernel, not at every call of a function in it.

    Looking through the modules took a quarter of the time of these tests.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, execute, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn: Any) -> Any:
        seen = frozenset(id(each) for each in fn.__globals__.values() if each is tl or each is tl.core)
        if seen in patched:
            return None  # which nobody reads: a kernel patches first, with nothing patched yet
        patched.add(seen)
        return patch(fn)

    def execute_one(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return execute(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, execute_one


def _look_up_once() -> None:
    """Let the interpreter make what a type says once, not at every operation: half of the time of these tests.

    It also looks whether each sum of integers overflows, and tells nobody.
    """
    from triton.language import core
    from triton.runtime import interpreter

    builder, numpy_type = interpreter.interpreter_builder, interpreter._get_np_dtype
    builder.options = replace(builder.options, sanitize_overflow=False)
    numpy_types: dict[str, Any] = {}

    def numpy_type_once(kind: Any) -> Any:
        if kind.name not in numpy_types:
            numpy_types[kind.name] = numpy_type(kind)
        return numpy_types[kind.name]

    def make_once(kind: Any, key: Callable[..., Any], *own: str) -> None:
        make, made = kind.__init__, {}

        def make_or_copy(self: Any, *arguments: Any) -> None:
            name = key(*arguments)
            if name not in made:
                make(self, *arguments)
                made[name] = self.__dict__.copy()
            self.__dict__.update(made[name], **dict(zip(own, arguments, strict=False)))

        kind.__init__ = make_or_copy

    interpreter._get_np_dtype = numpy_type_once
    make_once(core.block_type, lambda element, shape: (element.name, *map(core._unwrap_if_constexpr, shape)))
    make_once(core.tensor, lambda handle, kind: kind.name, "handle")


if INTERPRETED:
    _sort_by_numpy()
    _patch_once()
    _look_up_once()


class Calls(TorchDispatchMode):
    """Record which operators run, and on what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    @property
    def names(self) -> list[str]:
        return [func.name() for func, _ in self.calls]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def own(self) -> list[str]:
        """Name those of moekit, in order."""
        return [name.removeprefix("moekit::") for name in self.names if name.startswith("moekit::")]
