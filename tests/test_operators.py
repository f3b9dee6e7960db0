"""Operators are called directly where torch's dispatcher would do nothing else, and through it everywhere else."""

import runpy
import sys

import pytest
import torch
from interpreted import Calls
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import profile

from moekit import operators
from moekit.operators import operator, wants_gradient

CALLERS: list[str] = []


def _fake(x: Tensor, others: list[Tensor], times: int) -> Tensor:
    return torch.empty_like(x)


@operator("scaled_for_a_test", _fake)
def scaled(x: Tensor, others: list[Tensor], times: int) -> Tensor:
    """Multiply, and note by whom it was called."""
    CALLERS.append(sys._getframe(1).f_code.co_name)
    return x * times


torch.library.register_autograd(
    "moekit::scaled_for_a_test",
    lambda ctx, grad: (grad * ctx.times, [], None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "times", inputs[2]),
)


def is_direct(x: Tensor, *others: Tensor) -> bool:
    CALLERS.clear()
    assert torch.equal(torch.as_tensor(scaled(x, [*others], 3)), 3 * torch.as_tensor(x))
    assert len(CALLERS) == 1
    return CALLERS[0] == "call"


class Called(TorchFunctionMode):
    """Record names of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Odd(Tensor):
    """A tensor of another class."""


def test_without_gradients_plain_tensors_are_passed_directly() -> None:
    x, w = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    assert not is_direct(x)  # gradients are on
    with torch.no_grad():
        assert is_direct(x, x, w)
        assert is_direct(w)
    with torch.inference_mode():
        assert is_direct(x)


@torch.no_grad()
def test_modes_and_tensors_of_other_classes_see_the_operator() -> None:
    x = torch.ones(2)
    with Calls() as seen:
        assert not is_direct(x)
    assert seen.own() == ["scaled_for_a_test"]
    with Called() as seen:
        assert not is_direct(x)
    assert "moekit.scaled_for_a_test.default" in seen.names
    assert not is_direct(x.as_subclass(Odd))
    assert not is_direct(x, x, x.as_subclass(Odd))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    CALLERS.clear()
    assert scaled(fake, [], 3).shape == (2,)
    assert not CALLERS  # a fake tensor has no values to multiply


@operator("anything_for_a_test", lambda x, maybe, word, numbers, tensors, flag: torch.empty_like(x))
def anything(
    x: Tensor, maybe: Tensor | None, word: str, numbers: list[float], tensors: list[Tensor], flag: bool
) -> Tensor:
    """Note by whom it was called."""
    CALLERS.append(sys._getframe(1).f_code.co_name)
    return x.clone()


@torch.no_grad()
def test_every_kind_of_argument_is_passed_directly() -> None:
    CALLERS.clear()
    x = torch.ones(2)
    for maybe, tensors in ((None, []), (x, [x, x])):
        anything(x, maybe, "word", [1.0, 2.0], tensors, True)
    assert CALLERS == ["call", "call"]


@torch.no_grad()
def test_tensors_whose_memory_does_not_hold_their_values_are_dispatched() -> None:
    x = torch.ones(2)
    assert not is_direct(torch._neg_view(x))
    assert not is_direct(torch._efficientzerotensor(2))
    CALLERS.clear()
    assert scaled(x.to("meta"), [], 3).shape == (2,)
    assert scaled(x, [x.to("meta")], 3).device.type == "cpu"
    assert "call" not in CALLERS


@torch.no_grad()
def test_tracers_find_the_operator() -> None:
    x = torch.ones(2)
    traced = torch.jit.trace(lambda x: scaled(x, [x], 3), x)
    assert "moekit::scaled_for_a_test" in str(traced.graph)
    for before in (False, True):
        graph = make_fx(lambda x: scaled(x, [x], 3), pre_dispatch=before)(x)
        assert "moekit.scaled_for_a_test.default" in {str(node.target) for node in graph.graph.nodes}


@torch.no_grad()
def test_a_torch_that_cannot_be_asked_dispatches(monkeypatch) -> None:
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    assert operators._onlookers() is None
    monkeypatch.setattr(operators, "_ONLOOKERS", None)
    assert not is_direct(torch.ones(2))


@torch.no_grad()
def test_a_profiler_sees_the_operator() -> None:
    with profile() as seen:
        assert not is_direct(torch.ones(2))
    assert "moekit::scaled_for_a_test" in {event.name for event in seen.events()}


@torch.no_grad()
def test_a_transform_is_told_that_it_has_no_rule() -> None:
    with pytest.raises(RuntimeError, match="moekit::scaled_for_a_test"):
        torch.func.vmap(lambda x: scaled(x, [], 3))(torch.ones(2, 2))


def test_a_registered_gradient_is_found() -> None:
    x = torch.ones(2, requires_grad=True)
    scaled(x, [], 3).sum().backward()
    assert x.grad.tolist() == [3, 3]


@pytest.mark.parametrize("gradients", [True, False])
def test_compiled_code_has_the_operator(gradients: bool) -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with torch.set_grad_enabled(gradients):
        compiled = torch.compile(lambda x: scaled(x, [x], 3), backend=backend, fullgraph=True)
        assert compiled(torch.ones(2)).tolist() == [3, 3]
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert "moekit.scaled_for_a_test.default" in targets


def test_what_wants_a_gradient() -> None:
    x, w = torch.ones(2), torch.ones(2, requires_grad=True)
    assert wants_gradient(x, w)
    assert not wants_gradient(x)
    assert not wants_gradient()
    with torch.no_grad():
        assert not wants_gradient(w)


def test_a_torch_for_amd_cards_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert runpy.run_path(operators.__file__)["HAS_TRITON"]
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert not runpy.run_path(operators.__file__)["HAS_TRITON"]
