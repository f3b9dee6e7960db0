"""What does a whole MoE layer cost beside its arithmetic? Gate, route, dispatch, experts, combine; forward + backward.

The reference row ``dense bound`` is the six products of one SwiGLU expert fed T * K rows, ``dense expert`` all of it.
The load is balanced, so that ``batched`` at capacity factor 1 neither drops nor pads and all rows do equal work.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from shapes import EVERY_SHAPE, Shape

from moekit.dispatch import dropless, padded
from moekit.experts import GatedParams, batched, grouped, loop, swiglu
from moekit.recipes import MoEParams, Recipe, expert_layer, moe_layer
from moekit.recipes.bench.dense import dense_bound, dense_expert
from moekit.recipes.bench.rows import Build, make_case
from moekit.recipes.bench.shapes import LayerShape
from moekit.routing import linear_gate, round_robin, top_k
from moekit.types import Dispatcher, GroupedMatmul

DENSE: dict[str, Build] = {"dense bound": dense_bound, "dense expert": dense_expert}
BACKENDS: dict[str, tuple[Dispatcher, GroupedMatmul]] = {
    "loop": (dropless(), loop),
    "batched": (padded(capacity_factor=1.0), batched),
    "grouped": (dropless(), grouped),
}


@pytest.mark.benchmark(max_time=2.0)
@pytest.mark.parametrize("name", [*DENSE, *BACKENDS])
@pytest.mark.parametrize("shape", EVERY_SHAPE, indirect=True)
def test_layer(measure, shape, name):
    body = dense(shape, DENSE[name]) if name in DENSE else layer(shape, *BACKENDS[name])
    flops = 18 * shape.rows * shape.dim * shape.hidden  # 3 matrices, 2 operations, 1 product forward and 2 backward
    measure(
        body, shape, stage="layer forward + backward", name=name, reference="dense bound", work=flops, unit="TFLOP/s"
    )


def dense(shape: Shape, build: Build) -> Callable[[], object]:
    sizes = LayerShape("", shape.tokens, shape.dim, shape.hidden, shape.experts, shape.k)
    row = build(make_case(sizes, "uniform", device=shape.device, dtype=shape.dtype))
    return lambda: torch.autograd.grad(row.forward(), row.leaves, row.grad)


def layer(shape: Shape, dispatcher: Dispatcher, matmul: GroupedMatmul) -> Callable[[], object]:
    x, grad = shape.random(shape.tokens, shape.dim), shape.random(shape.tokens, shape.dim).detach()
    up = (shape.experts, shape.dim, shape.hidden)
    experts = GatedParams(shape.random(*up), shape.random(*up), shape.random(up[0], up[2], up[1]))
    params = MoEParams(shape.random(shape.dim, shape.experts), experts)
    recipe = Recipe(
        linear_gate,
        partial(round_robin, k=shape.k),
        expert_layer(dispatcher=dispatcher, experts=partial(swiglu, matmul=matmul)),
    )

    def body() -> object:
        return torch.autograd.grad(moe_layer(x, params, recipe).y, (x, params.gate, *experts), grad)

    return body


@pytest.mark.benchmark(max_time=1.0)
@pytest.mark.parametrize("name", ["without experts", "whole layer"])
@pytest.mark.parametrize("shape", EVERY_SHAPE, indirect=True)
def test_share_of_all_but_the_experts(measure, shape, name):
    """The fraction of the second row is the share of gate, router, plan, dispatch and combine in a forward."""
    x, gate = shape.random(shape.tokens, shape.dim).detach(), shape.random(shape.dim, shape.experts).detach()
    up = (shape.experts, shape.dim, shape.hidden)
    experts = GatedParams(*(shape.random(*size).detach() for size in (up, up, (up[0], up[2], up[1]))))
    network = partial(swiglu, matmul=grouped) if name == "whole layer" else lambda rows, groups, params: rows
    layer = expert_layer(dispatcher=dropless(), experts=network)
    recipe = Recipe(linear_gate, partial(top_k, k=shape.k), layer)
    params = MoEParams(gate, experts)

    @torch.no_grad()
    def body() -> object:
        return moe_layer(x, params, recipe).y

    work = 6 * shape.rows * shape.dim * shape.hidden
    measure(body, shape, stage="layer forward", name=name, reference="without experts", work=work, unit="TFLOP/s")
