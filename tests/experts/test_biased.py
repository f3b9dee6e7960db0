"""Experts with biases against loops over rows: output and every gradient, in equal groups and in unequal ones."""

from functools import partial

import pytest
import torch
from torch import Tensor

from moekit.dispatch import dropless, padded
from moekit.experts import BiasedGatedParams, batched, clamped_swiglu, grouped, init_biased_gated, loop
from moekit.experts.biased import affine
from moekit.recipes import expert_layer
from moekit.routing import top_k
from moekit.types import Groups

E, D, F = 5, 6, 7
ALPHA, LIMIT = 1.3, 0.8
EQUAL = Groups(torch.full((E,), 3, dtype=torch.int32), 3)
UNEQUAL = Groups(torch.tensor([4, 0, 1, 7, 2], dtype=torch.int32), None)
FRAMES = [(EQUAL, loop), (EQUAL, batched), (EQUAL, grouped), (UNEQUAL, loop), (UNEQUAL, grouped)]


def draw(dtype: torch.dtype = torch.float64) -> BiasedGatedParams:
    params = init_biased_gated(E, D, F, dtype=dtype)
    return BiasedGatedParams(*(torch.randn_like(p).requires_grad_() for p in params))


def row_by_row(rows: Tensor, groups: Groups, params: BiasedGatedParams, *, alpha: float, limit: float) -> Tensor:
    """gpt-oss's formula, one row at a time."""
    owners = [e for e, size in enumerate(groups.sizes.tolist()) for _ in range(size)]
    outputs = []
    for x, e in zip(rows, owners, strict=False):
        gate, up = x @ params.gate[e] + params.gate_bias[e, 0], x @ params.up[e] + params.up_bias[e, 0]
        gate = torch.where(gate > limit, torch.full_like(gate, limit), gate)
        up = torch.where(up > limit, torch.full_like(up, limit), torch.where(up < -limit, -limit, up))
        hidden = gate / (1 + torch.exp(-alpha * gate)) * (1 + up)
        outputs.append(hidden @ params.down[e] + params.down_bias[e, 0])
    return torch.stack(outputs)


def gradients(y: Tensor, cotangent: Tensor, rows: Tensor, params: BiasedGatedParams) -> dict[str, Tensor]:
    named = {"rows": rows, **params._asdict()}
    return dict(zip(named, torch.autograd.grad((y * cotangent).sum(), list(named.values())), strict=True))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("groups", "matmul"), FRAMES)
def test_output_and_gradients_are_those_of_the_loop(groups: Groups, matmul) -> None:
    params, number = draw(), int(groups.sizes.sum())
    rows = torch.randn(number, D, dtype=torch.float64, requires_grad=True)
    y = clamped_swiglu(rows, groups, params, matmul=matmul, alpha=ALPHA, limit=LIMIT)
    expected = row_by_row(rows, groups, params, alpha=ALPHA, limit=LIMIT)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    wanted = gradients(expected, cotangent, rows, params)
    for name, grad in gradients(y, cotangent, rows, params).items():
        torch.testing.assert_close(grad, wanted[name], msg=lambda text, n=name: f"{n}\n{text}")


def test_both_clamps_hold_in_that_comparison() -> None:
    rows, params = torch.randn(20, D, dtype=torch.float64), draw()
    gate, up = rows @ params.gate[0], rows @ params.up[0]
    assert (gate > LIMIT).any()
    assert (gate < -LIMIT).any()
    assert (up.abs() > LIMIT).any()
    assert (up.abs() < LIMIT).any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("matmul", [loop, grouped])
@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_rows_past_the_last_group_reach_no_parameter(matmul, junk: float) -> None:
    params, number = draw(), int(UNEQUAL.sizes.sum())
    inner = torch.randn(number, D, dtype=torch.float64)
    results = []
    for tail in (0, 3):
        rows = torch.cat([inner, torch.full((tail, D), junk, dtype=torch.float64)]).requires_grad_()
        y = clamped_swiglu(rows, UNEQUAL, params, matmul=matmul)
        cotangent = torch.cat([torch.ones(number, D), torch.full((tail, D), junk)]).double()
        y.backward(cotangent)
        results.append([p.grad.clone() for p in params])
        for p in params:
            p.grad = None
    for name, alone, with_tail in zip(params._fields, *results, strict=True):
        torch.testing.assert_close(with_tail, alone, msg=lambda text, n=name: f"{n}\n{text}")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("matmul", [batched, grouped, loop])
def test_padding_rows_count_in_no_bias(matmul) -> None:
    # Experts have 2, 1, 0, 0, 0 of their three rows; the rest is padding, whose bias must get no gradient.
    logits = torch.full((3, E), -9.0).double()
    logits[0, 0] = logits[1, 0] = logits[2, 1] = 9.0
    params, x = draw(), torch.randn(3, D, dtype=torch.float64)
    grads = []
    for dispatcher, backend in ((dropless(), loop), (padded(capacity_factor=5.0), matmul)):
        layer = expert_layer(dispatcher=dispatcher, experts=partial(clamped_swiglu, matmul=backend))
        y = layer(x, top_k(logits, k=1), params)
        grads.append(torch.autograd.grad(y.sum(), list(params)))
    for name, dropped_nothing, filled_up in zip(params._fields, *grads, strict=True):
        torch.testing.assert_close(filled_up, dropped_nothing, msg=lambda text, n=name: f"{n}\n{text}")
    assert grads[0][-1][0, 0, 0] != 0
    assert (grads[0][-1][2:] == 0).all()


@pytest.mark.parametrize("groups", [Groups(torch.zeros(E, dtype=torch.int32), c) for c in (0, None)], ids=str)
def test_no_rows(groups: Groups) -> None:
    params, rows = draw(), torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    y = clamped_swiglu(rows, groups, params, matmul=grouped)
    assert y.shape == (0, D)
    assert all((grad == 0).all() for grad in torch.autograd.grad(y.sum(), list(params)))


@pytest.mark.parametrize("groups", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_autocast_keeps_the_backend_dtype(groups: Groups) -> None:
    params, rows = draw(torch.float32), torch.randn(int(groups.sizes.sum()), D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = clamped_swiglu(rows, groups, params, matmul=grouped)
    assert y.dtype == torch.bfloat16
    expected = clamped_swiglu(rows, groups, params, matmul=loop)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.03 * expected.abs().max().item())


def test_defaults_are_those_of_gpt_oss() -> None:
    params, rows = draw(), 9 * torch.randn(15, D, dtype=torch.float64)
    y = clamped_swiglu(rows, EQUAL, params, matmul=loop)
    torch.testing.assert_close(y, row_by_row(rows, EQUAL, params, alpha=1.702, limit=7.0))
    assert not torch.allclose(y, row_by_row(rows, EQUAL, params, alpha=1.702, limit=1e9))


def test_init_draws_matrices_and_zeroes_biases() -> None:
    params = init_biased_gated(3, 64, 128, std=0.5, generator=torch.Generator().manual_seed(1))
    again = init_biased_gated(3, 64, 128, std=0.5, generator=torch.Generator().manual_seed(1))
    assert [tuple(p.shape) for p in params] == [
        (3, 64, 128),
        (3, 64, 128),
        (3, 128, 64),
        (3, 1, 128),
        (3, 1, 128),
        (3, 1, 64),
    ]
    for name, p, same in zip(params._fields, params, again, strict=True):
        assert torch.equal(p, same)
        assert p.std().item() == (0 if name.endswith("bias") else pytest.approx(0.5, rel=0.05)), name
    assert params.gate_bias.data_ptr() != params.up_bias.data_ptr()


def test_a_bias_of_another_shape_says_how_to_mend_it() -> None:
    params = draw()
    with pytest.raises(ValueError, match=r"bias \(5, 7\); expected \(E, D, F\) and \(E, 1, F\).*bias.unsqueeze\(1\)"):
        affine(torch.zeros(15, D), EQUAL, (params.up, params.up_bias.squeeze(1)), matmul=loop)
    with pytest.raises(ValueError, match=r"bias \(5, 1, 7\); .*weights fit the other way round: pass w\.mT"):
        affine(torch.zeros(15, D), EQUAL, (params.up.mT, params.up_bias), matmul=loop)
    with pytest.raises(ValueError, match=r"w has shape \(.,\) .*; expected \(E, D, F\)"):
        affine(torch.zeros(15, D), EQUAL, (params.up[:, 0, 0], params.up_bias), matmul=loop)


@pytest.mark.parametrize("groups", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_it_compiles_whole(groups: Groups) -> None:
    params, rows = draw(torch.float32), torch.randn(int(groups.sizes.sum()), D)
    compiled = torch.compile(partial(clamped_swiglu, matmul=grouped), fullgraph=True, backend="aot_eager")
    y = compiled(rows, groups, params)
    torch.testing.assert_close(y, clamped_swiglu(rows, groups, params, matmul=grouped))
    y.sum().backward()
