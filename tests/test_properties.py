"""Properties that hold for every routing, plan and layer, tried on drawn ones."""

from collections import Counter
from functools import partial

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moekit.dispatch import by_choice, by_position, by_weight, capacity, dropless, dropless_plan, padded, padded_plan
from moekit.experts import GatedParams, batched, grouped, init_gated, init_mlp, loop, relu2, swiglu
from moekit.recipes import MoEParams, Recipe, expert_layer, moe_layer
from moekit.routing import linear_gate, load_balance_loss, mask_tokens, routing_stats, softmax, top_k, z_loss
from moekit.routing.top_k import token_choice
from moekit.types import DispatchPlan, Routing

D, F = 4, 3
few = settings(max_examples=40, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


@st.composite
def routings(draw, *, axes: tuple[int, ...] = (1, 2, 3)) -> Routing:
    """Draw a routing of one, two or three axes with missing assignments; an expert may meet a token twice."""
    num_tokens, num_experts = draw(st.integers(0, 9)), draw(st.integers(1, 6))
    kind = draw(st.sampled_from(axes))
    if kind == 2:
        shape = (num_tokens, draw(st.integers(1, 4)))
        tokens = torch.arange(num_tokens).unsqueeze(1).expand(shape)
    else:
        shape = (
            (draw(st.integers(0, 20)),)
            if kind == 1
            else (draw(st.integers(1, 2)), num_experts, draw(st.integers(1, 3)))
        )
        shape = shape if num_tokens else (0,) * kind
        tokens = torch.randint(max(num_tokens, 1), shape, generator=generator(draw(seeds)))
    if kind == 3:
        experts = torch.arange(num_experts)[:, None].expand(shape) if num_tokens else torch.zeros(shape).long()
    else:
        experts = torch.randint(-1, num_experts, shape, generator=generator(draw(seeds)))
    weights = torch.rand(shape, dtype=torch.float64, generator=generator(draw(seeds))).masked_fill(experts < 0, 0.0)
    return Routing(tokens, experts, weights, num_tokens, num_experts, pool=experts.numel())


@st.composite
def sizes(draw) -> tuple[int, int, int, int]:
    """Draw T, E, K and a seed. Small numbers meet often, so that T = E, D = E or K = E come up."""
    num_experts = draw(st.integers(1, 6))
    return draw(st.integers(0, 8)), num_experts, draw(st.integers(1, num_experts)), draw(seeds)


factors = st.sampled_from([0.1, 0.5, 1.0, 1.25, 3.0])
priorities = st.sampled_from([by_position, by_choice, by_weight])


def layer_of(dispatcher=None, *, matmul=grouped, ffn=swiglu):
    return expert_layer(dispatcher=dispatcher or dropless(), experts=partial(ffn, matmul=matmul))


def kept_by_position(routing: Routing, limit: int | None) -> list[reference.Assignment]:
    """Serve the flattened list in its own order, which is not that of the tokens unless it is (T, K)."""
    tokens, experts = routing.token_indices.flatten().tolist(), routing.expert_indices.flatten().tolist()
    listed = [
        reference.Assignment(n, 0, e, w)
        for n, (e, w) in enumerate(zip(experts, routing.weights.flatten(), strict=True))
    ]
    return [a._replace(token=tokens[a.token]) for a in reference.keep(listed, limit=limit)]


def assert_rows_belong_to_their_experts(plan: DispatchPlan, routing: Routing) -> None:
    start, experts = 0, routing.expert_indices.flatten()
    for expert, size in enumerate(plan.groups.sizes.tolist()):
        members = plan.assignments[start : start + size]
        assert (experts[members[members >= 0]] == expert).all()
        start += size
    assert (plan.assignments[start:] == -1).all()


# Plans are matchings.


@few
@given(routings())
def test_dropless_plan_has_each_existing_assignment_once(routing: Routing) -> None:
    plan = dropless_plan(routing)
    experts = routing.expert_indices.flatten()
    assert plan.assignments.shape == experts.shape
    assert sorted(plan.assignments[plan.assignments >= 0].tolist()) == (experts >= 0).nonzero().flatten().tolist()
    counts = Counter(experts[experts >= 0].tolist())
    assert plan.groups.sizes.tolist() == [counts[e] for e in range(routing.num_experts)]
    assert_rows_belong_to_their_experts(plan, routing)


def assert_capacity_is_kept(routing: Routing, factor: float, priority) -> None:
    plan = padded_plan(routing, capacity_factor=factor, priority=priority)
    limit = capacity(routing, capacity_factor=factor)
    assert plan.groups.capacity == limit
    assert plan.groups.sizes.tolist() == [limit] * routing.num_experts
    assert plan.assignments.shape == (routing.num_experts * limit,)
    assert_rows_belong_to_their_experts(plan, routing)
    kept = Counter(plan.assignments[plan.assignments >= 0].tolist())
    assert set(kept.values()) <= {1}
    wanted = Counter(routing.expert_indices[routing.expert_indices >= 0].tolist())
    assert kept.total() == sum(min(count, limit) for count in wanted.values())


@few
@given(routings(), factors)
def test_padded_plan_never_exceeds_capacity_and_drops_no_more_than_it_must(routing: Routing, factor: float) -> None:
    assert_capacity_is_kept(routing, factor, by_position)


@few
@given(routings(axes=(2,)), factors, priorities)
def test_padded_plan_keeps_whom_the_priority_prefers(routing: Routing, factor: float, priority) -> None:
    assert_capacity_is_kept(routing, factor, priority)
    plan = padded_plan(routing, capacity_factor=factor, priority=priority)
    k = routing.expert_indices.shape[1]
    rows = [
        reference.Assignment(n // k, n % k, e, w)
        for n, (e, w) in enumerate(
            zip(routing.expert_indices.flatten().tolist(), routing.weights.flatten(), strict=True)
        )
    ]
    kept = reference.keep(rows, limit=plan.groups.capacity, priority=priority.__name__)
    for expert, block in enumerate(plan.assignments.view(routing.num_experts, -1).tolist()):
        assert [n for n in block if n >= 0] == [a.token * k + a.choice for a in kept if a.expert == expert]
        assert sorted(block, key=lambda n: n < 0) == block  # padding comes last


# Any list of assignments, of one, two or three axes, equals the loops.


@few
@given(routings(), st.sampled_from([0, 0.5, 1.0]), seeds)
def test_layer_equals_the_loops_for_every_shape_of_routing(routing: Routing, factor: float, seed: int) -> None:
    x = normal(routing.num_tokens, D, seed=seed).requires_grad_()
    params = init_gated(routing.num_experts, D, F, dtype=torch.float64, generator=generator(seed))
    leaves = [x, routing.weights.requires_grad_(), *(w.requires_grad_() for w in params)]
    limit = capacity(routing, capacity_factor=factor) if factor else None
    expected = reference.moe(x, kept_by_position(routing, limit), reference.swiglu, params)
    for matmul in (loop, grouped):
        y = layer_of(padded(capacity_factor=factor), matmul=matmul)(x, routing, params)
        torch.testing.assert_close(y, expected)
        assert_same_gradients(y, expected, leaves)


def assert_same_gradients(y: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    if not expected.requires_grad:
        return
    cotangent = normal(*y.shape, seed=0)
    expected_grads = torch.autograd.grad(expected, leaves, cotangent, retain_graph=True, materialize_grads=True)
    for grad, wanted in zip(
        torch.autograd.grad(y, leaves, cotangent, materialize_grads=True), expected_grads, strict=True
    ):
        torch.testing.assert_close(grad, wanted)


# Dropped, masked and permuted.


@few
@given(sizes(), st.sampled_from([0.1, 0.5, 1.0]), priorities)
def test_dropped_assignments_change_nothing(size, factor: float, priority) -> None:
    num_tokens, num_experts, k, seed = size
    routing = top_k(normal(num_tokens, num_experts, seed=seed), k=k)
    x = normal(num_tokens, D, seed=seed)
    params = init_mlp(num_experts, D, F, dtype=torch.float64, generator=generator(seed))
    dispatcher = padded(capacity_factor=factor, priority=priority)
    plan = dispatcher.plan(routing)
    kept = torch.zeros(num_tokens * k, dtype=torch.bool)
    kept[plan.assignments[plan.assignments >= 0]] = True
    kept = kept.view(num_tokens, k)
    only_kept = routing._replace(
        expert_indices=routing.expert_indices.masked_fill(~kept, -1), weights=routing.weights.masked_fill(~kept, 1e9)
    )
    y = layer_of(dispatcher, ffn=relu2)(x, routing, params)
    assert torch.equal(y, layer_of(dispatcher._replace(plan=lambda _: plan), ffn=relu2)(x, only_kept, params))
    torch.testing.assert_close(y, layer_of(ffn=relu2)(x, only_kept, params))


@few
@given(sizes(), st.integers(1, 5), st.sampled_from([0, 0.5, 1.0]), priorities)
def test_appending_masked_tokens_changes_nothing(size, extra: int, factor: float, priority) -> None:
    num_tokens, num_experts, k, seed = size
    real = normal(num_tokens, D, seed=seed)
    junk = torch.cat([real, 100 * normal(extra, D, seed=seed + 1)])
    mask = torch.arange(num_tokens + extra) < num_tokens
    gate = normal(D, num_experts, seed=seed + 2)
    params = MoEParams(gate, init_gated(num_experts, D, F, dtype=torch.float64, generator=generator(seed)))
    # Capacity follows the number of tokens that compete, which the mask must not change here.
    route = lambda logits, *, bias=None: top_k(logits, k=k)._replace(pool=num_tokens * k)  # noqa: E731
    dispatcher = padded(capacity_factor=factor, priority=priority) if factor else dropless()
    losses = {"load_balance": load_balance_loss, "z": z_loss}
    recipe = Recipe(linear_gate, route, layer_of(dispatcher), losses)
    short, long = moe_layer(real, params, recipe), moe_layer(junk, params, recipe, token_mask=mask)
    torch.testing.assert_close(long.y[:num_tokens], short.y)
    assert (long.y[num_tokens:] == 0).all()
    torch.testing.assert_close(long.losses, short.losses)
    short_stats = routing_stats(short.logits, short.routing, dispatcher.plan(short.routing))
    long_stats = routing_stats(long.logits, long.routing, dispatcher.plan(long.routing), token_mask=mask)
    torch.testing.assert_close(tuple(long_stats), tuple(short_stats))


@few
@given(sizes())
def test_masked_tokens_get_no_gradient_from_routed_experts(size) -> None:
    num_tokens, num_experts, k, seed = size
    x = normal(num_tokens, D, seed=seed).requires_grad_()
    params = init_gated(num_experts, D, F, dtype=torch.float64, generator=generator(seed))
    mask = torch.arange(num_tokens) % 2 == 0
    routing = mask_tokens(top_k(normal(num_tokens, num_experts, seed=seed), k=k), mask)
    (grad,) = torch.autograd.grad(layer_of()(x, routing, params).sum(), x)
    assert (grad[~mask] == 0).all()


@few
@given(sizes())
def test_permuting_tokens_permutes_outputs(size) -> None:
    num_tokens, num_experts, k, seed = size
    x, gate = normal(num_tokens, D, seed=seed), normal(D, num_experts, seed=seed + 1)
    params = MoEParams(gate, init_gated(num_experts, D, F, dtype=torch.float64, generator=generator(seed)))
    recipe = Recipe(linear_gate, partial(top_k, k=k), layer_of(), {"load_balance": load_balance_loss, "z": z_loss})
    order = torch.randperm(num_tokens, generator=generator(seed))
    straight, permuted = moe_layer(x, params, recipe), moe_layer(x[order], params, recipe)
    torch.testing.assert_close(permuted.y, straight.y[order])
    torch.testing.assert_close(permuted.losses, straight.losses)


@few
@given(sizes())
def test_permuting_experts_changes_nothing(size) -> None:
    num_tokens, num_experts, k, seed = size
    x, gate = normal(num_tokens, D, seed=seed), normal(D, num_experts, seed=seed + 1)
    experts = init_gated(num_experts, D, F, dtype=torch.float64, generator=generator(seed))
    recipe = Recipe(linear_gate, partial(top_k, k=k), layer_of())
    order = torch.randperm(num_experts, generator=generator(seed))
    renumbered = MoEParams(gate[:, order], GatedParams(*(w[order] for w in experts)))
    torch.testing.assert_close(moe_layer(x, renumbered, recipe).y, moe_layer(x, MoEParams(gate, experts), recipe).y)


# Cases that have a dense form.


@few
@given(st.integers(0, 8), seeds, st.sampled_from([loop, batched, grouped]))
def test_one_expert_is_the_dense_ffn(num_tokens: int, seed: int, matmul) -> None:
    x = normal(num_tokens, D, seed=seed)
    experts = init_gated(1, D, F, dtype=torch.float64, generator=generator(seed))
    layer = layer_of(padded(capacity_factor=1.0), matmul=matmul)
    recipe = Recipe(linear_gate, partial(top_k, k=1), layer)
    gate, up, down = (w[0] for w in experts)
    dense = (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down
    torch.testing.assert_close(moe_layer(x, MoEParams(normal(D, 1, seed=seed), experts), recipe).y, dense)


@few
@given(st.integers(0, 8), st.integers(1, 6), seeds)
def test_all_experts_is_the_dense_mixture(num_tokens: int, num_experts: int, seed: int) -> None:
    x, w = normal(num_tokens, D, seed=seed), normal(D, num_experts, seed=seed + 1)
    experts = init_gated(num_experts, D, F, dtype=torch.float64, generator=generator(seed))
    recipe = Recipe(linear_gate, partial(top_k, k=num_experts, score=softmax), layer_of())
    hidden = torch.nn.functional.silu(torch.einsum("td,edf->etf", x, experts.gate))
    outputs = torch.einsum("etf,efd->etd", hidden * torch.einsum("td,edf->etf", x, experts.up), experts.down)
    mixture = torch.einsum("te,etd->td", torch.softmax(x @ w, dim=-1), outputs)
    torch.testing.assert_close(moe_layer(x, MoEParams(w, experts), recipe).y, mixture)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k", "dim"), [(4, 4, 4, 4), (2, 4, 2, 4), (4, 2, 2, 2), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("factor", [0, 1.0])
def test_sizes_that_coincide(num_tokens: int, num_experts: int, k: int, dim: int, factor: float) -> None:
    """A transposed axis hides in a square tensor of other tests; here every tensor may be square."""
    x, gate = normal(num_tokens, dim, seed=1), normal(dim, num_experts, seed=2)
    params = init_mlp(num_experts, dim, dim, dtype=torch.float64, generator=generator(3))
    assignments = reference.route(x @ gate, lambda z, t: reference.best(z, k), reference.weights_at)
    limit = reference.capacity(num_tokens, k, num_experts, factor) if factor else None
    expected = reference.moe(x, reference.keep(assignments, limit=limit), reference.relu2, params)
    recipe = Recipe(linear_gate, partial(top_k, k=k), layer_of(padded(capacity_factor=factor), ffn=relu2))
    torch.testing.assert_close(moe_layer(x, MoEParams(gate, params), recipe).y, expected)


def test_the_same_expert_twice_counts_twice() -> None:
    x, params = normal(3, D, seed=0), init_mlp(2, D, F, dtype=torch.float64, generator=generator(0))
    twice = token_choice(torch.tensor([[1, 1]] * 3), torch.full((3, 2), 0.5, dtype=torch.float64), torch.zeros(3, 2))
    once = token_choice(torch.tensor([[1]] * 3), torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 2))
    layer = layer_of(ffn=relu2)
    torch.testing.assert_close(layer(x, twice, params), layer(x, once, params))
