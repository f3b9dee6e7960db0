"""The selections of token rounding against the plain versions in torch; on the GPU, or under Triton's interpreter."""

import importlib
from functools import partial
from typing import Any

import pytest
import torch
from interpreted import DEVICE, Calls, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor
from torch._subclasses import FakeTensorMode
from waiting import nothing_waits

from moekit.routing import round_tokens, token_rounding, top_k
from moekit.segments import sort_by_expert, tokens_per_expert
from moekit.types import Routing

PLAIN: Any = importlib.import_module("moekit.routing.token_rounding")  # which has the name of a function in it
NAN, INF = float("nan"), float("inf")
ON_GPU = DEVICE == "cuda"
# assignments, experts: nothing, one of each, a part of a chunk; on the GPU several chunks each, and more than E = 1024
ASSIGNMENTS = [(0, 3), (1, 1), (40, 3), (700, 5), (9, 20)]
ASSIGNMENTS += [(131072, 512), (131072, 64), (300000, 3), (2**20 + 3, 129), (5000, 1500)] * ON_GPU
# T, E, K, places: no token, no place, a tile cut anywhere, several chunks, more places than lanes
SCORES = [(0, 3, 2, 0), (9, 4, 2, 0), (1, 1, 1, 1), (70, 5, 2, 9), (20, 67, 1, 2), (5000, 2, 2, 40), (2300, 1, 1, 2100)]
SCORES += [(16384, 512, 8, 64), (33000, 64, 8, 127), (300, 1500, 3, 300), (20000, 300, 2, 5000)] * ON_GPU


@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def kernels() -> Any:
    from moekit.routing import _rounding_triton

    return _rounding_triton


def awkward(values: Tensor) -> Tensor:
    """Make ties, both zeros, infinities and NaN of some values."""
    drawn = torch.randint(12, values.shape)
    for number, value in enumerate((0.0, -0.0, 0.25, -INF, INF, NAN)):
        values = values.masked_fill(drawn == number, value)
    return values


KINDS = {
    "distinct": lambda values: values,
    "tied": lambda values: (4 * values).round(),
    "awkward": awkward,
}
every_kind = pytest.mark.parametrize("change", KINDS.values(), ids=KINDS)


def check_heaviest(weights: Tensor, experts: Tensor, limits: Tensor) -> None:
    order, sizes = sort_by_expert(experts, limits.shape[0])
    expected = PLAIN._heaviest(weights, order, sizes, limits=limits)
    kept = kernels().heaviest(*(each.to(DEVICE) for each in (weights, order, sizes, limits)))
    assert kept.dtype == torch.bool
    assert torch.equal(kept.cpu(), expected)
    number = torch.minimum(limits.clamp_min(0), sizes)
    assert torch.equal(tokens_per_expert(experts.where(expected, -1), limits.shape[0]), number)


@runs_kernels
@pytest.mark.usefixtures("poison")
@every_kind
@pytest.mark.parametrize(("number", "num_experts"), ASSIGNMENTS)
def test_the_heaviest_assignments_are_kept(number, num_experts, change) -> None:
    experts, weights = torch.randint(-1, num_experts, (number,)), change(torch.randn(number))
    loads = tokens_per_expert(experts, num_experts)
    check_heaviest(weights, experts, loads - torch.randint(-2, 12, (num_experts,)))


@runs_kernels
@pytest.mark.parametrize("change", [torch.zeros_like, awkward, KINDS["distinct"]], ids=["equal", "awkward", "distinct"])
@pytest.mark.parametrize("limit", [1000, 400, -1])
def test_an_expert_may_have_many_more_than_the_others(limit, change) -> None:
    experts = torch.where(torch.rand(1200) < 0.9, 3, torch.randint(-1, 10, (1200,)))  # several chunks, of 256
    check_heaviest(change(torch.rand(1200)), experts, torch.full((10,), limit))


@runs_kernels
@pytest.mark.parametrize("limit", [0, 2, 9])
def test_nobody_chose_or_all_are_missing(limit) -> None:
    for expert in (-1, 1):
        check_heaviest(torch.rand(9), torch.full((9,), expert), torch.tensor([limit, limit]))


def check_besides(scores: Tensor, experts: Tensor, counts: Tensor, number: int) -> None:
    expected = PLAIN._besides(scores, experts, counts, number=number)
    tokens = kernels().besides(scores.to(DEVICE), experts.to(DEVICE), counts.to(DEVICE), number)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens.cpu(), expected)


@runs_kernels
@pytest.mark.usefixtures("poison")
@every_kind
@pytest.mark.parametrize(("num_tokens", "num_experts", "k", "number"), SCORES)
def test_the_best_tokens_are_taken_besides(num_tokens, num_experts, k, number, change) -> None:
    scores = change(torch.randn(num_tokens, num_experts))
    experts = torch.randint(-1, num_experts, (num_tokens, k))  # some tokens name an expert twice
    most = num_tokens - tokens_per_expert(experts, num_experts)
    counts = torch.where(torch.rand(num_experts) < 0.5, number, torch.randint(-2, number + 1, (num_experts,)))
    if not ON_GPU:  # where each that takes some costs a hundredth of a second
        counts[5:-3] = 0
    check_besides(scores, experts, counts.minimum(most), number)


@runs_kernels
def test_a_score_of_minus_infinity_is_taken_before_one_who_chose() -> None:
    scores, experts = torch.full((40, 2), -INF), torch.arange(40).remainder(2).unsqueeze(1)
    tokens = kernels().besides(scores.to(DEVICE), experts.to(DEVICE), torch.tensor([20, 3], device=DEVICE), 20)
    assert tokens.tolist() == [[*range(1, 40, 2)], [0, 2, 4, *([0] * 17)]]


@runs_kernels
def test_both_zeros_are_one_score_and_minus_infinity_is_the_lowest_finite_one() -> None:
    """So that the earlier of two wins, whichever of the two it has."""
    nobody = torch.full((40, 1), -1)
    for pair in ((0.0, -0.0), (torch.finfo(torch.float32).min, -INF), (INF, NAN)):
        for first, second in (pair, pair[::-1]):
            scores = torch.where(torch.arange(40) % 2 == 0, first, second).unsqueeze(1)
            tokens = kernels().besides(scores.to(DEVICE), nobody.to(DEVICE), torch.tensor([7], device=DEVICE), 7)
            assert tokens.tolist() == [[*range(7)]]
            check_besides(scores, nobody, torch.tensor([7]), 7)


@runs_kernels
def test_keys_put_aside_stay_in_their_expert_s_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few lanes have all of the greatest keys: as many are put aside as there is room for."""
    chunk, number = 256, 3
    scores = torch.rand(4 * chunk, 2)
    scores.view(4, chunk, 2)[:, :number] += 1.0
    monkeypatch.setattr(kernels(), "_MOST_CHUNK", chunk)
    launch, room = kernels()._take_launch.__wrapped__(4 * chunk, 2, number)
    keys = torch.empty(2, 4 * chunk, dtype=torch.int32, device=DEVICE)
    nobody = torch.full((4 * chunk, 1), -1, device=DEVICE)
    kernels()._score_launch(4 * chunk, 2, 1)(scores.to(DEVICE), nobody, keys)
    aside = torch.zeros(2, room, dtype=torch.int32, device=DEVICE)
    taken = torch.empty(2, number, dtype=torch.int64, device=DEVICE)
    launch(keys, aside, torch.tensor([number, 0], device=DEVICE), taken)
    assert (aside[0] != 0).sum() > number
    assert (aside[1] == 0).all()
    assert taken[0].tolist() == scores[:, 0].topk(number).indices.sort().values.tolist()


@runs_kernels
def test_memory_in_any_order_is_read_right() -> None:
    scores, experts = torch.randn(5, 30).T, torch.randint(-1, 5, (2, 30)).T
    check_besides(scores, experts, torch.tensor([3, 9, 0, 9, 1, 9, 2, 9, 3, 9])[::2], 3)
    order, sizes = sort_by_expert(experts.flatten(), 5)
    weights, limits = torch.randn(60, 2)[:, 0], (sizes.repeat_interleave(2) - 2)[::2]
    sizes = sizes.repeat_interleave(2)[::2]
    assert not any(each.is_contiguous() for each in (weights, sizes, limits))
    kept = kernels().heaviest(weights.to(DEVICE), order.to(DEVICE), sizes.to(DEVICE), limits.to(DEVICE))
    assert torch.equal(kept.cpu(), PLAIN._heaviest(weights, order, sizes, limits=limits))


@runs_kernels
def test_the_operators_are_well_formed() -> None:
    kernels()  # whose import registers them
    order, sizes = sort_by_expert(torch.randint(-1, 3, (40,)), 3)
    weights, limits = torch.rand(40), sizes - 2
    given = [each.to(DEVICE) for each in (weights, order, sizes, limits)]
    torch.library.opcheck(torch.ops.moekit.heaviest.default, tuple(given))
    scores, experts = torch.rand(40, 3, device=DEVICE), torch.randint(-1, 3, (40, 1), device=DEVICE)
    torch.library.opcheck(torch.ops.moekit.besides.default, (scores, experts, given[3], 4))


def moved(routing: Routing, device: str) -> Routing:
    experts, tokens = routing.expert_indices.to(device), routing.token_indices.to(device)
    return routing._replace(token_indices=tokens, expert_indices=experts, weights=routing.weights.to(device))


def unchanged(logits: Tensor) -> Tensor:
    return logits  # a score that no device rounds


def decided(num_tokens: int, num_experts: int) -> tuple[Tensor, Routing]:
    """Draw a decision whose weights tie, where some assignments are missing and some tokens name an expert twice."""
    logits = (8 * torch.randn(num_tokens, num_experts)).round() / 8
    routing = top_k(logits, k=3)
    experts = routing.expert_indices.clone()
    experts[::5, 0] = -1
    experts[::7, 1] = experts[::7, 2]
    return logits, routing._replace(expert_indices=experts, weights=(16 * routing.weights).round() / 16)


def same(found: Routing, expected: Routing) -> None:
    for name, value in expected._asdict().items():
        other = getattr(found, name)
        assert torch.equal(other.cpu(), value) if isinstance(value, Tensor) else other == value, name


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("how", [torch.round, torch.ceil, torch.floor], ids=["nearest", "up", "down"])
@pytest.mark.parametrize(("num_tokens", "num_experts", "tile"), [(90, 7, 16), (11, 5, 64), (6, 3, 1)])
def test_the_routing_is_that_of_the_plain_versions(num_tokens, num_experts, tile, how, monkeypatch) -> None:
    logits, routing = decided(num_tokens, num_experts)
    options = {"tile": tile, "rounding": how, "score": unchanged}
    expected = round_tokens(logits, routing, **options)
    monkeypatch.setattr(PLAIN, "_has_kernels", lambda values: True)
    same(round_tokens(logits.to(DEVICE), moved(routing, DEVICE), **options), expected)


@runs_kernels
def test_the_gradients_are_those_of_the_plain_versions_in_float64(monkeypatch) -> None:
    _, routing = decided(90, 7)
    logits = torch.randn(90, 7)  # whose scores do not tie but for rounding
    grads, cotangent = [], torch.randn(90 * 3 + 7 * 8, dtype=torch.float64)
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, DEVICE)):
        z, w = (each.to(device, dtype).requires_grad_() for each in (logits, routing.weights))
        placed = moved(routing, device)._replace(weights=w)
        weights = round_tokens(z, placed, tile=16).weights
        loss = (weights * cotangent.to(device, dtype)).sum()
        grads.append(dict(zip(("logits", "weights"), torch.autograd.grad(loss, [z, w]), strict=True)))
        monkeypatch.setattr(PLAIN, "_has_kernels", lambda values: values.dtype == torch.float32)
    for name, expected in grads[0].items():
        found = grads[1][name].double().cpu()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=lambda text, at=name: f"{at}: {text}")


def test_float32_on_cuda_takes_the_kernels() -> None:
    """Told from fake tensors, which need no GPU."""
    router = token_rounding(partial(top_k, k=2), tile=4)
    with FakeTensorMode(), Calls() as calls:
        logits = torch.zeros(6, 5, device="cuda")
        rounded = router(logits)
        assert rounded.weights.shape == rounded.expert_indices.shape == rounded.token_indices.shape == (22,)
        assert rounded.weights.device.type == "cuda"
        assert not any(PLAIN._has_kernels(logits.to(dtype)) for dtype in (torch.float64, torch.bfloat16))
    assert calls.own() == ["counting_sort", "heaviest", "besides"]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
class TestOnCuda:
    @pytest.mark.parametrize("shape", [(16384, 512, 128), (5000, 1500, 64), (20000, 8, 128), (33, 5, 16)])
    def test_the_routing_is_that_of_the_cpu_and_nothing_reads_the_device(self, shape) -> None:
        num_tokens, num_experts, tile = shape
        logits, routing = decided(num_tokens, num_experts)
        expected = round_tokens(logits, routing, tile=tile, score=unchanged)
        logits, routing = logits.cuda().requires_grad_(), moved(routing, "cuda")
        round_tokens(logits, routing, tile=tile, score=unchanged)  # the first call compiles
        with nothing_waits():
            found = round_tokens(logits, routing, tile=tile, score=unchanged)
            found.weights.sum().backward()
        same(found._replace(weights=found.weights.detach()), expected)

    def test_it_is_captured_in_a_graph(self) -> None:
        logits, routing = decided(3000, 40)
        logits, routing, graph = logits.cuda(), moved(routing, "cuda"), torch.cuda.CUDAGraph()
        run = partial(round_tokens, tile=32, score=unchanged)
        run(logits, routing)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = run(logits, routing)
        others, other = decided(3000, 40)
        expected = run(others, other)
        logits.copy_(others)
        routing.expert_indices.copy_(other.expert_indices)
        routing.weights.copy_(other.weights)
        graph.replay()
        same(found, expected)

    def test_it_compiles_whole(self) -> None:
        logits, routing = decided(3000, 40)
        run = partial(round_tokens, tile=32, score=unchanged)
        torch.compiler.reset()
        found = torch.compile(run, fullgraph=True)(logits.cuda(), moved(routing, "cuda"))
        same(found, run(logits, routing))
