import copy

import pytest
import torch
from torch import nn

from moekit.lm.configs import load_config
from moekit.recipes import deepseek_moe
from moekit.recipes.language_models import language_model
from moekit.recipes.optimizers import clip_gradients, make_optimizer
from moekit.recipes.settings import OptimizerSettings
from moekit.recipes.steps import take_gradient


def make():
    config = load_config("moekit_tiny", moe_freq=2, moe_num_experts=4, model_norm="default_layer_norm", qk_norm=True)
    return language_model(config, deepseek_moe(k=2))


def decaying(model, settings):
    """Name the parameters that decay, checking that each is in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, settings).param_groups
    members = [(names[id(p)], group["weight_decay"]) for group in groups for p in group["params"]]
    assert sorted(name for name, _ in members) == sorted(names.values())
    assert {decay for _, decay in members} <= {0.0, settings.wd}
    return {name for name, decay in members if decay}


def test_everything_decays_as_in_openlm():
    model = make()
    assert decaying(model, OptimizerSettings(wd=0.1)) == {name for name, _ in model.named_parameters()}


def test_matrices_decay_and_gains_biases_and_the_embedding_do_not():
    model = make()
    decays = decaying(model, OptimizerSettings(wd=0.1, wd_on="matrices"))
    spared = {name for name, _ in model.named_parameters()} - decays
    for name in ("gate", "experts.up", "experts.down", "shared.up"):
        assert f"layers.0.feed_forward.{name}" in decays
    assert {"output.weight", "layers.1.feed_forward.w12.weight", "layers.0.attention.in_proj.weight"} <= decays
    assert {"tok_embeddings.weight", "norm.weight", "norm.bias", "layers.0.attention_norm.weight"} <= spared
    assert {"layers.1.ffn_norm.bias", "layers.0.attention.q_norm.weight"} <= spared
    assert {name.split(".")[-2].split("_")[-1] for name in spared} == {"embeddings", "norm"}


def test_a_step_is_adamw_by_its_formula():
    """One step from nothing moves by the rate times sign-like values, after the decay."""
    settings = OptimizerSettings(lr=0.01, wd=0.5, beta1=0.8, beta2=0.9, eps=1e-3)
    layer = nn.Linear(3, 2, bias=False)
    before, gradient = layer.weight.detach().clone(), torch.randn(2, 3)
    layer.weight.grad = gradient.clone()
    make_optimizer(layer, settings).step()
    expected = before * (1 - 0.01 * 0.5) - 0.01 * gradient / (gradient.abs() + 1e-3)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("limit", [0.01, 0.5, 1e6])
def test_clipping_is_torchs(limit):
    model = make()
    take_gradient(model, [torch.randint(512, (4, 17))])
    model.norm.bias.grad = None
    other = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    norm = clip_gradients(model, limit)
    expected = torch.nn.utils.clip_grad_norm_(other.parameters(), limit).item()
    assert norm == pytest.approx(expected, rel=1e-6)
    assert 0.01 < norm < 1e6
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=0)


def test_tiny_gradients_are_clipped_as_torch_does():
    """Torch adds 1e-6 to the norm, which shows where the norm is small."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.grad = torch.tensor([[4e-6]])
    clip_gradients(layer, 1e-6)
    assert layer.weight.grad.item() == pytest.approx(4e-6 / 5, rel=1e-6)


def test_zero_does_not_clip():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.grad = torch.full((2, 2), 1e3)
    assert clip_gradients(layer, 0) == pytest.approx(2e3)
    assert (layer.weight.grad == 1e3).all()


def test_a_norm_that_is_no_number_is_told_and_changes_nothing():
    layer = nn.Linear(2, 1)
    layer.weight.grad, layer.bias.grad = torch.tensor([[torch.nan, 1.0]]), torch.ones(1)
    norm = clip_gradients(layer, 0.1)
    assert norm != norm
    assert layer.weight.grad[0, 1] == layer.bias.grad == 1.0


def test_nothing_to_clip():
    assert clip_gradients(nn.Linear(2, 2), 1.0) == 0.0
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.zeros(2, 2)
    assert clip_gradients(layer, 1.0) == 0.0
    assert (layer.weight.grad == 0).all()
