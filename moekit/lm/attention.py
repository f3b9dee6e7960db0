"""Causal self-attention with OpenLM's parameter names, on torch's scaled dot-product attention."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moekit.lm.initialization import output_std, truncated_normal_
from moekit.lm.norms import LayerNorm
from moekit.lm.rotary import half_split_rotary


class Attention(nn.Module):
    """Multi-head causal self-attention without biases.

    One projection gives queries, keys and values. A head is ``hidden_dim // n_heads`` wide, rounded down, so the
    attention may be narrower than the model. With ``qk_norm``, queries and keys are normalized over all heads together,
    before the split into heads and before the rotation. The weights are torch's default until ``reset_parameters``.

    Letters beside the axis legend: B batch, L sequence length, A = n_heads * head_dim attention width.

    Args:
        hidden_dim: D.
        n_heads: number of heads.
        qk_norm: normalize queries and keys.
        norm: constructor of the norm over A, used if ``qk_norm``.
        rotate: position embedding of queries and keys (B, L, H, Dh); one of :mod:`moekit.lm.rotary`.

    Example:
        >>> attention = Attention(488, 12)
        >>> attention.in_proj.weight.shape, attention.out_proj.weight.shape  # 12 heads of 40
        (torch.Size([1440, 488]), torch.Size([488, 480]))
        >>> attention(torch.randn(2, 5, 488)).shape
        torch.Size([2, 5, 488])
    """

    def __init__(
        self,
        hidden_dim: int,
        n_heads: int,
        *,
        qk_norm: bool = False,
        norm: Callable[[int], nn.Module] = LayerNorm,
        rotate: Callable[[Tensor], Tensor] = half_split_rotary,
    ) -> None:
        super().__init__()
        self.head_dim = hidden_dim // n_heads
        width = n_heads * self.head_dim
        self.in_proj = nn.Linear(hidden_dim, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, hidden_dim, bias=False)
        self.q_norm = norm(width) if qk_norm else nn.Identity()
        self.k_norm = norm(width) if qk_norm else nn.Identity()
        self.rotate = rotate

    def reset_parameters(self, *, layer_index: int = 0, generator: torch.Generator | None = None) -> None:
        """Draw both projections anew.

        Args:
            layer_index: zero-based depth; deeper layers get a smaller output projection.
            generator: source of randomness; None is torch's global one.
        """
        hidden_dim = self.in_proj.in_features
        truncated_normal_(self.in_proj.weight, std=1.0 / math.sqrt(hidden_dim), generator=generator)
        out_std = output_std(hidden_dim, layer_index=layer_index)
        truncated_normal_(self.out_proj.weight, std=out_std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Let each token attend to itself and to the tokens before it.

        Args:
            x: (B, L, D).

        Returns:
            (B, L, D).
        """
        q, k, v = self.in_proj(x).chunk(3, dim=-1)  # (B, L, A) each
        split = partial(rearrange, pattern="b l (heads dim) -> b l heads dim", dim=self.head_dim)
        q, k, v = split(self.q_norm(q)), split(self.k_norm(k)), split(v)
        # Norms may return float32 under autocast, and the attention wants one dtype.
        q, k = self.rotate(q).to(v.dtype), self.rotate(k).to(v.dtype)
        q, k, v = (rearrange(t, "b l heads dim -> b heads l dim") for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(y, "b heads l dim -> b l (heads dim)"))
