"""Peers' rows of the layer benchmark compute the same layer, where they are installed: output and every gradient."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from interpreted import DEVICE, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor

from moekit.recipes.bench import peers
from moekit.recipes.bench.rows import Case, Contender, make_case, moekit_rows
from moekit.recipes.bench.shapes import LayerShape

MODULES = {"liger": "liger_kernel", "scattermoe": "scattermoe"}


@starts_interpreter
@pytest.mark.skipif(not any(find_spec(module) for module in MODULES.values()), reason="no peer is installed")
def test_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGER_FUSED_MOE_AUTOTUNE", "0")
    run_interpreted(__file__)


@runs_kernels
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("load", ["uniform", "dead"])
@pytest.mark.parametrize("peer", MODULES)
def test_it_computes_the_same_layer(peer: str, load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(MODULES[peer])
    monkeypatch.setattr(peers, "need_cuda", lambda case: None)
    case = make_case(LayerShape("", 96, 32, 64, 4, 2), load, device=DEVICE, dtype=torch.float32)
    row, loop = peers.peer_rows()[peer](case), moekit_rows()["loop"](case)
    if peer == "scattermoe":  # it makes weights of its own
        give_weights(row, case)
    y, expected = row.forward(), loop.forward()
    of_x, of_gate, of_firsts, of_down = torch.autograd.grad(y, row.leaves, row.grad)
    x, gate, d_gate, d_up, d_down = torch.autograd.grad(expected, loop.leaves, loop.grad)
    pairs = {
        "y": (y, expected),
        "x": (of_x, x),
        "gate": (of_gate, gate),
        "gate and up": (of_firsts, beside_each_other(peer, d_gate, d_up)),
        "down": (of_down, d_down.transpose(1, 2)),
    }
    for name, (found, want) in pairs.items():
        # Peers leave float32 to Triton, which takes TF32 on a GPU.
        rtol, atol = (1e-4, 1e-5) if DEVICE == "cpu" else (0.0, 4e-3 * want.abs().max().item())
        torch.testing.assert_close(found, want, rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))


@torch.no_grad()
def give_weights(row: Contender, case: Case) -> None:
    _, _, firsts, down = row.leaves
    firsts.copy_(beside_each_other("scattermoe", case.experts.gate, case.experts.up))
    down.copy_(case.experts.down.transpose(1, 2))


def beside_each_other(peer: str, gate: Tensor, up: Tensor) -> Tensor:
    """Return (E, 2F, D) as the peer lays it out, of two times (E, D, F)."""
    return torch.cat([up, gate] if peer == "scattermoe" else [gate, up], 2).transpose(1, 2)
