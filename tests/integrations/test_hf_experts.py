"""The experts' forward on experts modules of every layout, against a loop over tokens in float64."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from moekit.experts import loop
from moekit.integrations.hf_experts import experts_forward, module_layer, module_params, routing_of

T, D, H, E, K = 11, 8, 12, 4, 3
LAYOUTS = list(itertools.product([False, True], repeat=4))  # transposed, biased, gated, normed


class Scale(nn.Module):
    """A norm and an activation with a parameter each, whose gradient every row enters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x * self.weight) * x


def experts(transposed=False, biased=False, gated=True, normed=False, *, learnt=False, seed=0) -> nn.Module:
    """Build a module as transformers' models do, with random float64 parameters."""
    torch.default_generator.manual_seed(seed)
    name, width = ("gate_up_proj", 2 * H) if gated else ("up_proj", H)

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = E
            up, down = (E, D, width), (E, H, D)
            self.register_parameter(name, draw(up if transposed else (E, width, D)))
            self.down_proj = draw(down if transposed else (E, D, H))
            if biased:
                self.register_parameter(f"{name}_bias", draw((E, width)))
                self.down_proj_bias = draw((E, D))
            self.act_fn = Scale(H) if learnt else F.silu
            if normed:
                self.post_expert_norm = Scale(D)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AssertionError("the module's own forward is not what runs")

    options = {"is_transposed": transposed, "has_bias": biased, "has_gate": gated, "has_post_expert_norm": normed}
    return use_experts_implementation(Experts, **options)(SimpleNamespace()).double()


def draw(shape) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def inputs(seed=1, tokens=T) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=g, dtype=torch.float64).requires_grad_()
    index = torch.rand(tokens, E, generator=g).topk(K).indices
    return x, index, torch.rand(tokens, K, generator=g, dtype=torch.float64).requires_grad_()


def reference(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute one token and one choice at a time; choices outside of [0, E) do not exist."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[t])
        for e, weight in zip(index[t].tolist(), weights[t], strict=True):
            if 0 <= e < E:
                up, down = getattr(module, name)[e], module.down_proj[e]
                up, down = (up, down) if module.is_transposed else (up.T, down.T)
                hidden = x[t] @ up + (getattr(module, f"{name}_bias")[e] if module.has_bias else 0)
                hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
                out = hidden @ down + (module.down_proj_bias[e] if module.has_bias else 0)
                total = total + weight * (module.post_expert_norm(out) if module.has_post_expert_norm else out)
        rows.append(total)
    return torch.stack(rows) if rows else x * 0


def forward(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor, **options) -> Tensor:
    return experts_forward(module, x, index, weights, layer=module_layer(**options))


def gradients(function, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    leaves = {"x": x, "weights": weights, **dict(module.named_parameters())}
    y = function(module, x, index, weights)
    grads = torch.autograd.grad(y.square().sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def check(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor, **options) -> None:
    expected = gradients(reference, module, x, index, weights)
    actual = gradients(partial(forward, **options), module, x, index, weights)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("transposed", "biased", "gated", "normed"), LAYOUTS)
def test_every_layout_equals_the_loop(transposed: bool, biased: bool, gated: bool, normed: bool) -> None:
    check(experts(transposed, biased, gated, normed), *inputs())


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize(("biased", "normed"), [(False, False), (True, True)])
@pytest.mark.parametrize("outside", [E, E + 7, -1])
def test_choices_of_other_ranks_do_not_exist(outside: int, biased: bool, normed: bool, learnt: bool) -> None:
    x, index, weights = inputs()
    index = index.where(torch.rand(T, K) < 0.6, outside)
    index[3] = outside  # a token without any expert
    assert (index == outside).sum() > 4
    check(experts(biased=biased, normed=normed, learnt=learnt), x, index, weights)


@pytest.mark.usefixtures("poison")
def test_ranks_sum_to_the_whole() -> None:
    x, index, weights = inputs()
    module = experts(biased=True)
    expected = gradients(forward, module, x, index, weights)
    parts = []
    for rank in range(2):
        own = experts(biased=True)
        for (_, whole), (name, _) in zip(module.named_parameters(), list(own.named_parameters()), strict=True):
            setattr(own, name, nn.Parameter(whole.detach()[2 * rank : 2 * rank + 2]))
        local = torch.where(index // 2 == rank, index % 2, 2)
        parts.append(experts_forward(own, x, local, weights, layer=module_layer()))
    torch.testing.assert_close(sum(parts), expected["y"])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("biased", [False, True])
def test_no_tokens_and_empty_experts(biased: bool) -> None:
    check(experts(biased=biased), *inputs(tokens=0))
    x, _, weights = inputs()
    check(experts(biased=biased), x, torch.full((T, K), 2), weights)  # all on one, three times each


def test_another_backend_computes_the_same() -> None:
    check(experts(biased=True), *inputs(), matmul=loop)


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_views_and_gradients_have_their_layout(transposed: bool) -> None:
    module = experts(transposed, gated=True)
    params = module_params(module)
    assert params.up.data_ptr() == module.gate_up_proj.data_ptr()
    assert params.down.data_ptr() == module.down_proj.data_ptr()
    assert (params.up.shape, params.down.shape) == ((E, D, 2 * H), (E, H, D))
    forward(module, *inputs()).sum().backward()
    assert module.gate_up_proj.grad.stride() == module.gate_up_proj.stride()


@pytest.mark.parametrize("biased", [False, True])
def test_bfloat16_keeps_its_dtype_and_the_float64_value(biased: bool) -> None:
    module, (x, index, weights) = experts(biased=biased), inputs()
    expected = reference(module, x, index, weights)
    narrow = forward(module.bfloat16(), x.bfloat16(), index, weights.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert (narrow - expected).abs().max() < 0.02 * expected.abs().max()
    mixed = forward(module, x.float(), index, weights.float())  # a norm in float32 before narrower experts
    assert mixed.dtype == torch.float32
    assert (mixed - expected).abs().max() < 0.02 * expected.abs().max()


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    module, (x, index, weights) = experts(biased=True).float(), inputs()
    x, weights = x.detach().float().requires_grad_(), weights.detach().float().requires_grad_()
    exact = gradients(forward, module, x, index, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = gradients(forward, module, x, index, weights)
    assert narrow["y"].dtype == torch.float32
    for name, value in exact.items():
        difference = (narrow[name] - value).abs().max() / value.abs().max()
        assert 1e-5 < difference < 0.05, (name, difference)


# Dynamo instantiates torch.autograd.Function
@pytest.mark.parametrize(("biased", "normed"), [(False, False), (True, True)])
def test_it_compiles_to_one_graph(biased: bool, normed: bool) -> None:
    torch._dynamo.reset()
    module, (x, index, weights) = experts(biased=biased, normed=normed), inputs()
    index = index.masked_fill(index == 0, E)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    expected = gradients(forward, module, x, index, weights)
    for name, value in gradients(compiled, module, x, index, weights).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_missing_choices_get_minus_one_and_weight_zero() -> None:
    weights = torch.tensor([[0.5, torch.inf], [0.25, 0.75]], dtype=torch.bfloat16).requires_grad_()
    routing = routing_of(torch.tensor([[2, 4], [3, 0]], dtype=torch.int32), weights, num_experts=4)
    assert routing.expert_indices.tolist() == [[2, -1], [3, 0]]
    assert routing.expert_indices.dtype == torch.int64
    assert routing.weights.tolist() == [[0.5, 0.0], [0.25, 0.75]]
    assert routing.weights.dtype == torch.float32
    assert routing.token_indices.tolist() == [[0, 0], [1, 1]]
    assert (routing.num_tokens, routing.num_experts, routing.pool) == (2, 4, 4)
    routing.weights.sum().backward()
    assert weights.grad.tolist() == [[1.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize(("index", "weights"), [((2, 3, 2), (2, 3, 2)), ((6, 2), (6, 1)), ((6,), (6,))])
def test_other_shapes_are_refused(index, weights) -> None:
    with pytest.raises(ValueError, match=r"expected \(T, K\) for both"):
        routing_of(torch.zeros(index, dtype=torch.int64), torch.zeros(weights), num_experts=4)


def test_a_module_without_the_interface_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Linear is no experts module.*@use_experts_implementation"):
        module_params(nn.Linear(2, 2))
