import itertools
import re
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moekit.routing import (
    biased_gate,
    cosine_gate,
    init_biased_gate,
    init_cosine_gate,
    init_linear_gate,
    init_noisy_gate,
    init_soft_gate,
    linear_gate,
    noisy_gate,
    score_and_pass,
    soft_gate,
)

GATES = {
    linear_gate: init_linear_gate,
    biased_gate: init_biased_gate,
    noisy_gate: init_noisy_gate,
    cosine_gate: init_cosine_gate,
    soft_gate: partial(init_soft_gate, slots=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    x, w = torch.randn(9, 33).to(dtype), torch.randn(33, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = linear_gate(x, w)
    assert logits.dtype == torch.float32
    # A product in bfloat16 would be off by about 1e-2.
    torch.testing.assert_close(logits.double(), x.double() @ w.double(), rtol=1e-5, atol=1e-5)


def test_float64_stays_float64() -> None:
    assert linear_gate(torch.ones(1, 2, dtype=torch.float64), torch.ones(2, 3)).dtype == torch.float64


def test_gradients_have_the_dtype_of_their_tensors() -> None:
    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(6, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_gate(x, w).sum()
    loss.backward()
    assert (x.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(w.grad, x.detach().float().sum(0).unsqueeze(1).expand(6, 3))


def test_no_tokens() -> None:
    assert linear_gate(torch.ones(0, 2), torch.ones(2, 3)).shape == (0, 3)


@pytest.mark.parametrize(("x", "w"), [((4, 3), (2, 5)), ((2, 2, 3), (3, 5)), ((4, 3), (3,)), ((4, 3), (5, 3))])
def test_shapes_that_do_not_fit(x: tuple[int, ...], w: tuple[int, ...]) -> None:
    for call in (linear_gate, partial(score_and_pass, linear_gate)):
        with pytest.raises(ValueError, match=r"x has shape .* and w .*; expected \(T, D\) and \(D, E\).*Flatten x"):
            call(torch.zeros(x), torch.zeros(w))


def test_parameters_of_another_gate_are_named() -> None:
    for gate, other in itertools.permutations(GATES, 2):
        given, own = GATES[other](3, 5), GATES[gate](3, 5)
        expected = "a tensor (D, E)" if gate is linear_gate else type(own).__name__
        message = f"{gate.__name__}: the gate's parameters are {type(given).__name__}(;|, which lack .*;) expected "
        message += (
            rf"{re.escape(expected)}\. .*make a new MoE of .* or draw the parameters with init_{gate.__name__}\.$"
        )
        for call in (gate, partial(score_and_pass, gate)):
            with pytest.raises(ValueError, match=message):
                call(torch.randn(4, 3), given)


def test_parameters_of_another_gate_are_named_for_bfloat16_on_cuda() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 3, dtype=torch.bfloat16, device="cuda")
        with pytest.raises(
            ValueError, match="linear_gate: the gate's parameters are NoisyGateParams; expected a tensor"
        ):
            score_and_pass(linear_gate, x, init_noisy_gate(3, 5, device="cuda"))


def test_parameters_are_known_by_their_fields() -> None:
    """A user's own tuple is as good, and may hold more."""

    class Mine(NamedTuple):
        w: torch.Tensor
        b: torch.Tensor
        more: int

    w, b = torch.randn(3, 5), torch.randn(5)
    torch.testing.assert_close(biased_gate(torch.eye(3), Mine(w, b, 1)), w + b)
