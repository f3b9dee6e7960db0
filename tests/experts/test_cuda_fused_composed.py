"""On the GPU: the fused layer under autocast, activation checkpointing, FSDP2, Inductor and many or skewed experts."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from moekit.dispatch import dropless, padded
from moekit.experts import fused_layer, init_gated, loop, swiglu
from moekit.experts.tile_files import layer_tiles, shipped
from moekit.experts.tiles import LayerSize
from moekit.recipes import MoE, auto, choose_backend, expert_layer, mixtral, moe_layer, recompute
from moekit.recipes.layers import MoEParams, Recipe
from moekit.routing import fused_top_k, linear_gate, top_k

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = 1e-2  # of bfloat16, relative to the norm


def close(found: Tensor, expected: Tensor, name: str) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE, f"{name}: {error}"


def model(recipe: Recipe, dtype: torch.dtype | None = None) -> MoE:
    return MoE(256, 8, recipe, hidden=512, generator=torch.Generator("cuda").manual_seed(0), device="cuda", dtype=dtype)


def step(moe: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return output and gradients, of parameters in whole."""
    y = moe(x).y
    y.float().square().mean().backward()
    grads = {name: p.grad for name, p in moe.named_parameters()}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items() if g is not None}
    assert set(whole) == set(grads)
    return {"y": y.detach(), **whole}


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_recomputing_layers_have_the_same_bits() -> None:
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    recipe = mixtral(k=2)._replace(layer=fused_layer())
    expected = step(model(recipe, torch.bfloat16), x)
    again = model(recipe._replace(layer=recompute(fused_layer())), torch.bfloat16)
    whole = model(recipe, torch.bfloat16)
    whole.forward = partial(checkpoint, whole.forward, use_reentrant=False)  # type: ignore[method-assign]
    for other in (again, whole):
        for name, found in step(other, x).items():
            assert torch.equal(found, expected[name]), name


def test_autocast_and_sharded_parameters_give_the_gradients_of_bfloat16(group: None) -> None:
    x = torch.randn(300, 256, device="cuda")
    plain = step(model(mixtral(k=2)), x)
    recipe = mixtral(k=2)._replace(layer=fused_layer())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        under_autocast = step(model(recipe), x)
    sharded = model(recipe)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(sharded.experts, mp_policy=policy)
    fully_shard(sharded)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        of_shards = step(sharded, x)
    for name, expected in plain.items():
        close(under_autocast[name], expected, f"autocast, {name}")
        close(of_shards[name], expected, f"sharded, {name}")


def test_auto_compiles_whole_and_is_the_fused_layer() -> None:
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    params = MoEParams(torch.randn(256, 8, device="cuda").bfloat16() / 16, init_gated(8, 256, 512, device="cuda"))
    params = params._replace(experts=type(params.experts)(*(p.bfloat16() for p in params.experts)))
    recipe = Recipe(linear_gate, partial(fused_top_k, k=2), auto())
    run = lambda x: moe_layer(x, params, recipe).y  # noqa: E731
    expected = moe_layer(x, params, recipe._replace(layer=fused_layer())).y
    assert torch.equal(run(x), expected)
    assert torch.equal(torch.compile(run, fullgraph=True)(x), expected)


@pytest.mark.parametrize("factor", [0.5, 1.25])
@pytest.mark.parametrize("compiled", [False, True])
def test_auto_keeps_to_a_capacity_limit(factor: float, compiled: bool) -> None:
    tight = padded(capacity_factor=factor)
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    recipe = Recipe(linear_gate, partial(top_k, k=2), auto(dispatcher=tight), plan=tight.plan)
    composed = expert_layer(dispatcher=tight, experts=partial(swiglu, matmul=loop))
    assert choose_backend("cuda", torch.bfloat16, dispatcher=tight).name == "fused_layer"
    moe = model(recipe, torch.bfloat16)
    if compiled:
        moe.compile(fullgraph=True)
    expected = step(model(recipe._replace(layer=composed), torch.bfloat16), x)
    for name, found in step(moe, x).items():
        close(found, expected[name], name)


def test_a_layer_of_the_shipped_table_compiles_whole_with_its_gradients() -> None:
    num_experts, dim, hidden, tokens = 8, 768, 2048, 8192
    size = LayerSize(torch.bfloat16, 2 * tokens, num_experts, dim, hidden, gated=True, capability=9)
    assert layer_tiles(size) in [entry.tiles for entry in shipped()]
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gate = torch.randn(dim, num_experts, device="cuda", dtype=torch.bfloat16).div(28).requires_grad_()
    experts = init_gated(num_experts, dim, hidden, device="cuda", dtype=torch.bfloat16)
    experts = type(experts)(*(p.requires_grad_() for p in experts))
    recipe = Recipe(linear_gate, partial(fused_top_k, k=2), fused_layer())
    run = lambda: moe_layer(x, MoEParams(gate, experts), recipe).y  # noqa: E731
    leaves, grad = (x, gate, *experts), torch.randn_like(x)
    expected = [run(), *torch.autograd.grad(run(), leaves, grad)]
    compiled = torch.compile(run, fullgraph=True)
    y = compiled()
    for name, found, want in zip(
        ("y", "x", "gate", *experts._fields), (y, *torch.autograd.grad(y, leaves, grad)), expected, strict=True
    ):
        close(found, want, name)


@pytest.mark.parametrize("load", ["one expert", "most are empty"])
def test_shipped_tiles_take_any_load(load: str) -> None:
    """With the tiles of the shipped table that overlap in every product, and groups without a row."""
    num_experts, dim, hidden, rows = 64, 2048, 1024, 64 * 256
    tiles = layer_tiles(LayerSize(torch.bfloat16, rows, num_experts, dim, hidden, gated=True, capability=9))
    x = torch.randn(600, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    params = init_gated(num_experts, dim, hidden, device="cuda", dtype=torch.bfloat16)
    params = type(params)(*(p.requires_grad_() for p in params))
    logits = torch.randn(600, num_experts, device="cuda")
    logits[:, 3 if load == "one expert" else slice(0, 60)] += 50.0 if load == "one expert" else -50.0
    routing = top_k(logits, k=2)
    grad = torch.randn_like(x)
    out = {}
    for name, layer, cast in (
        ("fused", fused_layer(tiles=lambda size: tiles), lambda t: t),
        ("loop", expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=loop)), lambda t: t.double()),
    ):
        tokens, own = cast(x), type(params)(*map(cast, params))
        y = layer(tokens, routing, own)
        out[name] = [y, *torch.autograd.grad(y, (x, *params), cast(grad))]
    for name, found, expected in zip(("y", "x", *params._fields), *out.values(), strict=True):
        close(found, expected, name)
