import itertools
import json
from collections import Counter

import pytest
import torch

from moekit.lm.batches import mixed_batches, mixed_sequences, validation_batches
from moekit.lm.shards import load_sequences, write_shards

SEQ_LEN = 3


@pytest.fixture
def sources(tmp_path):
    """Two sources; every token says its source (thousands) and its sequence."""
    manifests = []
    for number, size in enumerate((50, 7)):
        rows = (1000 * number + torch.arange(size)).unsqueeze(1).expand(-1, SEQ_LEN + 1)
        manifests.append(write_shards(tmp_path / str(number), rows, sequences_per_shard=16))
    return manifests


def ids(stream, batches):
    return [token for batch in itertools.islice(stream, batches) for token in batch[:, 0].tolist()]


def test_batches_have_the_documented_shape(sources):
    stream = mixed_batches(sources, batch_size=6, seed=0, vocab_size=2000)
    batch = next(stream)
    assert batch.shape == (6, SEQ_LEN + 1)
    assert batch.dtype == torch.int64
    assert iter(stream) is stream
    assert not torch.equal(next(stream), batch)


@pytest.mark.parametrize("weights", [(0.725, 0.275), (725, 275), (0.05, 0.95), (0.5, 0.5)])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_shares_hold_to_one_sequence_at_every_length(sources, weights, batch_size):
    drawn = ids(mixed_batches(sources, weights, batch_size=batch_size, seed=0), 2000 // batch_size)
    assert len(drawn) == 2000
    for n in range(1, 2001):
        assert abs(sum(i >= 1000 for i in drawn[:n]) - n * weights[1] / sum(weights)) <= 1


def test_shares_of_many_sources_hold(tmp_path):
    weights = [5, 3, 2, 1, 1, 0.5]
    manifests = [write_shards(tmp_path / str(i), [[i, i]] * (i + 1)) for i in range(6)]
    drawn = ids(mixed_batches(manifests, weights, batch_size=10, seed=0), 200)
    for i, weight in enumerate(weights):
        assert drawn.count(i) == pytest.approx(2000 * weight / sum(weights), abs=2)


def test_without_weights_sources_are_used_up_together(sources):
    stream = mixed_batches(sources, batch_size=57, seed=0)
    assert sorted(ids(stream, 1)) == [*range(50), *range(1000, 1007)]
    assert stream.passes == (1, 1)


def test_every_pass_has_every_sequence_once_in_a_new_order(sources):
    drawn = ids(mixed_batches(sources[:1], batch_size=10, seed=0), 20)
    passes = [drawn[start : start + 50] for start in range(0, 200, 50)]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert len(set(map(tuple, passes))) == 4
    assert list(range(50)) not in passes


def test_passes_are_counted(sources):
    stream = mixed_batches(sources, [0.5, 0.5], batch_size=2, seed=0)
    assert stream.passes == (0, 0)
    ids(stream, 6)
    assert stream.passes == (0, 0)
    ids(stream, 1)
    assert stream.passes == (0, 1)
    ids(stream, 43)
    assert stream.passes == (1, 7)


def test_the_seed_decides(sources):
    def draw(seed):
        return ids(mixed_batches(sources, [0.7, 0.3], batch_size=5, seed=seed), 30)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draw(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_sources_are_shuffled_differently(tmp_path):
    rows = [[i, i] for i in range(30)]
    manifests = [write_shards(tmp_path / name, rows) for name in "ab"]
    drawn = ids(mixed_batches(manifests, [1, 1], batch_size=60, seed=0), 1)
    assert Counter(drawn) == dict.fromkeys(range(30), 2)
    assert drawn[::2] != drawn[1::2]


@pytest.mark.parametrize("done", [0, 1, 3, 10, 37])
def test_a_saved_position_continues_exactly(sources, done):
    def fresh():
        return mixed_batches(sources, [0.725, 0.275], batch_size=4, seed=3)

    unbroken = fresh()
    ids(unbroken, done)
    saved = json.loads(json.dumps(unbroken.state_dict()))  # so it is plain data
    later = ids(unbroken, 5)
    again = json.loads(json.dumps(unbroken.state_dict()))
    rest = ids(unbroken, 40)

    resumed = fresh()
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == saved
    assert ids(resumed, 5) == later
    twice = fresh()
    ids(twice, 2)
    twice.load_state_dict(again)  # resumed a second time, into a stream that had moved
    assert ids(twice, 40) == rest
    assert twice.passes == unbroken.passes
    unbroken.load_state_dict(saved)
    assert ids(unbroken, 5) == later


def test_saving_does_not_move_the_stream_and_a_saved_state_does_not_change(sources):
    stream = mixed_batches(sources, [0.7, 0.3], batch_size=4, seed=3)
    plain = mixed_batches(sources, [0.7, 0.3], batch_size=4, seed=3)
    saved = stream.state_dict()
    text = json.dumps(saved)
    drawn = []
    for _ in range(10):
        drawn += ids(stream, 1)
        stream.state_dict()
    assert drawn == ids(plain, 10)
    assert json.dumps(saved) == text


def test_another_batch_size_continues_with_the_next_sequence(sources):
    stream = mixed_batches(sources, [0.7, 0.3], batch_size=4, seed=3)
    ids(stream, 5)
    other = mixed_batches(sources, [0.7, 0.3], batch_size=8, seed=3)
    other.load_state_dict(stream.state_dict())
    assert ids(other, 3) == ids(stream, 6)


def test_a_position_of_other_data_is_refused(sources):
    saved = mixed_batches(sources, [0.7, 0.3], batch_size=4, seed=3).state_dict()
    for stream, message in [
        (mixed_batches(sources, [0.7, 0.3], batch_size=4, seed=4), "is for seed 3; this stream has 4"),
        (mixed_batches(sources, [0.6, 0.4], batch_size=4, seed=3), r"is for weights \[0.7, 0.3\]; this stream"),
        (mixed_batches(sources[::-1], [0.7, 0.3], batch_size=4, seed=3), r"num_sequences \[50, 7\]; this .* \[7, 50\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream.load_state_dict(saved)


@pytest.mark.parametrize(
    ("weights", "batch_size", "message"),
    [
        ([1.0], 4, r"there are 1 weights, \[1.0\], for 2 manifests"),
        ([1.0, 0.0], 4, r"weights are \[1.0, 0.0\]; expected positive numbers"),
        ([1.0, -1.0], 4, "expected positive numbers"),
        ([1.0, float("nan")], 4, "expected positive numbers"),
        ([1.0, float("inf")], 4, "expected positive numbers"),
        (None, 0, "batch_size is 0; expected at least 1"),
    ],
)
def test_bad_input(sources, weights, batch_size, message):
    with pytest.raises(ValueError, match=message):
        mixed_batches(sources, weights, batch_size=batch_size, seed=0)


def test_bad_sources(sources, tmp_path):
    with pytest.raises(ValueError, match="there is no source; expected at least one manifest"):
        mixed_batches([], batch_size=1, seed=0)
    with pytest.raises(FileNotFoundError, match="there is no manifest at"):
        mixed_batches([tmp_path / "absent.jsonl"], batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"has the id 6 at position 0; expected ids in \[0, 6\)"):
        mixed_batches(sources, batch_size=1, seed=0, vocab_size=6)
    longer = write_shards(tmp_path / "longer", [[1] * 9])
    with pytest.raises(ValueError, match=r"shapes \[\(50, 4\), \(1, 9\)\]; expected"):
        mixed_batches([sources[0], longer], batch_size=1, seed=0)


@pytest.mark.parametrize("source", [torch.zeros(0, 4), torch.zeros(4)])
def test_bad_tensors(source):
    with pytest.raises(ValueError, match=r"expected \(num_sequences, seq_len \+ 1\) with the same seq_len"):
        mixed_sequences([source], batch_size=1, seed=0)


def test_loaded_sequences_give_the_same_batches(sources):
    loaded = [load_sequences(manifest) for manifest in sources]
    from_memory = mixed_sequences(loaded, [0.7, 0.3], batch_size=4, seed=3)
    assert ids(from_memory, 20) == ids(mixed_batches(sources, [0.7, 0.3], batch_size=4, seed=3), 20)


def test_validation_is_in_order_once_and_the_last_may_be_short(sources):
    batches = validation_batches(sources[1], batch_size=3, vocab_size=1007)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.cat(batches)[:, 0].tolist() == list(range(1000, 1007))
    assert batches[0].dtype == torch.int64
    assert batches[0].shape == (3, SEQ_LEN + 1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        validation_batches(sources[1], batch_size=0)
