import pickle

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from moekit.experts.simple import NoSimpleParams, SimpleExpertParams, init_simple, simple, simple_experts
from moekit.types import Routing

T, D, E, K = 11, 3, 4, 3
NUMBERS = {"moe++": (1, 1, 2), "longcat": (0, 3, 0), "several": (2, 2, 3), "null": (2, 0, 0), "constant": (0, 0, 1)}
every_number = pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)


def choices(num_tokens: int, num_experts: int, k: int, dtype: torch.dtype = torch.float64) -> Routing:
    """Draw different experts per token, some of them missing; their weights hold numbers all the same."""
    experts = torch.rand(num_tokens, num_experts).argsort(-1)[:, :k]
    experts = experts.where(torch.rand(num_tokens, k) < 0.9, -1)
    weights = torch.rand(num_tokens, k, dtype=dtype, requires_grad=True)
    tokens = torch.arange(num_tokens).unsqueeze(1).expand(-1, k)
    return Routing(tokens, experts, weights, num_tokens, num_experts, num_tokens * k)


def in_loops(x: Tensor, routing: Routing, params: list[Tensor], numbers: tuple[int, int, int]) -> Tensor:
    null, copy, _ = numbers
    rows = []
    for t, token in enumerate(x):
        y = token * 0
        for expert, weight in zip(routing.expert_indices[t].tolist(), routing.weights[t], strict=True):
            if E + null <= expert < E + null + copy:
                y = y + weight * token
            elif expert >= E + null + copy:
                j = expert - E - null - copy
                a, b = torch.exp(token @ params[1][j, :, 0]), torch.exp(token @ params[1][j, :, 1])
                y = y + weight * (a * token + b * params[0][j]) / (a + b)
        rows.append(y)
    return torch.stack(rows)


@every_number
def test_output_and_every_gradient_are_those_of_loops(numbers: tuple[int, int, int]) -> None:
    null, copy, constants = numbers
    routing = choices(T, E + sum(numbers), min(K, E + sum(numbers)))
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    drawn = init_simple(D, constants=constants, dtype=torch.float64)
    params = [p.requires_grad_() for p in drawn]
    y = simple_experts(x, routing, type(drawn)(*params), num_experts=E, null=null, copy=copy)
    expected = in_loops(x, routing, params, numbers)
    torch.testing.assert_close(y, expected)
    leaves, probe = [x, routing.weights, *params], torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * probe).sum(), leaves, allow_unused=True)
    for name, grad, want in zip(
        ("x", "weights", "vectors", "mix"), torch.autograd.grad((y * probe).sum(), leaves), wanted, strict=False
    ):
        want = torch.zeros_like(grad) if want is None else want
        torch.testing.assert_close(grad, want, msg=lambda text: f"{name}\n{text}")  # noqa: B023


def test_gradients_by_finite_differences() -> None:
    routing = choices(3, E + 4, K)
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, D), (2, D), (2, D, 2))]

    def run(x: Tensor, vectors: Tensor, mix: Tensor, weights: Tensor) -> Tensor:
        return simple_experts(x, routing._replace(weights=weights), SimpleExpertParams(vectors, mix), num_experts=E)

    assert gradcheck(run, (*leaves, routing.weights))


def test_each_kind_alone() -> None:
    x = torch.tensor([[2.0, 4.0]])
    params = SimpleExpertParams(torch.tensor([[10.0, 20.0]]), torch.zeros(1, 2, 2))
    expected = {0: [0.0, 0.0], 1: [0.0, 0.0], 2: [1.0, 2.0], 3: [3.0, 6.0], -1: [0.0, 0.0]}
    for expert, output in expected.items():
        routing = Routing(torch.tensor([[0]]), torch.tensor([[expert]]), torch.tensor([[0.5]]), 1, 4, 1)
        assert simple_experts(x, routing, params, num_experts=1).tolist() == [output]


def test_a_missing_assignment_with_a_nan_weight_is_not_read() -> None:
    weights = torch.tensor([[float("nan"), 0.5]], requires_grad=True)
    routing = Routing(torch.tensor([[0, 0]]), torch.tensor([[-1, 2]]), weights, 1, 3, 2)
    y = simple_experts(torch.ones(1, 2), routing, NoSimpleParams(), num_experts=1)
    assert y.tolist() == [[0.5, 0.5]]
    assert torch.autograd.grad(y.sum(), weights)[0].tolist() == [[0.0, 2.0]]


@every_number
def test_no_tokens(numbers: tuple[int, int, int]) -> None:
    experts = simple(null=numbers[0], copy=numbers[1], constants=numbers[2])
    routing = choices(0, 1 + experts.number, 2)
    assert experts.apply(torch.zeros(0, D), routing, experts.init(D), num_experts=1).shape == (0, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computed_in_float32_inside_autocast_and_returned_in_the_dtype_of_tokens(dtype: torch.dtype) -> None:
    x, routing, params = torch.randn(T, D).to(dtype), choices(T, E + 4, K, torch.float32), init_simple(D, constants=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = simple_experts(x, routing, params, num_experts=E)
    assert y.dtype == dtype
    exact = routing._replace(weights=routing.weights.double())
    expected = in_loops(x.double(), exact, [p.double() for p in params], (1, 1, 2))
    torch.testing.assert_close(y, expected.to(dtype))


def test_a_recipes_experts_are_a_value() -> None:
    experts = pickle.loads(pickle.dumps(simple(null=1, copy=2, constants=3)))
    assert experts.number == 6
    params = experts.init(D, generator=torch.Generator().manual_seed(1))
    assert (params.vectors.shape, params.mix.shape) == ((3, D), (3, D, 2))
    assert torch.equal(params.mix, experts.init(D, generator=torch.Generator().manual_seed(1)).mix)
    x, routing = torch.randn(T, D), choices(T, E + 6, K, torch.float32)
    expected = simple_experts(x, routing, params, num_experts=E, null=1, copy=2)
    assert torch.equal(experts.apply(x, routing, params, num_experts=E), expected)
    assert simple(constants=0).init(D) == NoSimpleParams() == ()


def test_one_graph() -> None:
    torch._dynamo.reset()
    x, routing, params = (
        torch.randn(T, D, requires_grad=True),
        choices(T, E + 4, K, torch.float32),
        init_simple(D, constants=2),
    )

    def run(x: Tensor) -> Tensor:
        return simple_experts(x, routing, params, num_experts=E)

    (actual,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(x).square().sum(), x)
    torch.testing.assert_close(actual, torch.autograd.grad(run(x).square().sum(), x)[0])


def test_errors_say_what_was_given() -> None:
    x, routing = torch.zeros(T, D), choices(T, E + 4, K)
    with pytest.raises(ValueError, match="4 real, 1 null, 1 copy and 1 constant experts are 7, but the routing has 8"):
        simple_experts(x, routing, init_simple(D, constants=1), num_experts=E)
    flat = routing._replace(expert_indices=routing.expert_indices.flatten())
    with pytest.raises(
        ValueError, match=r"the routing has shape \(33,\); expected \(T, K\). Use a token-choice router"
    ):
        simple_experts(x, flat, init_simple(D, constants=2), num_experts=E)
    with pytest.raises(ValueError, match="simple: null = 1, copy = -1, constants = 2; expected numbers >= 0"):
        simple(copy=-1)


def test_constant_experts_begin_with_vectors_of_unit_numbers_and_shares_about_equal() -> None:
    drawn = init_simple(1024, constants=4, generator=torch.Generator().manual_seed(0))
    assert drawn.vectors.std().item() == pytest.approx(1, rel=0.05)
    assert drawn.mix.std().item() == pytest.approx(1024**-0.5, rel=0.05)
