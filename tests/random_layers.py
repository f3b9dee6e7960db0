"""Draw fused layers at random and hold each against the loop over experts in float64, and against itself.

python tests/random_layers.py SECONDS [SEED], on a CUDA device, several at a time with seeds of their own; elsewhere
TRITON_INTERPRET=1 python tests/random_layers.py SECONDS, in which shapes are small. Fresh memory holds NaN, and a layer
that is run twice must give the same bits. What fails is printed with what was drawn, and the status is then 1. No part
of the tests: it is for changes of kernels.
"""

import random
import sys
import time
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.dispatch import dropless, padded
from moekit.experts import (
    CLAMPED_SWIGLU,
    Activation,
    Keep,
    PackedGatedParams,
    fused_layer,
    init_biased_gated,
    init_biased_mlp,
    init_gated,
    init_mlp,
    loop,
    pack_gated,
)
from moekit.experts.tile_files import layer_tiles
from moekit.experts.tiles import LayerSize, LayerTiles, ruled_tiles
from moekit.recipes import expert_layer, limited
from moekit.recipes.expert_networks import ACTIVATIONS, experts_of
from moekit.routing import expert_choice, top_k
from moekit.types import ExpertLayer, Routing

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.bfloat16, torch.bfloat16, torch.float16, torch.float32] if CUDA else [torch.float16, torch.float32]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}  # of the norm
TF32_TOLERANCE = 4e-3
KINKED = ("relu", "clamped_swiglu")  # whose slope jumps, so that a rounded pre-activation may be on the other side
ROUTINGS_EACH = 10 if CUDA else 3  # of one layer, whose kernels are compiled once


class Layer(NamedTuple):
    """What is drawn once, for several routings."""

    dtype: torch.dtype
    precision: str
    activation: Activation
    keep: Keep
    params: Any
    tiles: str
    specialized: tuple[bool, ...]


def width(rng: random.Random) -> int:
    """Draw D or F: any, a multiple of 8 or of 64."""
    most = 20 if CUDA else 1
    return rng.choice([rng.randint(1, 7 * most), 8 * rng.randint(1, 3 * most), 64 * rng.randint(1, most)])


def draw_params(rng: random.Random, activation: Activation, shape: tuple[int, int, int]) -> Any:
    """Draw parameters that fit an activation, in either order of memory."""
    kinds: list[Any] = [init_gated, init_biased_gated, packed] if activation.gated else [init_mlp, init_biased_mlp]
    params = rng.choice(kinds)(*shape)
    turn = rng.random() < 0.3
    spread = (t if t.shape[1] > 1 else 0.3 * torch.randn_like(t) for t in params)  # biases are drawn as zero
    return type(params)(*(turned(t) if turn and t.shape[1] > 1 else t for t in spread))


def packed(num_experts: int, dim: int, hidden: int) -> PackedGatedParams:
    """Draw experts of which gate and up are one tensor."""
    return pack_gated(init_gated(num_experts, dim, hidden))


def turned(w: Tensor) -> Tensor:
    """Return the same matrices, stored the other way."""
    return w.mT.contiguous().mT


def draw_layer(rng: random.Random) -> Layer:
    """Draw experts, and how a layer computes them."""
    activation = rng.choice([*ACTIVATIONS, CLAMPED_SWIGLU, CLAMPED_SWIGLU._replace(limit=0.7)])
    dim, hidden = width(rng), width(rng)
    num_experts = min(rng.choice([1, 2, 3, 8, 17, 64, 300] if CUDA else [1, 2, 5]), 1 + 10**8 // (dim * hidden))
    dtype, specialized = rng.choice(DTYPES), tuple(rng.random() < 0.3 for _ in LayerTiles._fields)
    params = draw_params(rng, activation, (num_experts, dim, hidden))
    params = type(params)(*(p.to(DEVICE, dtype, memory_format=torch.preserve_format) for p in params))
    keep = Keep(rng.random() < 0.4, rng.random() < 0.6)
    tiles = rng.choice(["table", "rule", "turned about"])
    return Layer(dtype, rng.choice(["ieee", "tf32"]), activation, keep, params, tiles, specialized)


def choose_tiles(size: LayerSize, *, layer: Layer) -> LayerTiles:
    """Choose tiles as the layer says: of some products plain kernels, not ``specialized`` ones, or the other way."""
    if layer.tiles == "table":
        return layer_tiles(size)
    ruled = ruled_tiles(size)
    may = layer.tiles == "turned about" and size.capability == 9 and size.dtype.itemsize == 2 and ruled.up.m == 128
    flips = layer.specialized if may else (False,) * len(ruled)
    return LayerTiles(*(t._replace(specialized=t.specialized ^ flip) for t, flip in zip(ruled, flips, strict=True)))


def draw_routing(rng: random.Random, num_experts: int) -> Routing:
    """Draw token or expert choice, skewed or not, with assignments that do not exist or exist twice, or a list."""
    num_tokens = rng.choice([0, 1, 2, 17, 128, 129, 1000, 4097] if CUDA else [0, 1, 2, 17, 33])
    k = rng.randint(1, min(num_experts, 8))
    logits = torch.randn(num_tokens, num_experts, device=DEVICE)
    logits[:, 0] += rng.choice([0, 0, 8])
    kind = rng.choice(["all", "some", "twice", "list", "experts"])
    if kind == "experts" and num_tokens:
        return expert_choice(logits, capacity_factor=rng.choice([0.5, 1.0]))
    routing = top_k(logits, k=k)
    experts = routing.expert_indices.clone()
    if kind == "some":
        experts[torch.rand(experts.shape, device=DEVICE) < rng.choice([0.1, 0.5, 1.0])] = -1
    if kind == "twice" and k > 1:
        experts[:, 1] = experts[:, 0]
    routing = routing._replace(expert_indices=experts)
    if kind == "list":
        some = torch.randperm(num_tokens * k, device=DEVICE)[: num_tokens * k // 2]
        routing = routing._replace(**{name: getattr(routing, name).flatten()[some] for name in routing._fields[:3]})
    return routing


def run(
    layer: ExpertLayer, x: Tensor, routing: Routing, params: Any, slope: Tensor, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return output and every gradient, of copies."""
    x, weights, *leaves = (
        t.detach().to(dtype, memory_format=torch.preserve_format, copy=True).requires_grad_()
        for t in (x, routing.weights, *params)
    )
    y = layer(x, routing._replace(weights=weights), type(params)(*leaves))
    names = ("x", "weights", *params._fields)
    grads = torch.autograd.grad(y, (x, weights, *leaves), slope.to(y), allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def trouble(drawn: Layer, routing: Routing, limit: float | None) -> list[str]:
    """Run one layer twice and compare; return what is wrong."""
    dim = drawn.params.down.shape[1 if isinstance(drawn.params, PackedGatedParams) else 2]
    x, slope = (torch.randn(routing.num_tokens, dim, device=DEVICE).to(drawn.dtype) for _ in range(2))
    layers = (
        fused_layer(
            activation=drawn.activation, keep=drawn.keep, precision=drawn.precision,
            tiles=partial(choose_tiles, layer=drawn),
        ),
        expert_layer(
            dispatcher=dropless(), experts=partial(experts_of(drawn.activation, type(drawn.params)), matmul=loop)
        ),
    )  # fmt: skip
    if limit is not None:
        layers = tuple(limited(each, plan=padded(capacity_factor=limit).plan) for each in layers)
    given = (x, routing, drawn.params, slope)
    found, again = run(layers[0], *given), run(layers[0], *given)
    tf32 = drawn.dtype == torch.float32 and drawn.precision == "tf32"
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCE[drawn.dtype]
    if drawn.activation.function in KINKED:  # as rounding is small, so few slopes are others: their norm is the root
        tolerance = 1.5 * tolerance**0.5
    wrong = []
    for name, want in run(layers[1], *given, dtype=torch.float64).items():
        error, size = (found[name].double() - want).norm(), want.norm().clamp_min(1e-4)
        if name == "weights":  # inner products of dim numbers, which may cancel
            size = torch.maximum(size, 0.2 * want.numel() ** 0.5 * dim**0.5 * torch.ones_like(size))
        if not error <= tolerance * size:
            wrong.append(f"{name} differs by {error / size:.2g}")
        if not torch.equal(found[name], again[name]):
            wrong.append(f"{name} has other bits the second time")
    return wrong


def described(drawn: Layer, routing: Routing, limit: float | None) -> str:
    """Say what was drawn."""
    shapes = {name: tuple(p.shape) for name, p in drawn.params._asdict().items()}
    sizes = f"{routing.num_tokens} tokens, assignments {tuple(routing.expert_indices.shape)}, limit {limit}"
    return f"{drawn._replace(params=shapes)}; {sizes}"


def main(seconds: float, seed: int = 0) -> int:
    """Draw layers for so long; return how many failed."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    layers = cases = failed = 0
    while time.monotonic() < end:
        drawn = draw_layer(rng)
        layers += 1
        for _ in range(ROUTINGS_EACH):
            routing = draw_routing(rng, drawn.params.down.shape[0])
            choices = routing.expert_indices.ndim == 2 and routing.expert_indices.shape[0] == routing.num_tokens
            limit = rng.choice([0.3, 1.25]) if choices and rng.random() < 0.2 else None
            cases += 1
            try:
                wrong = trouble(drawn, routing, limit)
            except Exception as error:
                wrong = [f"{type(error).__name__}: {error}"]
            if wrong:
                failed += 1
                print(f"seed {seed}: {', '.join(wrong)}; {described(drawn, routing, limit)}", flush=True)
    print(f"seed {seed}: {cases} cases of {layers} layers, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *map(int, sys.argv[2:])) > 0)
