"""Transforms of torch.func through the layers of kernels: gradients as autograd has them, and refusals of the rest."""

import pytest
import torch
from interpreted import DEVICE, run_interpreted, runs_kernels, starts_interpreter
from transform_cases import case, check_compiled, check_gradients, check_refusals, check_row_of_the_page, composed

from moekit.experts import INPUTS, fused_layer
from moekit.experts.triton_matmul import triton

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # rows that nobody reads
]

ON_KERNELS = {
    "fused_layer": fused_layer(),
    "fused_layer, inputs kept": fused_layer(keep=INPUTS),
    "triton": composed(triton),
}


@pytest.mark.slow
@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", ON_KERNELS)
def test_gradients_of_kernels_are_those_of_autograd(name: str) -> None:
    check_gradients(ON_KERNELS[name], DEVICE)


@runs_kernels
@pytest.mark.parametrize("name", ["fused_layer", "triton"])
def test_the_page_on_performance_says_what_goes_through_kernels(name: str) -> None:
    check_row_of_the_page(ON_KERNELS[name], name, DEVICE)


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


@runs_kernels
@pytest.mark.parametrize("name", ON_KERNELS)
def test_compiled_gradients_of_kernels_are_right_or_refused(name: str) -> None:
    check_compiled(ON_KERNELS[name], DEVICE)


@runs_kernels
@pytest.mark.parametrize(("name", "said"), [("fused_layer", "fused_layer"), ("triton", "triton")])
def test_what_has_no_other_transforms_says_so_on_kernels(name: str, said: str) -> None:
    check_refusals(ON_KERNELS[name], said, DEVICE)
