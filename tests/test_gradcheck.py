"""Finite differences in float64: of the whole layer, and of each piece whose gradient is written by hand."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from moekit.dispatch import dropless, dropless_plan, gather_rows, padded, padded_plan, scatter_rows
from moekit.experts import (
    GatedParams,
    MlpParams,
    batched,
    geglu,
    gelu_mlp,
    grouped,
    init_gated,
    init_mlp,
    loop,
    relu2,
    relu_mlp,
    swiglu,
)
from moekit.recipes import MoEParams, Recipe, expert_layer, moe_layer
from moekit.routing import linear_gate, load_balance_loss, sigmoid, softmax_of_top_k, top_k, z_loss
from moekit.routing.top_k import token_choice
from moekit.types import Groups, Routing

T, D, F, E, K = 4, 2, 2, 3, 2
FFNS = {swiglu: init_gated, geglu: init_gated, gelu_mlp: init_mlp, relu_mlp: init_mlp, relu2: init_mlp}
ROUTERS = {
    "softmax": partial(top_k, k=K),
    "normalized": partial(top_k, k=K, normalize=True),
    "sigmoid": partial(top_k, k=K, score=sigmoid, normalize=True, scale=2.5),
    "softmax of top k": partial(softmax_of_top_k, k=K),
}


def draw_inputs(init) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Draw x, gate and experts until no finite difference can change a decision."""
    while True:
        x, gate = torch.randn(T, D, dtype=torch.float64), torch.randn(D, E, dtype=torch.float64)
        gaps = (x @ gate).sort(-1).values.diff(dim=-1)
        if gaps.min() > 1e-2:
            return x.requires_grad_(), gate.requires_grad_(), [w.requires_grad_() for w in init(E, D, F, dtype=x.dtype)]


def check_layer(recipe: Recipe, init) -> None:
    x, gate, experts = draw_inputs(init)
    kind = GatedParams if len(experts) == 3 else MlpParams

    def layer(x: Tensor, gate: Tensor, *experts: Tensor) -> tuple[Tensor, ...]:
        output = moe_layer(x, MoEParams(gate, kind(*experts)), recipe)
        return output.y, *output.losses.values()

    assert gradcheck(layer, (x, gate, *experts), check_undefined_grad=False)


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("factor", [0, 0.5], ids=["dropless", "with drops"])
def test_layer_with_each_ffn(ffn, factor: float) -> None:
    layer = expert_layer(dispatcher=padded(capacity_factor=factor), experts=partial(ffn, matmul=grouped))
    check_layer(Recipe(linear_gate, ROUTERS["softmax"], layer), FFNS[ffn])


@pytest.mark.parametrize("router", ROUTERS)
def test_layer_with_each_router_and_its_losses(router: str) -> None:
    layer = expert_layer(dispatcher=dropless(), experts=partial(gelu_mlp, matmul=loop))
    losses = {
        "load_balance": load_balance_loss,
        "sigmoid": partial(load_balance_loss, score=sigmoid),
        "z": z_loss,
    }
    check_layer(Recipe(linear_gate, ROUTERS[router], layer, losses), init_mlp)


def routing_with_gaps() -> Routing:
    """Seven tokens, two choices, some missing, one token with none; expert 1 of 4 is empty, expert 0 is popular."""
    experts = torch.tensor([[0, 2], [-1, -1], [0, 3], [3, -1], [-1, 0], [0, 2], [2, 0]])
    return token_choice(experts, torch.rand(7, 2, dtype=torch.float64), torch.zeros(7, 4))


PLANS = {"dropless": dropless_plan, "padded": partial(padded_plan, capacity_factor=0.7)}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("axes", [2, 1], ids=["token choice", "list"])
def test_gather_and_scatter(plan: str, axes: int) -> None:
    routing = routing_with_gaps()
    plan = PLANS[plan](routing)
    if axes == 1:
        routing = routing._replace(
            token_indices=routing.token_indices.flatten(),
            expert_indices=routing.expert_indices.flatten(),
            weights=routing.weights.flatten(),
        )
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(plan.assignments.shape[0], 3, dtype=torch.float64, requires_grad=True)
    weights = routing.weights.requires_grad_()
    assert gradcheck(lambda x: gather_rows(x, routing, plan), (x,))
    assert gradcheck(lambda r, w: scatter_rows(r, routing._replace(weights=w), plan), (rows, weights))


@pytest.mark.parametrize(
    ("matmul", "sizes", "capacity"),
    [(grouped, [2, 0, 3], None), (loop, [2, 0, 3], None), (batched, [2, 2, 2], 2), (grouped, [2, 2, 2], 2)],
)
def test_matmuls(matmul, sizes: list[int], capacity: int | None) -> None:
    groups = Groups(torch.tensor(sizes, dtype=torch.int32), capacity)
    rows = torch.randn(sum(sizes), 2, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda rows, w: matmul(rows, groups, w), (rows, w))
