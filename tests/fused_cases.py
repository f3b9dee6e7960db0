"""What tests of the fused layer share: low tiles, drawn cases, and the loop over experts in float64 to compare with."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from moekit.dispatch import dropless
from moekit.experts import geglu, gelu_mlp, init_gated, init_mlp, loop, relu2, relu_mlp, swiglu
from moekit.experts.activations import GEGLU, GEGLU_TANH, GELU_MLP, RELU2, RELU_MLP, SWIGLU, Activation
from moekit.experts.fused import fused_layer
from moekit.experts.tiles import LayerTiles, Tile
from moekit.recipes import expert_layer
from moekit.routing import top_k
from moekit.types import ExpertLayer, Routing

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3}

# So low that a group has several, and one that two groups of aligned rows would share.
_ROWS = Tile(m=32, n=32, k=16, warps=4, stages=2, band=2, overlap=True)
LOW = LayerTiles(_ROWS._replace(n=16), _ROWS, _ROWS, _ROWS, _ROWS._replace(m=16), _ROWS._replace(m=16))
# By name: what experts do, and the expert network that does it.
ACTIVATIONS = {
    "swiglu": (SWIGLU, swiglu),
    "geglu": (GEGLU, geglu),
    "geglu, tanh": (GEGLU_TANH, partial(geglu, approximate="tanh")),
    "gelu": (GELU_MLP, gelu_mlp),
    "relu": (RELU_MLP, relu_mlp),
    "relu2": (RELU2, relu2),
}
fused = partial(fused_layer, tiles=lambda size: LOW)


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
