import importlib.util
from functools import partial

import pytest
import torch

from moekit.dispatch import dropless, padded
from moekit.experts import geglu, gelu_mlp, init_gated, init_mlp, loop, relu2, relu_mlp, swiglu
from moekit.experts.fused import GEGLU, GELU_MLP, RELU2, RELU_MLP, SWIGLU, Activation
from moekit.recipes import MoEParams, Recipe, backends, expert_layer, moe_layer
from moekit.recipes.backends import auto, choose_backend, experts_of
from moekit.routing import linear_gate, top_k

BF16 = torch.bfloat16


@pytest.fixture
def hopper(monkeypatch):
    """Let torch find a GPU of compute capability 9.0 and Triton, and give a function that changes either."""

    def be(capability: tuple[int, int] = (9, 0), *, triton: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        find = importlib.util.find_spec
        spec = object() if triton else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "triton" else find(name))

    be()
    return be


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
@pytest.mark.parametrize("dispatcher", [None, dropless(), padded(capacity_factor=1.0)], ids=["none", "dropless", "pad"])
def test_the_cpu_has_one_layer_for_everything(dtype, dispatcher) -> None:
    choice = choose_backend("cpu", dtype, dispatcher=dispatcher)
    assert choice.name == "fused_cpu"
    assert choice.reason.startswith("the CPU: computes expert by expert")


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_a_gpu_with_triton_is_given_the_fused_kernels(hopper, dtype) -> None:
    choice = choose_backend("cuda", dtype, activation=GEGLU)
    assert choice.name == "fused_layer"
    assert choice.layer.keywords["activation"] == GEGLU
    assert "with Triton: gathers rows inside the products" in choice.reason


def test_float32_products_on_a_gpu_follow_torchs_own_setting(hopper, monkeypatch) -> None:
    assert choose_backend("cuda", torch.float32).layer.keywords["precision"] == "ieee"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert choose_backend("cuda", torch.float32).layer.keywords["precision"] == "tf32"


@pytest.mark.parametrize(
    ("device", "dtype", "factor", "widths", "name", "why"),
    [
        ("cuda", BF16, 1.25, None, "grouped", "it drops nothing, and the dispatcher has a capacity"),
        ("cuda", BF16, 1.25, (12, 64), "batched", "it drops nothing, and the dispatcher has a capacity"),
        ("cuda", torch.float64, 0, None, "loop", "its kernels do not compute in float64"),
        ("cuda", torch.float64, 1.25, None, "batched", "its kernels do not compute in float64"),
        ("mps", torch.float32, 0, None, "loop", "its kernels are for CUDA devices, not mps"),
        ("mps", torch.float32, 1.25, None, "batched", "its kernels are for CUDA devices, not mps"),
    ],
)
def test_what_the_fused_kernels_cannot_do_is_said(hopper, device, dtype, factor, widths, name, why) -> None:
    choice = choose_backend(device, dtype, dispatcher=padded(capacity_factor=factor), widths=widths)
    assert choice.name == name
    assert choice.reason.endswith(f"; not fused_layer: {why}")
    assert choice.layer.keywords["experts"].keywords["matmul"].__name__ == name


def test_an_old_gpu_and_a_missing_triton(hopper) -> None:
    hopper((7, 5))
    choice = choose_backend("cuda", torch.float16)
    assert choice.name == "grouped"
    assert choice.reason.endswith("not fused_layer: compute capability 7.5 is below 8.0")
    hopper(triton=False)
    assert choose_backend("cuda", BF16).reason.endswith("Triton is not installed (pip install triton)")
    assert choose_backend("cuda", BF16, widths=(12, 64)).name == "loop"
    assert "widths (12, 64): no grouped product takes them" in choose_backend("cuda", BF16, widths=(12, 64)).reason


@pytest.mark.parametrize(
    ("activation", "ffn", "init"),
    [
        (SWIGLU, swiglu, init_gated),
        (GEGLU, geglu, init_gated),
        (GELU_MLP, gelu_mlp, init_mlp),
        (RELU_MLP, relu_mlp, init_mlp),
        (RELU2, relu2, init_mlp),
    ],
)
@pytest.mark.parametrize("factor", [0, 0.6])
def test_auto_computes_what_the_composed_layer_does(activation, ffn, init, factor) -> None:
    assert experts_of(activation) is ffn
    dispatcher = padded(capacity_factor=factor)
    composed = expert_layer(dispatcher=dispatcher, experts=partial(ffn, matmul=loop))
    x, params = torch.randn(12, 6).double(), init(4, 6, 10, dtype=torch.float64)
    routing = top_k(torch.randn(12, 4).double(), k=2)
    torch.testing.assert_close(
        auto(dispatcher=dispatcher, activation=activation)(x, routing, params), composed(x, routing, params)
    )


def test_auto_inside_autocast_asks_for_the_dtype_of_autocast(monkeypatch) -> None:
    asked = []

    def choose(device, dtype, **options):
        asked.append((dtype, options["widths"]))
        return choose_backend(device, dtype, **options)

    monkeypatch.setattr(backends, "choose_backend", choose)
    x, params = torch.randn(12, 6), init_gated(4, 6, 10)
    routing = top_k(torch.randn(12, 4), k=2)
    with torch.autocast("cpu", dtype=BF16):
        assert auto()(x, routing, params).dtype == BF16
    assert auto()(x, routing, params).dtype == torch.float32
    assert asked == [(BF16, (6, 10)), (torch.float32, (6, 10))]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_auto_compiles_to_one_graph() -> None:
    recipe = Recipe(linear_gate, lambda logits, *, bias=None: top_k(logits, k=2, bias=bias), auto())
    x, gate, experts = torch.randn(12, 6, requires_grad=True), torch.randn(6, 4), init_gated(4, 6, 10)

    def run(x):
        return moe_layer(x, MoEParams(gate, experts), recipe).y

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(run(x).sum(), x)[0])


def test_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"function='tanh'.* is no expert network of moekit's; expected one of"):
        experts_of(Activation("tanh", gated=True))
