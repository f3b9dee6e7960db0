from functools import partial

import pytest
import torch

from moekit.routing import linear_gate, score_and_pass


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
