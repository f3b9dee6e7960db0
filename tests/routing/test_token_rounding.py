import math
from functools import partial

import pytest
import torch
from torch import Tensor

from moekit.dispatch import dropless
from moekit.experts import loop
from moekit.routing import hash_choice, hash_table, round_robin, sigmoid, softmax, top_k
from moekit.routing.dynamic_k import top_p
from moekit.routing.expert_choice import expert_choice
from moekit.routing.moved_mass import moved_mass
from moekit.routing.token_rounding import round_tokens, token_rounding
from moekit.segments import tokens_per_expert
from moekit.types import NoisyLogits, Routing

T, E, K = 37, 5, 2
ROUTERS = {
    "softmax": partial(top_k, k=K),
    "normalized": partial(top_k, k=K, normalize=True),
    "top 1": partial(top_k, k=1),
    "sigmoid": partial(top_k, k=3, score=sigmoid, normalize=True, scale=2.5),
    "top-p": partial(top_p, p=0.5, max_k=3),
    "round robin": partial(round_robin, k=K),
}
ROUNDINGS = {torch.round: round, torch.ceil: math.ceil, torch.floor: math.floor}
every_router = pytest.mark.parametrize("route", ROUTERS.values(), ids=ROUTERS)
every_rounding = pytest.mark.parametrize("rounding", ROUNDINGS, ids=["nearest", "up", "down"])


def reference(logits: Tensor, routing: Routing, *, tile: int, rounding) -> Tensor:
    """Dense weights (T, E), one expert at a time: sort all tokens, chosen ones first, and take the first r_e."""
    num_tokens, num_experts = logits.shape
    chosen: list[dict[int, Tensor]] = [{} for _ in range(num_experts)]
    for t, row in enumerate(routing.expert_indices.tolist()):
        for i, e in enumerate(row):
            if e >= 0:
                chosen[e][t] = routing.weights[t, i]
    columns = []
    for e in range(num_experts):
        score = [torch.exp(z[e]) / torch.exp(z).sum() for z in logits.unbind(0)]
        rows = min(num_tokens, tile * ROUNDINGS[rounding](len(chosen[e]) / tile))
        heaviest = sorted(chosen[e], key=lambda t: -chosen[e][t].item())
        others = sorted(set(range(num_tokens)) - set(chosen[e]), key=lambda t: -score[t].item())
        taken = (heaviest + others)[:rows]
        weight = {t: chosen[e].get(t, score[t]) for t in taken}
        columns.append(torch.stack([weight.get(t, score[t] * 0) for t in range(num_tokens)]))
    return torch.stack(columns, dim=1)


def dense(routing: Routing) -> Tensor:
    weights = routing.weights.new_zeros(routing.num_tokens, routing.num_experts + 1)
    index = (routing.token_indices.flatten(), routing.expert_indices.flatten())
    return weights.index_put(index, routing.weights.flatten(), accumulate=True)[:, :-1]


def pairs(routing: Routing) -> list[tuple[int, int]]:
    listed = zip(routing.token_indices.flatten().tolist(), routing.expert_indices.flatten().tolist(), strict=True)
    return [(t, e) for t, e in listed if e >= 0]


@every_router
@every_rounding
@pytest.mark.parametrize("tile", [1, 2, 5, 8, 100])
def test_loads_weights_and_gradients_follow_the_formula(route, rounding, tile: int) -> None:
    logits = (torch.randn(T, E, dtype=torch.float64) + torch.linspace(0, 2, E)).requires_grad_()
    routing, rounded = route(logits), token_rounding(route, tile=tile, rounding=rounding)(logits)
    loads = tokens_per_expert(routing.expert_indices, E).tolist()
    expected_loads = [min(T, tile * ROUNDINGS[rounding](c / tile)) for c in loads]
    assert tokens_per_expert(rounded.expert_indices, E).tolist() == expected_loads
    assert len(set(pairs(rounded))) == len(pairs(rounded)) == sum(expected_loads)
    assert (rounded.weights[rounded.expert_indices < 0] == 0).all()
    actual, expected = dense(rounded), reference(logits, routing, tile=tile, rounding=rounding)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    cotangent = torch.randn(T, E, dtype=torch.float64)
    grads = [torch.autograd.grad((y * cotangent).sum(), logits, retain_graph=True)[0] for y in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@every_router
@every_rounding
def test_a_tile_of_one_is_the_identity(route, rounding) -> None:
    logits = torch.randn(T, E)
    routing, rounded = route(logits), token_rounding(route, tile=1, rounding=rounding)(logits)
    assert torch.equal(rounded.token_indices, routing.token_indices.flatten())
    assert torch.equal(rounded.expert_indices, routing.expert_indices.flatten())
    assert torch.equal(rounded.weights, routing.weights.flatten())
    assert rounded[3:] == routing[3:]
    moved = moved_mass(routing, rounded)
    assert (moved.dropped.item(), moved.added.item()) == (0, 0)


@pytest.mark.parametrize(
    ("rounding", "most"),
    [(torch.round, 4), (torch.ceil, 7), (torch.floor, 0), (lambda tiles: tiles.ceil(), 7)],
    ids=["round", "ceil", "floor", "any other"],
)
@pytest.mark.parametrize("num_tokens", [T, 5, 3, 0])
def test_shape_is_known_without_the_loads(num_tokens: int, rounding, most: int) -> None:
    for tile, besides in ((8, most), (1, 0)):
        logits = torch.randn(num_tokens, E)
        rounded = token_rounding(partial(top_k, k=K), tile=tile, rounding=rounding)(logits)
        size = num_tokens * K + E * min(besides, num_tokens)
        assert rounded.expert_indices.shape == rounded.token_indices.shape == rounded.weights.shape == (size,)
        assert (rounded.num_tokens, rounded.num_experts, rounded.pool) == (num_tokens, E, size)
        assert rounded.expert_indices.dtype == rounded.token_indices.dtype == torch.int64
        assert rounded.weights.dtype == torch.float32


def test_hand_written_values() -> None:
    """Loads 3 and 1 in tiles of 2: up gives 4 and 2; down 2 and 0; to the nearest, halves to even, 4 and 0."""
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    expected = {
        torch.ceil: [[0.9, 0.0], [0.8, 0.0], [0.6, 0.4], [0.3, 0.7]],
        torch.floor: [[0.9, 0.0], [0.8, 0.0], [0.0, 0.0], [0.0, 0.0]],
        torch.round: [[0.9, 0.0], [0.8, 0.0], [0.6, 0.0], [0.3, 0.0]],
    }
    for rounding, weights in expected.items():
        rounded = token_rounding(partial(top_k, k=1), tile=2, rounding=rounding)(probs.log())
        torch.testing.assert_close(dense(rounded), torch.tensor(weights))


def test_moved_mass_is_a_share_of_the_mass_before() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    before = top_k(probs.log(), k=1)  # 0.9 + 0.8 + 0.6 + 0.7 = 3.0
    moved = moved_mass(before, round_tokens(probs.log(), before, tile=2, rounding=torch.floor))
    torch.testing.assert_close(torch.stack(moved), torch.tensor([1.3 / 3, 0.0]))
    moved = moved_mass(before, round_tokens(probs.log(), before, tile=2, rounding=torch.ceil))
    torch.testing.assert_close(torch.stack(moved), torch.tensor([0.0, 0.7 / 3]))
    moved = moved_mass(before, round_tokens(probs.log(), before, tile=2))
    torch.testing.assert_close(torch.stack(moved), torch.tensor([0.7 / 3, 0.3 / 3]))


def test_moved_mass_of_nothing_and_of_gradients() -> None:
    logits = torch.randn(T, E, requires_grad=True)
    routing = top_k(logits, k=K)
    nothing = routing._replace(expert_indices=torch.full_like(routing.expert_indices, -1), weights=routing.weights * 0)
    assert torch.stack(moved_mass(nothing, routing)).tolist() == [0, 0]
    gone = moved_mass(routing, nothing)
    assert gone.dropped.item() == pytest.approx(1)
    assert gone.added.item() == 0
    assert not gone.dropped.requires_grad
    with pytest.raises(ValueError, match=r"over 37 and 3 tokens, 5 and 5 experts; expected two routings of the same"):
        moved_mass(routing, top_k(logits[:3], k=K))


def test_at_most_a_tile_of_each_expert_moves() -> None:
    logits, tile = torch.randn(500, 8), 16
    routing = top_k(logits, k=2)
    for rounding, limit in ((torch.round, tile // 2), (torch.ceil, tile - 1), (torch.floor, tile - 1)):
        rounded = round_tokens(logits, routing, tile=tile, rounding=rounding)
        before, after = set(pairs(routing)), set(pairs(rounded))
        for e in range(8):
            dropped, added = ({t for t, expert in some if expert == e} for some in (before - after, after - before))
            assert len(dropped) + len(added) <= limit
            assert not (dropped and added)
    shares = [moved_mass(routing, round_tokens(logits, routing, tile=n)).dropped.item() for n in (1, 4, 16, 64)]
    assert shares[0] == 0
    assert shares[1] < shares[3]


def test_stochastic_rounding_may_be_passed() -> None:
    logits = torch.randn(T, E)
    rounded = token_rounding(partial(top_k, k=K), tile=4, rounding=lambda n: (n + torch.rand_like(n)).floor())(logits)
    assert (tokens_per_expert(rounded.expert_indices, E) % 4 == 0).all()


def test_ties_go_to_earlier_assignments() -> None:
    logits = torch.zeros(5, 1)
    rounded = token_rounding(partial(top_k, k=1), tile=2, rounding=torch.floor)(logits)
    assert rounded.expert_indices.tolist()[:5] == [0, 0, 0, 0, -1]


def rounded_in_loops(scores: list[list[float]], routing: Routing, tile: int) -> tuple[list[int], list[int]]:
    """Return tokens and experts of a routing rounded up, whatever the numbers: equals in order, NaN as infinity."""

    def number(value: float) -> float:
        return math.inf if math.isnan(value) else value

    experts, weights = routing.expert_indices.flatten().tolist(), routing.weights.flatten().tolist()
    tokens, kept, besides = routing.token_indices.flatten().tolist(), [-1] * len(experts), []
    for e in range(routing.num_experts):
        own = [i for i, expert in enumerate(experts) if expert == e]
        rows = min(routing.num_tokens, tile * math.ceil(len(own) / tile))
        for i in sorted(own, key=lambda i: -number(weights[i]))[:rows]:  # which is stable
            kept[i] = e
        others = sorted(set(range(routing.num_tokens)) - {tokens[i] for i in own})
        taken = sorted(sorted(others, key=lambda t: -number(scores[t][e]))[: max(0, rows - len(own))])
        besides.append(taken + [-1] * (min(tile - 1, routing.num_tokens) - len(taken)))
    padded = [max(t, 0) for each in besides for t in each]
    return tokens + padded, kept + [e if t >= 0 else -1 for e, each in enumerate(besides) for t in each]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_tokens", "tile"), [(40, 16), (40, 3), (9, 64), (1, 2)])
def test_equals_and_numbers_that_are_none_have_a_stated_order(num_tokens, tile, dtype) -> None:
    scores = torch.randint(-2, 3, (num_tokens, 4)).to(dtype)
    for value in (math.nan, math.inf, -math.inf, -0.0):
        scores = scores.masked_fill(torch.rand(num_tokens, 4) < 0.1, value)
    experts = torch.randint(-1, 4, (num_tokens, 3))  # a token may name an expert twice
    tokens = torch.arange(num_tokens).unsqueeze(1).expand(num_tokens, 3)
    weights = scores.gather(1, experts.clamp_min(0))
    routing = Routing(tokens, experts, weights, num_tokens, 4, pool=3 * num_tokens)
    rounded = round_tokens(scores, routing, tile=tile, rounding=torch.ceil, score=lambda z: z)
    expected_tokens, expected_experts = rounded_in_loops(scores.tolist(), routing, tile)
    assert rounded.expert_indices.tolist() == expected_experts
    assert rounded.token_indices.tolist() == expected_tokens


def test_a_token_that_chose_is_not_taken_again_whatever_the_others_scores() -> None:
    scores = torch.tensor([0.0, -math.inf, 0.0, 1.0, -math.inf, 2.0]).unsqueeze(1)
    chosen = torch.tensor([0, -1, 0, -1, -1, -1]).unsqueeze(1)
    routing = top_k(scores, k=1)._replace(expert_indices=chosen, weights=torch.ones(6, 1))
    rounded = round_tokens(scores, routing, tile=6, rounding=torch.ceil, score=lambda z: z)
    assert sorted(pairs(rounded)) == [(t, 0) for t in range(6)]


def test_no_expert_has_more_rows_than_there_are_tokens() -> None:
    logits = torch.tensor([[9.0, 0.0]]).expand(5, 2)
    rounded = token_rounding(partial(top_k, k=1), tile=4, rounding=torch.ceil)(logits)
    assert tokens_per_expert(rounded.expert_indices, 2).tolist() == [5, 0]


def test_bias_reaches_the_router() -> None:
    logits, bias = torch.randn(T, E, dtype=torch.float64), torch.randn(E, dtype=torch.float64)
    route = partial(top_k, k=K)
    rounded = token_rounding(route, tile=8, rounding=torch.ceil)(logits, bias=bias)
    routing = route(logits, bias=bias)
    torch.testing.assert_close(dense(rounded), reference(logits, routing, tile=8, rounding=torch.ceil))
    assert not torch.equal(routing.expert_indices, route(logits).expert_indices)


def test_what_the_router_needs_is_passed_on_and_noise_decides() -> None:
    logits, noise, ids = torch.randn(T, E), torch.randn(T, E), torch.randint(9, (T,))
    table = hash_table(9, E, k=K)
    rounded = token_rounding(hash_choice, tile=1)(logits, token_ids=ids, table=table)
    assert torch.equal(rounded.expert_indices, table[ids].flatten())
    noisy = NoisyLogits(logits + noise, logits, torch.ones(T, E))
    routing = top_k(logits + noise, k=K)
    rounded = round_tokens(noisy, routing, tile=8)
    assert torch.equal(rounded.weights, round_tokens(logits + noise, routing, tile=8).weights)


def test_other_scores_rank_and_weigh_who_is_taken_besides() -> None:
    logits = torch.tensor([[2.0, -9.0], [1.0, 0.0], [0.0, 0.5]])
    route = partial(top_k, k=1, score=sigmoid)
    rounded = token_rounding(route, tile=3, rounding=torch.ceil, score=sigmoid)(logits)
    torch.testing.assert_close(dense(rounded), sigmoid(logits))
    negative = token_rounding(partial(top_k, k=1), tile=4, rounding=torch.ceil, score=lambda z: z - 10)
    rounded = negative(torch.randn(T, E))
    assert len(set(pairs(rounded))) == len(pairs(rounded)) > T


def test_a_layer_runs_on_it() -> None:
    """Every token to every expert after rounding up: the dense mixture."""
    logits = torch.randn(6, E, dtype=torch.float64)
    rounded = token_rounding(partial(top_k, k=E - 1), tile=6, rounding=torch.ceil)(logits)
    x, w, move = torch.randn(6, 3, dtype=torch.float64), torch.randn(E, 3, 2, dtype=torch.float64), dropless()
    plan = move.plan(rounded)
    y = move.combine(loop(move.dispatch(x, rounded, plan), plan.groups, w), rounded, plan)
    torch.testing.assert_close(y, torch.einsum("te,td,edf->tf", softmax(logits), x, w))


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite(extreme: float) -> None:
    logits = torch.randn(T, E)
    logits[:, 1] = extreme
    logits[3] = extreme
    logits[4, 2:] = -torch.inf
    logits.requires_grad_()
    rounded = token_rounding(partial(top_k, k=K, normalize=True), tile=8)(logits)
    assert rounded.weights.isfinite().all()
    (grad,) = torch.autograd.grad((rounded.weights * torch.randn_like(rounded.weights)).sum(), logits)
    assert grad.isfinite().all()


@pytest.mark.usefixtures("poison")
def test_autocast_repetition_and_poison_change_nothing() -> None:
    logits = torch.randn(T, E)
    router = token_rounding(partial(top_k, k=K), tile=8)
    expected = router(logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = router(logits)
    assert actual.weights.dtype == torch.float32
    for a, b in zip(actual[:3], expected[:3], strict=True):
        assert torch.equal(a, b)


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    router = token_rounding(partial(top_k, k=K, normalize=True), tile=8)
    logits, bias = torch.randn(T, E, requires_grad=True), torch.randn(E) * 0.1
    expected = router(logits, bias=bias)
    actual = torch.compile(router, fullgraph=True, backend="aot_eager")(logits, bias=bias)
    for a, b in zip(actual[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(r.weights.square().sum(), logits)[0] for r in (actual, expected)]
    torch.testing.assert_close(*grads)


def test_errors_say_what_was_given() -> None:
    logits = torch.zeros(T, E)
    with pytest.raises(
        ValueError, match=r"token_rounding: tile = 0; expected the rows of a GEMM tile, >= 1, such as 128"
    ):
        token_rounding(partial(top_k, k=1), tile=0)(logits)
    routing = top_k(logits, k=1)
    for other in (torch.zeros(T + 1, E), torch.zeros(T - 1, E), torch.zeros(T, E + 1)):
        with pytest.raises(ValueError, match=r"the logits have shape .* and the routing is over .* expected \(T, E\)"):
            round_tokens(other, routing, tile=2)
    with pytest.raises(ValueError, match=r"rounding = 'ceil'; expected a function .* such as torch.round"):
        round_tokens(torch.zeros(2, 3), round_robin(torch.zeros(2, 3), k=1), tile=1, rounding="ceil")
    with pytest.raises(ValueError, match=r"token_rounding: the routing has experts of torch.int32"):
        round_tokens(logits, routing._replace(expert_indices=routing.expert_indices.int()), tile=2)
    with pytest.raises(ValueError, match=r"the routing has shape \(1, 5, 7\); expected \(T, K\), as token-choice"):
        token_rounding(partial(expert_choice, capacity_factor=1), tile=2)(logits)
    with pytest.raises(ValueError, match=r"the router returned a tuple; expected a Routing of shape \(T, K\)"):
        token_rounding(lambda logits, bias: (logits, bias), tile=2)(logits)


@pytest.mark.parametrize("load", [1007, 4097])
def test_large_loads_are_rounded_exactly(load: int) -> None:
    rounded = token_rounding(partial(top_k, k=1), tile=16, rounding=torch.floor)(torch.zeros(load, 1))
    assert tokens_per_expert(rounded.expert_indices, 1).tolist() == [load // 16 * 16]


def test_weights_keep_their_dtype() -> None:
    logits = torch.randn(37, 5)
    routing = top_k(logits, k=2)
    rounded = round_tokens(logits, routing._replace(weights=routing.weights.bfloat16()), tile=8, rounding=torch.ceil)
    assert rounded.weights.dtype == torch.bfloat16


def test_logits_of_another_device_are_refused() -> None:
    logits = torch.randn(37, 5)
    with pytest.raises(ValueError, match=r"token_rounding: its tensors are on cpu and meta; expected one device"):
        round_tokens(logits.to("meta"), top_k(logits, k=2), tile=8)
