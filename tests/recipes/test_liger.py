"""Liger's row of the layer benchmark computes the same layer, where Liger is installed: output and every gradient."""

from functools import partial

import pytest
import torch
from interpreted import DEVICE, run_interpreted, runs_kernels, starts_interpreter

from moekit.recipes.bench import peers
from moekit.recipes.bench.rows import make_case, moekit_rows
from moekit.recipes.bench.shapes import LayerShape

pytest.importorskip("liger_kernel")


@starts_interpreter
def test_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGER_FUSED_MOE_AUTOTUNE", "0")
    run_interpreted(__file__)


@runs_kernels
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("load", ["uniform", "dead"])
def test_it_computes_the_same_layer(load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "need_cuda", lambda case: None)
    case = make_case(LayerShape("", 96, 32, 64, 4, 2), load, device=DEVICE, dtype=torch.float32)
    row, loop = peers.peer_rows()["liger"](case), moekit_rows()["loop"](case)
    y, expected = row.forward(), loop.forward()
    of_x, of_gate, of_gate_up, of_down = torch.autograd.grad(y, row.leaves, row.grad)
    x, gate, *of_ups, down = torch.autograd.grad(expected, loop.leaves, loop.grad)
    pairs = {
        "y": (y, expected),
        "x": (of_x, x),
        "gate": (of_gate, gate),
        "gate and up": (of_gate_up, torch.cat(of_ups, 2).transpose(1, 2)),
        "down": (of_down, down.transpose(1, 2)),
    }
    for name, (found, want) in pairs.items():
        # Liger leaves float32 to Triton, which takes TF32 on a GPU.
        rtol, atol = (1e-4, 1e-5) if DEVICE == "cpu" else (0.0, 4e-3 * want.abs().max().item())
        torch.testing.assert_close(found, want, rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))
