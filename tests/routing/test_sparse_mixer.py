import pytest
import torch
from torch import Tensor

from moekit.routing.sparse_mixer import sparse_mixer

T, E = 40, 6


def near_best(z: list[float], taken: list[int], eps: float) -> list[int]:
    """Return the experts that a choice is made from, in order of number, and the best of them first."""
    rest = [e for e in range(len(z)) if e not in taken]
    best = max(rest, key=lambda e: z[e])
    size = {e: max(abs(z[e]), z[best]) for e in rest}
    kept = [e for e in rest if z[e] == z[best] or (z[best] - z[e]) / size[e] <= 2 * eps]
    return [best, *(e for e in kept if e != best)]


def share(z: Tensor, expert: int, kept: list[int]) -> Tensor:
    return torch.exp(z[expert]) / sum(torch.exp(z[e]) for e in kept)


def logits_for(scale: float, shift: float) -> Tensor:
    return (torch.randn(T, E, dtype=torch.float64) * scale + shift).requires_grad_()


cases = pytest.mark.parametrize(
    ("scale", "shift", "eps"),
    [(0.02, 1.0, 0.01), (1.0, 0.0, 0.3), (1.0, -2.0, 0.2), (0.0, 0.0, 0.01), (3.0, 0.0, 1e-9)],
)


@cases
@pytest.mark.parametrize("k", [1, 2, 3, E])
def test_evaluation_is_that_of_loops(scale: float, shift: float, eps: float, k: int) -> None:
    logits = logits_for(scale, shift)
    state = torch.get_rng_state()
    routing = sparse_mixer(logits, k=k, eps=eps, training=False)
    assert torch.equal(state, torch.get_rng_state())
    probe, expected = torch.randn(T, k, dtype=torch.float64), torch.zeros(())
    for t, z in enumerate(logits):
        taken: list[int] = []
        for i in range(k):
            kept = near_best(z.tolist(), taken, eps)
            weight = share(z, kept[0], kept)
            assert routing.expert_indices[t, i] == kept[0]
            torch.testing.assert_close(routing.weights[t, i], weight)
            expected = expected + probe[t, i] * weight
            taken.append(kept[0])
    (actual,) = torch.autograd.grad((routing.weights * probe).sum(), logits)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, logits)[0])


def check_training(weights: Tensor, experts: Tensor, logits: Tensor, *, eps: float, midpoint: float) -> dict[str, int]:
    """Hold values and gradient of what was drawn against loops; count the kinds of values that were seen."""
    probe, expected, seen = torch.randn(weights.shape), torch.zeros(()), {"peak": 0, "full": 0, "part": 0}
    for t, z in enumerate(logits):
        taken: list[int] = []
        for i, expert in enumerate(experts[t].tolist()):
            kept = near_best(z.tolist(), taken, eps)
            assert expert in kept
            weight, value = share(z, expert, kept), weights[t, i].item()
            full = value == pytest.approx(weight.item(), rel=1e-5)
            assert full or (expert != kept[0] and value == pytest.approx(midpoint * weight.item(), rel=1e-5))
            seen["peak" if expert == kept[0] else "full" if full else "part"] += 1
            expected = expected + probe[t, i] * weight  # the gradient has no midpoint in it
            taken.append(expert)
    (actual,) = torch.autograd.grad((weights * probe).sum(), logits)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, logits)[0])
    return seen


@cases
@pytest.mark.parametrize("midpoint", [1 / 3, 0.3333])
def test_training_weighs_what_it_drew(scale: float, shift: float, eps: float, midpoint: float) -> None:
    logits = logits_for(scale, shift)
    routing = sparse_mixer(logits, eps=eps, midpoint=midpoint)
    seen = check_training(routing.weights, routing.expert_indices, logits, eps=eps, midpoint=midpoint)
    assert seen["peak"]
    assert (seen["full"] and seen["part"]) or eps == 1e-9


def test_draws_follow_the_two_softmaxes_and_a_quarter_is_full() -> None:
    z, eps, number = torch.tensor([1.0, 1.4, 0.9, -3.0], dtype=torch.float64), 0.25, 60000
    routing = sparse_mixer(z.expand(number, 4), eps=eps)
    first, second = routing.expert_indices.unbind(1)
    for a in range(4):
        chance = share(z, a, near_best(z.tolist(), [], eps)) if a != 3 else torch.tensor(0.0)
        assert (first == a).double().mean().item() == pytest.approx(chance.item(), abs=0.008)
        for b in set(range(3)) - {a}:
            both = 0.0 if a == 3 else chance * share(z, b, near_best(z.tolist(), [a], eps))
            assert ((first == a) & (second == b)).double().mean().item() == pytest.approx(float(both), abs=0.008)
    off_peak = first == 2
    full = routing.weights[off_peak, 0] > 0.9 * share(z, 2, [0, 1, 2])
    assert full.double().mean().item() == pytest.approx(0.25, abs=0.02)


def test_experts_of_a_token_differ_and_far_ones_are_never_drawn() -> None:
    routing = sparse_mixer(torch.randn(500, E), k=E, eps=10.0)
    assert (routing.expert_indices.sort(-1).values == torch.arange(E)).all()
    far = sparse_mixer(torch.tensor([[5.0, 4.99, -1.0]]).expand(500, 3), k=2)
    assert (far.expert_indices < 2).all()


def test_a_bias_moves_the_choice_and_no_weight() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 2.0])
    routing = sparse_mixer(logits, k=2, eps=0.01, training=False, bias=bias)
    assert routing.expert_indices.tolist() == [[0, 2]]  # 3 against 3, and then 3 against 2
    assert routing.weights[0].tolist() == pytest.approx([torch.softmax(logits[0, [0, 2]], 0)[0].item(), 1.0])
    assert set(sparse_mixer(logits.expand(200, 3), k=1, bias=bias).expert_indices.unique().tolist()) == {0, 2}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e30, -1e30, 1e-30])
def test_extreme_and_equal_logits_stay_finite(training: bool, value: float) -> None:
    logits = torch.full((50, 4), value)
    logits[:, 1] *= 0.5
    logits.requires_grad_()
    routing = sparse_mixer(logits, training=training)
    assert routing.weights.isfinite().all()
    assert (routing.expert_indices[:, 0] != routing.expert_indices[:, 1]).all()
    assert torch.autograd.grad(routing.weights.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_no_tokens_and_one_expert(training: bool) -> None:
    assert sparse_mixer(torch.zeros(0, E), training=training).weights.shape == (0, 2)
    assert (sparse_mixer(torch.randn(3, 1), k=1, training=training).weights == 1).all()


def test_one_graph() -> None:
    logits = (torch.randn(T, E) * 0.02 + 1).requires_grad_()

    def route(logits: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        routing = sparse_mixer(logits, training=training)
        return routing.weights, routing.expert_indices

    torch._dynamo.reset()
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(logits, False), route(logits, False), strict=True):
        torch.testing.assert_close(actual, expected)
    # A compiler may change the order of draws, so what it drew is held against the loops.
    seen = check_training(*compiled(logits, True), logits, eps=0.01, midpoint=1 / 3)
    assert all(seen.values())


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="sparse_mixer: k = 2 experts per token were asked of E = 1"):
        sparse_mixer(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"selection bias has shape \(2,\)"):
        sparse_mixer(torch.zeros(3, 4), bias=torch.zeros(2))


@pytest.mark.parametrize("training", [False, True])
def test_experts_at_minus_infinity_are_chosen_once_and_weigh_nothing(training: bool) -> None:
    inf = float("inf")
    logits = torch.tensor([[1.0, -inf, -inf, -inf], [-inf, 2.0, -inf, 1.99], [-inf] * 4], requires_grad=True)
    routing = sparse_mixer(logits, k=3, training=training)
    assert all(len(set(chosen)) == 3 for chosen in routing.expert_indices.tolist())
    assert routing.expert_indices[0, 0] == 0
    assert set(routing.expert_indices[1, :2].tolist()) == {1, 3}
    dead = logits.detach().gather(1, routing.expert_indices) == -inf
    assert (routing.weights[dead] == 0).all()
    assert (routing.weights[~dead] > 0).all()
    assert torch.autograd.grad(routing.weights.sum(), logits)[0].isfinite().all()
