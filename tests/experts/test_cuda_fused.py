"""The fused layer and the grouped product on the GPU, with the tiles and widths of real layers."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from waiting import nothing_waits

from moekit.dispatch import dropless
from moekit.experts import init_gated, loop, swiglu
from moekit.experts.fused import fused_layer
from moekit.experts.keep import EVERYTHING, INPUTS, PREACTIVATION, Keep
from moekit.experts.triton_matmul import triton
from moekit.recipes import expert_layer
from moekit.routing import top_k
from moekit.types import ExpertLayer, Groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# T, D, F, E, K: full groups; on Hopper tails of every tile, and more tiles than programs; widths past whole tiles,
# widths without descriptors, groups of few rows
SHAPES = {
    "full": (700, 256, 512, 8, 2),
    "tails": (900, 320, 384, 6, 2),
    "five quarters": (900, 256, 320, 6, 2),  # of the hidden columns, the last without a whole tile
    "many": (6000, 512, 1024, 4, 2),
    "odd": (333, 200, 104, 5, 3),
    "by pointers": (333, 204, 102, 5, 3),
    "few rows": (100, 256, 128, 64, 4),
}
# Relative to the norm: three roundings in a row of what is summed in float32.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 2e-6}


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    num_tokens, dim, hidden, num_experts, k = shape
    x = torch.randn(num_tokens, dim, device="cuda", dtype=dtype, requires_grad=True)
    params = init_gated(num_experts, dim, hidden, device="cuda", dtype=dtype)
    routing = top_k(torch.randn(num_tokens, num_experts, device="cuda"), k=k)
    indices = routing.expert_indices.clone()
    indices[::7, 0] = -1
    routing = routing._replace(expert_indices=indices, weights=routing.weights.clone().requires_grad_())
    return x, routing, type(params)(*(p.requires_grad_() for p in params))


def run(layer: ExpertLayer, case: tuple[Any, ...], cotangent: Tensor) -> dict[str, Tensor]:
    x, routing, params = case
    y = layer(x, routing, params)
    grads = torch.autograd.grad(y, (x, routing.weights, *params), cotangent)
    return dict(zip(("y", "x", "routing.weights", *params._fields), (y.detach(), *grads), strict=True))


def double(case: tuple[Any, ...]) -> tuple[Any, ...]:
    x, routing, params = case
    leaf = lambda t: t.detach().double().requires_grad_()  # noqa: E731
    return leaf(x), routing._replace(weights=leaf(routing.weights)), type(params)(*map(leaf, params))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("keep", [PREACTIVATION, INPUTS, EVERYTHING], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_layer_equals_the_loop_and_itself(shape: tuple[int, ...], dtype: torch.dtype, keep: Keep) -> None:
    case = draw(shape, dtype)
    cotangent = torch.randn_like(case[0])
    found, again = (run(fused_layer(keep=keep), case, cotangent) for _ in range(2))
    reference = expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=loop))
    for name, want in run(reference, double(case), cotangent.double()).items():
        assert torch.equal(found[name], again[name]), name
        error = (found[name] - want).norm() / want.norm()
        assert error < TOLERANCE[dtype], f"{name}: {error}"


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper card"
)


@on_hopper
def test_on_hopper_some_warps_load_and_the_others_multiply() -> None:
    case = draw(SHAPES["tails"], torch.bfloat16)
    run(fused_layer(), case, case[0].detach())  # compiled
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(fused_layer(), case, case[0].detach())
    kernels = [event.name for event in profile.events() if event.name.startswith("_")]
    assert sum(name == "_special_up_kernel" for name in kernels) == 1
    assert sum(name == "_special_rows_kernel" for name in kernels) == 2
    assert sum(name == "_special_back_kernel" for name in kernels) == 1
    assert sum(name == "_special_weight_kernel" for name in kernels) == 2
    assert not {"_up_kernel", "_rows_kernel", "_back_kernel", "_weight_kernel"} & set(kernels)


@on_hopper
@pytest.mark.parametrize("shape", ["full", "tails"])
def test_on_hopper_what_was_launched_before_is_launched_without_triton(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moekit._operators_triton import Launch

    case = draw(SHAPES[shape], torch.bfloat16)
    for _ in range(2):
        expected = run(fused_layer(), case, case[0].detach())
    monkeypatch.setattr(Launch, "_launch", lambda launch, tensors: pytest.fail(f"{launch.kernel} by Triton"))
    for name, found in run(fused_layer(), case, case[0].detach()).items():
        assert torch.equal(found, expected[name]), name


def test_nothing_waits_for_the_device_and_the_forward_captures() -> None:
    case = draw(SHAPES["full"], torch.bfloat16)
    layer, cotangent = fused_layer(), torch.randn_like(case[0])
    expected = run(layer, case, cotangent)["y"]
    with nothing_waits():
        run(layer, case, cotangent)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(*case)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def test_the_compiled_layer_equals_the_eager_one() -> None:
    case = draw(SHAPES["full"], torch.bfloat16)
    cotangent = torch.randn_like(case[0])
    compiled = torch.compile(fused_layer(), fullgraph=True)
    expected = run(fused_layer(), case, cotangent)
    for name, found in run(compiled, case, cotangent).items():
        assert torch.equal(found, expected[name]), name


def test_what_is_held_is_the_preactivation_or_nothing() -> None:
    shape = num_tokens, _, hidden, num_experts, k = 4096, 256, 512, 16, 4
    x, routing, params = draw(shape, torch.bfloat16)
    held = {}
    for keep in (PREACTIVATION, INPUTS):
        fused_layer(keep=keep)(x, routing, params).sum().backward()  # compiled
        before = torch.cuda.memory_allocated()
        y = fused_layer(keep=keep)(x, routing, params)
        held[keep] = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
        del y
    pre = (num_tokens * k + 63 * num_experts) * 2 * hidden * 2
    assert held[PREACTIVATION] - held[INPUTS] == pytest.approx(pre, rel=0.01)
    assert held[INPUTS] < 0.06 * pre


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", [(256, 512), (200, 104), (204, 102)])
@pytest.mark.parametrize("sizes", [[300, 0, 1, 129, 64], [0, 0, 3], [1] * 70])
def test_the_product_equals_the_loop(sizes: list[int], widths: tuple[int, int], dtype: torch.dtype) -> None:
    num_rows = sum(sizes)
    rows = torch.randn(num_rows + 5, widths[0], device="cuda", dtype=dtype)
    rows[num_rows:] = torch.nan
    w = torch.randn(len(sizes), *widths, device="cuda", dtype=dtype, requires_grad=True)
    groups = Groups(torch.tensor(sizes, device="cuda", dtype=torch.int32), None)
    cotangent = torch.randn(num_rows + 5, widths[1], device="cuda", dtype=dtype)
    cotangent[num_rows:] = torch.nan
    rows.requires_grad_()
    out = triton(rows, groups, w)
    found = [out[:num_rows], *torch.autograd.grad(out, (rows, w), cotangent)]
    found[1] = found[1][:num_rows]
    inner, wide = rows.detach()[:num_rows].double().requires_grad_(), w.detach().double().requires_grad_()
    expected = loop(inner, groups, wide)
    wanted = [expected, *torch.autograd.grad(expected, (inner, wide), cotangent[:num_rows].double())]
    for name, one, other in zip(("out", "rows", "w"), found, wanted, strict=True):
        assert (one - other).norm() / other.norm() < TOLERANCE[dtype], name
