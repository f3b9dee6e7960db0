"""Layers in transforms of torch.func, against autograd: gradients by all, the rest by those on torch's operators."""

from importlib import import_module

import pytest
import torch
from torch import Tensor
from transform_cases import (
    D,
    E,
    K,
    T,
    case,
    check_compiled,
    check_gradients,
    check_refusals,
    check_row_of_the_page,
    composed,
)

from moekit.dispatch import dropless, padded
from moekit.experts import GatedParams, batched, fused_cpu, grouped, loop
from moekit.recipes import MoE, auto
from moekit.recipes.names import RECIPES
from moekit.recipes.routers import ROUTERS
from moekit.routing import _half_gates, fused_top_k, linear_gate, top_k
from moekit.types import ExpertLayer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),  # torch's linearize
]

PLAIN = {"loop": composed(loop), "batched": composed(batched, padded(capacity_factor=0.75))}
LAYERS = {**PLAIN, "grouped": composed(grouped), "fused_cpu": fused_cpu(plan=dropless().plan), "auto": auto()}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_autograd(name: str) -> None:
    check_gradients(LAYERS[name])


@pytest.mark.parametrize("name", sorted({*LAYERS} - {"auto"}))
def test_the_page_on_performance_says_what_goes_through(name: str) -> None:
    check_row_of_the_page(
        composed(batched, padded(capacity_factor=float(E))) if name == "batched" else LAYERS[name], name
    )


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_gradients_are_right_or_refused(name: str) -> None:
    check_compiled(LAYERS[name])


@pytest.mark.parametrize("name", PLAIN)
def test_compiled_gradients_of_gradients_are_right(name: str) -> None:
    x, routing, params = case()

    def total(x: Tensor) -> Tensor:
        return PLAIN[name](x, routing, params).square().sum()

    def twice(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: torch.func.grad(total)(x).square().sum())(x)

    torch.compiler.reset()
    found = torch.compile(twice, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, twice(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "said"), [("fused_cpu", "fused_cpu"), ("auto", "fused_cpu")])
def test_what_has_no_other_transforms_says_so(name: str, said: str) -> None:
    check_refusals(LAYERS[name], said)


@pytest.mark.parametrize("name", PLAIN)
def test_layers_on_operators_take_every_transform(name: str) -> None:
    x, routing, params = case()
    x, routing = x.double(), routing._replace(weights=routing.weights.double())
    params = GatedParams(*(w.double() for w in params))

    def total(x: Tensor) -> Tensor:
        return PLAIN[name](x, routing, params).square().sum()

    hessian = torch.autograd.functional.hessian(total, x)  # by autograd functions of our own, twice
    torch.testing.assert_close(torch.func.hessian(total)(x), hessian, rtol=1e-9, atol=1e-9)
    tangent = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradient = torch.func.grad(total)(x)
    torch.testing.assert_close(torch.func.jvp(total, (x,), (tangent,))[1], (gradient * tangent).sum())
    torch.testing.assert_close(torch.func.linearize(total, x)[1](tangent), (gradient * tangent).sum())
    several = torch.stack([x, tangent])
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(total))(several), torch.stack([gradient, torch.func.grad(total)(tangent)])
    )


def test_gradients_of_each_sequence_go_through_its_own_routing() -> None:
    _, _, params = case()
    xs, gate = torch.randn(3, T, D), torch.randn(D, E)

    def total(gate: Tensor, x: Tensor) -> Tensor:
        return PLAIN["batched"](x, top_k(x @ gate, k=K), params).square().sum()

    found = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(gate, xs)
    expected = torch.stack([torch.func.grad(total)(gate, x) for x in xs])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_grouped_has_the_gradients_of_gradients_that_it_can_and_refuses_the_others() -> None:
    x, routing, params = case()

    def total(x: Tensor, up: Tensor, *, layer: ExpertLayer = LAYERS["grouped"]) -> Tensor:
        return layer(x, routing, params._replace(up=up)).square().sum()

    x, up = x.requires_grad_(), params.up.requires_grad_()
    for leaf, others in ((x, (x, up)), (up, ())):
        (gradient,) = torch.autograd.grad(total(x, up), leaf, create_graph=True)
        (plain,) = torch.autograd.grad(total(x, up, layer=PLAIN["loop"]), leaf, create_graph=True)
        for other in others:
            found = torch.autograd.grad(gradient.square().sum(), other, retain_graph=True)
            expected = torch.autograd.grad(plain.square().sum(), other, retain_graph=True)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for other in (x, up):
        with pytest.raises(RuntimeError, match="grouped: its gradient has no gradient"):
            torch.autograd.grad(gradient.square().sum(), other, retain_graph=True)


def test_gate_and_router_leave_their_kernels_in_a_transform(monkeypatch) -> None:
    router = import_module("moekit.routing.fused_top_k")
    monkeypatch.setattr(Tensor, "is_cuda", True)
    logits, x = torch.zeros(2, E), torch.zeros(2, D, dtype=torch.bfloat16)
    asked = []

    def ask(_: Tensor) -> Tensor:
        asked.append((_half_gates.takes(x, logits), router._has_kernel(logits)))
        return _

    ask(logits)
    torch.func.vmap(ask)(torch.zeros(1))
    assert asked == [(True, router.HAS_TRITON), (False, False)]


def test_rows_of_nobody_are_not_read_in_a_transform() -> None:
    x, routing, _ = case()
    moves = padded(capacity_factor=2.0)
    plan = moves.plan(routing)
    nobody = (plan.assignments < 0).unsqueeze(1)
    assert nobody.any()

    def total(x: Tensor) -> Tensor:
        rows = moves.dispatch(x, routing, plan).masked_fill(nobody, torch.nan)
        return moves.combine(rows, routing, plan).square().sum()

    assert torch.func.grad(total)(x).isfinite().all()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_modules_of_every_recipe_are_functions_of_their_parameters(name: str) -> None:
    torch.manual_seed(0)
    moe = MoE(16, 16, RECIPES[name](), hidden=12)
    x, ids = torch.randn(2, 6, 16), torch.arange(12).view(2, 6)
    options = {"token_ids": ids} if "token_ids" in moe.recipe.needs else {}
    params = {key: each.detach() for key, each in moe.named_parameters()}

    def total(params: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(1)  # of routers with noise
        output = torch.func.functional_call(moe, params, (x,), options)
        return output.y.square().sum() + sum(output.losses.values())

    found = torch.func.grad(total)(params)
    leaves = {key: each.clone().requires_grad_() for key, each in params.items()}
    wanted = torch.autograd.grad(total(leaves), [*leaves.values()], allow_unused=True, materialize_grads=True)
    for (key, gradient), expected in zip(found.items(), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_who_looks_for_nan_is_not_sent_to_rows_of_nobody(name: str, masked: bool) -> None:
    moe, x = MoE(16, 16, RECIPES[name](), hidden=8), torch.randn(2, 12, 16, requires_grad=True)
    ids, mask = torch.arange(24).view(2, 12), torch.arange(24).view(2, 12) % 5 != 0
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        with torch.autograd.detect_anomaly():
            output = moe(x, token_ids=ids, token_mask=mask if masked else None)
            (output.y.square().sum() + sum(output.losses.values())).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*(searchsorted|performance drop):UserWarning")  # of vmap
@pytest.mark.parametrize("name", ["token_rounding", "top_k", "sinkhorn", "expert_choice"])
def test_a_router_decides_for_each_batch_of_a_vmap(name: str) -> None:
    route, logits = ROUTERS[name]().route, torch.randn(3, 24, 4)
    found = torch.vmap(lambda z: route(z).weights)(logits)
    torch.testing.assert_close(found, torch.stack([route(z).weights for z in logits]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_router_and_gate_on_cuda_are_transformed() -> None:
    x, w = torch.randn(33, 16, device="cuda", dtype=torch.bfloat16), torch.randn(16, 8, device="cuda")

    def total(x: Tensor, w: Tensor) -> Tensor:
        return fused_top_k(linear_gate(x, w), k=2).weights.square().sum()

    found = torch.func.grad(total, argnums=(0, 1))(x, w)
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    for gradient, expected in zip(found, torch.autograd.grad(total(*leaves), leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=2e-2)
