import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moekit import routing as r
from moekit.recipes.backends import auto_top_k
from moekit.routing.gates import clean, linear_gate, noisy
from moekit.routing.noise import (
    NoisyGateParams,
    gumbel_noise,
    init_noisy_gate,
    input_jitter,
    logit_noise,
    noisy_gate,
    noisy_top_k,
)
from moekit.routing.top_k import softmax_of_top_k
from moekit.types import NoisyLogits

T, D, E = 7, 5, 4
WRAPPERS = {"jitter": input_jitter, "normal": logit_noise, "gumbel": gumbel_noise}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def noisy_gate_in_loops(x: Tensor, w: Tensor, noise: Tensor, n: Tensor) -> list[list[Tensor]]:
    rows = []
    for t in range(x.shape[0]):
        row = []
        for e in range(w.shape[1]):
            std = torch.log(1 + torch.exp(sum(x[t, d] * noise[d, e] for d in range(x.shape[1])))) + 0.01
            row.append(sum(x[t, d] * w[d, e] for d in range(x.shape[1])) + n[t, e] * std)
        rows.append(row)
    return rows


def test_noisy_gate_and_its_router_are_the_papers() -> None:
    x, w, noise = drawn(T, D), drawn(D, E), drawn(D, E)
    torch.manual_seed(2)
    n = torch.randn(T, E, dtype=torch.float64)
    torch.manual_seed(2)
    routing = noisy_top_k(noisy_gate(x, NoisyGateParams(w, noise)), k=2)
    expected = []
    for row in noisy_gate_in_loops(x, w, noise, n):
        best = sorted(range(E), key=lambda e: -row[e].item())[:2]
        total = sum(torch.exp(row[e]) for e in best)
        expected.append([(e, torch.exp(row[e]) / total) for e in best])
    assert routing.expert_indices.tolist() == [[e for e, _ in row] for row in expected]
    weights = torch.stack([torch.stack([g for _, g in row]) for row in expected])
    torch.testing.assert_close(routing.weights, weights)
    probe = torch.randn(T, 2, dtype=torch.float64)
    for actual, wanted in zip(
        torch.autograd.grad((routing.weights * probe).sum(), (x, w, noise)),
        torch.autograd.grad((weights * probe).sum(), (x, w, noise)),
        strict=True,
    ):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(actual, wanted)


def test_the_paper_begins_with_zeros() -> None:
    params = init_noisy_gate(D, E)
    assert params.w.shape == params.noise.shape == (D, E)
    assert (params.w == 0).all()
    assert (params.noise == 0).all()
    generator = torch.Generator().manual_seed(0)
    drawn = init_noisy_gate(400, E, std=0.5, generator=generator)
    assert drawn.w.std().item() == pytest.approx(0.5, rel=0.1)
    assert not torch.equal(drawn.w, drawn.noise)


def test_evaluation_draws_nothing_and_keeps_the_deviation() -> None:
    x, params = torch.randn(T, D), NoisyGateParams(torch.randn(D, E), torch.randn(D, E))
    state = torch.get_rng_state()
    logits = noisy_gate(x, params, training=False)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(logits.logits, logits.clean)
    torch.testing.assert_close(logits.std, F.softplus(x @ params.noise) + 0.01)
    assert not torch.equal(noisy_gate(x, params).logits, logits.clean)


def test_noise_has_the_deviation_that_is_returned() -> None:
    x = torch.ones(20000, 1)
    for gate, params in (
        (noisy_gate, NoisyGateParams(torch.zeros(1, 2), torch.tensor([[0.0, 2.0]]))),
        (logit_noise(linear_gate, std=3.0), torch.zeros(1, 2)),
        (gumbel_noise(linear_gate), torch.zeros(1, 2)),
        (logit_noise(noisy_gate, std=2.0), init_noisy_gate(1, 2)),
    ):
        logits = gate(x, params)
        torch.testing.assert_close((logits.logits - logits.clean).std(0), logits.std[0], rtol=0.04, atol=0)


def test_v_moe_divides_the_deviation_by_the_number_of_experts() -> None:
    for num_experts in (2, 8):
        logits = logit_noise(linear_gate, std=1.0)(torch.ones(3, 1), torch.zeros(1, num_experts))
        torch.testing.assert_close(logits.std, torch.full((3, num_experts), 1 / num_experts))


def test_the_largest_logit_under_gumbel_noise_is_a_draw_from_the_softmax() -> None:
    w = torch.tensor([[0.0, 1.0, -1.0, 0.5]])
    logits = noisy(gumbel_noise(linear_gate)(torch.ones(40000, 1), w))
    shares = torch.bincount(logits.argmax(-1), minlength=4) / 40000
    torch.testing.assert_close(shares, torch.softmax(w[0], 0), rtol=0, atol=0.012)


def test_jitter_is_uniform_on_every_entry_of_the_input_and_in_float32() -> None:
    x = torch.ones(500, 40, dtype=torch.bfloat16)
    seen = input_jitter(linear_gate, eps=0.01)(x, torch.eye(40))
    assert seen.dtype == torch.float32
    assert 0.99 <= seen.min() < 0.9901
    assert 1.0099 < seen.max() <= 1.01
    assert seen.std().item() == pytest.approx(0.02 / math.sqrt(12), rel=0.02)
    assert seen.unique().numel() > 10000  # in bfloat16 there would be four numbers
    assert (x == 1).all()


@every_wrapper
def test_wrappers_draw_in_training_alone(wrap) -> None:
    x, w = torch.randn(T, D), torch.randn(D, E)
    gate = wrap(linear_gate)
    state = torch.get_rng_state()
    logits = gate(x, w, training=False)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(noisy(logits), linear_gate(x, w))
    assert not torch.equal(noisy(gate(x, w)), linear_gate(x, w))
    assert torch.equal(clean(wrap(linear_gate)(x, w, training=False)), linear_gate(x, w))


@every_wrapper
def test_a_gate_that_knows_training_is_told(wrap) -> None:
    x, params = torch.randn(T, D), init_noisy_gate(D, E)
    twice = wrap(wrap(noisy_gate))
    assert torch.equal(noisy(twice(x, params, training=False)), torch.zeros(T, E))
    assert not torch.equal(noisy(twice(x, params)), torch.zeros(T, E))
    assert isinstance(twice(x, params), NoisyLogits)


@every_wrapper
def test_wrappers_are_values(wrap) -> None:
    x, w = torch.randn(T, D), torch.randn(D, E)
    gate = wrap(linear_gate)
    again = pickle.loads(pickle.dumps(gate))
    torch.manual_seed(1)
    first = noisy(gate(x, w))
    torch.manual_seed(1)
    assert torch.equal(first, noisy(again(x, w)))


def test_variances_add_up() -> None:
    x, params = torch.randn(T, D), init_noisy_gate(D, E, std=1.0)
    inner = noisy_gate(x, params, training=False)
    outer = logit_noise(noisy_gate, std=E * 0.3)(x, params, training=False)
    torch.testing.assert_close(outer.std, (inner.std.square() + 0.09).sqrt())
    assert torch.equal(outer.clean, inner.clean)


def test_the_router_takes_logits_without_noise_too() -> None:
    logits, bias = torch.randn(T, E), torch.tensor([9.0, 0.0, 0.0, 0.0])
    routing, plain = noisy_top_k(logits, k=2, bias=bias), softmax_of_top_k(logits, k=2, bias=bias)
    assert torch.equal(routing.expert_indices, plain.expert_indices)
    assert torch.equal(routing.weights, plain.weights)
    assert (routing.expert_indices == 0).any(-1).all()


GATES = {
    "noisy gate": (noisy_gate, init_noisy_gate(D, E, std=1.0)),
    "jitter": (input_jitter(linear_gate), torch.randn(D, E)),
    "normal": (logit_noise(linear_gate), torch.randn(D, E)),
    "gumbel": (gumbel_noise(linear_gate), torch.randn(D, E)),
}
every_gate = pytest.mark.parametrize(("gate", "params"), GATES.values(), ids=GATES)


@every_gate
@pytest.mark.parametrize("training", [False, True])
def test_float32_inside_autocast(gate, params, training: bool) -> None:
    x = torch.randn(T, D)
    torch.manual_seed(1)
    expected = gate(x, params, training=training)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gate(x, params, training=training)
    for one, other in zip((noisy(actual), clean(actual)), (noisy(expected), clean(expected)), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@every_gate
def test_no_tokens_and_one_expert(gate, params) -> None:
    assert noisy(gate(torch.zeros(0, D), params)).shape == (0, E)
    one = NoisyGateParams(*(p[:, :1] for p in params)) if isinstance(params, NoisyGateParams) else params[:, :1]
    routing = noisy_top_k(gate(torch.randn(3, D), one), k=1)
    assert (routing.weights == 1).all()


@every_gate
def test_one_graph(gate, params) -> None:
    torch._dynamo.reset()
    x = torch.randn(T, D, requires_grad=True)

    def route(x: Tensor) -> Tensor:
        return noisy_top_k(gate(x, params), k=2).weights

    torch.manual_seed(1)
    expected = torch.autograd.grad(route(x).square().sum(), x)[0]
    torch.manual_seed(1)
    actual = torch.autograd.grad(torch.compile(route, fullgraph=True, backend="aot_eager")(x).square().sum(), x)[0]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (partial(input_jitter, eps=1.0), "input_jitter: eps = 1.0; expected 0 <= eps < 1. Switch's is 0.01"),
        (partial(input_jitter, eps=-0.1), "input_jitter: eps = -0.1; expected 0 <= eps < 1"),
        (partial(logit_noise, std=-1.0), "logit_noise: std = -1.0; expected a number >= 0"),
        (partial(logit_noise, std=math.nan), "logit_noise: std = nan; expected a number >= 0"),
    ],
)
def test_errors_say_what_was_given(wrap, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrap(linear_gate)


IDS, TABLE = torch.tensor([3, 0, 3, 2, 1, 0, 4]), r.hash_table(5, E, k=2)
BY_NOISE = {
    "top_k": partial(r.top_k, k=2),
    "softmax_of_top_k": partial(r.softmax_of_top_k, k=2),
    "sigmoid_of_top_k": partial(r.sigmoid_of_top_k, k=2),
    "fused_top_k": partial(r.fused_top_k, k=2),
    "fused_top_k_and_load": lambda z: r.fused_top_k_and_load(z, k=2)[0],
    "auto_top_k": partial(auto_top_k, k=2),
    "noisy_top_k": partial(r.noisy_top_k, k=2),
    "group_limited": partial(r.group_limited, k=2, num_groups=2, groups_kept=1),
    "quantile_balanced": partial(r.quantile_balanced, k=2),
    "sinkhorn": partial(r.sinkhorn, k=2),
    "sparse_mixer": partial(r.sparse_mixer, training=False),
    "top_p": partial(r.top_p, p=0.5),
    "threshold": partial(r.threshold, threshold=0.5),
    "relu_choice": r.relu_choice,
    "topology_limited": partial(r.topology_limited, num_nodes=2, node=0),
    "over_nodes": partial(r.over_nodes, num_nodes=2),
    "expert_choice": partial(r.expert_choice, capacity_factor=2),
    "soft_slots": partial(r.soft_slots, slots=2),
    "token_rounding": r.token_rounding(partial(r.top_k, k=2), tile=2),
}
WITHOUT = {
    "hash_choice": partial(r.hash_choice, token_ids=IDS, table=TABLE),
    "random_choice": partial(r.random_choice, k=2),
    "round_robin": partial(r.round_robin, k=2),
}


def test_every_router_of_the_package_is_here() -> None:
    start, end = r.__all__.index("top_k"), r.__all__.index("load_balance_loss")
    others = {"softmax", "sigmoid", "sqrt_softplus", "softmax_over_tokens", "token_choice", "weights_at"}
    others |= {"expert_capacity", "hash_table", "round_tokens", "moved_mass", "mask_tokens", "mask_soft"}
    others |= {"random_second", "without_simple"}
    assert set(r.__all__[start:end]) - others == (set(BY_NOISE) | set(WITHOUT)) - {"auto_top_k"}


@pytest.mark.parametrize("name", [*BY_NOISE, *WITHOUT])
def test_every_router_takes_logits_with_noise(name: str) -> None:
    """It decides by those with noise, or, where logits decide nothing, weighs by those without."""
    logits = logit_noise(linear_gate, std=9.0)(torch.randn(T, D), torch.randn(D, E))
    route, read = (BY_NOISE[name], logits.logits) if name in BY_NOISE else (WITHOUT[name], logits.clean)
    found = []
    for given in (logits, read):
        torch.manual_seed(5)
        found.append(route(given))
    for part, expected in zip(*found, strict=True):
        assert torch.equal(part, expected) if isinstance(part, Tensor) else part == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*BY_NOISE, *WITHOUT])
def test_every_router_refuses_half_precision(name: str, dtype: torch.dtype) -> None:
    z = torch.randn(T, E).to(dtype)
    for given in (z, NoisyLogits(z, z, z.abs())):
        with pytest.raises(ValueError, match=rf"logits are in {dtype}; expected float32 .*or pass logits\.float\(\)"):
            (BY_NOISE | WITHOUT)[name](given)
