import pytest
import torch

from moekit.lm.configs import load_config
from moekit.recipes import mixtral, openlm
from moekit.recipes.language_models import language_model
from moekit.recipes.optimizers import clip_gradients, gradient_norm, make_optimizer
from moekit.recipes.precisions import (
    autocast,
    deterministic,
    gradient_scaler,
    parameter_dtype,
    precision_words,
    product_dtype,
)
from moekit.recipes.settings import OptimizerSettings
from moekit.recipes.steps import LossRules, take_gradient

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PRECISIONS = ["auto", "fp32", "amp", "amp_bfloat16", "amp_bf16", "bf16", "fp16"]


@pytest.mark.parametrize(("amx", "expected"), [(True, torch.bfloat16), (False, None)])
def test_auto_precision_asks_the_hardware(monkeypatch, amx, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    assert product_dtype("auto", CPU) is expected
    assert product_dtype("amp_bfloat16", CPU) is torch.bfloat16
    assert product_dtype("fp32", CPU) is None
    assert product_dtype("auto", CUDA) is torch.bfloat16


def test_hardware_that_does_not_know_amx(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert product_dtype("auto", CPU) is None


@pytest.mark.parametrize(
    ("precision", "parameters", "products", "words"),
    [
        ("fp32", torch.float32, torch.float32, "fp32"),
        ("amp", torch.float32, torch.float16, "fp16 autocast"),
        ("amp_bfloat16", torch.float32, torch.bfloat16, "bf16 autocast"),
        ("amp_bf16", torch.float32, torch.bfloat16, "bf16 autocast"),
        ("bf16", torch.bfloat16, torch.bfloat16, "bf16"),
        ("fp16", torch.float16, torch.float16, "fp16"),
    ],
)
def test_what_a_precision_means(precision, parameters, products, words):
    dtype = parameter_dtype(precision)
    assert dtype is parameters
    with autocast(precision, CPU):
        assert (torch.ones(2, 2, dtype=dtype) @ torch.ones(2, 2, dtype=dtype)).dtype is products
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
    assert precision_words(precision, CPU) == words


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_fp16_autocast_has_a_gradient_scaler(precision):
    scaler = gradient_scaler(precision, CPU)
    assert scaler.is_enabled() is (precision == "amp")
    assert scaler.scale(torch.tensor(2.0)) == (2.0 * 65_536 if precision == "amp" else 2.0)


@pytest.mark.parametrize("recipe", [openlm, mixtral])
@pytest.mark.parametrize("precision", ["fp32", "amp", "amp_bfloat16", "bf16", "fp16"])
def test_a_step_in_every_precision_lowers_the_loss(precision, recipe):
    settings = OptimizerSettings(lr=3e-3, wd=0.0, eps=1e-4)  # 1e-8 is zero in fp16
    model = language_model(load_config("moekit_tiny", moe_freq=2, moe_num_experts=4), recipe())
    model.to(parameter_dtype(precision))
    optimizer, scaler = make_optimizer(model, settings), gradient_scaler(precision, CPU)
    batches = torch.randint(512, (8, 17)).chunk(2)
    rules = LossRules(z_coefficient=1e-4, precision=lambda: autocast(precision, CPU), scale=scaler.scale)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(take_gradient(model, batches, rules=rules, masked=False))
        scaler.unscale_(optimizer)
        assert all(p.grad.dtype is p.dtype is parameter_dtype(precision) for p in model.parameters())
        norm = gradient_norm(model).item()
        clip_gradients(model, norm, 1.0)
        assert 0 < norm < 100
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert all(torch.isfinite(loss.total) for loss in losses)
    assert losses[-1].cross_entropy < losses[0].cross_entropy - 0.05


@pytest.mark.parametrize("precision", ["amp", "amp_bfloat16", "bf16", "fp16"])
def test_low_precision_is_near_float32(precision):
    model = language_model(load_config("moekit_tiny", moe_freq=2, moe_num_experts=4), mixtral())
    batch = torch.randint(512, (4, 17))
    exact = take_gradient(model, [batch])
    model.to(parameter_dtype(precision))
    low = take_gradient(model, [batch], rules=LossRules(precision=lambda: autocast(precision, CPU)))
    assert low.cross_entropy.item() == pytest.approx(exact.cross_entropy.item(), rel=0.01)
    assert low.cross_entropy != exact.cross_entropy


def test_a_deterministic_run_leaves_the_switch_of_compiled_code_as_it_was():
    from torch._inductor import config

    for before in (True, False):  # True: TORCHINDUCTOR_DETERMINISTIC=1 says so
        with config.patch(deterministic=before):
            with deterministic(True):
                assert config.deterministic
            assert config.deterministic is before
