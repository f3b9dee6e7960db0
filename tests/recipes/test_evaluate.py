import math

import pytest
import torch

from moekit.lm.configs import load_config
from moekit.recipes import gshard, mixtral, openlm
from moekit.recipes.evaluate import Evaluation, evaluate
from moekit.recipes.language_models import language_model
from moekit.recipes.setup import autocast
from moekit.recipes.steps import batch_loss, layer_stats


def make(recipe, *, freq=1):
    return language_model(load_config("moekit_tiny", moe_freq=freq, moe_num_experts=4), recipe)


@pytest.fixture
def sequences():
    return torch.randint(512, (13, 17))


@pytest.mark.parametrize("batch_size", [1, 4, 13])
def test_the_size_of_batches_does_not_matter_without_drops(sequences, batch_size):
    model = make(mixtral())
    scores = evaluate(model, sequences.split(batch_size), token_bytes=torch.arange(512))
    with torch.no_grad():
        loss = batch_loss(model, sequences)
    stats = layer_stats(model, loss.layers)
    assert scores.loss == pytest.approx(loss.cross_entropy.item(), rel=1e-6)
    assert scores.tokens == 13 * 16
    assert list(scores.loads) == [0, 1]
    for index, load in scores.loads.items():
        assert load == pytest.approx(stats[index].load.tolist(), abs=0.005)  # a near tie may fall either way
        assert sum(load) == pytest.approx(1.0)
    assert scores.drop_rate == 0.0


def test_bits_per_byte_count_the_bytes_of_the_targets(sequences):
    model = make(mixtral())
    sizes = torch.arange(512) % 5
    scores = evaluate(model, sequences.split(4), token_bytes=sizes)
    num_bytes = sum(int(sizes[token]) for token in sequences[:, 1:].flatten().tolist())
    assert scores.bits_per_byte == pytest.approx(scores.loss * scores.tokens / math.log(2) / num_bytes, rel=1e-12)
    assert evaluate(model, [sequences]).bits_per_byte is None


def test_perplexity_is_the_exponential_of_the_loss():
    assert Evaluation(math.log(7), 1, None, {}, 0.0).perplexity == pytest.approx(7)


def test_an_untrained_model_is_near_the_uniform_loss(sequences):
    model = make(mixtral())
    with torch.no_grad():
        model.output.weight.zero_()
    assert evaluate(model, [sequences]).loss == pytest.approx(math.log(512), rel=1e-6)


def test_drops_are_weighted_by_assignments(sequences):
    model = make(openlm(k=1, capacity_factor=0.5))
    batches = sequences.split(4)
    scores = evaluate(model, batches)
    dropped = assigned = 0.0
    with torch.no_grad():
        for batch in batches:
            for stats in layer_stats(model, batch_loss(model, batch).layers).values():
                assigned += stats.tokens_per_expert.sum().item()
                dropped += stats.drop_rate.item() * stats.tokens_per_expert.sum().item()
    assert assigned == 2 * 13 * 16
    assert scores.drop_rate == pytest.approx(dropped / assigned)
    assert 0.4 < scores.drop_rate < 0.9


def test_a_dense_model_has_no_loads(sequences):
    scores = evaluate(make(mixtral(), freq=0), [sequences])
    assert scores.loads == {}
    assert scores.drop_rate == 0.0


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
    evaluate(model, sequences.split(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [training, False, False, False]
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_leaves_mode_and_random_state_as_before(sequences):
    model = make(gshard())
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match="expected int64 or int32"):
        evaluate(model, [sequences, sequences.float()])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_to_evaluate_on_is_an_error():
    model = make(mixtral())
    with pytest.raises(ValueError, match="validation data have no batch; expected at least one"):
        evaluate(model, [])
    assert model.training


def test_the_precision_is_that_of_the_forward(sequences):
    model = make(mixtral())
    dtypes = []
    model.output.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    full = evaluate(model, [sequences])
    low = evaluate(model, [sequences], precision=autocast("amp_bfloat16", torch.device("cpu")))
    assert dtypes == [torch.float32, torch.bfloat16]
    assert low.loss == pytest.approx(full.loss, rel=0.02)
