"""Dense feed-forward networks. Each is called like an MoE layer and returns the same ``LayerOutput``.

Their weights are torch's default until ``reset_parameters`` draws OpenLM's; the language model calls it.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.lm.initialization import output_std, truncated_normal_
from moekit.lookup import look_up
from moekit.types import LayerOutput


class GatedFeedForward(nn.Module):
    """A gated network without biases: ``w3(activation(gate) * value)``, with gate and value from one matrix ``w12``.

    Parameter names are those of OpenLM's SwiGLU; the gate is the first half of ``w12``. Its hidden width is 8/3 of the
    model's, rounded up to a multiple of 256.

    Args:
        hidden_dim: D.
        activation: silu makes it SwiGLU, gelu GeGLU.

    Example:
        >>> ffn = GatedFeedForward(48, activation=F.silu)
        >>> ffn(torch.randn(2, 5, 48)).y.shape
        torch.Size([2, 5, 48])

    References:
        GLU Variants Improve Transformer, Shazeer, https://arxiv.org/abs/2002.05202, 2020.
    """

    def __init__(self, hidden_dim: int, *, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        inner_dim = 256 * math.ceil((8 * hidden_dim // 3) / 256)
        self.w12 = nn.Linear(hidden_dim, 2 * inner_dim, bias=False)
        self.w3 = nn.Linear(inner_dim, hidden_dim, bias=False)
        self.activation = activation

    def reset_parameters(self, *, layer_index: int = 0, generator: torch.Generator | None = None) -> None:
        """Draw both matrices anew; deeper layers get a smaller ``w3``."""
        truncated_normal_(self.w12.weight, std=1.0 / math.sqrt(self.w12.in_features), generator=generator)
        out_std = output_std(self.w3.in_features, layer_index=layer_index)
        truncated_normal_(self.w3.weight, std=out_std, generator=generator)

    def forward(self, x: Tensor, *, token_ids: Tensor | None = None, token_mask: Tensor | None = None) -> LayerOutput:
        """Apply the network to each token.

        Args:
            x: (..., D).
            token_ids: ignored; MoE layers may route by it.
            token_mask: ignored; MoE layers leave masked tokens out of their statistics.

        Returns:
            The output (..., D) as ``y``, and nothing else.
        """
        gate, value = self.w12(x).chunk(2, dim=-1)
        return LayerOutput(self.w3(self.activation(gate) * value))


class FeedForward(nn.Module):
    """A network of two matrices without biases, four times as wide inside: ``w2(gelu(w1(x)))``, with the exact GELU.

    Args:
        hidden_dim: D.

    Example:
        >>> FeedForward(8).w1.weight.shape
        torch.Size([32, 8])
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_dim, 4 * hidden_dim, bias=False)
        self.w2 = nn.Linear(4 * hidden_dim, hidden_dim, bias=False)

    def reset_parameters(self, *, layer_index: int = 0, generator: torch.Generator | None = None) -> None:
        """Draw both matrices anew; deeper layers get a smaller ``w2``."""
        truncated_normal_(self.w1.weight, std=1.0 / math.sqrt(self.w1.in_features), generator=generator)
        out_std = output_std(self.w2.in_features, layer_index=layer_index)
        truncated_normal_(self.w2.weight, std=out_std, generator=generator)

    def forward(self, x: Tensor, *, token_ids: Tensor | None = None, token_mask: Tensor | None = None) -> LayerOutput:
        """Apply the network to each token.

        Args:
            x: (..., D).
            token_ids: ignored; MoE layers may route by it.
            token_mask: ignored; MoE layers leave masked tokens out of their statistics.

        Returns:
            The output (..., D) as ``y``, and nothing else.
        """
        return LayerOutput(self.w2(F.gelu(self.w1(x))))


FEED_FORWARDS: dict[str, Callable[[int], nn.Module]] = {
    "swiglu": partial(GatedFeedForward, activation=F.silu),
    "swiglu_torch": partial(GatedFeedForward, activation=F.silu),  # upstream: the same map without a fused kernel
    "geglu": partial(GatedFeedForward, activation=F.gelu),
    "gelu": FeedForward,
}


def make_feed_forward(name: str) -> Callable[[int], nn.Module]:
    """Return the constructor of a dense feed-forward network by name.

    Args:
        name: ``swiglu`` (or ``swiglu_torch``, the same), ``geglu`` or ``gelu``.

    Returns:
        A function from the model's width D to a module ``(x, *, token_ids=None, token_mask=None) -> LayerOutput``.

    Raises:
        ValueError: if the name is unknown.

    Example:
        >>> make_feed_forward("swiglu")(288).w12.weight.shape
        torch.Size([1536, 288])
    """
    return look_up(FEED_FORWARDS, name, what="dense feed-forward (ffn_type)")
