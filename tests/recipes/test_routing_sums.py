import pytest
import torch

from moekit.lm.configs import load_config
from moekit.recipes import mixtral, moe_plus_plus, openlm
from moekit.recipes.language_models import language_model
from moekit.recipes.layers import MoEParams, moe_layer
from moekit.recipes.modules import MoE
from moekit.recipes.routing_sums import all_routing_sums, choice_counts, layer_loads, routing_sums
from moekit.routing import routing_stats, top_k
from moekit.segments import tokens_per_expert
from moekit.types import Routing


def make(recipe, *, freq=1):
    return language_model(load_config("moekit_tiny", moe_freq=freq, moe_num_experts=4), recipe)


def test_counts_by_choice():
    routing = top_k(torch.tensor([[9.0, 5, 1], [5, 9, 1], [1, 5, 9], [9, 5, 1]]), k=2)
    assert choice_counts(routing).tolist() == [[2, 1, 1], [1, 3, 0]]
    gone = routing._replace(expert_indices=routing.expert_indices.masked_fill(routing.expert_indices == 1, -1))
    assert choice_counts(gone).tolist() == [[2, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("shape", [(6,), (1, 3, 2)])
def test_a_routing_without_choices_has_one_row(shape):
    experts = torch.tensor([0, 2, 2, 1, -1, 2]).view(shape)
    routing = Routing(
        experts.clamp_min(0), experts, torch.ones(shape), num_tokens=6, num_experts=4, pool=experts.numel()
    )
    assert choice_counts(routing).tolist() == [[1, 1, 3, 0]]


@pytest.mark.parametrize("masked", [False, True])
def test_sums_say_what_a_layer_did(masked):
    recipe = openlm(k=2, capacity_factor=0.5)
    layer = MoE(8, 4, recipe, hidden=8)
    mask = torch.arange(24).view(2, 12) % 5 != 0 if masked else None
    output = layer(torch.randn(2, 12, 8), token_mask=mask)
    sums = routing_sums(output, recipe, token_mask=mask)
    assert sums.shape == (4 + 3,)
    assert sums.dtype == torch.float64
    assert not sums.requires_grad
    real = torch.ones(24, dtype=torch.bool) if mask is None else mask.flatten()
    counts = tokens_per_expert(output.routing.expert_indices, 4)
    assert counts.sum() == 2 * real.sum()
    assert sums[:4].tolist() == counts.tolist()
    capacity = 2 * 24 // 4 // 2
    assert sums[4].item() == pytest.approx((counts - capacity).clamp_min(0).sum().item())
    assert sums[4] > 0
    entropy = torch.distributions.Categorical(logits=output.logits[real]).entropy().sum().item()
    assert sums[5].item() == pytest.approx(entropy, rel=1e-5)
    assert sums[6] == real.sum()


def test_sums_add_up_over_batches_without_drops():
    recipe = mixtral()
    params = MoE(8, 4, recipe, hidden=8).params()
    assert isinstance(params, MoEParams)
    x = torch.randn(24, 8)
    whole = routing_sums(moe_layer(x, params, recipe), recipe)
    parts = [routing_sums(moe_layer(part, params, recipe), recipe) for part in x.split((5, 12, 7))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-6)


def test_a_layer_without_a_real_token_sums_to_nothing():
    recipe = openlm()
    mask = torch.zeros(5, dtype=torch.bool)
    output = MoE(8, 4, recipe, hidden=8)(torch.randn(5, 8), token_mask=mask)
    assert routing_sums(output, recipe, token_mask=mask).tolist() == [0.0] * 7


def test_rows_are_of_the_moe_layers_alone():
    model = make(openlm(k=1, capacity_factor=0.5), freq=2)
    layers = model(torch.randint(512, (3, 16))).layers
    sums = all_routing_sums(model, layers)
    assert sums.shape == (1, 7)
    stats = routing_stats(
        layers[0].logits, layers[0].routing, model.layers[0].feed_forward.recipe.plan(layers[0].routing)
    )
    assert torch.equal(sums[0, :4].long(), stats.tokens_per_expert)
    capacity = 3 * 16 // 4 // 2
    dropped = (stats.tokens_per_expert - capacity).clamp(min=0).sum().item()
    assert dropped > 0
    [load] = layer_loads(model, sums)
    assert load.layer == 0
    assert load.drop_rate == pytest.approx(dropped / 48)
    assert (load.assignments, load.tokens) == (48, 48)  # before any drop


def test_a_dense_model_has_no_rows():
    model = make(mixtral(), freq=0)
    sums = all_routing_sums(model, model(torch.randint(512, (1, 4))).layers)
    assert sums.shape == (0, 3)
    assert layer_loads(model, sums) == []


def test_a_layer_load_is_made_of_plain_numbers():
    model = make(mixtral())
    layers = model(torch.randint(512, (3, 16))).layers
    loads = layer_loads(model, all_routing_sums(model, layers))
    assert [load.layer for load in loads] == [0, 1]
    for load, output in zip(loads, layers, strict=True):
        counts = tokens_per_expert(output.routing.expert_indices, 4)
        assert load.load == pytest.approx([count / 96 for count in counts.tolist()])
        assert load.max_violation == pytest.approx(max(load.load) * 4 - 1)
        entropy = torch.distributions.Categorical(logits=output.logits).entropy().mean()
        assert load.entropy == pytest.approx(entropy.item(), rel=1e-5)
        assert (load.drop_rate, load.dead_experts, load.assignments, load.tokens) == (0.0, 0, 96, 48)
        assert [type(value) for value in load] == [int, list, float, float, float, int, int, int, int]


def test_loads_of_nothing_are_zero_and_dead_experts_are_counted():
    model = make(mixtral(), freq=2)
    [nothing] = layer_loads(model, torch.zeros(1, 7))
    assert nothing == (0, [0.0] * 4, 0.0, 0.0, 0.0, 4, 0, 0, 0)
    [collapsed] = layer_loads(model, torch.tensor([[0.0, 8, 0, 0, 2, 4, 8]]))
    assert collapsed == (0, [0.0, 1.0, 0.0, 0.0], 3.0, 0.25, 0.5, 3, 8, 8, 0)


def test_simple_experts_are_neither_dead_nor_uneven():
    """MoE++'s 4 networks are before a null, a copy and two constant experts, which cost nothing."""
    model = make(moe_plus_plus(), freq=2)
    [load] = layer_loads(model, torch.tensor([[1.0, 3, 0, 0, 0, 4, 0, 0, 0, 8, 4]]))
    assert load.load == [0.125, 0.375, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0]
    assert (load.max_violation, load.dead_experts, load.simple_experts) == (2.0, 2, 4)
    assert (load.assignments, load.tokens) == (8, 4)
    [idle] = layer_loads(model, torch.tensor([[0.0, 0, 0, 0, 0, 4, 0, 0, 0, 8, 4]]))
    assert (idle.max_violation, idle.dead_experts) == (0.0, 4)


def test_sums_of_another_model_do_not_fit():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        layer_loads(make(mixtral()), torch.zeros(1, 7))
