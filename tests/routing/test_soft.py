import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from moekit.routing.soft import SoftGateParams, init_soft_gate, mask_soft, soft_gate, soft_slots
from moekit.types import SoftRouting

L, G, D, E, S = 5, 3, 4, 3, 2
T = G * L


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gate_in_loops(x: Tensor, slots: Tensor, scale: Tensor) -> Tensor:
    def unit(v: Tensor) -> Tensor:
        return v / (torch.sqrt((v * v).sum()) + 1e-6)

    return torch.stack([torch.stack([scale[0] * (unit(a) * unit(mu)).sum() for mu in slots.unbind(1)]) for a in x])


def shares_in_loops(logits: Tensor, slots: int, length: int, real: list[bool]) -> tuple[Tensor, Tensor]:
    """Return dispatch and combine weights (T, E*S), zero where there are none."""
    num_tokens, width = logits.shape
    dispatch, combine = torch.zeros(num_tokens, width).double(), torch.zeros(num_tokens, width).double()
    for start in range(0, num_tokens, length):
        pool = [t for t in range(start, start + length) if real[t]]
        for t in pool:
            total = sum(torch.exp(logits[t, j]) for j in range(width))
            for i in range(width):
                here = torch.zeros(num_tokens, width).double()
                here[t, i] = 1
                dispatch = dispatch + here * torch.exp(logits[t, i]) / sum(torch.exp(logits[u, i]) for u in pool)
                combine = combine + here * torch.exp(logits[t, i]) / total
    return dispatch, combine


def test_gate_and_every_gradient_are_those_of_loops() -> None:
    leaves = (drawn(T, D), drawn(D, E * S), drawn(1))
    actual, expected = soft_gate(leaves[0], SoftGateParams(*leaves[1:])), gate_in_loops(*leaves)
    torch.testing.assert_close(actual, expected)
    probe = torch.randn_like(actual)
    wanted = torch.autograd.grad((expected * probe).sum(), leaves)
    for grad, want in zip(torch.autograd.grad((actual * probe).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(grad, want)
    assert gradcheck(lambda x, *params: soft_gate(x, SoftGateParams(*params)), (drawn(2, 3), drawn(3, 2), drawn(1)))


def test_gate_begins_with_logits_within_one() -> None:
    params = init_soft_gate(D, E, slots=S, generator=torch.Generator().manual_seed(0))
    assert (params.slots.shape, params.scale.tolist()) == ((D, E * S), [1.0])
    assert torch.equal(params.slots, init_soft_gate(D, E, slots=S, generator=torch.Generator().manual_seed(0)).slots)
    logits = soft_gate(torch.randn(T, D) * 100, params)
    assert 0.5 < logits.abs().max() <= 1


def test_a_token_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(2, D, requires_grad=True)
    logits = soft_gate(x, init_soft_gate(D, E, slots=S))
    assert (logits == 0).all()
    assert torch.autograd.grad(logits.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_inside_autocast(dtype: torch.dtype) -> None:
    x, params = torch.randn(T, D).to(dtype), init_soft_gate(D, E, slots=S)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = soft_gate(x, params)
        routing = soft_slots(logits, slots=S)
    assert {logits.dtype, *(w.dtype for w in routing)} == {torch.float32}
    torch.testing.assert_close(logits, gate_in_loops(*(p.double() for p in (x, *params))).float())


@pytest.mark.parametrize("length", [None, 1, L, T])
@pytest.mark.parametrize("masked", [False, True])
def test_shares_and_gradient_are_those_of_loops(length: int | None, masked: bool) -> None:
    logits = drawn(T, E * S)
    mask = torch.tensor([True, False, True, True, False] + [False] * L + [True] * L) if masked else torch.ones(T) > 0
    routing = soft_slots(logits, slots=S, sequence_length=length, bias=torch.randn(E * S))
    routing = mask_soft(routing, mask.view(G, L)) if masked else routing
    size = length or T
    expected = shares_in_loops(logits, S, size, mask.tolist())
    probe, grads = torch.randn(2, T, E * S, dtype=torch.float64), []
    for actual, want, weight in zip(routing, expected, probe, strict=True):
        assert actual.shape == (T // size, size, E, S)
        torch.testing.assert_close(actual.reshape(T, E * S), want)
        grads.append(
            [
                torch.autograd.grad((w.reshape(T, -1) * weight).sum(), logits, retain_graph=True)[0]
                for w in (actual, want)
            ]
        )
    for actual, want in grads:
        torch.testing.assert_close(actual, want)


def test_shares_of_a_slot_and_of_a_token_sum_to_one() -> None:
    routing = soft_slots(torch.randn(T, E * S) * 10, slots=S, sequence_length=L)
    torch.testing.assert_close(routing.dispatch_weights.sum(1), torch.ones(G, E, S))
    torch.testing.assert_close(routing.combine_weights.sum((2, 3)), torch.ones(G, L))


def test_one_slot_in_all_is_a_softmax_over_tokens_and_weight_one() -> None:
    logits = torch.randn(T, 1)
    routing = soft_slots(logits, slots=1)
    torch.testing.assert_close(routing.dispatch_weights.flatten(), torch.softmax(logits[:, 0], 0))
    assert (routing.combine_weights == 1).all()


def test_sequences_do_not_mix_and_tokens_of_one_do() -> None:
    logits = torch.randn(T, E * S, requires_grad=True)
    routing = soft_slots(logits, slots=S, sequence_length=L)
    (grad,) = torch.autograd.grad(routing.dispatch_weights[1, 0].square().sum(), logits)
    touched = (grad != 0).any(-1)
    assert touched.tolist() == [L <= t < 2 * L for t in range(T)]


def test_masked_tokens_change_nothing_even_with_larger_logits() -> None:
    logits = torch.randn(1, L, E * S)
    padded = torch.cat([logits, torch.full((1, 2, E * S), 30.0)], 1).flatten(0, 1)
    mask = torch.arange(L + 2) < L
    masked, alone = mask_soft(soft_slots(padded, slots=S), mask), soft_slots(logits[0], slots=S)
    for actual, want in zip(masked, alone, strict=True):
        torch.testing.assert_close(actual[:, :L], want, rtol=1e-5, atol=1e-7)
        assert (actual[:, L:] == 0).all()


@pytest.mark.parametrize("length", [None, L])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30, 0.0])
def test_what_padding_holds_changes_nothing(length: int | None, bad: float) -> None:
    real = torch.tensor([True, False, True, True, False] * G)
    logits = torch.randn(T, E * S, dtype=torch.float64)
    padded = logits.masked_fill(~real.unsqueeze(1), bad).requires_grad_()
    alone = logits[real].requires_grad_()
    masked = soft_slots(padded, slots=S, sequence_length=length, token_mask=real.view(G, L))
    expected = soft_slots(alone, slots=S, sequence_length=length and 3)
    for weights, want in zip(masked, expected, strict=True):
        probe = torch.randn_like(want)
        torch.testing.assert_close(weights.view(-1, E * S)[real], want.view(-1, E * S))
        assert (weights.view(-1, E * S)[~real] == 0).all()
        kept = weights.flatten(0, 1)[real].view_as(want)
        (grad,) = torch.autograd.grad((kept * probe).sum(), padded, retain_graph=True)
        torch.testing.assert_close(grad[real], torch.autograd.grad((want * probe).sum(), alone)[0])
        assert (grad[~real] == 0).all()
    again = mask_soft(masked, real)  # as a layer does behind any soft router
    for weights, want in zip(again, masked, strict=True):
        torch.testing.assert_close(weights, want)


def test_a_masked_pool_of_padding_is_zero_with_a_zero_gradient() -> None:
    logits = torch.full((T, E * S), torch.nan, requires_grad=True)
    routing = soft_slots(logits, slots=S, sequence_length=L, token_mask=torch.zeros(T, dtype=torch.bool))
    assert all((w == 0).all() for w in routing)
    assert (torch.autograd.grad(sum(w.sum() for w in routing), logits)[0] == 0).all()


def test_a_pool_without_a_real_token_is_zero_with_a_zero_gradient() -> None:
    logits = torch.randn(T, E * S, requires_grad=True)
    routing = mask_soft(soft_slots(logits, slots=S, sequence_length=L), torch.zeros(T, dtype=torch.bool))
    assert all((w == 0).all() for w in routing)
    (grad,) = torch.autograd.grad(sum(w.sum() for w in routing), logits)
    assert (grad == 0).all()


@pytest.mark.parametrize(("length", "pools", "size"), [(None, 1, 0), (L, 0, L)])
def test_no_tokens(length: int | None, pools: int, size: int) -> None:
    routing = soft_slots(torch.zeros(0, E * S), slots=S, sequence_length=length)
    assert isinstance(routing, SoftRouting)
    assert routing.dispatch_weights.shape == routing.combine_weights.shape == (pools, size, E, S)
    assert mask_soft(routing, torch.zeros(0, dtype=torch.bool)).dispatch_weights.shape == (pools, size, E, S)
    assert soft_gate(torch.zeros(0, D), init_soft_gate(D, E, slots=S)).shape == (0, E * S)


def test_one_graph() -> None:
    torch._dynamo.reset()
    x, params, mask = torch.randn(T, D, requires_grad=True), init_soft_gate(D, E, slots=S), torch.arange(T) % 4 != 0

    def route(x: Tensor) -> Tensor:
        logits = soft_gate(x, params)
        routing = mask_soft(soft_slots(logits, slots=S, sequence_length=L, token_mask=mask), mask)
        return sum(weights.square().sum() for weights in routing)

    (actual,) = torch.autograd.grad(torch.compile(route, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(actual, torch.autograd.grad(route(x), x)[0])
    assert math.isfinite(actual.sum())


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"logits have shape \(15, 6\) and slots = 4; expected \(T, E\*S\).*slots=4"):
        soft_slots(torch.zeros(T, E * S), slots=4)
    with pytest.raises(ValueError, match=r"logits have shape \(15, 6\) and slots = 0"):
        soft_slots(torch.zeros(T, E * S), slots=0)
    with pytest.raises(ValueError, match=r"sequence_length = 4 was given for T = 15 tokens; expected a divisor.*Pad"):
        soft_slots(torch.zeros(T, E * S), slots=S, sequence_length=4)
    with pytest.raises(ValueError, match=r"token_mask has 4 elements \(shape \(2, 2\)\); expected one per token, 15"):
        mask_soft(soft_slots(torch.zeros(T, E * S), slots=S), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"token_mask has 4 elements \(shape \(2, 2\)\); expected one per token, 15"):
        soft_slots(torch.zeros(T, E * S), slots=S, token_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"x has shape \(15, 3\) and w \(4, 6\); expected"):
        soft_gate(torch.zeros(T, 3), init_soft_gate(D, E, slots=S))
