import math
import pickle

import pytest
import torch
from torch import Tensor

from moekit.dispatch import dropless
from moekit.experts import init_gated, loop, swiglu
from moekit.recipes import expert_layer
from moekit.routing.masks import mask_tokens
from moekit.routing.relu import _observe_active, adaptive_l1, relu_choice
from moekit.routing.top_k import sqrt_softplus
from moekit.types import Groups

T, E = 9, 5


def in_loops(logits: Tensor, max_k: int | None = None, bias: Tensor | None = None) -> list[dict[int, Tensor]]:
    """Return each token's experts with their weights, in falling order of preference."""
    rows = []
    for z in logits:
        shift = [0.0] * len(z) if bias is None else bias.tolist()
        active = sorted((e for e in range(len(z)) if z[e] > 0), key=lambda e: -(z[e].item() + shift[e]))
        rows.append({e: z[e] for e in active[:max_k]})
    return rows


@pytest.mark.parametrize("max_k", [None, 1, 2, E])
@pytest.mark.parametrize("biased", [False, True])
def test_choice_weights_and_gradient_are_those_of_loops(max_k: int | None, biased: bool) -> None:
    logits = torch.randn(T, E, dtype=torch.float64)
    logits[0], logits[1], logits[2, 2] = -1.0, 1.0 + torch.arange(E), 0.0  # none, all, exactly zero
    logits.requires_grad_()
    bias = torch.randn(E, dtype=torch.float64) if biased else None
    routing = relu_choice(logits, max_k=max_k, bias=bias)
    rows = in_loops(logits, max_k, bias)
    assert routing.expert_indices.shape == (T, max_k or E)
    probe = torch.randn(E, dtype=torch.float64)
    total, expected = (routing.weights * probe[routing.expert_indices.clamp_min(0)]).sum(), torch.zeros(())
    for t, row in enumerate(rows):
        experts = list(row) + [-1] * (routing.expert_indices.shape[1] - len(row))
        assert routing.expert_indices[t].tolist() == experts
        assert routing.weights[t].tolist() == [*(g.item() for g in row.values()), *[0.0] * experts.count(-1)]
        expected = expected + sum(probe[e] * g for e, g in row.items())
    (actual,), (wanted,) = torch.autograd.grad(total, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(actual, wanted)


def test_nan_stays_nan() -> None:
    logits = torch.tensor([[-1.0, 0.5, 2.0], [-1.0, torch.nan, 2.0], [torch.nan] * 3])
    for max_k in (None, 1):
        routing = relu_choice(logits, max_k=max_k)
        assert routing.weights.isnan().any(1).tolist() == [False, True, True]
        assert (routing.expert_indices >= 0)[routing.weights.isnan()].all()


def test_a_bias_activates_nobody() -> None:
    logits = torch.tensor([[-1.0, 0.0, 2.0]])
    assert relu_choice(logits, bias=torch.tensor([9.0, 9.0, -9.0])).expert_indices.tolist() == [[2, -1, -1]]


def test_all_positive_is_the_dense_mixture_with_those_weights() -> None:
    num_experts, dim, hidden = 3, 4, 6
    x, logits = torch.randn(T, dim, dtype=torch.float64), torch.rand(T, num_experts, dtype=torch.float64) + 0.1
    params = init_gated(num_experts, dim, hidden, dtype=torch.float64)
    x.requires_grad_(), logits.requires_grad_()
    layer = expert_layer(dispatcher=dropless(), experts=lambda *args: swiglu(*args, matmul=loop))
    y = layer(x, relu_choice(logits), params)
    dense = sum(
        logits[:, e : e + 1]
        * swiglu(x, Groups(torch.tensor([T]), None), type(params)(*(w[e : e + 1] for w in params)), matmul=loop)
        for e in range(num_experts)
    )
    torch.testing.assert_close(y, dense)
    probe = torch.randn_like(dense)
    for actual, wanted in zip(
        torch.autograd.grad((y * probe).sum(), (x, logits)),
        torch.autograd.grad((dense * probe).sum(), (x, logits)),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("value", [0.0, -0.0, -1e30, float("-inf")])
def test_no_positive_logit_means_no_expert_and_a_zero_gradient(value: float) -> None:
    logits = torch.full((3, E), value, requires_grad=True)
    routing = relu_choice(logits)
    assert (routing.expert_indices == -1).all()
    (grad,) = torch.autograd.grad(routing.weights.sum(), logits)
    assert (grad == 0).all()


def test_no_tokens_and_one_expert() -> None:
    assert relu_choice(torch.zeros(0, E)).weights.shape == (0, E)
    assert relu_choice(torch.tensor([[2.0], [-1.0]])).expert_indices.tolist() == [[0], [-1]]


def test_one_graph() -> None:
    torch._dynamo.reset()
    logits = torch.randn(T, E, requires_grad=True)

    def route(logits: Tensor) -> Tensor:
        return relu_choice(logits, max_k=2).weights.square().sum()

    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(logits), logits)
    torch.testing.assert_close(actual, torch.autograd.grad(route(logits), logits)[0])


@pytest.mark.parametrize(("active", "factor"), [(21, 1.2), (20, 1.0), (19, 1 / 1.2), (0, 1 / 1.2)])
def test_the_coefficient_follows_the_sparsity(active: int, factor: float) -> None:
    k, num_experts, tokens = 2, 8, 10
    sparsity = 1 - active / (tokens * num_experts)
    target = 1 - k / num_experts
    assert (sparsity < target, sparsity == target) == (factor > 1, factor == 1)
    new = adaptive_l1(k=k).update(torch.tensor(1e-8), torch.tensor([active, tokens]))
    assert new.dtype == torch.float32
    assert new.item() == pytest.approx(1e-8 * factor)


def test_without_tokens_the_coefficient_stays() -> None:
    assert adaptive_l1(k=2).update(torch.tensor(0.5), torch.zeros(2)).item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("active", [0.0, 70.0])
def test_the_coefficient_comes_back_from_wherever_it_went(active: float, dtype: torch.dtype) -> None:
    """Below the normal numbers times 1.2 rounds back to where it was, and infinity stays whatever it is divided by."""
    state, bounds = adaptive_l1(k=6), torch.finfo(dtype)
    edge = bounds.max if active else bounds.tiny
    coefficient = torch.tensor(edge, dtype=dtype)
    for _ in range(3):
        coefficient = state.update(coefficient, torch.tensor([active, 10.0]))
    assert coefficient.item() == edge
    back = state.update(coefficient, torch.tensor([70.0 - active, 10.0]))
    assert back.item() == pytest.approx(edge / 1.2 if active else edge * 1.2)


def test_the_step_of_the_coefficient_is_one_graph() -> None:
    torch._dynamo.reset()
    update = adaptive_l1(k=6).update
    compiled = torch.compile(lambda *given: update(*given), fullgraph=True, backend="aot_eager")
    given = torch.tensor(1e-8), torch.tensor([70.0, 10.0])
    assert torch.equal(compiled(*given), update(*given))


def test_counts_of_parts_add_up_and_leave_padding_out() -> None:
    logits, mask = torch.randn(T, E), torch.arange(T) != 3
    routing = mask_tokens(relu_choice(logits), mask)
    observed = _observe_active(logits, routing, torch.tensor(0.0), token_mask=mask)
    assert observed.dtype == torch.float64
    assert observed.tolist() == [(logits[mask] > 0).sum(), T - 1]
    parts = sum(_observe_active(z, relu_choice(z), torch.tensor(0.0)) for z in logits[mask].split(3))
    assert torch.equal(parts, observed)


def test_the_state_reaches_its_target() -> None:
    """Logits that fall with the coefficient: the state settles where two of eight experts are active."""
    state = pickle.loads(pickle.dumps(adaptive_l1(k=2, loss="l1")))
    assert (state.name, state.scales) == ("l1_coefficient", "l1")
    coefficient, logits = state.init(8), torch.randn(400, 8)
    assert coefficient.shape == ()
    assert coefficient.item() == pytest.approx(1e-8)
    active = []
    for _ in range(160):
        routing = relu_choice(logits - 0.3 * (coefficient * 1e8).log())
        observed = state.observe(logits, routing, coefficient)
        coefficient = state.update(coefficient, observed)
        active.append((observed[0] / observed[1]).item())
    assert active[0] > 3
    assert sum(active[-20:]) / 20 == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("options", [{"k": 0}, {"k": float("nan")}, {"k": 2, "rate": 1.0}, {"k": 2, "initial": 0.0}])
def test_a_state_out_of_range_says_so(options: dict) -> None:
    with pytest.raises(ValueError, match=r"adaptive_l1: k = .*, rate = .*, initial = .*; expected k > 0, rate > 1"):
        adaptive_l1(**options)


@pytest.mark.parametrize("max_k", [0, E + 1])
def test_a_bad_limit_says_so(max_k: int) -> None:
    with pytest.raises(ValueError, match=rf"relu_choice: k = {max_k} experts per token were asked of E = {E}"):
        relu_choice(torch.zeros(T, E), max_k=max_k)


def test_sqrt_softplus_is_its_formula() -> None:
    z = torch.linspace(-300, 30, 331, dtype=torch.float64, requires_grad=True)
    expected = torch.sqrt(torch.log1p(torch.exp(z)))
    torch.testing.assert_close(sqrt_softplus(z), expected, rtol=1e-8, atol=0)
    (actual,), (wanted,) = torch.autograd.grad(sqrt_softplus(z).sum(), z), torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=0)


def test_sqrt_softplus_in_float32_falls_where_exp_has_underflowed() -> None:
    z = torch.linspace(-170, 30, 401, requires_grad=True)
    wide = z.detach().double().requires_grad_()
    for scores, expected in ((sqrt_softplus(z), sqrt_softplus(wide)),):
        torch.testing.assert_close(scores.double(), expected, rtol=2e-6, atol=0)
        (actual,), (wanted,) = torch.autograd.grad(scores.sum(), z), torch.autograd.grad(expected.sum(), wide)
        torch.testing.assert_close(actual.double(), wanted, rtol=5e-6, atol=0)


@pytest.mark.parametrize("around", [-20.0, -40.0, -100.0])
def test_the_gradient_of_sqrt_softplus(around: float) -> None:
    z = (around + torch.linspace(-0.03, 0.04, 8, dtype=torch.float64)).requires_grad_()
    unit = math.exp(-around / 2)  # so that what is compared is about one
    assert torch.autograd.gradcheck(lambda z: unit * sqrt_softplus(z), (z,))


def test_sqrt_softplus_far_out() -> None:
    z = torch.tensor([-3e38, -1e4, -200.0, -80.0, 80.0, 1e4], requires_grad=True)
    scores = sqrt_softplus(z)
    assert scores.isfinite().all()
    assert (scores > 0).all()
    torch.testing.assert_close(scores[4:], z[4:].sqrt())
    assert torch.autograd.grad(scores.sum(), z)[0].isfinite().all()
