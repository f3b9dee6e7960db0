"""On the GPU: the fused layer on parameters in any order of memory, packed, and with biases, and on any routing."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fused_cases import ACTIVATIONS, reference
from torch import Tensor
from waiting import nothing_waits

from moekit.experts import GatedParams, MlpParams, clamped_swiglu, init_gated, init_mlp, swiglu
from moekit.experts.activations import CLAMPED_SWIGLU, GELU_MLP, RELU2, SWIGLU, Activation
from moekit.experts.biased import BiasedGatedParams, BiasedMlpParams, biased_mlp
from moekit.experts.fused import fused_layer
from moekit.experts.keep import INPUTS, PREACTIVATION, Keep
from moekit.experts.packed import pack_gated, unpack_gated
from moekit.routing import expert_choice, top_k
from moekit.types import ExpertLayer, Routing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# T, D, F, E, K: whole tiles; on Hopper tails of every tile; widths past them; descriptors for one order of memory
# alone; for none; groups of few rows
SHAPES = {
    "full": (700, 256, 512, 8, 2),
    "tails": (900, 320, 384, 6, 2),
    "odd": (333, 200, 104, 5, 3),
    "dim by descriptors": (333, 200, 102, 5, 3),
    "by pointers": (333, 204, 102, 5, 3),
    "few rows": (100, 256, 128, 64, 4),
}
# Relative to the norm: three roundings in a row of what is summed in float32.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 2e-6}


class Form(NamedTuple):
    """An activation; parameters as they are stored; what the layer gets; and a layer of loops that takes the same."""

    activation: Activation
    leaves: Callable[[GatedParams], Any]
    params: Callable[[Any], Any]
    reference: ExpertLayer


def turned(w: Tensor) -> Tensor:
    return w.transpose(1, 2).contiguous().transpose(1, 2)


def same(leaves: Any) -> Any:
    return leaves


def unpacked(x: Tensor, routing: Routing, leaves: Any) -> Tensor:
    return reference(swiglu)(x, routing, unpack_gated(leaves))


def biases(params: Any) -> list[Tensor]:
    widths = [w.shape[2] for w in params]
    return [params.up.new_empty(params.up.shape[0], 1, width).normal_() for width in widths]


def biased_gated_leaves(params: GatedParams) -> BiasedGatedParams:
    return BiasedGatedParams(*params, *biases(params))


def biased_mlp_leaves(params: GatedParams) -> BiasedMlpParams:
    matrices = init_mlp(params.up.shape[0], *params.up.shape[1:], device="cuda", dtype=params.up.dtype)
    return BiasedMlpParams(*matrices, *biases(matrices))


FORMS = {
    "transposed": Form(SWIGLU, lambda p: GatedParams(*map(turned, p)), same, reference(swiglu)),
    "views of packed": Form(SWIGLU, pack_gated, unpack_gated, unpacked),
    "packed": Form(SWIGLU, pack_gated, same, unpacked),
    "clamped with biases": Form(CLAMPED_SWIGLU, biased_gated_leaves, same, reference(clamped_swiglu)),
    "relu2 with biases": Form(
        RELU2, biased_mlp_leaves, same, reference(partial(biased_mlp, activation=lambda x: F.relu(x).square()))
    ),
}


def draw(shape: tuple[int, ...], dtype: torch.dtype, form: Form) -> tuple[Any, ...]:
    num_tokens, dim, hidden, num_experts, k = shape
    x = torch.randn(num_tokens, dim, device="cuda", dtype=dtype)
    params = form.leaves(init_gated(num_experts, dim, hidden, device="cuda", dtype=dtype))
    routing = top_k(torch.randn(num_tokens, num_experts, device="cuda"), k=k)
    indices = routing.expert_indices.clone()
    indices[::7, 0] = -1
    return x, routing._replace(expert_indices=indices), params


def run(layer: ExpertLayer, case: tuple[Any, ...], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return output and every gradient, computed on copies of a dtype."""
    leaf = lambda t: t.detach().to(dtype, copy=True).requires_grad_()  # noqa: E731
    x, weights, params = leaf(case[0]), leaf(case[1].weights), type(case[2])(*map(leaf, case[2]))
    y = layer(x, case[1]._replace(weights=weights), params)
    cotangent = torch.linspace(0, 999, y.numel(), dtype=torch.float64, device="cuda").sin().to(case[0].dtype)
    grads = torch.autograd.grad(y, (x, weights, *params), cotangent.view_as(y).to(y.dtype))
    return dict(zip(("y", "x", "routing.weights", *params._fields), (y.detach(), *grads), strict=True))


def check(layer: ExpertLayer, case: tuple[Any, ...], plain: ExpertLayer, tolerance: float) -> None:
    """Hold two runs to each other, bit by bit, and to the loop."""
    found, again = (run(layer, case) for _ in range(2))
    for name, want in run(plain, case, torch.float64).items():
        assert torch.equal(found[name], again[name]), name
        error = (found[name] - want).norm() / want.norm()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("keep", [PREACTIVATION, INPUTS], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_loop_and_itself(
    form: str, shape: tuple[int, ...], dtype: torch.dtype, keep: Keep
) -> None:
    chosen = FORMS[form]
    layer = fused_layer(activation=chosen.activation, keep=keep)
    case = draw(shape, dtype, chosen)
    # Rounding moves entries across the limit of a clamp, and their gradient appears or vanishes.
    tolerance = TOLERANCE[dtype] * (3 if form == "clamped with biases" else 1)
    check(lambda x, routing, leaves: layer(x, routing, chosen.params(leaves)), case, chosen.reference, tolerance)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_equals_the_loop_and_itself(name: str, dtype: torch.dtype) -> None:
    activation, experts = ACTIVATIONS[name]
    x, routing, params = draw(SHAPES["tails"], dtype, FORMS["transposed"])
    case = x, routing, params if activation.gated else MlpParams(params.up, params.down)
    check(fused_layer(activation=activation), case, reference(experts), TOLERANCE[torch.bfloat16])


@pytest.mark.usefixtures("poison")
def test_biases_of_one_hot_expert() -> None:
    x, routing, params = draw((9000, 128, 128, 8, 1), torch.bfloat16, FORMS["relu2 with biases"])
    case = x, routing._replace(expert_indices=torch.full_like(routing.expert_indices, 3)), params
    check(fused_layer(activation=RELU2), case, FORMS["relu2 with biases"].reference, TOLERANCE[torch.bfloat16])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", ["full", "by pointers"])
@pytest.mark.parametrize("chooser", ["experts", "nobody"])
def test_any_routing_equals_the_loop_and_itself(chooser: str, shape: str, dtype: torch.dtype) -> None:
    x, routing, params = draw(SHAPES[shape], dtype, FORMS["packed"])
    num_tokens, num_experts = routing.num_tokens, routing.num_experts
    if chooser == "experts":
        routing = expert_choice(torch.randn(num_tokens, num_experts, device="cuda"), capacity_factor=2.0)
    else:
        tokens = torch.randint(num_tokens // 2, (2000,), device="cuda")
        tokens[500:900] = 7  # a token of many assignments, and half of them have none
        experts = torch.randint(-1, num_experts, (2000,), device="cuda")
        weights = torch.rand(2000, device="cuda").masked_fill(experts < 0, 0.0)
        routing = Routing(tokens, experts, weights, num_tokens, num_experts, 2000)
    check(fused_layer(), (x, routing, params), unpacked, TOLERANCE[dtype])


@pytest.mark.parametrize("form", ["packed", "clamped with biases"])
@pytest.mark.parametrize("flat", [False, True])
def test_nothing_waits_for_the_device(form: str, flat: bool) -> None:
    case = draw(SHAPES["full"], torch.bfloat16, FORMS[form])
    if flat:
        routing = case[1]
        parts = (t.flatten() for t in (routing.token_indices, routing.expert_indices, routing.weights))
        case = case[0], Routing(*parts, *routing[3:]), case[2]
    layer = fused_layer(activation=FORMS[form].activation)
    expected = run(layer, case)  # compiled
    with nothing_waits():
        found = run(layer, case)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(*case)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected["y"])


@pytest.mark.parametrize("form", ["packed", "clamped with biases"])
def test_the_compiled_layer_equals_the_eager_one(form: str) -> None:
    case = draw(SHAPES["full"], torch.bfloat16, FORMS[form])
    layer = fused_layer(activation=FORMS[form].activation)
    expected = run(layer, case)
    for name, found in run(torch.compile(layer, fullgraph=True), case).items():
        assert torch.equal(found, expected[name]), name


def test_no_parameter_is_copied() -> None:
    shape = 64, 1024, 2048, 16, 2
    form = FORMS["packed"]
    x, routing, params = draw(shape, torch.bfloat16, form)
    params = type(params)(*(p.requires_grad_() for p in params))
    layer = fused_layer(keep=INPUTS)
    layer(x, routing, params).sum().backward()  # compiled
    size = sum(p.numel() * p.element_size() for p in params)
    for p in params:
        p.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer(x, routing, params).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.2 * size  # gradients, and little else
    assert [p.grad.stride() for p in params] == [p.stride() for p in params]


@pytest.mark.parametrize("activation", [GELU_MLP, SWIGLU], ids=["mlp", "gated"])
def test_short_rows_are_not_overwritten_while_they_are_read(activation: Activation) -> None:
    """Several warps hold the same 16 units; without a barrier one weight in 500,000 had a wrong gradient."""
    from moekit.experts.kernels._back_triton import back

    rows, width = 2**18, 16
    pre = torch.randn(rows, activation.parts * width, device="cuda").bfloat16()
    grads = torch.randn(rows, width, device="cuda").bfloat16()
    weights, assignments = torch.rand(rows, device="cuda"), torch.arange(rows, device="cuda")
    first, second = pre.float()[:, :width], pre.float()[:, -width:]
    hidden = F.silu(first) * second if activation.gated else F.gelu(first, approximate="tanh")
    expected = (hidden * grads.float()).sum(1)
    for _ in range(20):
        found = torch.empty(rows, device="cuda")
        back(grads.clone(), pre, weights, found, assignments, activation=activation)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
