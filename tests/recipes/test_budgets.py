import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.recipes.budgets import Budget, make_budget
from moekit.recipes.settings import DataSettings, OptimizerSettings, TrainSettings


def budget(*, seq_len=2048, world_size=1, **flags):
    data = {name: flags.pop(name) for name in ("train_num_samples", "epochs") if name in flags}
    settings = TrainSettings(data=DataSettings(**data), optimizer=OptimizerSettings(**flags))
    return make_budget(settings, seq_len=seq_len, world_size=world_size)


def test_openlms_command():
    """Section 1.1 of its description: tokens are rounded down to sequences of an epoch, then to whole batches."""
    found = budget(world_size=8, train_num_samples=1_000_000_000, epochs=4, batch_size=8, accum_freq=4)
    assert found == Budget(steps=30_517, batch_size=64, epochs=4, epoch_sequences=488_281, seq_len=2048)
    assert found.tokens_per_step == 131_072
    assert found.sequences == 1_953_088 <= 4 * 488_281 == 1_953_124
    assert [found.epoch_end(epoch) for epoch in (1, 2, 3, 4)] == [7629, 15258, 22888, 30517]


def test_no_flags():
    assert budget(seq_len=128) == Budget(steps=800, batch_size=16, epochs=1, epoch_sequences=12_800, seq_len=128)
    assert budget(seq_len=128, world_size=4).batch_size == 64


def test_steps_are_taken_as_they_are():
    found = budget(steps=7, batch_size=3, world_size=2)
    assert (found.steps, found.batch_size, found.sequences, found.epochs) == (7, 6, 42, 1)
    assert [found.epochs_ended(step) for step in (0, 6, 7)] == [0, 0, 1]


def test_the_global_batch_does_not_grow_with_the_ranks():
    assert [budget(global_batch_size=24, world_size=size).batch_size for size in (1, 2, 4)] == [24, 24, 24]


def test_a_batch_that_does_not_divide_over_the_ranks():
    message = "--global-batch-size 10 does not divide over 4 ranks; choose a multiple of 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        budget(global_batch_size=10, world_size=4)


@pytest.mark.parametrize(
    ("flags", "share"),
    [({"global_batch_size": 24, "world_size": 4, "accum_freq": 4}, 6), ({"accum_freq": 3}, 16)],
)
def test_micro_batches_that_do_not_divide_a_ranks_share(flags, share):
    message = f"--accum-freq {flags['accum_freq']} does not divide a rank's {share} sequences per step; choose one"
    with pytest.raises(ValueError, match=re.escape(message)):
        budget(**flags)


def test_too_few_tokens_for_a_step():
    message = (
        "--train-num-samples 1000 tokens are 15 sequences of 64; times --epochs 1, that is less than one batch of 16. "
        "Train on more, or take a smaller batch"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        budget(seq_len=64, train_num_samples=1000)
    assert budget(seq_len=64, train_num_samples=1024).steps == 1
    assert budget(seq_len=64, train_num_samples=1000, epochs=2).steps == 1


def test_one_epoch_by_default():
    assert budget(seq_len=64, train_num_samples=64 * 100, batch_size=10)[:4] == (10, 10, 1, 100)


@given(epoch_sequences=st.integers(1, 200), batch_size=st.integers(1, 64), epochs=st.integers(1, 12))
def test_epochs_end_in_order_and_all_of_them(epoch_sequences, batch_size, epochs):
    steps = epoch_sequences * epochs // batch_size
    found = Budget(steps, batch_size, epochs, epoch_sequences, 1)
    ends = [found.epoch_end(epoch) for epoch in range(1, epochs + 1)]
    assert ends == sorted(ends)
    assert ends[-1] == steps
    for epoch, end in enumerate(ends, start=1):
        assert found.epochs_ended(end) >= epoch
        assert end * batch_size <= epoch * epoch_sequences < (end + 1) * batch_size
    ended = [found.epochs_ended(step) for step in range(steps + 1)]
    assert ended == sorted(ended)
    assert ended == [sum(end <= step for end in ends) for step in range(steps + 1)]
    assert ended[-1] == epochs
    if steps:  # a run has one at least
        ending = [found.epochs_ending(step) for step in range(steps + 1)]
        expected = [[e for e in range(1, epochs + 1) if max(ends[e - 1], 1) == step] for step in range(steps + 1)]
        assert ending == expected
