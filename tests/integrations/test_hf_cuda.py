"""The experts of a transformers module on CUDA: views of either layout, biases and missing choices, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.experts import loop
from moekit.integrations.hf_experts import ModuleParams, module_layer, routing_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
T, D, H, E, K = 200, 64, 96, 8, 3


def silu_gate(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def tensors(transposed: bool) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"up": (E, D, 2 * H), "down": (E, H, D)}
    stored = shapes if transposed else {name: (e, out, into) for name, (e, into, out) in shapes.items()}
    stored |= {"up_bias": (E, 2 * H), "down_bias": (E, D)}
    drawn = {name: torch.randn(shape, generator=g) * shape[-1] ** -0.5 for name, shape in stored.items()}
    return {"x": torch.randn(T, D, generator=g), "weights": torch.rand(T, K, generator=g), **drawn}


def gradients(leaves: dict[str, Tensor], index: Tensor, *, transposed: bool, **options) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    up, down = (leaves[name] if transposed else leaves[name].transpose(1, 2) for name in ("up", "down"))
    params = ModuleParams(up, leaves["up_bias"], down, leaves["down_bias"], silu_gate, None, False)
    y = module_layer(**options)(leaves["x"], routing_of(index, leaves["weights"], num_experts=E), params)
    y.float().square().sum().backward()
    return {"y": y.detach(), **{name: value.grad for name, value in leaves.items()}}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 5e-2)])
def test_either_layout_equals_float64(dtype: torch.dtype, tolerance: float, transposed: bool) -> None:
    index = torch.rand(T, E, generator=torch.Generator().manual_seed(1)).topk(K).indices
    index = index.masked_fill(index == 5, E)  # another rank's, so that rows are left at the end, and 5 is empty
    narrow = {name: value.to(dtype) for name, value in tensors(transposed).items()}
    exact = {name: value.double() for name, value in narrow.items()}
    fast = {name: value.cuda() for name, value in narrow.items()}
    expected = gradients(exact, index, transposed=transposed, matmul=loop)
    for name, value in gradients(fast, index.cuda(), transposed=transposed).items():
        difference = (value.cpu().double() - expected[name]).abs().max() / expected[name].abs().max()
        assert difference < tolerance, (name, difference)


def test_weights_are_not_copied_in_the_forward_pass() -> None:
    leaves = {name: value.cuda() for name, value in tensors(False).items()}
    up = torch.zeros(64, 2048, 1024, device="cuda", dtype=torch.bfloat16)
    params = ModuleParams(up.transpose(1, 2), None, up[:, :1024, :1024], None, silu_gate, None, False)
    x, index = torch.zeros(16, 1024, device="cuda", dtype=torch.bfloat16), torch.zeros(16, 1, dtype=torch.int64)
    routing = routing_of(index.cuda(), leaves["weights"][:16, :1], num_experts=64)
    layer = module_layer()
    with torch.no_grad():
        layer(x, routing, params)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(x, routing, params)
    assert torch.cuda.max_memory_allocated() - before < up.nbytes / 4
