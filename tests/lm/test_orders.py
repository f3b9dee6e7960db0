import itertools
import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.lm.orders import Address, DataExhausted, Order, _sequences_needed, block_permutation, check_budget

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=13).filter(any)
LANES = st.integers(1, 16)


def draw(order, number, batch_size=8):
    """Take so many sequences, in whole steps and a smaller one."""
    whole, rest = divmod(number, batch_size)
    return [address for size in [batch_size] * whole + [rest] for address in order.step(size)]


@settings(max_examples=60)
@given(counts=SHARDS, lanes=LANES, batch_size=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_every_pass_has_every_sequence_once_before_the_next_begins(counts, lanes, batch_size, seed):
    order, total = Order([counts], seed=seed, lanes=lanes), sum(counts)
    everything = {(shard, position) for shard, count in enumerate(counts) for position in range(count)}
    for data_pass in range(3):
        assert order.passes == (data_pass,)
        addresses = draw(order, total, batch_size)
        assert {address.data_pass for address in addresses} == {data_pass}
        assert {(address.shard, address.position) for address in addresses} == everything
    assert order.passes == (3,)
    assert order.taken == (3 * total,)


@settings(max_examples=60)
@given(counts=SHARDS, lanes=LANES, batch_size=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_lane_serves_its_slots_until_no_shard_is_left_and_then_the_fullest_helps(counts, lanes, batch_size, seed):
    unclaimed, left, read = sum(map(bool, counts)), [0] * lanes, {}
    for index, address in enumerate(draw(Order([counts], seed=seed, lanes=lanes), sum(counts), batch_size)):
        slot_lane = index % lanes
        if not left[slot_lane] and unclaimed:
            unclaimed -= 1
            left[slot_lane] = counts[address.shard]
            read[slot_lane] = (address.shard, -1)
        expected = slot_lane if left[slot_lane] else left.index(max(left))
        shard, position = read[expected]
        assert (address.lane, address.shard, address.position) == (expected, shard, position + 1)
        read[expected], left[expected] = (shard, position + 1), left[expected] - 1


@settings(max_examples=40)
@given(
    counts=st.lists(SHARDS, min_size=1, max_size=4),
    lanes=LANES,
    done=st.integers(0, 150),
    again=st.integers(0, 60),
    data=st.data(),
)
def test_a_saved_position_continues_exactly_twice(counts, lanes, done, again, data):
    weights = data.draw(st.lists(st.floats(0.1, 9), min_size=len(counts), max_size=len(counts)))

    def fresh():
        return Order(counts, weights, seed=5, lanes=lanes)

    unbroken = fresh()
    draw(unbroken, done)
    saved = json.dumps(unbroken.state_dict())
    later = draw(unbroken, again)
    saved_again = json.dumps(unbroken.state_dict())
    rest = draw(unbroken, 100)

    resumed = fresh()
    resumed.load_state_dict(json.loads(saved))
    assert json.dumps(resumed.state_dict()) == saved
    assert draw(resumed, again) == later
    draw(resumed, 7)  # one that had moved on
    resumed.load_state_dict(json.loads(saved_again))
    assert draw(resumed, 100) == rest
    assert (resumed.passes, resumed.taken) == (unbroken.passes, unbroken.taken)


@pytest.mark.parametrize(
    "change",
    [
        {"pass": -1},
        {"pass": True},
        {"claimed": 3},  # of two shards
        {"claimed": -1},
        {"lanes": None},
        {"lanes": [[0, 2]]},
        {"lanes": [[0, 2], [1]]},
        {"lanes": [[0, 2], [1, 1.0]]},
        {"lanes": [[0, 4], [1, 1]]},  # of three sequences
        {"lanes": [[0, 2], [1, -1]]},
        {"lanes": [[0, 2], [2, 1]]},
        {"lanes": [[0, 2], [-1, 1]]},
        {"lanes": [[0, 2], [-2, 0]]},
    ],
)
def test_a_position_that_is_none_is_refused(change):
    order = Order([[3, 2]], seed=0, lanes=2)
    position = {"pass": 0, "claimed": 2, "lanes": [[0, 2], [1, 1]]} | change
    with pytest.raises(ValueError, match="the saved position of source 0 is damaged: "):
        order.load_state_dict({"taken": [2], "sources": [position]})


@pytest.mark.parametrize("change", [{"taken": [1]}, {"taken": [2, 0]}, {"taken": 2}, {"sources": []}])
def test_a_position_whose_parts_do_not_fit_is_refused(change):
    order = Order([[3, 2]], seed=0, lanes=2)
    state = {"taken": [2], "sources": [{"pass": 0, "claimed": 2, "lanes": [[0, 2], [1, 1]]}]}
    order.load_state_dict(state)
    assert order.state_dict() == state
    with pytest.raises(ValueError, match="the saved position is damaged: "):
        order.load_state_dict(state | change)


def test_the_position_is_small_whatever_the_data():
    order = Order([[2048] * 10_000, [2048] * 10_000], seed=0)
    draw(order, 1000)
    assert len(json.dumps(order.state_dict())) < 500


@pytest.mark.parametrize("weights", [(0.725, 0.275), (725, 275), (0.05, 0.95), (0.5, 0.5)])
@pytest.mark.parametrize("counts", [[[50] * 4, [50] * 4], [[2000], [1, 0, 2]], [[3], [40] * 13]])
def test_shares_hold_to_one_sequence_at_every_length(weights, counts):
    order, share = Order(counts, weights, seed=0), weights[1] / sum(weights)
    second = 0
    for n, address in enumerate(draw(order, 2000, 1), start=1):
        second += address.source
        assert abs(second - n * share) <= 0.5 + 1e-9
    assert order.taken == (2000 - second, second)
    assert abs(second / 2000 - share) < 0.01


@given(st.tuples(*[st.floats(0.01, 1)] * 3))
def test_shares_of_three_sources_hold_to_one_sequence_at_every_length(weights):
    order, taken = Order([[7], [5, 4], [9]], weights, seed=0), [0, 0, 0]
    for n, address in enumerate(draw(order, 120, 1), start=1):
        taken[address.source] += 1
        for number, weight in zip(taken, weights, strict=True):
            assert abs(number - n * weight / sum(weights)) <= 1 + 1e-9


def test_the_order_of_sources_stays_what_saved_positions_were_made_under():
    """Another order would be silent: a run that goes on would read other sequences than it left."""
    orders = Order([[9], [9]], [0.1, 0.9], seed=0), Order([[9], [9], [9]], [0.5, 0.3, 0.2], seed=0)
    found = ["".join(str(address.source) for address in draw(order, 20, 1)) for order in orders]
    assert found == ["11110111111111011111", "01200102100120010210"]


def test_sources_of_a_step_are_those_of_single_ones_and_who_has_which_slot_is_drawn():
    single, several = Order([[9], [9]], seed=0, lanes=3), Order([[9], [9]], seed=0, lanes=3)
    one_by_one = [address.source for address in draw(single, 24, 1)]
    steps = [[address.source for address in several.step(6)] for _ in range(4)]
    assert [sorted(step) for step in steps] == [sorted(one_by_one[first : first + 6]) for first in range(0, 24, 6)]
    assert len(set(map(tuple, steps))) > 1
    other = Order([[9], [9]], seed=1, lanes=3)
    assert [[address.source for address in other.step(6)] for _ in range(4)] != steps


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.75, 0.25), (1, 1, 1, 1)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_and_every_lane_has_something_of_every_source(weights, ranks):
    """Sources in turn would have given every rank its own, and with it experts that drop much of it."""
    order, seen = Order([[10] * 40] * len(weights), weights, seed=0, lanes=8), Counter()
    for _ in range(20):
        seen.update((slot % ranks, address.source) for slot, address in enumerate(order.step(16)))
    for (_, source), number in seen.items():
        assert number == pytest.approx(320 / ranks * weights[source] / sum(weights), rel=0.6)
    assert len(seen) == ranks * len(weights)
    lanes = {(address.source, address.lane) for address in draw(order, 200)}
    assert len(lanes) == 8 * len(weights)


def test_small_batches_are_served_by_all_lanes():
    order = Order([[10] * 40], seed=0, lanes=8)
    assert [address.lane for address in draw(order, 24, 3)] == [*range(8)] * 3


def test_shares_of_many_sources_hold():
    weights = [5, 3, 2, 1, 1, 0.5]
    order = Order([[i + 1] for i in range(6)], weights, seed=0)
    draw(order, 2000)
    for taken, weight in zip(order.taken, weights, strict=True):
        assert taken == pytest.approx(2000 * weight / sum(weights), abs=2)


def test_without_weights_sources_are_used_up_together():
    order = Order([[20, 30], [7]], seed=0)
    draw(order, 57)
    assert order.passes == (1, 1)


def test_the_end_of_the_last_pass_is_an_error_that_says_what_to_do():
    order = Order([[5, 5], [6]], [0.5, 0.5], seed=0, max_passes=1)
    draw(order, 12)
    before = order.state_dict()
    message = (
        r"source 1 is used up: its 6 sequences were taken in 1 passes .* --multiple-data-passes, or .* "
        "--train-num-samples or --epochs"
    )
    with pytest.raises(DataExhausted, match=message):
        order.step(8)
    assert order.state_dict() == before  # the half step is taken back
    assert order.step(1)[0].source == 0
    assert issubclass(DataExhausted, ValueError)


def test_two_passes_are_allowed_if_two_are():
    order = Order([[3, 2]], seed=0, max_passes=2)
    assert Counter(address.data_pass for address in order.step(10)) == {0: 5, 1: 5}
    with pytest.raises(DataExhausted, match="its 5 sequences were taken in 2 passes"):
        order.step(1)


def test_a_position_beyond_the_last_pass_that_is_allowed_has_nothing_left():
    """As a run that goes on with fewer passes than it began with."""
    position = Order([[3, 2]], seed=0)
    draw(position, 12)
    order = Order([[3, 2]], seed=0, max_passes=1)
    order.load_state_dict(position.state_dict())
    with pytest.raises(DataExhausted, match="its 5 sequences were taken in 2 passes"):
        order.step(1)


@pytest.mark.parametrize("other", [{"seed": 1}, {"counts": [[0, 40, 40, 40]]}, {"lanes": 2}])
def test_what_decides_the_order(other):
    arguments = {"counts": [[40, 40, 40, 0]], "seed": 0, "lanes": 3}

    def shards(counts, **rest):
        return [tuple(address) for address in draw(Order(counts, **rest), 120)]

    assert shards(**arguments) == shards(**arguments)
    assert shards(**arguments) != shards(**arguments | other)


def test_shards_are_visited_in_another_order_in_every_pass_and_source():
    order = Order([[1] * 50, [1] * 50], seed=0, lanes=1)
    addresses = draw(order, 200)
    visits = {
        tuple(a.shard for a in addresses if (a.source, a.data_pass) == key) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]
    }
    assert len(visits) == 4
    assert all(sorted(visit) == list(range(50)) for visit in visits)


def test_a_block_is_shuffled_by_all_that_it_depends_on():
    address = Address(source=0, lane=0, data_pass=0, shard=0, position=0)
    blocks = [
        block_permutation(0, 256, seed=0, address=address),
        block_permutation(0, 256, seed=1, address=address),
        block_permutation(1, 256, seed=0, address=address),
        *(block_permutation(0, 256, seed=0, address=address._replace(**{name: 1})) for name in Address._fields[:4:2]),
        block_permutation(0, 256, seed=0, address=address._replace(shard=1)),
    ]
    assert len(set(map(tuple, blocks))) == len(blocks)
    assert all(sorted(block) == list(range(256)) for block in blocks)
    same = address._replace(lane=3, position=9)  # where in the shard, and who reads it, does not matter
    assert block_permutation(0, 256, seed=0, address=same) == blocks[0]


def test_the_order_is_well_shuffled():
    counts = [300] * 20
    places = []
    for address in draw(Order([counts], seed=0), 6000):
        block, offset = divmod(address.position, 256)
        size = min(256, 300 - 256 * block)
        member = 256 * block + block_permutation(block, size, seed=0, address=address)[offset]
        places.append(300 * address.shard + member)
    assert sorted(places) == list(range(6000))
    ranks = torch.stack([torch.arange(6000.0), torch.tensor(places, dtype=torch.float32)])
    assert abs(torch.corrcoef(ranks)[0, 1]) < 0.3  # of 20 shards in random order; 1 unshuffled
    neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(places))
    assert neighbours < 60  # 6000 unshuffled, 2 in a perfect shuffle
    for start in range(0, 4800, 64):  # each batch mixes all eight lanes
        assert len({place // 300 for place in places[start : start + 64]}) >= 8


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draw(Order([[30] * 9], seed=0), 600)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": []}, "there is no source; expected at least one manifest"),
        ({"counts": [[3], [0, 0]]}, "source 1 holds 0 sequences in 2 shards; expected at least one"),
        ({"counts": [[]]}, "source 0 holds 0 sequences in 0 shards"),
        ({"counts": [[3, -1]]}, "source 0 holds 2 sequences in 2 shards; expected at least one"),
        ({"weights": [1.0, 2.0]}, r"there are 2 weights, \[1.0, 2.0\], for 1 manifests; expected one per manifest"),
        ({"weights": [0.0]}, r"weights are \[0.0\]; expected positive numbers, of a finite sum. Leave out"),
        ({"weights": [-1.0]}, "expected positive numbers"),
        ({"weights": [math.nan]}, "expected positive numbers"),
        ({"weights": [math.inf]}, "expected positive numbers"),
        ({"counts": [[3], [3]], "weights": [1.7e308, 1e308]}, "expected positive numbers, of a finite sum"),
        ({"lanes": 0}, "lanes is 0; expected at least 1"),
        ({"max_passes": 0}, "max_passes is 0; expected at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Order(**{"counts": [[3]], "seed": 0} | arguments)


@settings(max_examples=40)
@given(number=st.integers(0, 400), weights=st.lists(st.floats(0.01, 9), min_size=1, max_size=5))
def test_needs_are_what_the_order_takes(number, weights):
    order = Order([[1]] * len(weights), weights, seed=0)
    draw(order, number)
    assert _sequences_needed(number, weights) == list(order.taken)


def test_needs_of_long_runs_are_a_bound():
    assert _sequences_needed(4_000_000, [0.725, 0.275]) == [2_900_000, 1_100_000]
    check_budget(["a", "b", "c"], [[1_500_000], [1_500_000], [7]], num_sequences=3_000_007, max_passes=1)
    assert _sequences_needed(4_000_000, [3.0]) == [4_000_000]


@pytest.mark.parametrize("max_passes", [1, 2])
def test_a_budget_that_does_not_last_is_told_before_the_start(max_passes):
    counts = [[50 // max_passes], [40]]
    check_budget(["a.jsonl", "b.jsonl"], counts, [0.725, 0.275], num_sequences=68, max_passes=max_passes)
    with pytest.raises(ValueError, match="the run takes 100 sequences") as error:
        check_budget(["a.jsonl", "b.jsonl"], counts, [0.725, 0.275], num_sequences=100, max_passes=max_passes)
    for words in [
        f"more than {('one pass', '2 passes')[max_passes - 1]} over the data can give:\n",
        "a.jsonl: 72 needed, 50 there (22 short)",
        f"b.jsonl: 28 needed, {40 * max_passes} there\n",
        "--multiple-data-passes",
        "--train-num-samples",
        "--epochs",
        "--train-data-mix-weights",
    ]:
        assert words in str(error.value)


def test_a_budget_without_end_lasts():
    check_budget(["a"], [[1]], num_sequences=10**9, max_passes=None)
    check_budget(["a", "b"], [[9], [1]], num_sequences=10, max_passes=1)  # exactly all there is
    with pytest.raises(ValueError, match=r"a: 10 needed, 9 there \(1 short\)"):
        check_budget(["a", "b"], [[9], [1]], num_sequences=11, max_passes=1)
    with pytest.raises(ValueError, match="there are 1 weights"):
        check_budget(["a", "b"], [[9], [1]], [1.0], num_sequences=1, max_passes=None)
