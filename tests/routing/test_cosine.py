import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from moekit.routing.cosine import CosineGateParams, cosine_gate, init_cosine_gate

T, D, E, P = 6, 5, 4, 3


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def in_loops(x: Tensor, params: CosineGateParams) -> Tensor:
    factor = torch.exp(params.temperature[0] if params.temperature[0] < math.log(100) else torch.tensor(math.log(100)))
    rows = []
    for token in x:
        h = torch.stack([(token * column).sum() for column in params.projection.unbind(1)])
        cosines = [(h * v).sum() / (torch.sqrt((h * h).sum()) * torch.sqrt((v * v).sum())) for v in params.experts]
        rows.append(torch.stack([factor * cosine for cosine in cosines]))
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [0.0, 1.7, 4.0, 9.0])
def test_logits_and_every_gradient_are_those_of_loops(temperature: float) -> None:
    tau = torch.tensor([temperature], dtype=torch.float64, requires_grad=True)
    leaves = {"x": drawn(T, D), "projection": drawn(D, P), "experts": drawn(E, P), "temperature": tau}
    x, *params = leaves.values()
    actual, expected = cosine_gate(x, CosineGateParams(*params)), in_loops(x, CosineGateParams(*params))
    torch.testing.assert_close(actual, expected)
    probe = torch.randn(T, E, dtype=torch.float64)
    grads = torch.autograd.grad((actual * probe).sum(), [*leaves.values()])
    wanted = torch.autograd.grad((expected * probe).sum(), [*leaves.values()], allow_unused=True)
    for name, grad, want in zip(leaves, grads, wanted, strict=True):
        want = torch.zeros_like(grad) if want is None else want
        torch.testing.assert_close(grad, want, msg=lambda text: f"{name}\n{text}")  # noqa: B023
    assert (wanted[3] is None) == (temperature > math.log(100))


def test_gradients_by_finite_differences() -> None:
    leaves = (drawn(2, 3), drawn(3, 2), drawn(3, 2), drawn(1))
    assert gradcheck(lambda x, *params: cosine_gate(x, CosineGateParams(*params)), leaves)


def test_lengths_do_not_matter_and_logits_are_bounded() -> None:
    x, params = torch.randn(T, D), init_cosine_gate(D, E, projected=P)
    logits = cosine_gate(x, params)
    scaled = params._replace(experts=params.experts * torch.tensor([[3.0], [1.0], [0.1], [20.0]]))
    torch.testing.assert_close(cosine_gate(x * 7, scaled), logits)
    hot = params._replace(temperature=torch.tensor([50.0]))
    assert 1 < cosine_gate(x, hot).abs().max() <= 100 * (1 + 1e-6)


def test_a_token_of_zeros_gives_zeros_and_finite_gradients() -> None:
    x = torch.zeros(2, D, requires_grad=True)
    logits = cosine_gate(x, init_cosine_gate(D, E, projected=P))
    assert (logits == 0).all()
    assert torch.autograd.grad(logits.sum(), x)[0].isfinite().all()


def test_the_first_temperature_divides_the_cosines() -> None:
    params = init_cosine_gate(64, 32)
    assert (params.projection.shape, params.experts.shape, params.temperature.shape) == ((64, 16), (32, 16), (1,))
    assert params.temperature.exp().item() == pytest.approx(1 / 0.3)
    assert init_cosine_gate(8, 32, projected=7, temperature=0.5).temperature.exp().item() == pytest.approx(2)
    assert init_cosine_gate(8, 1).experts.shape == (1, 2)


def test_the_draw_follows_its_generator() -> None:
    one, two, other = (init_cosine_gate(D, E, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.projection, other.projection)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_inside_autocast(dtype: torch.dtype) -> None:
    x, params = torch.randn(T, D).to(dtype), init_cosine_gate(D, E, projected=P)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = cosine_gate(x, params)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, in_loops(x.double(), CosineGateParams(*(p.double() for p in params))).float())


def test_no_tokens_and_one_expert() -> None:
    assert cosine_gate(torch.zeros(0, D), init_cosine_gate(D, E)).shape == (0, E)
    assert cosine_gate(torch.randn(3, D), init_cosine_gate(D, 1)).shape == (3, 1)


def test_one_graph() -> None:
    torch._dynamo.reset()
    x, params = torch.randn(T, D, requires_grad=True), init_cosine_gate(D, E)
    compiled = torch.compile(cosine_gate, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(x, params).square().sum(), x)
    torch.testing.assert_close(actual, torch.autograd.grad(cosine_gate(x, params).square().sum(), x)[0])


def test_errors_say_what_was_given() -> None:
    params = init_cosine_gate(D, E, projected=P)
    with pytest.raises(ValueError, match=r"projection has shape \(5, 3\) and experts \(4, 2\); expected \(D, d\)"):
        cosine_gate(torch.randn(T, D), params._replace(experts=torch.zeros(E, 2)))
    with pytest.raises(ValueError, match=r"x has shape \(6, 4\) and w \(5, 3\); expected"):
        cosine_gate(torch.randn(T, 4), params)
    for temperature in (0, math.nan):
        with pytest.raises(
            ValueError, match=f"init_cosine_gate: temperature = {temperature}; expected a positive number"
        ):
            init_cosine_gate(D, E, temperature=temperature)
