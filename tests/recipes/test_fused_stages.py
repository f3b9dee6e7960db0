"""The stages of the fused layer are what the layer runs: what they return is its output and its gradients."""

import pytest
import torch
from interpreted import DEVICE, run_interpreted, runs_kernels, starts_interpreter

from moekit.experts.fused import fused_layer
from moekit.recipes.bench.fused_stages import fused_stages
from moekit.recipes.bench.rows import make_case
from moekit.recipes.bench.shapes import LayerShape
from moekit.recipes.bench.stages import measure_stages
from moekit.recipes.layers import MoEParams, Recipe, moe_layer

SHAPE = LayerShape("small", 48, 16, 32, 4, 2)

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"  # rows that nobody reads are garbage
)


@pytest.mark.slow
@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@runs_kernels
@pytest.mark.parametrize("load", ["uniform", "dead"])
def test_the_stages_compute_the_layer(load: str) -> None:
    case = make_case(SHAPE, load, device=DEVICE, dtype=torch.float32)
    recipe = Recipe(lambda x, gate: x @ gate, case.route, fused_layer())
    y = moe_layer(case.x, MoEParams(case.gate, case.experts), recipe).y
    of_x, of_gate, of_gate_up, of_up, of_down = torch.autograd.grad(y, case.leaves, case.grad)
    found = {name: work.run() for name, work in fused_stages(case).items()}
    of_tokens, gate = found["router and gate, back"]
    expected = {
        "sum": (found["sum"], y),
        "x": (of_tokens, of_x),
        "gate": (gate, of_gate),
        "gate and up": (found["gradients of gate and up"], torch.stack([of_gate_up, of_up])),
        "down": (found["gradient of down"][0], of_down),
    }
    for name, (value, want) in expected.items():
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6, msg=name)


@runs_kernels
def test_the_work_of_the_stages_is_that_of_the_layer() -> None:
    case = make_case(SHAPE, "uniform", device=DEVICE, dtype=torch.float32)
    works = fused_stages(case)
    of_gate = 3 * 2 * 48 * 16 * 4
    assert sum(work.flops for work in works.values()) == 3 * SHAPE.flops + of_gate
    assert works["gate"].nbytes == (48 * 16 + 16 * 4 + 48 * 4) * 4
    back = (3 * 48 * 16 + 2 * 16 * 4 + 2 * 48 * 4 + 96) * 4 + 96 * 8  # weights, and experts' numbers in int64
    assert works["router and gate, back"].nbytes == back
    assert works["copy"].nbytes == (1 + 2) * 48 * 16 * 4
    assert works["up"].nbytes == (96 * 16 + 2 * 4 * 16 * 32 + 3 * 96 * 32) * 4
    dead = fused_stages(make_case(SHAPE, "dead", device=DEVICE, dtype=torch.float32))
    assert dead["up"].nbytes == works["up"].nbytes - 2 * 2 * 16 * 32 * 4
    assert dead["gradient of down"].nbytes == works["gradient of down"].nbytes
    composed, fused = measure_stages(case, rounds=2).items()
    assert (composed[0], fused[0]) == ("grouped, forward", "fused_layer")
    assert [stage.name for stage in fused[1]] == list(works)
    assert all(len(stage.seconds) == 2 and min(stage.seconds) > 0 for stage in fused[1])
