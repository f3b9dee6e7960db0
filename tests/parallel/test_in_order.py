import pytest
import torch

from moekit.parallel import in_order, with_positions
from moekit.routing import round_robin
from moekit.types import Routing


def dealt(num_tokens: int, ranks: int, block: int) -> list[list[int]]:
    """Deal the tokens of one process to ranks, block by block."""
    mine: list[list[int]] = [[] for _ in range(ranks)]
    for token in range(num_tokens * ranks):
        mine[token // block % ranks].append(token)
    return mine


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("num_tokens", "block"), [(6, 1), (6, 2), (6, 6), (0, 2), (4, 2)])
@pytest.mark.parametrize("k", [1, 3])
def test_places_are_those_of_one_process_that_deals_blocks(ranks, num_tokens, block, k):
    for rank, tokens in enumerate(dealt(num_tokens, ranks, block)):
        routing = round_robin(torch.zeros(num_tokens, 4), k=k)
        places = with_positions(routing, rank=rank, num_ranks=ranks, block=block).positions
        assert places.tolist() == [[token * k + choice for choice in range(k)] for token in tokens]


def test_without_blocks_a_rank_comes_after_all_of_the_one_before():
    routing = round_robin(torch.zeros(5, 4), k=2)
    places = [with_positions(routing, rank=rank, num_ranks=3).positions.flatten() for rank in range(3)]
    together = torch.cat(places)
    assert torch.equal(together.argsort(), torch.arange(30))
    assert together.unique().numel() == 30


def test_a_list_has_as_many_assignments_in_every_block():
    """Expert choice by pools: eight assignments of four tokens, two blocks, so four each."""
    numbers = torch.arange(8)
    routing = Routing(numbers // 2, numbers % 2, torch.ones(8), num_tokens=4, num_experts=2, pool=8)
    places = with_positions(routing, rank=1, num_ranks=2, block=2).positions
    assert places.tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


@pytest.mark.parametrize("block", [None, 2])
def test_the_layer_gets_positions_and_all_else_as_it_was(block):
    seen = []

    def layer(x, routing, params):
        seen.append((x, routing, params))
        return x + 1

    x, routing, params = torch.ones(4, 2), round_robin(torch.zeros(4, 2), k=1), object()
    y = in_order(layer, rank=1, num_ranks=2, block=block)(x, routing, params)
    [(tokens, given, handed_on)] = seen
    assert tokens is x
    assert handed_on is params
    assert (y == 2).all()
    assert given.positions.shape == routing.expert_indices.shape
    assert torch.equal(given.positions, with_positions(routing, rank=1, num_ranks=2, block=block).positions)
    assert all(a is b for a, b in zip(given._replace(positions=None), routing, strict=True))
    assert routing.positions is None


@pytest.mark.parametrize(("num_tokens", "assignments", "block"), [(5, 5, 2), (4, 7, 2), (3, 3, 4)])
def test_a_part_of_a_block_is_refused(num_tokens, assignments, block):
    numbers = torch.zeros(assignments, dtype=torch.int64)
    routing = Routing(numbers, numbers, torch.ones(assignments), num_tokens, num_experts=2, pool=assignments)
    message = (
        f"in_order: {num_tokens} tokens with {assignments} assignments are no whole number of blocks of {block} "
        "tokens; expected a multiple"
    )
    with pytest.raises(ValueError, match=message):
        with_positions(routing, rank=0, num_ranks=2, block=block)
