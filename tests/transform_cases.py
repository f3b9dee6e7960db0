"""What tests of transforms share: a small layer, and what is held of every one of its backends."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit.dispatch import dropless, padded
from moekit.experts import GatedParams, batched, init_gated, swiglu
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


PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def check_row_of_the_page(layer: ExpertLayer, name: str, device: str = "cpu") -> None:
    """Hold each cell of a backend's row in docs/performance.md to what happens; what goes through, to `batched`."""
    section = (
        PAGE.read_text(encoding="utf-8").split("\n## Transforms, and gradients of gradients\n")[1].split("\n## ")[0]
    )
    [head], [row] = (
        re.findall(rf"^\| {first}[^|]*\| (.*) \|$", section, flags=re.MULTILINE)
        for first in ("experts on", f"`{name}`")
    )
    columns = _attempts(layer, device)
    assert head.replace("`", "").split(" | ") == [*columns]
    for attempts, said in zip(columns.values(), row.split(" | "), strict=True):
        for attempt in attempts:
            if said == "yes":
                attempt()
            else:
                assert said == "no"
                with pytest.raises((RuntimeError, NotImplementedError)):
                    attempt()


def _attempts(layer: ExpertLayer, device: str) -> dict[str, list[Callable[[], None]]]:
    x, routing, params = case(device)
    logits = torch.randn(2, T, E, generator=torch.Generator().manual_seed(1)).to(device)
    plain = composed(batched, padded(capacity_factor=float(E)))  # drops nothing

    def total(x: Tensor, up: Tensor, *, layer: ExpertLayer = layer, routing: Routing = routing) -> Tensor:
        return layer(x, routing, params._replace(up=up)).square().sum()

    def same(transform: Callable[..., Any]) -> Callable[[], None]:
        return lambda: torch.testing.assert_close(
            transform(total), transform(partial(total, layer=plain)), rtol=1e-4, atol=1e-4
        )

    def routed(f: Callable[..., Tensor]) -> Tensor:
        return torch.vmap(lambda z: f(x, params.up, routing=top_k(z, k=K)))(logits)

    def of_gradient(f: Callable[..., Tensor], which: int) -> Tensor:
        def size(each: Tensor) -> Tensor:
            return (
                torch.func.grad(f, which)(*(each if i == which else (x, params.up)[i] for i in range(2))).square().sum()
            )

        return torch.func.grad(size)((x, params.up)[which])

    def by_graph(f: Callable[..., Tensor], which: int) -> Tensor:
        leaves = [each.clone().requires_grad_() for each in (x, params.up)]
        (gradient,) = torch.autograd.grad(f(*leaves), leaves[which], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaves[which])[0]

    gradients = [[same(partial(f, which=i)) for f in (of_gradient, by_graph)] for i in range(2)]
    return {
        "grad, vjp": [
            same(lambda f: torch.func.grad(f, (0, 1))(x, params.up)),
            same(lambda f: torch.func.vjp(f, x, params.up)[1](torch.ones((), device=device))),
        ],
        "jvp": [same(lambda f: torch.func.jvp(f, (x, params.up), (x, params.up)))],
        "vmap over tokens": [same(lambda f: torch.vmap(f, (0, None))(torch.stack([x, -x]), params.up))],
        "vmap with the router": [same(routed)],
        "gradient of a gradient by x": gradients[0],
        "by the matrices": gradients[1],
    }
