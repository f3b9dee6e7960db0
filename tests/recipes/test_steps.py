import math

import pytest
import torch
import torch.nn.functional as F

from moekit.lm.configs import load_config
from moekit.recipes import deepseek_moe, mixtral, olmoe, openlm
from moekit.recipes.language_models import language_model, moe_layers
from moekit.recipes.steps import batch_loss, layer_load, layer_stats, learning_rate, update_selection_biases
from moekit.segments import tokens_per_expert


def make(recipe, *, freq=1, num_experts=4):
    return language_model(load_config("moekit_tiny", moe_freq=freq, moe_num_experts=num_experts), recipe)


@pytest.fixture
def batch():
    return torch.randint(512, (3, 17))


def weigh(model, coefficients):
    for _, layer in moe_layers(model):
        layer.recipe = layer.recipe._replace(coefficients=coefficients)


SCHEDULE = {"steps": 100, "peak": 3e-3, "warmup": 10, "end": 1e-4}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 3e-3 / 10),
        (4, 3e-3 / 2),
        (9, 3e-3),
        (10, 3e-3),
        (55, (3e-3 + 1e-4) / 2),
        (40, 1e-4 + (3e-3 - 1e-4) * 0.75),  # a third of the cosine: (1 + cos 60 degrees) / 2
        (100, 1e-4),
    ],
)
def test_learning_rate_at_the_edges(step, expected):
    assert learning_rate(step, **SCHEDULE) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step, **SCHEDULE) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert len(set(rates[10:])) == 91


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert learning_rate(0, steps=5, peak=1.0, warmup=0, end=0.1) == 1.0
    last = learning_rate(4, steps=5, peak=1.0, warmup=0, end=0.1)
    assert last == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.8)) / 2)


def test_the_cross_entropy_is_of_the_next_token(batch):
    model = make(mixtral())
    loss = batch_loss(model, batch)
    with torch.no_grad():
        log_probs = torch.log_softmax(model(batch[:, :-1]).logits, dim=-1)
    by_hand = -torch.stack([log_probs[b, t, batch[b, t + 1]] for b in range(3) for t in range(16)]).mean()
    torch.testing.assert_close(loss.cross_entropy.detach(), by_hand)
    assert len(loss.layers) == 2


def test_balancing_losses_are_means_over_the_moe_layers(batch):
    model = make(olmoe(k=2))
    loss = batch_loss(model, batch)
    assert sorted(loss.balancing) == ["load_balance", "z"]
    for name, value in loss.balancing.items():
        by_layer = [layer.losses[name] for layer in loss.layers]
        assert len(by_layer) == 2
        assert by_layer[0] != by_layer[1]
        torch.testing.assert_close(value, (by_layer[0] + by_layer[1]) / 2)
    expected = loss.cross_entropy + 0.01 * loss.balancing["load_balance"] + 0.001 * loss.balancing["z"]
    torch.testing.assert_close(loss.total, expected)


def test_dense_layers_do_not_thin_the_balancing_loss(batch):
    loss = batch_loss(make(openlm(), freq=2), batch)
    torch.testing.assert_close(loss.balancing["load_balance"], loss.layers[0].losses["load_balance"])
    torch.testing.assert_close(loss.total, loss.cross_entropy + 0.1 * loss.layers[0].losses["load_balance"])


def test_value_and_gradient_are_linear_in_the_coefficient(batch):
    model = make(mixtral()).double()

    def at(coefficient):
        weigh(model, {"load_balance": coefficient})
        loss = batch_loss(model, batch)
        gradients = torch.autograd.grad(loss.total, [layer.gate for _, layer in moe_layers(model)])
        return torch.cat([loss.total.detach().reshape(1), *(gradient.flatten() for gradient in gradients)])

    zero, one, seven = at(0.0), at(1.0), at(7.0)
    torch.testing.assert_close(seven - zero, 7 * (one - zero), rtol=1e-6, atol=1e-9)
    assert (one - zero)[1:].abs().max() > 1e-5


def test_a_loss_without_coefficient_is_reported_only(batch):
    model = make(mixtral())
    weigh(model, {})
    loss = batch_loss(model, batch)
    assert torch.equal(loss.total, loss.cross_entropy)
    assert loss.balancing["load_balance"] >= 0.5


def test_a_dense_model_has_its_cross_entropy_alone(batch):
    loss = batch_loss(make(mixtral(), freq=0), batch)
    assert loss.total is loss.cross_entropy
    assert loss.balancing == {}
    assert torch.isclose(loss.total, torch.tensor(math.log(512)), atol=1.0)


def test_the_selection_bias_moves_against_the_load(batch):
    model = make(deepseek_moe(k=2, bias_rate=0.25))
    layers = batch_loss(model, batch).layers
    update_selection_biases(model, layers)
    for index, layer in moe_layers(model):
        counts = tokens_per_expert(layers[index].routing.expert_indices, 4).float()
        assert counts.sum() == 3 * 16 * 2
        expected = 0.25 * torch.sign(counts.mean() - counts)
        assert torch.equal(layer.bias, expected)
        assert expected.abs().sum() > 0
    update_selection_biases(model, layers)
    assert torch.equal(layer.bias, 2 * expected)


def test_layers_without_a_bias_are_left_alone(batch):
    model = make(mixtral())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update_selection_biases(model, batch_loss(model, batch).layers)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_stats_describe_each_moe_layer(batch):
    model = make(openlm(k=1, capacity_factor=0.5), freq=2)
    loss = batch_loss(model, batch)
    stats = layer_stats(model, loss.layers)
    assert list(stats) == [0]
    counts = tokens_per_expert(loss.layers[0].routing.expert_indices, 4)
    assert torch.equal(stats[0].tokens_per_expert, counts)
    capacity = 3 * 16 // 4 // 2
    dropped = (counts - capacity).clamp(min=0).sum().item()
    assert dropped > 0
    assert stats[0].drop_rate.item() == pytest.approx(dropped / 48)
    assert not any(value.requires_grad for value in stats[0])


def test_a_layer_load_is_made_of_plain_numbers(batch):
    model = make(mixtral(), freq=2)
    loss = batch_loss(model, batch)
    stats = layer_stats(model, loss.layers)[0]
    load = layer_load(5, stats)
    assert load.layer == 5
    assert load.load == pytest.approx([count / 96 for count in stats.tokens_per_expert.tolist()])
    assert load.max_violation == pytest.approx(max(load.load) * 4 - 1)
    entropy = torch.distributions.Categorical(logits=loss.layers[0].logits).entropy().mean()
    assert load.entropy == pytest.approx(entropy.item(), rel=1e-5)
    assert (load.drop_rate, load.dead_experts) == (0.0, 0)
    assert [type(value) for value in load] == [int, list, float, float, float, int]


def test_the_loss_is_finite_for_extreme_weights(batch):
    model = make(mixtral())
    with torch.no_grad():
        model.layers[0].feed_forward.gate.mul_(1e4)
    loss = batch_loss(model, batch)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert F.cosine_similarity(model.output.weight.grad.flatten(), model.output.weight.grad.flatten(), 0) > 0.99
