import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.overrides import TorchFunctionMode

from moekit.lm.configs import load_config
from moekit.parallel import one_process, whole
from moekit.recipes import deepseek_moe
from moekit.recipes.language_models import language_model
from moekit.recipes.names import find_recipe
from moekit.recipes.optimizers import clip_gradients, gradient_norm, learning_rate, make_optimizer
from moekit.recipes.settings import OptimizerSettings
from moekit.recipes.steps import take_gradient


def make():
    config = load_config("moekit_tiny", moe_freq=2, moe_num_experts=4, model_norm="default_layer_norm", qk_norm=True)
    return language_model(config, deepseek_moe(k=2))


def clipped(model, limit):
    """Clip, and return the norm before."""
    norm = gradient_norm(model).item()
    clip_gradients(model, norm, limit)
    return norm


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


@pytest.mark.parametrize(("recipe", "vectors"), [("gpt_oss", "_bias"), ("moe_plus_plus", "simple.vectors")])
def test_stacked_vectors_of_experts_do_not_decay(recipe, vectors):
    model = language_model(load_config("moekit_tiny", moe_freq=2, moe_num_experts=4), find_recipe(recipe, k=2))
    stacked = {name for name, _ in model.named_parameters() if name.endswith(vectors)}
    assert stacked
    assert not stacked & decaying(model, OptimizerSettings(wd=0.1, wd_on="matrices"))
    assert stacked <= decaying(model, OptimizerSettings(wd=0.1))


def test_a_step_is_adamw_by_its_formula():
    """One step from nothing moves by the rate times sign-like values, after the decay."""
    settings = OptimizerSettings(lr=0.01, wd=0.5, beta1=0.8, beta2=0.9, eps=1e-3)
    layer = nn.Linear(3, 2, bias=False)
    before, gradient = layer.weight.detach().clone(), torch.randn(2, 3)
    layer.weight.grad = gradient.clone()
    make_optimizer(layer, settings).step()
    expected = before * (1 - 0.01 * 0.5) - 0.01 * gradient / (gradient.abs() + 1e-3)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-7)


class _Given(TorchFunctionMode):
    """Takes down of what classes the tensors are that a step of AdamW works on."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[type] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "_fused_adamw_":
            self.kinds |= {type(tensor) for tensors in args[:4] for tensor in tensors}
        return function(*args, **(kwargs or {}))


def test_a_step_of_sharded_parameters_is_one_of_what_this_rank_holds():
    """Their state is sharded as they are, for checkpoints."""
    plain = make()
    sharded = copy.deepcopy(plain)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        optimizers = [make_optimizer(model, OptimizerSettings(lr=0.1)) for model in (plain, sharded)]
        for step in range(3):
            for model, optimizer in zip((plain, sharded), optimizers, strict=True):
                for number, parameter in enumerate(model.parameters()):
                    values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + number))
                    parameter.grad = values
                    if model is sharded:
                        mesh = parameter.device_mesh
                        parameter.grad = distribute_tensor(values, mesh, parameter.placements)
                with _Given() as given:
                    optimizer.step()
                assert given.kinds == {nn.Parameter, torch.Tensor} or given.kinds == {torch.Tensor}
        state = optimizers[1].state
        for mine, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
            assert torch.equal(whole(mine.detach()), theirs.detach())
            assert isinstance(state[mine]["exp_avg"], DTensor)
            assert torch.equal(whole(state[mine]["exp_avg"]), optimizers[0].state[theirs]["exp_avg"])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("limit", [0.01, 0.5, 1e6])
def test_clipping_is_torchs(limit):
    model = make()
    take_gradient(model, [torch.randint(512, (4, 17))])
    model.norm.bias.grad = None
    other = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    norm = clipped(model, limit)
    expected = torch.nn.utils.clip_grad_norm_(other.parameters(), limit).item()
    assert norm == pytest.approx(expected, rel=1e-6)
    assert 0.01 < norm < 1e6
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=0)


def test_tiny_gradients_are_clipped_as_torch_does():
    """Torch adds 1e-6 to the norm, which shows where the norm is small."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.grad = torch.tensor([[4e-6]])
    clipped(layer, 1e-6)
    assert layer.weight.grad.item() == pytest.approx(4e-6 / 5, rel=1e-6)


def test_zero_does_not_clip():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.grad = torch.full((2, 2), 1e3)
    assert clipped(layer, 0) == pytest.approx(2e3)
    assert (layer.weight.grad == 1e3).all()


def test_a_norm_that_is_no_number_is_told_and_changes_nothing():
    layer = nn.Linear(2, 1)
    layer.weight.grad, layer.bias.grad = torch.tensor([[torch.nan, 1.0]]), torch.ones(1)
    norm = clipped(layer, 0.1)
    assert norm != norm
    assert layer.weight.grad[0, 1] == layer.bias.grad == 1.0


def test_gradients_need_not_lie_on_the_device_of_the_rank():
    """As those of a model on the CPU, on a machine with a GPU."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert gradient_norm(layer, one_process()._replace(device=torch.device("meta"))) == 5.0


def test_nothing_to_clip():
    assert clipped(nn.Linear(2, 2), 1.0) == 0.0
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.zeros(2, 2)
    assert clipped(layer, 1.0) == 0.0
    assert (layer.weight.grad == 0).all()


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


def test_a_constant_rate_stays_at_the_peak_after_the_warmup():
    rates = [learning_rate(step, **SCHEDULE, cosine=False) for step in (0, 9, 10, 55, 100)]
    assert rates == pytest.approx([3e-4, 3e-3, 3e-3, 3e-3, 3e-3], rel=1e-12)


def test_the_lower_limit_of_the_rate_counts_after_the_warmup_alone():
    rates = [learning_rate(step, **SCHEDULE, least=1e-3) for step in (0, 10, 99, 100)]
    assert rates == pytest.approx([3e-4, 3e-3, 1e-3, 1e-3], rel=1e-12)
    assert learning_rate(50, **SCHEDULE, cosine=False, least=5e-3) == 5e-3
