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


def test_unknown_norm_names_the_near_match():
    with pytest.raises(ValueError, match=r"unknown norm \(model_norm\) 'gain_only_layernorm'.*'gain_only_layer_norm'"):
        make_norm("gain_only_layernorm")
