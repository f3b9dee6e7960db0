import math
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial

import pytest
import torch

from moekit.lm.batches import Batching, RowFormat, ValidationBatch, read_validation
from moekit.lm.bootstrap import bootstrap_interval
from moekit.lm.configs import load_config
from moekit.lm.shards import read_manifest, write_shards
from moekit.lm.token_rows import batch_of
from moekit.parallel import World
from moekit.recipes import evaluate as evaluation
from moekit.recipes import gshard, mixtral, openlm, soft_moe
from moekit.recipes.evaluate import Evaluation, evaluate
from moekit.recipes.language_models import language_model, moe_layers
from moekit.recipes.precisions import autocast
from moekit.recipes.routing_sums import all_routing_sums, layer_loads
from moekit.recipes.steps import split_ids, take_gradient

SKIPPING = Batching(1, RowFormat(seq_len=16, vocab_size=512), on_bad="skip")


def make(recipe, *, freq=1):
    return language_model(load_config("moekit_tiny", moe_freq=freq, moe_num_experts=4), recipe)


@pytest.fixture
def sequences():
    return torch.randint(512, (13, 17))


@pytest.fixture
def ragged(sequences):
    for row, length in enumerate((17, 4, 9, 2, 13)):
        sequences[row, length:] = -1
    return sequences


def batches_of(sequences, size, *, width=None, skipped=None):
    """Cut sequences into batches; the last is filled up with rows that are none, and rows to a width."""
    wide = torch.full((len(sequences), (width or sequences.shape[1]) - sequences.shape[1]), -1)
    ids = torch.cat([sequences, wide], dim=1)
    missing = -len(ids) % size
    ids = torch.cat([ids, torch.full((missing, ids.shape[1]), -1)])
    indices = torch.cat([torch.arange(len(sequences)), torch.full((missing,), -1)])
    for batch, places in zip(ids.split(size), indices.split(size), strict=True):
        yield ValidationBatch(batch_of(batch), places, skipped or {})


@pytest.mark.parametrize("batch_size", [1, 4, 13, 20])
def test_the_size_of_batches_does_not_matter_without_drops(sequences, batch_size):
    model = make(mixtral())
    scores = evaluate(model, batches_of(sequences, batch_size), token_bytes=torch.arange(512))
    loss = take_gradient(model, [sequences])
    assert scores.loss == pytest.approx(loss.cross_entropy.item(), rel=1e-6)
    assert (scores.tokens, scores.sequences) == (13 * 16, 13)
    assert [layer.layer for layer in scores.layers] == [0, 1]
    for layer, whole in zip(scores.layers, layer_loads(model, loss.routing), strict=True):
        assert layer.load == pytest.approx(whole.load, abs=0.005)  # a near tie may fall either way
        assert sum(layer.load) == pytest.approx(1.0)
        assert layer.entropy == pytest.approx(whole.entropy, rel=1e-5)
        assert layer.drop_rate == 0.0


@pytest.mark.parametrize("width", [17, 30])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 13, 16])
def test_scores_are_the_same_to_the_digits_that_are_printed(ragged, batch_size, width):
    model = make(mixtral()).double()
    sizes = torch.arange(512) % 5 + 1
    ragged[:, -1] = -1  # so that in both widths every token is read
    expected = evaluate(model, batches_of(ragged, 13), token_bytes=sizes)
    scores = evaluate(model, batches_of(ragged, batch_size, width=width), token_bytes=sizes)
    for name in ("loss", "low", "high", "bits_per_byte", "perplexity"):
        assert getattr(scores, name) == pytest.approx(getattr(expected, name), rel=1e-12), name
        assert f"{getattr(scores, name):.6f}" == f"{getattr(expected, name):.6f}"
    assert scores.tokens == expected.tokens == int((ragged[:, 1:] >= 0).sum())
    for layer, other in zip(scores.layers, expected.layers, strict=True):
        assert layer.load == other.load
        assert layer.entropy == pytest.approx(other.entropy, rel=1e-12)


def test_each_sequence_has_its_own_loss_whatever_the_order_of_batches(ragged):
    model = make(mixtral()).double()
    one, other = (evaluate(model, order(list(batches_of(ragged, 4)))) for order in (list, reversed))
    assert (one.loss, one.low, one.high) == (other.loss, other.low, other.high)


def test_bounds_are_of_the_bootstrap_over_sequences(ragged):
    model = make(mixtral()).double()
    with torch.no_grad():
        model.output.weight.mul_(3)
    scores = evaluate(model, batches_of(ragged, 4))
    alone = [evaluate(model, batches_of(ragged[row : row + 1], 1)) for row in range(13)]
    tokens = torch.tensor([each.tokens for each in alone])
    nats = torch.tensor([each.loss for each in alone], dtype=torch.float64) * tokens
    assert scores.loss == pytest.approx((nats.sum() / tokens.sum()).item(), rel=1e-12)
    expected = bootstrap_interval(nats, tokens)
    assert (scores.low, scores.high) == pytest.approx(tuple(expected), rel=1e-12)
    assert scores.low < scores.loss < scores.high


def test_bits_per_byte_count_the_bytes_of_the_targets(ragged):
    model = make(mixtral())
    sizes = torch.arange(512) % 5 + 1
    scores = evaluate(model, batches_of(ragged, 4), token_bytes=sizes)
    num_bytes = sum(int(sizes[token]) for token in ragged[:, 1:].flatten().tolist() if token >= 0)
    assert scores.bits_per_byte == pytest.approx(scores.loss * scores.tokens / math.log(2) / num_bytes, rel=1e-12)
    assert evaluate(model, batches_of(ragged, 13)).bits_per_byte is None
    assert evaluate(model, batches_of(ragged, 13), token_bytes=0 * sizes).bits_per_byte is None


def test_perplexity_is_the_exponential_of_the_loss():
    assert Evaluation(math.log(7), 0.0, 2.0, 1, 1, None, [], {}).perplexity == pytest.approx(7)


@pytest.mark.parametrize(("loss", "finite"), [(709.7, True), (709.8, False), (1e9, False)])
def test_a_perplexity_too_large_for_a_float_is_infinite(loss, finite):
    assert math.isfinite(Evaluation(loss, 0.0, 2.0, 1, 1, None, [], {}).perplexity) is finite


def test_an_untrained_model_is_near_the_uniform_loss(sequences):
    model = make(mixtral())
    with torch.no_grad():
        model.output.weight.zero_()
    scores = evaluate(model, batches_of(sequences, 13))
    assert scores.loss == pytest.approx(math.log(512), rel=1e-6)
    assert scores.low == pytest.approx(scores.high)


def test_routing_of_each_layer_adds_up_over_batches(ragged):
    model = make(openlm(k=1, capacity_factor=0.5))
    batches = list(batches_of(ragged, 4))
    scores = evaluate(model, batches)
    sums = 0
    with torch.no_grad():
        for batch in batches:
            inputs, _, mask = split_ids(batch.batch.ids)
            sums = sums + all_routing_sums(model, model(inputs, token_mask=mask).layers, token_mask=mask)
    assert sums[:, -1].tolist() == [int((ragged[:, :-1] >= 0).sum())] * 2
    for layer, (*counts, dropped, entropy, tokens) in zip(scores.layers, sums.tolist(), strict=True):
        assert sum(counts) == tokens
        assert layer.load == pytest.approx([count / tokens for count in counts])
        assert layer.drop_rate == pytest.approx(dropped / tokens)
        assert layer.entropy == pytest.approx(entropy / tokens)
        assert 0.2 < layer.drop_rate < 0.9


def test_a_dense_model_has_no_loads(sequences):
    assert evaluate(make(mixtral(), freq=0), batches_of(sequences, 4)).layers == []


# The recipe of evaluation.


def test_another_recipe_may_run_meanwhile(sequences):
    tight, loose = openlm(k=1, capacity_factor=0.5), openlm(k=1, capacity_factor=0)
    model = make(tight)
    own, other = (evaluate(model, batches_of(sequences, 13), recipe=recipe) for recipe in (None, loose))
    assert all(layer.drop_rate > 0.2 for layer in own.layers)
    assert all(layer.drop_rate == 0 for layer in other.layers)
    assert own.loss != other.loss
    assert all(layer.recipe is tight for _, layer in moe_layers(model))


def test_an_error_puts_recipe_mode_and_random_state_back(sequences):
    recipe = gshard()
    model = make(recipe)
    state = torch.get_rng_state()
    bad = ValidationBatch(batch_of(sequences.float()), torch.arange(13), {})
    with pytest.raises(TypeError, match="expected int64 or int32"):
        evaluate(model, [*batches_of(sequences, 13), bad], recipe=gshard(capacity_factor=0))
    assert all(layer.recipe is recipe for _, layer in moe_layers(model))
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_size", [1, 3, 13, 16])
def test_slots_of_rows_that_fill_a_batch_up_are_not_counted(ragged, batch_size):
    scores = evaluate(make(soft_moe(slots=2)), batches_of(ragged, batch_size))
    tokens = int((ragged[:, :-1] >= 0).sum())
    for layer in scores.layers:
        assert (layer.assignments, layer.tokens, layer.load) == (13 * 4 * 2, tokens, [0.25] * 4)
        assert layer.drop_rate == 0.0


def test_slots_of_bad_data_are_not_counted_in_training(sequences):
    model = make(soft_moe(slots=2))
    sequences[4] = -1
    for statistics in (True, False):
        loss = take_gradient(model, sequences.split(5), statistics=statistics)
        assert loss.routing[:, :4].tolist() == [[12 * 2.0] * 4] * 2
    assert loss.total.isfinite()


@pytest.mark.parametrize("training", [True, False])
def test_mode_gradients_and_random_state_are_as_before(sequences, training):
    model = make(gshard())
    model.train(training)
    modes = []
    model.layers[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    state = torch.get_rng_state()
    model(sequences)
    assert not torch.equal(torch.get_rng_state(), state), "this recipe draws, or the test says nothing"
    state = torch.get_rng_state()
    evaluate(model, batches_of(sequences, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [training, False, False, False]
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# What is left out, and what is no score.


def test_sequences_without_a_target_are_not_scored_and_bad_ones_counted(sequences):
    model = make(mixtral()).double()
    expected = evaluate(model, batches_of(sequences[2:], 13))
    sequences[0] = -1  # bad data, whose place stays
    sequences[1, 1:] = -1  # a token and nothing to predict
    scores = evaluate(model, batches_of(sequences, 5, skipped={"short sequence": 2}))
    assert (scores.sequences, scores.tokens) == (11, 11 * 16)
    assert scores.loss == pytest.approx(expected.loss, rel=1e-12)
    assert (scores.low, scores.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert scores.skipped == {"short sequence": 6}
    assert expected.skipped == {}


def test_bad_sequences_of_shards_are_counted_once(tmp_path):
    shards = read_manifest(write_shards(tmp_path, [[1] * 17, [9999] * 17, [2] * 17, [3] * 4, [4] * 17]))
    batchings = [SKIPPING._replace(batch_size=size) for size in (1, 2, 5)]
    scores = [evaluate(make(mixtral()), read_validation(shards, batching)) for batching in batchings]
    for each in scores:
        assert (each.sequences, each.tokens) == (3, 48)
        assert each.skipped == {"id outside vocabulary": 1, "short sequence": 1}


@pytest.fixture
def two_ranks(monkeypatch):
    """Return a function that calls another for rank 0 and 1, threads of this process that add tensors up."""
    parts, everyone = {}, threading.Barrier(2, timeout=10)

    def all_sum(world, tensor):
        if world.size == 1:
            return tensor
        parts[world.rank] = tensor
        everyone.wait()
        total = parts[0] + parts[1]
        everyone.wait()
        return total

    def run(function):
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(function, (World(rank, 2, torch.device("cpu")) for rank in (0, 1))))

    monkeypatch.setattr(evaluation, "all_sum", all_sum)
    monkeypatch.setattr(evaluation, "any_true", lambda world, claim: bool(all_sum(world, torch.tensor(claim))))
    return run


def test_every_rank_has_the_scores_of_one_process(tmp_path, two_ranks):
    bad = [[9999] * 17, [3] * 4, [9999] * 17]
    rows = [*torch.randint(512, (4, 17)).tolist(), *bad, *torch.randint(512, (2, 17)).tolist()]
    shards, model = read_manifest(write_shards(tmp_path, rows)), make(mixtral()).double()
    expected = evaluate(model, read_validation(shards, SKIPPING._replace(batch_size=9)))

    def score(world):
        batching = SKIPPING._replace(batch_size=4, rank=world.rank, world_size=2)
        return evaluate(deepcopy(model), read_validation(shards, batching), world=world)

    one, other = two_ranks(score)
    assert one == other
    assert one.skipped == expected.skipped == {"id outside vocabulary": 2, "short sequence": 1}
    assert one[:5] == pytest.approx(expected[:5], rel=1e-12)
    for layer, whole in zip(one.layers, expected.layers, strict=True):
        assert layer.load == whole.load
        assert layer.entropy == pytest.approx(whole.entropy, rel=1e-12)


def test_data_that_one_rank_cannot_read_end_both(sequences, two_ranks):
    def score(world):
        batches = batches_of(sequences, 5)
        return evaluate(make(mixtral()), batches if world.rank else _unreadable(), world=world)

    def error_of(world):
        with pytest.raises(OSError, match="no such luck" if world.rank == 0 else "another rank cannot read") as raised:
            score(world)
        return raised.type

    assert two_ranks(error_of) == [OSError, OSError]


def _unreadable():
    raise OSError("no such luck")
    yield


def test_no_batch_waits_for_the_device(sequences, monkeypatch):
    """On a GPU each of these would: the next batch is read while this one is scored."""
    model, batches = make(mixtral()), list(batches_of(sequences, 4))
    read, early = [], []
    for name in ("cpu", "item", "__bool__", "__int__"):
        method = getattr(torch.Tensor, name)

        def noted(self, *args, name=name, method=method):
            if len(read) < 4:
                early.append(name)
            return method(self, *args)

        monkeypatch.setattr(torch.Tensor, name, noted)

    def watched():
        for batch in batches:
            read.append(batch)
            yield batch

    evaluate(model, watched(), token_bytes=torch.arange(512))
    assert (len(read), early) == (4, [])


def test_ids_that_no_token_has_are_of_no_bytes(sequences):
    """A vocabulary is often rounded up, and OpenLM's mark of a document's end becomes an id near its end."""
    model, few = make(mixtral()), torch.ones(400, dtype=torch.int64)
    found = evaluate(model, batches_of(sequences, 4), token_bytes=few)
    padded = evaluate(
        model, batches_of(sequences, 4), token_bytes=torch.cat([few, torch.zeros(112, dtype=torch.int64)])
    )
    assert int(sequences.max()) >= 400
    assert found.bits_per_byte == padded.bits_per_byte


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_evaluate_on_is_an_error(rows):
    model = make(mixtral())
    batches = batches_of(torch.full((rows, 17), -1), 2, skipped={"short sequence": 2}) if rows else []
    message = rf"nothing to evaluate on: no sequence .* \({2 * ((rows + 1) // 2)} left out as bad data\); expected at"
    with pytest.raises(ValueError, match=message):
        evaluate(model, batches)
    assert model.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(sequences, value):
    model = make(mixtral())
    with torch.no_grad():
        model.output.weight[3, 0] = value
    message = "the validation loss is .*: the model's parameters or outputs are not finite"
    with pytest.raises(FloatingPointError, match=message):
        evaluate(model, batches_of(sequences, 4))
    assert model.training


def test_the_precision_is_that_of_the_forward(sequences):
    model = make(mixtral())
    dtypes = []
    model.output.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    full = evaluate(model, batches_of(sequences, 13))
    precision = partial(autocast, "amp_bfloat16", torch.device("cpu"))
    low = evaluate(model, batches_of(sequences, 7), precision=precision)
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert low.loss == pytest.approx(full.loss, rel=0.02)
