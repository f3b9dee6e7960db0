"""Rows, bytes and times of the strategies: against simulated routings, and against sums done by hand."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from moekit.parallel import costs, replicated, spread_experts
from moekit.parallel.exchange_plans import plan_exchange
from moekit.parallel.link_times import Link, Machine, h100_machine, not_hidden, seconds
from moekit.parallel.payloads import Peers, Sent, Shape, gathered, peers, ring, there_and_back, total
from moekit.routing import top_k

SHAPE = Shape(tokens=100, width=8, hidden=16, experts=16, top_k=4, element_bytes=2)
ROW = 8 * 2


def of(sent, name):
    return [entry for entry in sent if entry.name == name]


@pytest.mark.parametrize(
    ("top_k", "experts", "blocks"), [(1, 4, 2), (2, 4, 2), (2, 6, 3), (3, 8, 4), (4, 8, 2), (8, 8, 4)]
)
def test_distinct_blocks_is_the_mean_over_all_choices(top_k, experts, blocks):
    choices = list(itertools.combinations(range(experts), top_k))
    found = Fraction(sum(len({e * blocks // experts for e in chosen}) for chosen in choices), len(choices))
    assert costs.distinct_blocks(top_k, experts, blocks) == pytest.approx(float(found), abs=1e-12)


def test_many_experts_are_as_independent_draws():
    draws = list(itertools.product(range(4), repeat=3))
    independent = 4 * (1 - (1 - 1 / 4) ** 3)
    assert independent == pytest.approx(sum(len(set(d)) for d in draws) / len(draws))
    assert costs.distinct_blocks(3, 40_000, 4) == pytest.approx(independent, rel=1e-3)
    assert costs.distinct_blocks(3, 8, 4) > independent  # distinct experts collide less


def test_the_plan_of_all_to_all_sends_as_many_rows():
    logits = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    rows = plan_exchange(top_k(logits, k=8), 8).sizes.sum().item()
    assert rows / 4000 == pytest.approx(costs.distinct_blocks(8, 64, 8), rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((2, 8, 3), r"8 experts are not 3 equal blocks; expected a divisor of 8"),
        ((9, 8, 2), r"top_k is 9; expected 1 to 8"),
        ((0, 8, 2), r"top_k is 0; expected 1 to 8"),
    ],
)
def test_distinct_blocks_says_what_is_wrong(arguments, words):
    with pytest.raises(ValueError, match=words):
        costs.distinct_blocks(*arguments)


@pytest.mark.parametrize(
    ("size", "stride", "near"), [(8, 1, 8), (16, 1, 8), (4, 1, 4), (4, 2, 4), (8, 2, 4), (4, 8, 1), (2, 64, 1)]
)
def test_peers_of_a_node(size, stride, near):
    members = range(0, size * stride, stride)
    assert sum(rank < 8 for rank in members) == near
    assert peers(size, stride, ranks_per_node=8) == Peers(size, near)


def test_all_to_all_by_hand():
    layout = spread_experts(16, 16, 16)  # one expert on each rank: K distinct ranks
    sent = costs.all_to_all(SHAPE, layout, ranks_per_node=8)
    rows = 100 * 4
    assert total(of(sent, "tokens"))[2:5] == pytest.approx((rows * ROW / 16, rows * ROW * 7 / 16, rows * ROW * 8 / 16))
    sizes = {entry.name: entry.own + entry.others for entry in sent}
    assert sizes == pytest.approx(
        {
            "counts": 16 * 4 * 8,
            "tokens": rows * ROW,
            "weights": rows * 4 * 4,
            "numbers": rows * 4 * 8,
            "outputs": rows * ROW,
            "output gradients": rows * ROW,
            "token gradients": rows * ROW,
            "weight gradients": rows * 4 * 4,
        }
    )
    assert [entry.backward for entry in sent] == [False] * 5 + [True] * 3
    assert all((entry.node_messages, entry.network_messages) == (7, 8) for entry in sent)


def test_positions_travel_with_the_numbers():
    layout = spread_experts(4, 16, 16)
    plain, placed = (costs.all_to_all(SHAPE, layout, ranks_per_node=8, positions=p) for p in (False, True))
    assert total(of(placed, "numbers")).node == 2 * total(of(plain, "numbers")).node
    assert len(plain) == len(placed)


@pytest.mark.parametrize(("factor", "rows"), [(1.0, 100), (0.5, 50), (0.1, 10), (1e-9, 1), (9.0, 100)])
def test_static_sends_its_capacity_and_no_counts(factor, rows):
    sent = costs.static_all_to_all(SHAPE, spread_experts(4, 16, 16), ranks_per_node=8, capacity_factor=factor)
    assert total(of(sent, "tokens")).own == rows * ROW
    assert not of(sent, "counts")


def test_hierarchical_sends_a_row_per_node_over_the_network():
    layout = spread_experts(16, 16, 16, ranks_per_node=8)
    sent = costs.hierarchical(SHAPE, layout, ranks_per_node=8)
    across, inside = of(sent, "tokens")
    assert across.own + across.network == pytest.approx(100 * costs.distinct_blocks(4, 16, 2) * ROW)
    assert (across.node, inside.network) == (0, 0)
    assert inside.own + inside.node == pytest.approx(100 * 4 * ROW)
    flat = costs.all_to_all(SHAPE, spread_experts(16, 16, 16), ranks_per_node=8)
    assert total(sent).network < 0.6 * total(flat).network


def test_gathers_by_hand():
    sent = costs.all_gather(SHAPE, spread_experts(4, 16, 16), ranks_per_node=8)
    assert total(of(sent, "tokens"))[2:] == (100 * ROW, 3 * 100 * ROW, 0, 3, 0)
    assert total(of(sent, "numbers")).node == 3 * 100 * 4 * 8
    by_hidden = spread_experts(4, 16, 16, expert_ranks=1, hidden_ranks=4)
    sliced = costs.tensor_parallel(SHAPE, by_hidden, ranks_per_node=8)
    assert [total(of(each, "counts")).own for each in (sent, sliced)] == [8 * (4 + 4), 8 * (4 + 1)]
    assert sliced[1:] == sent[1:]


def test_a_ring_over_nodes_shares_the_network():
    across = ring("tokens", False, Peers(32, 8), 10.0)
    assert across.others == pytest.approx(10.0 * 31)
    assert across.network == pytest.approx(across.others / 8)  # one hop of eight leaves the node
    assert (across.node_messages, across.network_messages) == (28, 3)
    assert ring("tokens", False, Peers(4, 1), 10.0)[2:] == (10.0, 0.0, 30.0, 0, 3)


def test_experts_by_hidden_gathers_what_arrived():
    layout = spread_experts(8, 4, 16)
    shape = SHAPE._replace(experts=4, top_k=2)
    sent = costs.experts_by_hidden(shape, layout, ranks_per_node=8)
    rows = 100 * costs.distinct_blocks(2, 4, 4)
    assert [entry.own + entry.others for entry in of(sent, "tokens")] == pytest.approx([rows * ROW, 2 * rows * ROW])


def test_parameters_travel_between_replicas_alone():
    layout = spread_experts(8, 16, 16, expert_ranks=4)
    one, two, three = costs.parameters(SHAPE, layout, ranks_per_node=8)
    block = 3 * 16 * 8 * 16 * 2 / 4
    assert one.node == block / 2  # of two replicas each has half, and sends it to the other
    assert one.node == two.node == three.node
    assert [one.backward, two.backward, three.backward] == [False, True, True]
    assert costs.parameters(SHAPE, spread_experts(8, 16, 16), ranks_per_node=8) == []
    far = costs.parameters(SHAPE, layout, ranks_per_node=4)
    assert (far[0].node, far[0].network) == (0, block / 2)


def test_nothing_travels_in_a_group_of_one():
    assert (
        there_and_back(SHAPE, Peers(1, 1), 10.0, positions=False)
        == gathered(SHAPE, Peers(1, 1), 10.0, existing=1)
        == []
    )
    assert costs.parameters(SHAPE, replicated(1, 16), ranks_per_node=8) == []
    assert total([])[2:] == (0, 0, 0, 0, 0)


def test_time_is_start_and_messages_and_the_slower_link():
    machine = Machine(Link(100.0, 1.0), Link(10.0, 5.0), start=2.0, ranks_per_node=8)
    assert seconds([Sent("a", False, 999, 200, 10, 3, 2)], machine) == 2 + 3 * 1 + 2 * 5 + 2.0
    assert seconds([Sent("a", False, 999, 200, 50, 3, 2)] * 2, machine) == 2 * (2 + 3 * 1 + 2 * 5 + 5.0)
    assert seconds([], machine) == 0


def test_published_links():
    machine = h100_machine()
    assert 2 * machine.node.bandwidth == 900e9  # both directions of the datasheet
    assert machine.network.bandwidth * 8 == 400e9  # bits
    assert machine.ranks_per_node == 8


@pytest.mark.parametrize(("exchange", "compute"), [(3.0, 4.0), (4.0, 3.0), (2.0, 0.0)])
def test_more_chunks_hide_more(exchange, compute):
    left = [not_hidden(exchange, compute, num_chunks=n) for n in (1, 2, 4, 10**9)]
    assert left[0] == exchange
    assert left == sorted(left, reverse=True)
    assert math.isclose(left[-1], max(exchange - compute, 0), abs_tol=1e-6)


def test_operations_of_the_experts():
    assert SHAPE.flops == 3 * (2 * 3 * 100 * 4 * 8 * 16)
    assert SHAPE.expert_bytes == 16 * 3 * 8 * 16 * 2
