"""Layers in transforms of torch.func, against autograd: gradients by all, the rest by those on torch's operators."""

from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from interpreted import DEVICE, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor

from moekit.dispatch import dropless, padded
from moekit.experts import INPUTS, GatedParams, batched, fused_cpu, fused_layer, grouped, init_gated, loop, swiglu
from moekit.experts.triton_matmul import triton
from moekit.recipes import MoE, auto, expert_layer
from moekit.recipes.names import RECIPES
from moekit.routing import _half_gates, fused_top_k, linear_gate, top_k
from moekit.types import ExpertLayer, Routing

pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),  # torch's linearize
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),  # by torch itself
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # rows that nobody reads
]

T, D, F, E, K = 7, 8, 12, 4, 2


def composed(matmul: Any, dispatcher: Any = None) -> ExpertLayer:
    return expert_layer(dispatcher=dispatcher or dropless(), experts=partial(swiglu, matmul=matmul))


PLAIN = {"loop": composed(loop), "batched": composed(batched, padded(capacity_factor=0.75))}
LAYERS = {**PLAIN, "grouped": composed(grouped), "fused_cpu": fused_cpu(plan=dropless().plan), "auto": auto()}
ON_KERNELS = {
    "fused_layer": fused_layer(),
    "fused_layer, inputs kept": fused_layer(keep=INPUTS),
    "triton": composed(triton),
}


@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def case(device: str = "cpu") -> tuple[Tensor, Routing, GatedParams]:
    generator = torch.Generator().manual_seed(0)
    routing = top_k(torch.randn(T, E, generator=generator).to(device), k=K)
    x, params = torch.randn(T, D, generator=generator), init_gated(E, D, F, generator=generator)
    return x.to(device), routing, GatedParams(*(w.to(device) for w in params))


def check_gradients(layer: ExpertLayer, device: str = "cpu") -> None:
    x, routing, params = case(device)
    inputs = {"x": x, "weights": routing.weights, **params._asdict()}

    def total(inputs: dict[str, Tensor]) -> Tensor:
        x, weights, *matrices = inputs.values()
        return layer(x, routing._replace(weights=weights), GatedParams(*matrices)).square().sum()

    leaves = {name: each.detach().requires_grad_() for name, each in inputs.items()}
    wanted = torch.autograd.grad(total(leaves), [*leaves.values()])
    found, value = torch.func.grad_and_value(total)(inputs)
    torch.testing.assert_close(value, total(inputs))
    for (name, gradient), expected in zip(found.items(), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5, msg=name)
    for name, expected in zip(inputs, wanted, strict=True):  # of one alone, and the others are constants
        alone = torch.func.grad(lambda each, name=name: total({**inputs, name: each}))(inputs[name])
        torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_autograd(name: str) -> None:
    check_gradients(LAYERS[name])


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", ON_KERNELS)
def test_gradients_of_kernels_are_those_of_autograd(name: str) -> None:
    check_gradients(ON_KERNELS[name], DEVICE)


@runs_kernels
def test_a_transform_computes_no_more_than_autograd(monkeypatch) -> None:
    from moekit.experts import _fused_operators

    (x, routing, params), frozen, backward = case(DEVICE), [], _fused_operators._backward
    monkeypatch.setattr(_fused_operators, "_backward", lambda *given: (frozen.append(given[-1]), backward(*given))[1])
    layer = ON_KERNELS["fused_layer"]
    torch.func.grad(lambda x: layer(x, routing, params).sum())(x)
    torch.func.grad(lambda up: layer(x, routing, params._replace(up=up)).sum())(params.up)
    assert frozen == [True, False]
    monkeypatch.setattr(_fused_operators.FusedOnce, "apply", None)
    monkeypatch.setattr("moekit.experts.fused.FusedOnce", None)
    layer(x.requires_grad_(), routing, params).sum().backward()  # by Fused
    assert frozen == [True, False, True]


def check_compiled(layer: ExpertLayer, device: str = "cpu") -> None:
    x, routing, params = case(device)

    def total(x: Tensor) -> Tensor:
        return layer(x, routing, params).square().sum()

    torch.compiler.reset()
    expected = torch.func.grad(total)(x)
    try:
        found = torch.compile(torch.func.grad(total), backend="aot_eager")(x)
    except Exception as error:  # whatever a compiler raises: it is not a wrong gradient
        assert type(error).__module__.startswith("torch._dynamo")  # noqa: PT017
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.any()


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_gradients_are_right_or_refused(name: str) -> None:
    check_compiled(LAYERS[name])


@runs_kernels
@pytest.mark.parametrize("name", ON_KERNELS)
def test_compiled_gradients_of_kernels_are_right_or_refused(name: str) -> None:
    check_compiled(ON_KERNELS[name], DEVICE)


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


def check_refusals(layer: ExpertLayer, name: str, device: str = "cpu") -> None:
    x, routing, params = case(device)

    def total(x: Tensor) -> Tensor:
        return layer(x, routing, params).square().sum()

    with pytest.raises(RuntimeError, match=f"{name}: its gradient has no gradient"):
        torch.func.grad(lambda x: torch.func.grad(total)(x).sum())(x)
    for forward_mode in (lambda: torch.func.jvp(total, (x,), (x,)), lambda: torch.func.linearize(total, x)):
        with pytest.raises(NotImplementedError, match=f"{name}: it has no forward-mode gradient"):
            forward_mode()
    with pytest.raises(RuntimeError, match="vmap support"):
        torch.func.vmap(total)(torch.stack([x, x]))


@pytest.mark.parametrize(("name", "said"), [("fused_cpu", "fused_cpu"), ("auto", "fused_cpu")])
def test_what_has_no_other_transforms_says_so(name: str, said: str) -> None:
    check_refusals(LAYERS[name], said)


@runs_kernels
@pytest.mark.parametrize(("name", "said"), [("fused_layer", "fused_layer"), ("triton", "triton")])
def test_what_has_no_other_transforms_says_so_on_kernels(name: str, said: str) -> None:
    check_refusals(ON_KERNELS[name], said, DEVICE)


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
