"""What tests of transforms share: a small layer, and what is held of every one of its backends."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit.dispatch import dropless
from moekit.experts import GatedParams, init_gated, swiglu
from moekit.recipes import expert_layer
from moekit.routing import top_k
from moekit.types import ExpertLayer, Routing

T, D, F, E, K = 7, 8, 12, 4, 2


def composed(matmul: Any, dispatcher: Any = None) -> ExpertLayer:
    return expert_layer(dispatcher=dispatcher or dropless(), experts=partial(swiglu, matmul=matmul))


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


def check_refusals(layer: ExpertLayer, name: str, device: str = "cpu") -> None:
    x, routing, params = case(device)

    def total(x: Tensor) -> Tensor:
        return layer(x, routing, params).square().sum()

    with pytest.raises(RuntimeError, match=f"{name}: its gradient has no gradient"):
        torch.func.grad(lambda x: torch.func.grad(total)(x).sum())(x)
    for forward_mode in (lambda: torch.func.jvp(total, (x,), (x,)), lambda: torch.func.linearize(total, x)):
        with pytest.raises(NotImplementedError, match=f"{name}: it has no forward-mode gradient"):
            forward_mode()
    with pytest.raises(NotImplementedError, match=f"^{name}: it has no vmap support"):
        torch.func.vmap(total)(torch.stack([x, x]))
