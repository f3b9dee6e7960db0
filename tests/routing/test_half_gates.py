"""The gate's product for bfloat16 tokens: as exact as float32, forward and backward."""

import pytest
import torch
from differentiated_once import check_differentiated_once
from torch import Tensor

from moekit.routing import _half_gates, _half_steps, linear_gate, score_and_pass

ON_CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU")])
# Relative to the norm: 40 roundings of a float32 sum, or one of the result
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


@pytest.mark.parametrize(("terms", "error"), [(1, 2.0**-8), (2, 2.0**-16), (3, 2.0**-23)])
def test_terms_add_up_to_what_was_split(terms: int, error: float) -> None:
    values = torch.randn(7, 5) * torch.logspace(-20, 20, 5)
    parts = _half_steps.split(values, terms)
    assert parts.dtype == torch.bfloat16
    found = parts.double().unflatten(1, (terms, 5)).sum(1)
    assert ((found - values).abs() <= error * values.abs()).all()


def run(x: Tensor, w: Tensor, grad: Tensor, device: str) -> dict[str, Tensor]:
    x, w = (t.detach().to(device, copy=True).requires_grad_() for t in (x, w))
    z = _half_gates.logits(x, w)
    return dict(zip(("z", "x", "w"), (z.detach(), *torch.autograd.grad(z, (x, w), grad.to(device))), strict=True))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(50, 96, 8), (333, 40, 5), (1, 16, 3)])
def test_logits_and_gradients_are_those_of_float64(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    num_tokens, dim, num_experts = shape
    x, w = torch.randn(num_tokens, dim).bfloat16(), torch.randn(dim, num_experts).to(dtype)
    grad = torch.randn(num_tokens, num_experts)
    found = run(x, w, grad, device)
    wide_x, wide_w = x.double().requires_grad_(), w.double().requires_grad_()
    z = wide_x @ wide_w
    expected = dict(zip(("z", "x", "w"), (z, *torch.autograd.grad(z, (wide_x, wide_w), grad.double())), strict=True))
    dtypes = {"z": torch.float32, "x": torch.bfloat16, "w": dtype}
    for name, want in expected.items():
        assert found[name].dtype == dtypes[name], name
        error = (found[name].cpu().double() - want).norm() / want.norm()
        assert error < TOLERANCE[dtypes[name]], f"{name}: {error}"


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("gate", [_half_gates.logits, _half_gates.logits_and_tokens])
def test_it_works_inside_checkpoint_and_refuses_gradients_of_gradients(gate, device: str) -> None:
    x, w = (torch.randn(*shape, device=device).bfloat16().requires_grad_() for shape in ((9, 16), (16, 3)))

    def total(x: Tensor, w: Tensor) -> Tensor:
        found = gate(x, w)
        return sum(part.float().square().sum() for part in (found if isinstance(found, tuple) else (found,)))

    check_differentiated_once("linear_gate", total, x, w)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16], ids=str)
def test_a_linear_gate_takes_it_on_cuda_alone(autocast: torch.dtype | None) -> None:
    x, w = torch.randn(70, 64, device="cuda").bfloat16(), torch.randn(64, 8, device="cuda")
    expected = x.float() @ w
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        found = linear_gate(x, w)
    assert torch.equal(found, _half_gates.logits(x, w))
    assert (found - expected).norm() < 2e-6 * expected.norm()
    assert not _half_gates.takes(x.cpu(), w.cpu())
    assert not _half_gates.takes(x.float(), w)


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_no_tokens_make_no_logits_and_no_gradient(dtype: torch.dtype, device: str) -> None:
    found = run(torch.zeros(0, 16).bfloat16(), torch.randn(16, 3).to(dtype), torch.zeros(0, 3), device)
    assert (found["z"].shape, found["x"].shape) == ((0, 3), (0, 16))
    assert torch.equal(found["w"].cpu(), torch.zeros(16, 3, dtype=dtype))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_autocast_changes_no_bit(dtype: torch.dtype, device: str) -> None:
    given = torch.randn(50, 32).bfloat16(), torch.randn(32, 5).to(dtype), torch.randn(50, 5)
    expected = run(*given, device)
    with torch.autocast(device, dtype=torch.float16):
        found = run(*given, device)
    for name, want in expected.items():
        assert torch.equal(found[name], want), name


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_operators_are_well_formed(dtype: torch.dtype, device: str) -> None:
    x, w = torch.randn(6, 8, device=device).bfloat16(), torch.randn(8, 3, device=device).to(dtype)
    torch.library.opcheck(torch.ops.moekit.half_gate.default, (x, w))
    torch.library.opcheck(torch.ops.moekit.half_gate_backward.default, (torch.randn(6, 3, device=device), x, w, None))
    torch.library.opcheck(
        torch.ops.moekit.half_gate_backward.default, (torch.randn(6, 3, device=device), x, w, torch.ones_like(x))
    )


def following(tokens: Tensor, z: Tensor) -> Tensor:
    """Stand for what comes after a gate, and reads tokens as well as logits."""
    return (tokens.to(z.dtype).square() * z.sum(1, keepdim=True)).sum()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tokens_that_go_through_the_gate(dtype: torch.dtype, device: str, compiled: bool) -> None:
    x = torch.randn(50, 96, device=device).bfloat16().requires_grad_()
    w = torch.randn(96, 8, device=device).to(dtype).requires_grad_()

    def run(x: Tensor, w: Tensor) -> Tensor:
        z, tokens = _half_gates.logits_and_tokens(x, w)
        return following(tokens, z)

    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(run(x, w), (x, w))
    wide = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    expected = torch.autograd.grad(following(wide[0], wide[0] @ wide[1]), wide)
    for name, one, want in zip("xw", found, expected, strict=True):
        error = (one.double() - want).norm() / want.norm()
        assert error < 2 * TOLERANCE[one.dtype], f"{name}: {error}"


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_either_way_through_the_gate_alone(device: str) -> None:
    x, w = torch.randn(5, 16, device=device).bfloat16().requires_grad_(), torch.randn(16, 3, device=device)
    w.requires_grad_()
    z, tokens = _half_gates.logits_and_tokens(x, w)
    assert torch.equal(tokens, x)
    of_x, of_w = torch.autograd.grad(2 * tokens.sum(), (x, w), allow_unused=True, retain_graph=True)
    assert torch.equal(of_x, torch.full_like(x, 2))
    assert of_w is None
    alone = torch.autograd.grad(_half_gates.logits(x, w).sum(), (x, w))
    assert all(map(torch.equal, torch.autograd.grad(z.sum(), (x, w)), alone))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_tokens_that_want_no_gradient_get_none_from_the_gate(device: str) -> None:
    x, w = torch.randn(5, 16, device=device).bfloat16(), torch.randn(16, 3, device=device, requires_grad=True)
    z, tokens = _half_gates.logits_and_tokens(x, w)
    assert (z.requires_grad, tokens.requires_grad) == (True, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scoring_passes_tokens_through_a_linear_gate_on_cuda() -> None:
    x, w = torch.randn(5, 16, device="cuda").bfloat16().requires_grad_(), torch.randn(16, 3, device="cuda")
    _, tokens = score_and_pass(linear_gate, x, w)
    assert type(tokens.grad_fn).__name__ == "_LogitsAndTokensBackward"
    assert score_and_pass(linear_gate, x.float(), w)[1].grad_fn.name() == "ToCopyBackward0"
    assert score_and_pass(lambda x, w: linear_gate(x, w), x, w)[1] is x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(50, 96, 8), (333, 40, 5), (4096, 768, 64), (0, 16, 3)])
def test_kernels_change_no_bit(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    num_tokens, dim, num_experts = shape
    x, w = torch.randn(num_tokens, dim).bfloat16(), torch.randn(dim, num_experts).to(dtype)
    grad = torch.randn(num_tokens, num_experts)
    found = run(x, w, grad, "cuda")
    monkeypatch.setattr(_half_gates, "_steps", lambda x: _half_steps.PLAIN)
    for name, want in run(x, w, grad, "cuda").items():
        assert torch.equal(found[name], want), name
