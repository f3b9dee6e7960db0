"""The fused router against ``top_k``: choice, weights, load and the gradient of the logits."""

import math
import sys
from functools import partial

import pytest
import torch
from differentiated_once import check_differentiated_once
from interpreted import DEVICE, Calls, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor
from torch._subclasses import FakeTensorMode

from moekit.routing import sigmoid, softmax, sqrt_softplus, top_k, weights_at
from moekit.routing.fused_top_k import fused_top_k, fused_top_k_and_load
from moekit.segments import tokens_per_expert
from moekit.types import Routing

SIZES = [(0, 4, 2), (1, 1, 1), (5, 6, 3), (7, 9, 9), (70, 40, 8), (3, 1024, 32)]
SCORES = [softmax, sigmoid]
NAN = float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # the interpreter's numpy


@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def by_kernel(logits: Tensor, *, k: int, score=softmax, normalize=False, scale=1.0, bias=None) -> tuple[Tensor, ...]:
    from moekit.routing import _top_k_triton

    *found, numbers = _top_k_triton.fused_top_k(logits, bias, k, score is softmax, normalize, scale)
    assert numbers.tolist() == [*range(logits.shape[0])]
    return tuple(found)


def agree(found: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(found.double().cpu(), expected, rtol=2e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), SIZES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_choice_weights_load_and_gradient_equal_float64(num_tokens, num_experts, k, score, normalize, biased) -> None:
    logits = torch.randn(num_tokens, num_experts)
    bias = 0.3 * torch.randn(num_experts) if biased else None
    options = {"k": k, "score": score, "normalize": normalize, "scale": 2.5}
    exact, fast = logits.double().requires_grad_(), logits.to(DEVICE).requires_grad_()
    expected = top_k(exact, **options, bias=None if bias is None else bias.double())
    weights, experts, load = by_kernel(fast, **options, bias=None if bias is None else bias.to(DEVICE))
    assert torch.equal(experts.cpu(), expected.expert_indices)
    assert torch.equal(load.cpu(), tokens_per_expert(expected.expert_indices, num_experts))
    assert (experts.dtype, weights.dtype, load.dtype) == (torch.int64, torch.float32, torch.int64)
    agree(weights.detach(), expected.weights.detach(), "weights")
    grad = torch.randn(num_tokens, k)
    [found] = torch.autograd.grad(weights, fast, grad.to(DEVICE))
    agree(found, torch.autograd.grad(expected.weights, exact, grad.double())[0], "d logits")


@runs_kernels
@pytest.mark.parametrize("score", SCORES)
def test_ties_go_to_the_lower_number(score) -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 2.0], [0.0, 0.0, -0.5, 0.0, 0.0]])
    _, experts, load = by_kernel(logits.to(DEVICE), k=4, score=score)
    assert experts.tolist() == [[1, 3, 4, 0], [0, 1, 3, 4]]
    assert load.tolist() == [2, 2, 0, 2, 2]


@runs_kernels
def test_extreme_logits() -> None:
    logits = torch.tensor([[-1e4, 1e4, 0.0, -1e4], [-400.0, -400.0, -400.0, -401.0]])
    weights, experts, _ = by_kernel(logits.to(DEVICE), k=2, score=softmax, normalize=True)
    assert experts.tolist() == [[1, 0], [0, 1]]  # the scores of 0 and -1e4 are both zero beside 1e4: a tie
    assert weights.cpu().tolist() == [[1, 0], [0.5, 0.5]]
    weights, _, _ = by_kernel(logits.to(DEVICE), k=2, score=sigmoid, normalize=True)
    assert weights.isfinite().all()
    expected = top_k(logits, k=2, score=sigmoid, normalize=True).weights
    torch.testing.assert_close(weights.cpu(), expected)


@runs_kernels
@pytest.mark.parametrize("logit", [-200.0, -47.0])
def test_the_gradient_of_vanishing_scores(logit) -> None:
    """Where the chosen scores sum to less than the smallest divisor, or to zero, it is a constant, as in ``top_k``."""
    fast = torch.full((1, 3), logit, device=DEVICE, requires_grad=True)
    exact = torch.full((1, 3), logit, dtype=torch.float64, requires_grad=True)
    weights, experts, _ = by_kernel(fast, k=2, score=sigmoid, normalize=True)
    expected = weights_at(exact.sigmoid(), experts.cpu(), normalize=True)
    agree(weights.detach(), expected.detach(), "weights")
    grad = torch.tensor([[1.0, 0.5]])
    [found] = torch.autograd.grad(weights, fast, grad.to(DEVICE))
    agree(found, torch.autograd.grad(expected, exact, grad.double())[0], "d logits")


@runs_kernels
def test_nan_is_the_best_score_and_every_choice_another_expert() -> None:
    logits = torch.tensor([[1.0, NAN, 3.0, -NAN], [math.inf, -math.inf, 0.0, 1.0]])
    _, experts, load = by_kernel(logits.to(DEVICE), k=4, score=sigmoid)
    assert experts.tolist() == [[1, 3, 2, 0], [0, 3, 2, 1]]
    assert load.tolist() == [2, 2, 2, 2]
    bias = torch.tensor([0.0, -NAN, 1.0, NAN])
    assert by_kernel(torch.zeros(1, 4, device=DEVICE), k=4, bias=bias.to(DEVICE))[1].tolist() == [[1, 3, 2, 0]]


@runs_kernels
def test_negative_shifted_scores_keep_their_order() -> None:
    bias = torch.tensor([-3.0, -1.0, -2.0, -1.5])
    _, experts, _ = by_kernel(torch.zeros(1, 4, device=DEVICE), k=4, bias=bias.to(DEVICE))
    assert experts.tolist() == [[1, 3, 2, 0]]


@runs_kernels
def test_memory_in_any_order_is_read_right() -> None:
    logits = torch.randn(5, 12).T  # (12, 5)
    bias, grad = torch.randn(10)[::2], torch.ones(()).expand(12, 2)
    fast, exact = logits.to(DEVICE).requires_grad_(), logits.double().requires_grad_()
    weights, experts, _ = by_kernel(fast, k=2, bias=bias.to(DEVICE))
    expected = top_k(exact, k=2, bias=bias.double())
    assert torch.equal(experts.cpu(), expected.expert_indices)
    [found] = torch.autograd.grad(weights, fast, grad.to(DEVICE))
    agree(found, torch.autograd.grad(expected.weights, exact, grad.double())[0], "d logits")


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("num_tokens", [0, 9])
def test_without_the_load_the_choice_is_the_same(num_tokens) -> None:
    from moekit.routing import _top_k_triton

    logits = torch.randn(num_tokens, 6).to(DEVICE)
    expected = _top_k_triton.fused_top_k(logits, None, 2, True, True, 1.0)
    found = _top_k_triton.fused_top_k(logits, None, 2, True, True, 1.0, counted=False)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert (expected[2].shape, found[2].shape, found[2].dtype) == ((6,), (0,), torch.int64)


class Silent(torch.autograd.Function):
    """A sum that sends no gradient back."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return values.sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        return None


@runs_kernels
def test_weights_that_get_no_gradient_send_none() -> None:
    logits = torch.randn(5, 4, device=DEVICE, requires_grad=True)
    weights, _, _ = by_kernel(logits, k=2)
    [found] = torch.autograd.grad(logits.sum() + Silent.apply(weights), logits)
    assert torch.equal(found, torch.ones_like(logits))


@runs_kernels
def test_it_works_inside_checkpoint_with_gradients_of_gradients_refused() -> None:
    from moekit.routing._top_k_triton import fused_top_k as choose

    logits = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    weights = lambda logits: choose(logits, None, 2, True, True, 1.0)[0].square().sum()  # noqa: E731
    check_differentiated_once("fused_top_k", weights, logits)


@runs_kernels
def test_the_operator_is_well_formed() -> None:
    from moekit.routing import _top_k_triton

    logits, bias = torch.randn(6, 5, device=DEVICE), torch.randn(5, device=DEVICE)
    torch.library.opcheck(torch.ops.moekit.fused_top_k.default, (logits, bias, 2, True, True, 2.0))
    torch.library.opcheck(torch.ops.moekit.fused_top_k.default, (logits, None, 2, False, False, 1.0))
    torch.library.opcheck(torch.ops.moekit.fused_top_k.default, (logits, None, 2, False, False, 1.0, False))
    _, experts, _, _ = _top_k_triton._choose(logits, None, 2, False, False, 1.0)
    grad = torch.randn(6, 2, device=DEVICE)
    torch.library.opcheck(torch.ops.moekit.fused_top_k_backward.default, (grad, logits, experts, False, False, 1.0))


def test_float32_on_cuda_takes_the_kernel() -> None:
    with FakeTensorMode(), Calls() as calls:
        logits = torch.zeros(6, 5, device="cuda")
        routing, load = fused_top_k_and_load(logits, k=2, score=sigmoid, bias=torch.zeros(5, device="cuda"))
        assert routing.expert_indices.shape == routing.weights.shape == routing.token_indices.shape == (6, 2)
        assert (load.shape, routing.num_tokens, routing.num_experts, routing.pool) == ((5,), 6, 5, 12)
        assert fused_top_k(logits, k=2).weights.shape == (6, 2)
        assert fused_top_k_and_load(logits.double(), k=2)[0].weights.dtype == torch.float64
        own = calls.own()
        calls.calls.clear()
        assert fused_top_k(logits.double(), k=2).weights.dtype == torch.float64
    assert own == ["fused_top_k", "fused_top_k", "tokens_per_expert"]  # float64 is left to torch, but for the counting
    assert calls.own() == []


def test_the_load_is_counted_only_where_it_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    from moekit.routing import _top_k_triton

    loads, choose = [], _top_k_triton._choose

    def chosen(*given):
        loads.append(choose(*given)[2].shape)
        return choose(*given)

    monkeypatch.setattr(_top_k_triton, "_choose", chosen)
    with FakeTensorMode():
        logits = torch.zeros(6, 5, device="cuda")
        fused_top_k(logits, k=2)
        fused_top_k_and_load(logits, k=2)
    assert loads == [(0,), (5,)]


def same(found: Routing, expected: Routing) -> None:
    for name, value in expected._asdict().items():
        other = getattr(found, name)
        assert torch.equal(other, value) if isinstance(value, Tensor) else other == value, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", SCORES)
def test_without_a_gpu_it_is_top_k(score, dtype) -> None:
    logits, bias = torch.randn(11, 6, dtype=dtype), torch.randn(6, dtype=dtype)
    options = {"k": 3, "score": score, "normalize": True, "scale": 1.5, "bias": bias}
    routing, load = fused_top_k_and_load(logits, **options)
    same(routing, top_k(logits, **options))
    same(fused_top_k(logits, **options), routing)
    assert torch.equal(load, tokens_per_expert(routing.expert_indices, 6))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((3, 4), {"k": 5}, r"fused_top_k: k = 5 .* of E = 4 experts"),
        ((3, 4, 2), {"k": 1}, r"fused_top_k: logits have shape \(3, 4, 2\)"),
        ((3, 40), {"k": 33}, r"k = 33 of E = 40 experts; the kernel takes at most k = 32 of 1024\. Use top_k"),
        ((3, 1025), {"k": 1}, r"k = 1 of E = 1025 experts"),
        ((3, 4), {"k": 1, "score": sqrt_softplus}, r"sqrt_softplus.*expected softmax or sigmoid.*Use top_k"),
        ((3, 4), {"k": 1, "score": partial(softmax)}, r"expected softmax or sigmoid"),
        ((3, 4), {"k": 1, "bias": torch.zeros(3)}, r"selection bias has shape \(3,\); expected .* \(4,\)"),
        ((3, 4), {"k": 1, "bias": torch.zeros(1)}, r"selection bias has shape \(1,\); expected .* \(4,\)"),
    ],
)
def test_errors_say_what_to_do(shape, options, words, device) -> None:
    for function in (fused_top_k, fused_top_k_and_load):
        with pytest.raises(ValueError, match=words):
            function(torch.zeros(shape, device=device), **options)


def test_a_bias_that_does_not_fit_is_refused_before_the_kernel() -> None:
    with FakeTensorMode(), Calls() as calls:
        logits = torch.zeros(6, 5, device="cuda")
        for shape in ((4,), (1,), (6, 5), ()):
            with pytest.raises(
                ValueError, match=r"selection bias has shape .*; expected one number per expert, \(5,\)"
            ):
                fused_top_k(logits, k=2, bias=torch.zeros(shape, device="cuda"))
    assert calls.own() == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_kernel_gets_a_bias_of_any_dtype_in_float32(dtype: torch.dtype) -> None:
    with FakeTensorMode(), Calls() as calls:
        fused_top_k(torch.zeros(6, 5, device="cuda"), k=2, bias=torch.zeros(5, device="cuda", dtype=dtype))
    assert [args[1].dtype for function, args in calls.calls if function.name() == "moekit::fused_top_k"] == [
        torch.float32
    ]


@runs_kernels
def test_a_gradient_of_gradients_by_either_input_is_refused() -> None:
    from moekit.routing._top_k_triton import fused_top_k as choose

    logits = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    for along in (torch.ones(5, 2, device=DEVICE), torch.ones(5, 2, device=DEVICE, requires_grad=True)):
        weights = choose(logits, None, 2, True, True, 1.0)[0]
        [grad] = torch.autograd.grad(weights, logits, along, create_graph=True)
        with pytest.raises(RuntimeError, match="fused_top_k: its gradient has no gradient"):
            torch.autograd.grad(grad.sum(), along if along.requires_grad else logits)


def test_without_triton_cuda_logits_take_the_plain_version(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["moekit.routing.fused_top_k"], "HAS_TRITON", False)
    with FakeTensorMode(), Calls() as calls:
        assert fused_top_k(torch.zeros(6, 5, device="cuda"), k=2).weights.shape == (6, 2)
    assert calls.own() == []
