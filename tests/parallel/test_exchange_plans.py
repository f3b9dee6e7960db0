from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moekit.experts import init_gated
from moekit.parallel import all_to_all, exchange, static_all_to_all
from moekit.parallel.all_to_all import static_limits
from moekit.parallel.arrivals import taken
from moekit.parallel.exchange_plans import (
    assignments_by_rank,
    exchange_links,
    limit_exchange,
    plan_exchange,
    tokens_of_rows,
)
from moekit.recipes import mixtral
from moekit.routing import expert_choice, top_k
from moekit.rows import copy_rows, sum_rows
from moekit.types import Routing

SHAPES = [
    (7, 3, 8, 4),
    (5, 1, 4, 2),
    (9, 4, 6, 3),
    (6, 4, 4, 1),
    (3, 2, 8, 8),
    (0, 2, 4, 2),
    (4, 0, 4, 2),
    (1, 2, 2, 2),
]
shapes = pytest.mark.parametrize(("num_tokens", "k", "num_experts", "ranks"), SHAPES)


def choices(num_tokens: int, k: int, num_experts: int, *, missing: float = 0.3) -> Routing:
    """Draw a token-choice routing, some of whose assignments do not exist."""
    scores = torch.rand(num_tokens, num_experts)
    experts = scores.argsort(-1)[:, :k].masked_fill(torch.rand(num_tokens, k) < missing, -1)
    tokens = torch.arange(num_tokens).unsqueeze(1).expand(-1, k)
    return Routing(tokens, experts, torch.rand(num_tokens, k), num_tokens, num_experts, pool=num_tokens * k)


def listed(num_tokens: int, k: int, num_experts: int) -> Routing:
    """Draw a list in any order, where a token may occur at an expert's rank many times."""
    routing = choices(num_tokens, k, num_experts)
    order = torch.randperm(num_tokens * k)
    columns = (each.flatten()[order] for each in routing[:3])
    return Routing(*columns, num_tokens, num_experts, pool=num_tokens * k)


def wanted(routing: Routing, ranks: int) -> list[list[int]]:
    """List the tokens that each rank needs, in order, without repetition."""
    per_rank = routing.num_experts // ranks
    pairs = list(zip(routing.token_indices.flatten().tolist(), routing.expert_indices.flatten().tolist(), strict=True))
    return [sorted({t for t, e in pairs if e >= 0 and e // per_rank == rank}) for rank in range(ranks)]


@shapes
@pytest.mark.parametrize("draw", [choices, listed])
def test_a_token_travels_once_to_each_rank_that_it_needs(draw, num_tokens, k, num_experts, ranks):
    routing = draw(num_tokens, k, num_experts)
    plan, needed = plan_exchange(routing, ranks), wanted(routing, ranks)
    assert plan.sizes.tolist() == [len(tokens) for tokens in needed]
    carried = [token for tokens in needed for token in tokens]
    assert tokens_of_rows(plan, routing, len(carried)).tolist() == carried
    per_rank = num_experts // ranks
    starts = [sum(plan.sizes.tolist()[:rank]) for rank in range(ranks)]
    seen: set[int] = set()
    columns = (routing.token_indices, routing.expert_indices, plan.owners, plan.rows, plan.firsts)
    for token, expert, owner, row, first in zip(*(each.flatten().tolist() for each in columns), strict=True):
        if expert < 0:
            assert (owner, row, first) == (-1, -1, False)
            continue
        assert owner == expert // per_rank
        assert row == starts[owner] + needed[owner].index(token)
        assert first == (row not in seen)
        seen.add(row)
    owners = plan.owners.tolist()
    assert plan.counts.tolist() == [owners.count(rank) for rank in range(ranks)]


@shapes
def test_links_copy_what_travels_and_add_up_what_comes_back(num_tokens, k, num_experts, ranks):
    routing = choices(num_tokens, k, num_experts)
    plan, needed = plan_exchange(routing, ranks), wanted(routing, ranks)
    links = exchange_links(plan, routing, int(plan.sizes.sum()))
    x = torch.randn(num_tokens, 2)
    rows = copy_rows(x, links)
    carried = [token for tokens in needed for token in tokens]
    assert torch.equal(rows, x[carried])
    times = torch.tensor([sum(token in tokens for tokens in needed) for token in range(num_tokens)], dtype=x.dtype)
    torch.testing.assert_close(sum_rows(rows, links), x * times.unsqueeze(1))
    assert not links.padding.any()


@shapes
@pytest.mark.parametrize("draw", [choices, listed])
@pytest.mark.parametrize(("rows", "assignments"), [(1, 1), (2, 3), (3, 2), (50, 50)])
def test_limits_keep_what_comes_first(draw, num_tokens, k, num_experts, ranks, rows, assignments):
    routing = draw(num_tokens, k, num_experts)
    plan = plan_exchange(routing, ranks)
    limited = limit_exchange(plan, rows=rows, assignments=assignments)
    assert limited.sizes.tolist() == [rows] * ranks
    assert limited.counts.tolist() == [assignments] * ranks
    needed = [tokens[:rows] for tokens in wanted(routing, ranks)]
    taken, kept = [0] * ranks, []
    for token, owner in zip(routing.token_indices.flatten().tolist(), plan.owners.tolist(), strict=True):
        stays = owner >= 0 and token in needed[owner] and taken[owner] < assignments
        kept.append(owner * rows + needed[owner].index(token) if stays else -1)
        taken[owner] += stays
    assert limited.rows.tolist() == kept
    carried = dict(zip(kept, routing.token_indices.flatten().tolist(), strict=True))
    expected = [carried.get(row, -1) for row in range(ranks * rows)]
    assert tokens_of_rows(limited, routing, ranks * rows).tolist() == expected
    assert limited.owners.tolist() == [-1 if row < 0 else row // rows for row in kept]


@shapes
def test_choices_within_the_limits_travel_as_without(num_tokens, k, num_experts, ranks):
    """With room for all, only padding is new."""
    routing = choices(num_tokens, k, num_experts)
    plan, room = plan_exchange(routing, ranks), num_tokens * max(k, 1)
    limited = limit_exchange(plan, rows=num_tokens, assignments=room)
    assert torch.equal(limited.firsts, plan.firsts)
    assert torch.equal(limited.owners, plan.owners)
    carried = tokens_of_rows(limited, routing, ranks * num_tokens).tolist()
    for rank, tokens in enumerate(wanted(routing, ranks)):
        block = carried[rank * num_tokens : (rank + 1) * num_tokens]
        assert block == tokens + [-1] * (num_tokens - len(tokens))
    links = exchange_links(limited, routing, ranks * num_tokens)
    assert links.padding.tolist() == [token < 0 for token in carried]
    assert (links.tokens >= 0).all()


@shapes
@pytest.mark.parametrize("limit", [None, 1, 2, 40])
def test_assignments_are_ordered_by_rank(num_tokens, k, num_experts, ranks, limit):
    routing = listed(num_tokens, k, num_experts)
    plan = plan_exchange(routing, ranks)
    if limit is not None:
        plan = limit_exchange(plan, rows=num_tokens, assignments=limit)
    order, owners = assignments_by_rank(plan, int(plan.counts.sum())).tolist(), plan.owners.tolist()
    expected = []
    for rank, count in enumerate(plan.counts.tolist()):
        mine = [number for number, owner in enumerate(owners) if owner == rank]
        expected += mine + [-1] * (count - len(mine))
    assert order == expected


@pytest.mark.parametrize(("experts", "ranks"), [(8, 3), (4, 8)])
def test_experts_that_ranks_cannot_share_evenly_are_refused(experts, ranks):
    message = (
        f"{experts} experts cannot be spread over {ranks} ranks in equal blocks; expected a number of ranks that "
        "divides the number of experts. Use a smaller group, or experts on several ranks each"
    )
    with pytest.raises(ValueError, match=message):
        plan_exchange(choices(3, 1, experts), ranks)


class _Two:
    """A group of two ranks, of which nothing is asked but its size."""

    def size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("shape", "num_tokens", "ranks", "factor", "limits"),
    [
        ((4, 2), 4, 2, 0.75, (3, 8)),  # choices of a token: all travel on its row
        ((4, 2), 4, 8, 0.5, (1, 8)),  # one row at least
        ((4, 2), 4, 2, 4.0, (4, 8)),  # no more rows than tokens
        ((8,), 4, 4, 1.0, (2, 2)),
        ((8,), 4, 8, 0.5, (1, 1)),
        ((8,), 4, 2, 4.0, (4, 8)),  # no more assignments than there are
        ((1, 4, 2), 4, 4, 1.0, (2, 2)),
        ((10,), 20, 1, 1.1, (11, 10)),  # the factor as it is written
        ((0, 2), 0, 2, 1.0, (0, 0)),
        ((0,), 3, 2, 1.0, (1, 0)),
    ],
)
def test_a_static_exchange_has_room_for_its_factor_of_a_balanced_load(shape, num_tokens, ranks, factor, limits):
    numbers = torch.zeros(shape, dtype=torch.int64)
    routing = Routing(numbers, numbers, torch.ones(shape), num_tokens, num_experts=8, pool=numbers.numel())
    assert static_limits(routing, ranks, capacity_factor=factor) == limits


@pytest.mark.parametrize("spread", [all_to_all, partial(static_all_to_all, capacity_factor=2.0)])
def test_a_rank_with_all_experts_is_told_of_its_part(spread):
    layer, routing = spread(len, group=_Two()), choices(3, 1, 8)
    with pytest.raises(
        ValueError, match=r"parameters of all 8 experts; expected 8 / 2 = 4.*part=Part\(block=.*, blocks=2"
    ):
        layer(torch.ones(3, 4), routing, init_gated(8, 4, 8))
    with pytest.raises(ValueError, match=r"all_to_all: group = None; expected a ProcessGroup, such as"):
        spread(len, group=None)


def test_rows_that_are_missing_read_different_rows() -> None:
    """Those that all read row 0 would be added to it one after the other in the backward (contract 3 of the design)."""
    x = torch.randn(5, 2, requires_grad=True)
    found = taken(x, torch.tensor([3, -1, -1, -1, -1, -1, -1, 0, -1, -1]))
    assert torch.equal(found[[0, 7]], x[[3, 0]])
    assert (found[[1, 2, 3, 4, 5, 6, 8, 9]] == 0).all()
    reads = found.grad_fn.next_functions[0][0]  # behind the mask
    assert reads._saved_index.bincount(minlength=5).max() <= 3


@pytest.mark.parametrize("spread", [all_to_all, partial(static_all_to_all, capacity_factor=1.0)])
@pytest.mark.parametrize("route", [partial(top_k, k=2), partial(expert_choice, capacity_factor=1.0)])
def test_tokens_and_sums_go_by_the_functions_that_are_given(group: ProcessGroup, spread, route) -> None:
    went = []

    def by(factor: float):
        def send(rows: Tensor, **way) -> Tensor:
            went.append((factor, sorted(way), rows.shape[1]))
            return factor * exchange(rows, **way)

        return send

    x, params = torch.randn(6, 4, dtype=torch.float64), init_gated(2, 4, 8, dtype=torch.float64)
    routing, layer = route(torch.randn(6, 2)), mixtral().layer
    expected = 5 * spread(layer, group=group)(3 * x, routing, params)
    found = spread(layer, group=group, send=by(3.0), send_back=by(5.0))(x, routing, params)
    torch.testing.assert_close(found, expected)
    assert went == [(3.0, ["group", "received", "room", "sent"], 4), (5.0, ["group", "received", "sent"], 4)]
