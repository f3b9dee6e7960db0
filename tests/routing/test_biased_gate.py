"""The gate with a learned bias."""

import pytest
import torch

from moekit.routing import BiasedGateParams, biased_gate, init_biased_gate


def test_it_is_a_linear_layer_with_gradients() -> None:
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    w, b = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    b.requires_grad_()
    logits, expected = biased_gate(x, BiasedGateParams(w, b)), torch.nn.functional.linear(x, w.T, b)
    torch.testing.assert_close(logits, expected)
    cotangent = torch.randn_like(logits)
    grads = [torch.autograd.grad((z * cotangent).sum(), [x, w, b], retain_graph=True) for z in (logits, expected)]
    for grad, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_logits_are_float32_inside_autocast_and_from_half_precision() -> None:
    params = BiasedGateParams(torch.tensor([[1.0]]), torch.tensor([2**-12]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert biased_gate(torch.ones(1, 1), params).item() == 1 + 2**-12
    half = BiasedGateParams(*(p.bfloat16() for p in params))
    assert biased_gate(torch.ones(1, 1, dtype=torch.bfloat16), half).item() == 1 + 2**-12


def test_init_draws_the_matrix_and_zeroes_the_bias() -> None:
    params = init_biased_gate(256, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert params.w.shape == (256, 64)
    assert params.w.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert params.b.dtype == torch.float64
    assert params.b.tolist() == [0.0] * 64


def test_shapes_that_do_not_fit_say_so() -> None:
    with pytest.raises(ValueError, match=r"w has shape \(5, 3\) and b \(4,\); expected \(D, E\) and \(E,\)"):
        biased_gate(torch.zeros(2, 5), BiasedGateParams(torch.zeros(5, 3), torch.zeros(4)))
