import pytest
import torch

from moekit.lm.norms import NORMS, make_norm

PARAMETERS = {
    "default_layer_norm": ["weight", "bias"],
    "gain_only_layer_norm": ["weight"],
    "no_wb_layer_norm": [],
    "lp_layer_norm": ["weight", "bias"],
    "gain_only_lp_layer_norm": ["weight"],
    "rms_norm": ["weight"],
}


def with_random_parameters(name: str, width: int) -> torch.nn.Module:
    norm = make_norm(name)(width)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm


def test_all_names_of_openlm_are_there():
    assert set(NORMS) == set(PARAMETERS)


@pytest.mark.parametrize("name", NORMS)
def test_norm_has_exactly_these_parameters(name):
    assert [n for n, _ in make_norm(name)(8).named_parameters()] == PARAMETERS[name]


@pytest.mark.parametrize("name", NORMS)
def test_norm_equals_its_formula(name):
    torch.manual_seed(0)
    norm = with_random_parameters(name, 12).double()
    x = 0.01 * torch.randn(3, 5, 12, dtype=torch.float64)  # small, so that eps = 1e-5 matters
    centered = x if name == "rms_norm" else x - x.mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    parameters = dict(norm.named_parameters())
    expected = expected * parameters.get("weight", 1.0) + parameters.get("bias", 0.0)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["lp_layer_norm", "gain_only_lp_layer_norm"])
def test_low_precision_norm_follows_autocast(name):
    torch.manual_seed(0)
    norm = with_random_parameters(name, 16)
    x = torch.randn(4, 16)
    outside = norm(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = norm(x)
    assert outside.dtype == torch.float32
    assert inside.dtype == torch.bfloat16
    torch.testing.assert_close(inside.float(), outside, rtol=0.05, atol=0.05)
    inside.float().sum().backward()
    assert norm.weight.grad.dtype == torch.float32


def test_rms_norm_computes_bfloat16_in_float32():
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    torch.testing.assert_close(make_norm("rms_norm")(4096)(x), torch.ones(1, 4096), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("mode", ["amp", "pure", "float32 gains"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in NORMS if PARAMETERS[name]])
def test_gradients_of_many_rows_in_half_precision_are_near_float64(name, dtype, mode):
    torch.manual_seed(0)
    x, grad = torch.randn(16_384, 16).to(dtype), (torch.randn(16_384, 16) + 0.5).to(dtype)
    norm, exact = make_norm(name)(16), make_norm(name)(16).double()
    norm.to(dtype if mode == "pure" else torch.float32)
    with torch.autocast("cpu", dtype=dtype, enabled=mode == "amp"):
        y = norm(x)
    y.backward(grad.to(y.dtype))
    exact(x.double()).backward(grad.double())
    for parameter, expected in zip(norm.parameters(), exact.parameters(), strict=True):
        assert parameter.grad.dtype is parameter.dtype
        assert (parameter.grad - expected.grad).norm() < 0.01 * expected.grad.norm()


@pytest.mark.parametrize("name", ["default_layer_norm", "gain_only_layer_norm", "no_wb_layer_norm", "lp_layer_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_in_half_precision_returns_what_torch_does(name, dtype):
    torch.manual_seed(0)
    norm, x = with_random_parameters(name, 96), torch.randn(64, 96)
    with torch.autocast("cpu", dtype=dtype):
        found = norm(x.to(dtype))
    low = [None if p is None else p.to(dtype) for p in (norm.weight, norm.bias)]
    parameters = low if name == "lp_layer_norm" else (norm.weight, norm.bias)
    expected = torch.nn.functional.layer_norm(x.to(dtype), (96,), *parameters, norm.eps)
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)  # one rounding
    assert (found == expected).float().mean() > 0.99


def test_unknown_norm_names_the_near_match():
    with pytest.raises(ValueError, match=r"unknown norm \(model_norm\) 'gain_only_layernorm'.*'gain_only_layer_norm'"):
        make_norm("gain_only_layernorm")
