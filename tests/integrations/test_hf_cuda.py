"""The experts of a transformers module on CUDA: views of either layout, biases and missing choices, against float64."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreted import Calls
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.olmoe import modeling_olmoe as olmoe
from waiting import nothing_waits

from moekit.experts import loop
from moekit.integrations.hf_experts import ModuleParams, module_layer, routing_of
from moekit.integrations.transformers import register, why_not_fused

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


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "olmoe": lambda: olmoe.OlmoeSparseMoeBlock(
        olmoe.OlmoeConfig(hidden_size=D, intermediate_size=H, num_experts=E, num_experts_per_tok=K)
    ),
    "mixtral": lambda: mixtral.MixtralSparseMoeBlock(
        mixtral.MixtralConfig(hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=K)
    ),
}


@pytest.fixture
def registered() -> Iterator[None]:
    """Register moekit, and take it out of transformers' table again."""
    before = dict(ExpertsInterface._global_mapping)
    register()
    yield
    ExpertsInterface._global_mapping.clear()
    ExpertsInterface._global_mapping.update(before)


def block_and_tokens(name: str, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """Draw a block, and tokens whose K best experts are the same in every dtype."""
    block, g = BLOCKS[name](), torch.Generator().manual_seed(2)
    for each, parameter in block.named_parameters():
        scale = 4 if "experts" not in each else 1
        parameter.data = torch.randn(parameter.shape, generator=g) * scale * parameter.shape[-1] ** -0.5
    block, x = block.cuda().to(dtype), torch.randn(20 * T, D, generator=g).cuda().to(dtype)
    best = (x.double() @ block.gate.weight.double().T).sort(-1, descending=True).values
    clear = x[best[:, K - 1] - best[:, K] > 0.2]
    assert clear.shape[0] >= T
    return block, clear[:T].unsqueeze(0).contiguous()


def run_block(block: Any, x: Tensor, implementation: str, forward: Any = None) -> dict[str, Tensor]:
    """Return the output and every gradient of a block, or of what it was compiled to."""
    block.experts.config._experts_implementation = implementation
    x = x.detach().requires_grad_()
    y = (block if forward is None else forward)(x)
    cotangent = torch.arange(y.numel(), device=y.device).view_as(y).sin().to(y.dtype)
    parameters = dict(block.named_parameters())
    grads = torch.autograd.grad(y, (x, *parameters.values()), cotangent)
    return dict(zip(("y", "x", *parameters), (y.detach(), *grads), strict=True))


def check_block(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, want in expected.items():
        error = (found[name].double() - want.double()).norm() / want.double().norm()
        assert error < tolerance, (name, float(error))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_block_is_fused_and_equals_the_eager_block_in_float32(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    block, x = block_and_tokens(name, dtype)
    expected = run_block(copy.deepcopy(block).float(), x.float(), "eager")
    assert why_not_fused(block) == {"experts": ""}
    with Calls() as calls:
        found = run_block(block, x, "moekit")
    assert {"fused_experts", "fused_experts_backward"} <= {each.removesuffix(".default") for each in calls.own()}
    assert {value.dtype for value in found.values()} == {dtype}
    check_block(found, expected, tolerance)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_never_waits_for_the_device(name: str) -> None:
    block, x = block_and_tokens(name, torch.bfloat16)
    run_block(block, x, "moekit")  # compiles the kernels
    with nothing_waits():
        run_block(block, x, "moekit")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    block, x = block_and_tokens(name, torch.bfloat16)
    expected = run_block(copy.deepcopy(block).float(), x.float(), "eager")
    check_block(run_block(block, x, "moekit", torch.compile(block, fullgraph=True)), expected, 3e-2)


@pytest.mark.usefixtures("registered")
def test_a_block_holds_no_copy_of_its_experts() -> None:
    config = olmoe.OlmoeConfig(hidden_size=1024, intermediate_size=512, num_experts=64, num_experts_per_tok=2)
    config._experts_implementation = "moekit"
    with torch.device("cuda"):
        block = olmoe.OlmoeSparseMoeBlock(config).bfloat16()
        x = torch.randn(1, 64, 1024).bfloat16()
    weights = block.experts.gate_up_proj.nbytes + block.experts.down_proj.nbytes
    for _ in range(2):  # the first compiles
        block.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        block(x).float().square().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.2 * weights  # the gradients alone
    assert block.experts.gate_up_proj.grad.stride() == block.experts.gate_up_proj.stride()
