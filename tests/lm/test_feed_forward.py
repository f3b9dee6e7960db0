import math

import pytest
import torch

from moekit.lm.feed_forward import FEED_FORWARDS, make_feed_forward
from moekit.types import LayerOutput


def test_gated_width_is_that_of_the_openlm_table():
    widths = {96: 256, 192: 512, 288: 768, 488: 1536, 768: 2048, 1024: 2816, 2048: 5632, 4096: 11008}
    with torch.device("meta"):
        assert {d: make_feed_forward("swiglu")(d).w3.in_features for d in widths} == widths


@pytest.mark.parametrize("name", ["swiglu", "swiglu_torch", "geglu"])
def test_gated_network_equals_its_formula(name):
    torch.manual_seed(0)
    ffn = make_feed_forward(name)(12).double()
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    gate, value = x @ ffn.w12.weight[:256].T, x @ ffn.w12.weight[256:].T
    gelu, silu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))), gate / (1 + torch.exp(-gate))
    active = gelu if name == "geglu" else silu
    torch.testing.assert_close(ffn(x).y, (active * value) @ ffn.w3.weight.T)


def test_gelu_network_equals_its_formula():
    torch.manual_seed(0)
    ffn = make_feed_forward("gelu")(12).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    h = x @ ffn.w1.weight.T
    assert h.shape == (5, 48)
    torch.testing.assert_close(ffn(x).y, (h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))) @ ffn.w2.weight.T)


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_dense_output_has_y_alone_and_ignores_token_arguments(name):
    ffn = make_feed_forward(name)(8)
    x = torch.randn(2, 3, 8)
    output = ffn(x, token_ids=torch.zeros(2, 3, dtype=torch.int64), token_mask=torch.zeros(2, 3, dtype=torch.bool))
    assert output == LayerOutput(output.y)
    assert torch.equal(output.y, ffn(x).y)


@pytest.mark.parametrize(("name", "first", "last", "fan_in"), [("swiglu", "w12", "w3", 256), ("gelu", "w1", "w2", 256)])
def test_reset_parameters_scales_the_output_with_depth(name, first, last, fan_in):
    ffn = make_feed_forward(name)(64)
    ffn.reset_parameters(layer_index=1, generator=torch.Generator().manual_seed(0))
    for weight, std in ((getattr(ffn, first).weight, 1 / 8), (getattr(ffn, last).weight, 1 / math.sqrt(4 * fan_in))):
        assert weight.abs().max() <= 3 * std
        assert weight.std().item() == pytest.approx(0.9866 * std, rel=0.05)


def test_unknown_name_lists_near_match():
    with pytest.raises(ValueError, match=r"dense feed-forward \(ffn_type\) 'swigl'; did you mean 'swiglu'"):
        make_feed_forward("swigl")
