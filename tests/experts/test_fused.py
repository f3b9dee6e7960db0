"""The fused layer against the loop over experts in float64: output and every gradient by name."""

from functools import partial
from typing import Any

import pytest
import torch
from interpreted import DEVICE, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor

from moekit.dispatch import dropless
from moekit.experts import geglu, gelu_mlp, init_gated, init_mlp, loop, relu2, relu_mlp, swiglu
from moekit.experts.fused import (
    EVERYTHING,
    GEGLU,
    GEGLU_TANH,
    GELU_MLP,
    INPUTS,
    PREACTIVATION,
    RELU2,
    RELU_MLP,
    SWIGLU,
    Activation,
    Keep,
    fused_layer,
)
from moekit.experts.tiles import LayerTiles, Tile
from moekit.recipes import expert_layer
from moekit.routing import expert_choice, top_k
from moekit.types import ExpertLayer, Routing

ACTIVATIONS = {
    "swiglu": (SWIGLU, swiglu),
    "geglu": (GEGLU, geglu),
    "geglu, tanh": (GEGLU_TANH, partial(geglu, approximate="tanh")),
    "gelu": (GELU_MLP, gelu_mlp),
    "relu": (RELU_MLP, relu_mlp),
    "relu2": (RELU2, relu2),
}
# T, D, F, E, K: several tiles; widths for pointers alone, and for both; groups of 0 and 1 row; every expert chosen
SHAPES = {
    "usual": (19, 24, 32, 2, 2),
    "by pointers": (13, 21, 35, 3, 3),
    "no whole tile of gate": (13, 16, 24, 3, 2),
    "one expert": (40, 16, 16, 1, 1),
    "few rows": (3, 16, 16, 5, 1),
    "all experts": (3, 16, 16, 8, 8),
    "one token": (1, 16, 16, 4, 2),
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3}

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"  # rows that nobody reads are garbage
)


@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


# So low that a group has several, and one that two groups of aligned rows would share.
_ROWS = Tile(m=32, n=32, k=16, warps=4, stages=2, band=2, overlap=True)
_LOW = LayerTiles(_ROWS._replace(n=16), _ROWS, _ROWS, _ROWS, _ROWS._replace(m=16), _ROWS._replace(m=16))
fused = partial(fused_layer, tiles=lambda size: _LOW)


def draw(shape: tuple[int, ...], activation: Activation, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Draw tokens, a routing of which some assignments do not exist, and parameters."""
    num_tokens, dim, hidden, num_experts, k = shape
    x = torch.randn(num_tokens, dim).to(dtype)
    params = (init_gated if activation.gated else init_mlp)(num_experts, dim, hidden)
    routing = top_k(torch.randn(num_tokens, num_experts), k=k)
    indices = routing.expert_indices.clone()
    indices[1::4, -1] = -1
    return x, routing._replace(expert_indices=indices), type(params)(*(p.to(dtype) for p in params))


def run(
    layer: ExpertLayer, case: tuple[Any, ...], dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """Return output and every gradient, computed on copies of a dtype and device."""
    x, routing, params = case
    leaf = lambda t: t.detach().to(device, dtype, copy=True).requires_grad_()  # noqa: E731
    x, params = leaf(x), type(params)(*map(leaf, params))
    weights = routing.weights.to(device, torch.float64 if dtype == torch.float64 else None, copy=True).requires_grad_()
    indices = (t.to(device) for t in (routing.token_indices, routing.expert_indices))
    y = layer(x, Routing(*indices, weights, *routing[3:]), params)
    cotangent = torch.linspace(-1, 1, y.numel()).reshape(y.shape).sin().to(y)
    grads = torch.autograd.grad(y, (x, weights, *params), cotangent)
    return dict(zip(("y", "x", "routing.weights", *params._fields), (y, *grads), strict=True))


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Hold each to its float64 counterpart by the size of its values."""
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
        if want.numel():
            error = (found[name].detach().cpu().double() - want).abs().max()
            bound = tolerance * want.abs().max().clamp_min(1e-3)
            assert error <= bound, f"{name}: {error} > {bound}"


def reference(experts: Any) -> ExpertLayer:
    return expert_layer(dispatcher=dropless(), experts=partial(experts, matmul=loop))


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_equals_the_loop(shape: str) -> None:
    case = draw(SHAPES[shape], SWIGLU)
    found = run(fused(), case, device=DEVICE)
    compare(found, run(reference(swiglu), case, torch.float64), TOLERANCE[torch.float32])


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("keep", [INPUTS, EVERYTHING, Keep(rows=True, preactivation=False)], ids=str)
def test_whatever_is_kept_gives_the_same(keep: Keep) -> None:
    case = draw(SHAPES["no whole tile of gate"], SWIGLU)
    found = run(fused(keep=keep), case, device=DEVICE)
    compare(found, run(reference(swiglu), case, torch.float64), TOLERANCE[torch.float32])


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_equals_the_loop(name: str) -> None:
    activation, experts = ACTIVATIONS[name]
    case = draw((9, 16, 24, 3, 2), activation)
    found = run(fused(activation=activation), case, device=DEVICE)
    compare(found, run(reference(experts), case, torch.float64), TOLERANCE[torch.float32])


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", ["usual", "by pointers"])
def test_float16_equals_the_loop(shape: str) -> None:
    case = draw(SHAPES[shape], SWIGLU, torch.float16)
    found = run(fused(), case, device=DEVICE)
    assert {value.dtype for name, value in found.items() if name != "routing.weights"} == {torch.float16}
    compare(found, run(reference(swiglu), case, torch.float64), TOLERANCE[torch.float16])


@runs_kernels
@pytest.mark.usefixtures("poison")
def test_expert_choice_equals_the_loop() -> None:
    x, _, params = draw((20, 16, 24, 4, 1), SWIGLU)
    routing = expert_choice(torch.randn(20, 4), capacity_factor=1.5)
    assert routing.expert_indices.ndim == 3
    case = x, routing, params
    compare(run(fused(), case, device=DEVICE), run(reference(swiglu), case, torch.float64), 2e-6)


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("activation", [SWIGLU, RELU2])
def test_no_tokens_give_gradients_of_zero(activation: Activation) -> None:
    found = run(fused(activation=activation), draw((0, 16, 24, 3, 2), activation), device=DEVICE)
    assert found["y"].shape == (0, 16)
    assert all((found[name] == 0).all() for name in found)


@runs_kernels
@pytest.mark.usefixtures("poison")
def test_a_layer_without_any_assignment_gives_zero() -> None:
    x, routing, params = draw(SHAPES["usual"], SWIGLU)
    case = x, routing._replace(expert_indices=torch.full_like(routing.expert_indices, -1)), params
    found = run(fused(), case, device=DEVICE)
    assert all((found[name] == 0).all() for name in found)


@runs_kernels
def test_what_is_kept_is_what_was_asked_for() -> None:
    case = draw(SHAPES["usual"], SWIGLU)
    kept = {keep: held(fused(keep=keep), case) for keep in (INPUTS, PREACTIVATION, EVERYTHING)}
    rows = 80  # 19 * 2 assignments and 15 more for each of 2 experts, in whole sixteens
    assert kept[PREACTIVATION] - kept[INPUTS] == rows * 2 * 32
    assert kept[EVERYTHING] - kept[PREACTIVATION] == rows * 24


def held(layer: ExpertLayer, case: tuple[Any, ...]) -> int:
    """Count the floating-point numbers that autograd saves."""
    sizes: list[int] = []
    count = lambda t: (sizes.append(t.numel() if t.is_floating_point() else 0), t)[1]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        run(layer, case, device=DEVICE)
    return sum(sizes)


@runs_kernels
def test_autocast_computes_in_its_dtype() -> None:
    x, routing, params = draw(SHAPES["usual"], SWIGLU)
    with torch.autocast(DEVICE, dtype=torch.float16):
        found = run(fused(), (x, routing, params), device=DEVICE)
    assert found["y"].dtype == torch.float16
    assert found["x"].dtype == found["down"].dtype == torch.float32
    compare(found, run(reference(swiglu), (x, routing, params), torch.float64), 2e-2)


@runs_kernels
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch does so itself
def test_it_compiles_whole() -> None:
    case = draw(SHAPES["usual"], SWIGLU)
    compiled = torch.compile(fused(), fullgraph=True, backend="aot_eager")
    found, expected = run(compiled, case, device=DEVICE), run(fused(), case, device=DEVICE)
    compare(found, {name: value.detach().cpu().double() for name, value in expected.items()}, 1e-6)


def test_errors_say_what_was_given_and_expected() -> None:
    x, routing, params = draw((5, 4, 8, 3, 2), SWIGLU)
    layer = fused()
    with pytest.raises(ValueError, match=r"are MlpParams, and the activation .*silu.*; expected GatedParams"):
        layer(x, routing, init_mlp(3, 4, 8))
    with pytest.raises(
        ValueError, match=r"x \(5, 4\) and parameters .* do not fit a routing of 5 tokens and 3 experts"
    ):
        layer(x, routing, params._replace(down=params.up))
    with pytest.raises(ValueError, match=r"float64.*expected one of float32, bfloat16 and float16"):
        layer(x.double(), routing, params)
    with pytest.raises(ValueError, match="precision = 'fp8'; expected 'ieee' or 'tf32'"):
        fused(precision="fp8")


def test_tiles_that_do_not_fit_are_refused() -> None:
    unfit = _LOW._replace(up=_LOW.up._replace(m=64), grad_up=_LOW.grad_up._replace(k=32))
    with pytest.raises(ValueError, match=r"m = \[32, 64\].*k = \[16, 32\].*Take the same m"):
        fused_layer(tiles=lambda size: unfit)(*draw(SHAPES["usual"], SWIGLU))
