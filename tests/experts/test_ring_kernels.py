"""The kernels for Hopper whose warps do one thing each: they compile, and what is computed stays in registers.

The way back through gated activations may take the room of a few addresses in a thread's own memory. They run on the
GPU alone: tests/experts/test_cuda_fused.py and test_cuda_fused_forms.py hold them to the loop.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ring_launches
import torch

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile all launches; return the folder of their code."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    program = [sys.executable, "-W", "ignore", str(ring_launches.__file__), str(folder)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def tool() -> Path:
    import triton.backends.nvidia as backend

    return Path(str(backend.__file__)).parent / "bin" / "cuobjdump"


@pytest.mark.skipif(not tool().exists(), reason="needs the tools that come with Triton for NVIDIA cards")
@pytest.mark.parametrize("name", ring_launches.NAMES)
def test_a_kernel_compiles_for_hopper_and_computes_in_registers(name: str, compiled: Path) -> None:
    usage, code = (
        subprocess.run([tool(), option, compiled / f"{name}.cubin"], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    assert int(stack) <= (32 if name == "back" else 0), "a thread needs memory of its own"
    # Of the products that a step is made of, none waits for the one before it.
    waits, products = code.count("WARPGROUP.DEPBAR"), len(re.findall(r"HGMMA\.64x256x16", code))
    assert products >= 8  # four of a step, in two places at least
    assert waits < products // 2


def test_what_the_kernels_do_not_take() -> None:
    from moekit.experts.kernels._ring_loads_triton import takes
    from moekit.experts.kernels._tiles_triton import matrices

    def of(dim: int, hidden: int, *, turned: bool = False) -> Any:
        return matrices(torch.empty(2, hidden, dim).transpose(1, 2) if turned else torch.empty(2, dim, hidden))

    assert takes(of(256, 384), 256, halved=True)
    assert takes(of(256, 328), 256, halved=False)
    assert takes(of(128, 384), 2 * 128, halved=False), "two matrices of half the depth"
    assert takes(of(256, 384, turned=True), 256, halved=True)
    assert takes(matrices(torch.empty(2, 256, 768).chunk(2, 2)[1]), 256, halved=True), "packed halves"
    assert not takes(of(264, 384), 264, halved=False), "steps past the last column of the rows"
    assert not takes(of(192, 384), 192, halved=False), "too few steps to write a tile behind"
    assert not takes(of(256, 320), 256, halved=True), "a tile that would run into the other half"
    assert not takes(of(256, 324), 256, halved=False), "columns of no whole 16 bytes"
