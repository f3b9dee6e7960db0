import math

import pytest
import torch

from moekit.lm.attention import Attention
from moekit.lm.norms import make_norm
from moekit.lm.rotary import ROTARIES, head_rotary, no_rotary


def naive_attention(attention: Attention, x: torch.Tensor, *, n_heads: int) -> torch.Tensor:
    """Head by head and query by query, with the softmax written out."""
    length, head_dim = x.shape[1], attention.head_dim
    q, k, v = (x @ attention.in_proj.weight.T).chunk(3, dim=-1)
    q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = (attention.rotate(t.reshape(*t.shape[:2], n_heads, head_dim)).flatten(2) for t in (q, k))
    y = torch.zeros_like(q)
    for head in range(n_heads):
        own = slice(head * head_dim, (head + 1) * head_dim)
        for i in range(length):
            scores = torch.einsum("bd,bjd->bj", q[:, i, own], k[:, : i + 1, own]) / math.sqrt(head_dim)
            y[:, i, own] = torch.einsum("bj,bjd->bd", scores.softmax(-1), v[:, : i + 1, own])
    return y @ attention.out_proj.weight.T


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rotate", ROTARIES.values())
@pytest.mark.parametrize(("hidden_dim", "n_heads"), [(24, 3), (26, 3), (8, 1)])
def test_equals_the_naive_loops(hidden_dim, n_heads, rotate, qk_norm):
    torch.manual_seed(0)
    attention = Attention(hidden_dim, n_heads, qk_norm=qk_norm, rotate=rotate).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 6, hidden_dim, dtype=torch.float64)
    torch.testing.assert_close(attention(x), naive_attention(attention, x, n_heads=n_heads), rtol=1e-10, atol=1e-10)


def test_qk_norm_spans_all_heads():
    attention = Attention(488, 12, qk_norm=True, norm=make_norm("gain_only_layer_norm"))
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    assert shapes == {
        "in_proj.weight": (1440, 488),
        "out_proj.weight": (488, 480),
        "q_norm.weight": (480,),
        "k_norm.weight": (480,),
    }


@pytest.mark.parametrize(
    ("rotate", "sees_order"), [(head_rotary, False), (no_rotary, False), (ROTARIES["rotary"], True)]
)
def test_order_of_earlier_tokens_matters_only_with_positions(rotate, sees_order):
    torch.manual_seed(0)
    attention = Attention(16, 2, rotate=rotate).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    swapped = x[:, [1, 0, 3, 2, 4]]
    assert torch.allclose(attention(x)[:, -1], attention(swapped)[:, -1]) is not sees_order


def test_reset_parameters_cuts_at_three_sigma_and_scales_with_depth():
    attention = Attention(64, 4)
    attention.reset_parameters(layer_index=7, generator=torch.Generator().manual_seed(0))
    for weight, std in ((attention.in_proj.weight, 1 / 8), (attention.out_proj.weight, 1 / 32)):
        assert weight.abs().max() <= 3 * std
        assert weight.std().item() == pytest.approx(0.9866 * std, rel=0.05)
