import itertools
import math

import pytest

from moekit.parallel import Layout, Part, part_of, replicated, spread_experts

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 64)
EXPERTS = (1, 2, 3, 4, 6, 8, 64)
pairs = pytest.mark.parametrize(("ranks", "experts"), list(itertools.product(SIZES, EXPERTS)))


@pairs
def test_every_hidden_unit_of_every_expert_is_owned_once_per_replica(ranks, experts):
    layout, hidden = spread_experts(ranks, experts, 96), 96
    assert layout.world_size == ranks
    owners = [[0] * hidden for _ in range(experts)]
    for rank in range(ranks):
        part = part_of(layout, rank)
        width = hidden // part.slices
        for expert in part.experts(experts):
            for unit in range(part.hidden * width, (part.hidden + 1) * width):
                owners[expert][unit] += 1
    assert {count for row in owners for count in row} == {layout.replicas}


@pytest.mark.parametrize(
    ("ranks", "experts", "hidden", "grid"),
    [
        (8, 8, 1952, (1, 1, 1, 8)),  # one expert a rank
        (4, 8, 1952, (1, 1, 1, 4)),  # two experts a rank
        (16, 8, 1952, (1, 2, 1, 8)),  # OpenLM: more ranks than experts, hidden cut W / E ways
        (64, 8, 1952, (1, 8, 1, 8)),
        (48, 8, 1952, (3, 2, 1, 8)),  # six ranks an expert, of which 1952 can be cut for two
        (8, 4, 7, (2, 1, 1, 4)),  # nothing to cut: replicas
        (6, 4, 1952, (3, 1, 1, 2)),  # neither divides the other: two blocks of two, and no cut
        (12, 8, 96, (3, 1, 1, 4)),  # likewise, although the hidden units could be cut for three
        (5, 8, 1952, (5, 1, 1, 1)),
        (1, 8, 1952, (1, 1, 1, 1)),
    ],
)
def test_the_rule_of_openlm(ranks, experts, hidden, grid):
    assert spread_experts(ranks, experts, hidden) == Layout(experts, *grid)


@pairs
def test_blocks_are_as_many_as_the_smaller_number_where_it_divides_the_other(ranks, experts):
    blocks = spread_experts(ranks, experts, 96).expert_ranks
    if max(ranks, experts) % min(ranks, experts) == 0:
        assert blocks == min(ranks, experts)
    assert blocks == math.gcd(ranks, experts)


def test_ranks_are_arranged_as_in_megablocks():
    """Block r mod X, slice r div X; replicas come after all slices."""
    layout = Layout(4, replicas=2, hidden=3, experts=2)
    parts = [part_of(layout, rank) for rank in range(12)]
    assert parts[:6] == [Part(block, 2, hidden, 3) for hidden in range(3) for block in range(2)]
    assert parts[6:] == parts[:6]


def test_nodes_do_not_change_who_owns_what():
    flat, nested = Layout(8, hidden=2, experts=4), Layout(8, hidden=2, nodes=2, experts=2)
    assert [part_of(flat, rank) for rank in range(8)] == [part_of(nested, rank) for rank in range(8)]


@pytest.mark.parametrize(
    ("chosen", "grid"),
    [
        ({"expert_ranks": 2}, (8, 1, 1, 2)),  # chosen: no hidden cut unless asked for
        ({"expert_ranks": 8}, (2, 1, 1, 8)),
        ({"expert_ranks": 2, "hidden_ranks": 4}, (2, 4, 1, 2)),
        ({"hidden_ranks": 1}, (2, 1, 1, 8)),
        ({"expert_ranks": 1}, (16, 1, 1, 1)),
        ({"expert_ranks": 1, "hidden_ranks": 16}, (1, 16, 1, 1)),
        ({"ranks_per_node": 4}, (1, 2, 2, 4)),
        ({"ranks_per_node": 8}, (1, 2, 1, 8)),  # the blocks lie within a node
        ({"ranks_per_node": 16}, (1, 2, 1, 8)),
        ({"ranks_per_node": 1}, (1, 2, 8, 1)),
    ],
)
def test_degrees_can_be_chosen(chosen, grid):
    assert spread_experts(16, 8, 1952, **chosen) == Layout(8, *grid)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"expert_ranks": 3},
            r"expert_ranks \(--moe-expert-ranks\) is 3, which does not divide 8, the experts; "
            "expected one of 1, 2, 4, 8$",
        ),
        ({"expert_ranks": 0}, r"expert_ranks \(--moe-expert-ranks\) is 0, which does not divide 8, the experts"),
        ({"expert_ranks": -2}, r"expert_ranks \(--moe-expert-ranks\) is -2, which does not divide 8, the experts"),
        (
            {"hidden_ranks": 3},
            r"hidden_ranks \(--moe-hidden-ranks\) is 3, which does not divide 1952, the hidden units of an expert",
        ),
        ({"hidden_ranks": 3}, r"expected one of 1, 2, 4, 8, 16, 32, 61, 122 \.\.\.$"),
        (
            {"expert_ranks": 8, "hidden_ranks": 4},
            r"hidden_ranks \(--moe-hidden-ranks\) is 4, which does not divide 2, "
            r"the ranks per expert block \(16 / 8\); expected one of 1, 2$",
        ),
        ({"ranks_per_node": 3}, "ranks_per_node is 3, which does not divide 8, the ranks that share the experts"),
    ],
)
def test_degrees_that_do_not_divide_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        spread_experts(16, 8, 1952, **chosen)


def test_more_blocks_than_ranks_are_refused():
    message = r"expert_ranks \(--moe-expert-ranks\) is 8, which does not divide 4, the ranks; expected one of 1, 2, 4$"
    with pytest.raises(ValueError, match=message):
        spread_experts(4, 8, 1952, expert_ranks=8)


@pytest.mark.parametrize(
    ("layout", "travels"),
    [
        (replicated(8, 4), False),
        (Layout(4, experts=2), True),
        (Layout(4, nodes=2), True),
        (Layout(4, hidden=2), True),
        (Layout(4), False),
    ],
)
def test_tokens_travel_where_experts_are_spread(layout, travels):
    assert layout.exchanges is travels


def test_replicas_own_everything():
    layout = replicated(6, 8)
    assert layout == Layout(8, replicas=6)
    assert {part_of(layout, rank) for rank in range(6)} == {Part()}
    assert Part().experts(8) == range(8)
    assert Part(2, 4).experts(8) == range(4, 6)
