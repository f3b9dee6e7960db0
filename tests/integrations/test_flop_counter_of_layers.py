"""What FLOP counters see of each backend: the products of the loop, which torch counts by itself."""

from functools import partial
from typing import Any

import pytest
import torch
from interpreted import DEVICE, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moekit.dispatch import by_weight, dropless, padded
from moekit.experts import (
    INPUTS,
    RELU2,
    SWIGLU,
    Activation,
    BiasedGatedParams,
    BiasedMlpParams,
    GatedParams,
    MlpParams,
    PackedGatedParams,
    fused_cpu,
    fused_layer,
    grouped,
    init_biased_gated,
    init_biased_mlp,
    init_gated,
    init_mlp,
    loop,
    pack_gated,
    triton,
)
from moekit.integrations.flop_counter import register
from moekit.recipes import expert_layer
from moekit.recipes.backends import auto
from moekit.recipes.expert_networks import experts_of
from moekit.routing import top_k
from moekit.types import ExpertLayer, GroupedMatmul, Routing

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # rows that nobody reads
]

register()
T, D, F, E, K = 12, 8, 16, 4, 2
PRODUCT = 2 * T * K * D * F


def packed(num_experts: int, dim: int, hidden: int) -> PackedGatedParams:
    return pack_gated(init_gated(num_experts, dim, hidden))


# By name: the activation, parameters, and how many products a row takes.
KINDS: dict[str, tuple[Activation, Any, type[Any], int]] = {
    "gated": (SWIGLU, init_gated, GatedParams, 3),
    "mlp": (RELU2, init_mlp, MlpParams, 2),
    "packed": (SWIGLU, packed, PackedGatedParams, 3),
    "biased gated": (SWIGLU, init_biased_gated, BiasedGatedParams, 3),
    "biased mlp": (RELU2, init_biased_mlp, BiasedMlpParams, 2),
}


def composed(kind: str, matmul: GroupedMatmul) -> ExpertLayer:
    activation, _, params, _ = KINDS[kind]
    return expert_layer(dispatcher=dropless(), experts=partial(experts_of(activation, params), matmul=matmul))


LAYERS: dict[str, Any] = {
    "loop": lambda kind: composed(kind, loop),
    "grouped": lambda kind: composed(kind, grouped),
    "triton": lambda kind: composed(kind, triton),
    "fused_cpu": lambda kind: fused_cpu(plan=dropless().plan, activation=KINDS[kind][0]),
    "fused_layer": lambda kind: fused_layer(activation=KINDS[kind][0]),
    "inputs kept": lambda kind: fused_layer(activation=KINDS[kind][0], keep=INPUTS),
    "auto": lambda kind: auto(activation=KINDS[kind][0]),
}
UNBIASED = ["gated", "mlp", "packed"]  # composed layers multiply for biases too: they bring them to their rows so
ON_THE_CPU = [(name, kind) for name in ("loop", "grouped", "fused_cpu", "auto") for kind in UNBIASED]
OF_SHAPES = [
    *(("triton", kind) for kind in UNBIASED),
    *((name, kind) for name in ("fused_layer", "inputs kept") for kind in KINDS),
]


def case(kind: str, device: str, *, frozen: bool = False) -> tuple[Tensor, Routing, Any]:
    params = KINDS[kind][1](E, D, F)
    x = torch.randn(T, D).to(device).requires_grad_()
    routing = top_k(torch.randn(T, E).to(device), k=K)
    return x, routing, type(params)(*(p.detach().to(device).requires_grad_(not frozen) for p in params))


def counts(layer: ExpertLayer, given: tuple[Tensor, Routing, Any]) -> tuple[float, float]:
    """Count forward and backward, in products of all assignments' rows and one matrix."""
    with FlopCounterMode(display=False) as forward:
        y = layer(*given)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops() / PRODUCT, backward.get_total_flops() / PRODUCT


@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.parametrize(("name", "kind"), ON_THE_CPU)
def test_all_products_on_the_cpu_are_counted(name: str, kind: str) -> None:
    products = KINDS[kind][3]
    assert counts(LAYERS[name](kind), case(kind, "cpu")) == (products, 2 * products)
    assert counts(LAYERS[name](kind), case(kind, "cpu", frozen=True)) == (products, products)


@pytest.mark.parametrize(("name", "kind"), OF_SHAPES)
def test_all_products_of_kernels_are_counted_by_shapes_alone(name: str, kind: str) -> None:
    products = KINDS[kind][3]
    again = products - 1 if name == "inputs kept" else 0
    assert counts(LAYERS[name](kind), case(kind, "meta")) == (products, 2 * products + again)
    assert counts(LAYERS[name](kind), case(kind, "meta", frozen=True)) == (products, products + again)


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", ["triton", "fused_layer", "inputs kept"])
def test_kernels_are_counted_where_they_run(name: str) -> None:
    again = 2 if name == "inputs kept" else 0
    assert counts(LAYERS[name]("gated"), case("gated", DEVICE)) == (3, 6 + again)


@pytest.mark.parametrize("name", ["fused_cpu", "grouped"])
def test_a_transform_is_counted_too(name: str) -> None:
    layer, (x, routing, params) = LAYERS[name]("gated"), case("gated", "cpu", frozen=True)
    with FlopCounterMode(display=False) as counter:
        torch.func.grad(lambda up: layer(x.detach(), routing, params._replace(up=up)).sum())(params.up)
    # fused_cpu computes the gradients of all matrices if it computes that of one, and those of tokens always
    assert counter.get_total_flops() / PRODUCT == {"fused_cpu": 9, "grouped": 3 + 1 + 1}[name]


@pytest.mark.parametrize(("name", "device"), [("fused_cpu", "cpu"), ("fused_layer", "meta")])
def test_all_assignments_of_a_routing_are_counted_whether_they_exist_or_not(name: str, device: str) -> None:
    x, routing, params = case("gated", device)
    missing = routing._replace(expert_indices=torch.full_like(routing.expert_indices, -1))
    assert counts(LAYERS[name]("gated"), (x, missing, params)) == (3, 6)


def test_a_plan_without_room_for_all_assignments_is_counted_by_its_room() -> None:
    tight = padded(capacity_factor=0.5, priority=by_weight)
    given = case("gated", "cpu")
    assert tight.plan(given[1])[0].shape[0] == T * K // 2
    assert counts(fused_cpu(plan=tight.plan), given) == (1.5, 3)
    roomy = padded(capacity_factor=2.0)  # whose padding fused_cpu does not compute
    assert counts(fused_cpu(plan=roomy.plan), given) == (3, 6)


def test_what_fused_cpu_computes_again_is_counted() -> None:
    x, routing, params = case("gated", "cpu")
    plan = dropless().plan(routing)
    given = (x, routing.weights, routing.token_indices, plan.assignments, plan.groups.sizes, *params, "silu", False)
    with FlopCounterMode(display=False) as counter:
        torch.ops.moekit.fused_cpu(*given, False)[0].sum().backward()
    assert counter.get_total_flops() == (3 + 6 + 2) * PRODUCT
