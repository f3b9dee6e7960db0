"""Normalization layers under OpenLM's names (its flag ``--model-norm``). Every eps is 1e-5."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.autocast import autocast_dtype, outside_autocast
from moekit.lookup import look_up

EPS = 1e-5


class LayerNorm(nn.LayerNorm):
    """A LayerNorm whose gradients of gain and bias are exact on the CPU too, also of tokens in 16 bits.

    There torch adds them up row by row in the dtype of the tokens, so that a long batch loses most of a sum. Here such
    tokens are normalized in float32, and the result is rounded.

    Example:
        >>> LayerNorm(4)(torch.ones(2, 4, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., D) over its last axis."""
        return _layer_norm(x, self, self.weight, self.bias)


class LowPrecisionLayerNorm(LayerNorm):
    """A LayerNorm that runs in the autocast dtype, where autocast would run it in float32.

    Outside autocast it is the ordinary LayerNorm.

    Example:
        >>> norm = LowPrecisionLayerNorm(4)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     norm(torch.ones(2, 4)).dtype
        torch.bfloat16
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., D) over its last axis."""
        device = x.device.type
        dtype = autocast_dtype(device)
        if dtype is None:
            return super().forward(x)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        with outside_autocast(device):
            return _layer_norm(x.to(dtype), self, weight, bias)


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square, computed in at least float32, times a gain.

    References:
        Root Mean Square Layer Normalization, Zhang and Sennrich, https://arxiv.org/abs/1910.07467, 2019.

    Example:
        >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, 3.0])).tolist()
        [1.0, 1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., D) over its last axis."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.normalized_shape, eps=self.eps).to(x.dtype) * self.weight


def adds_in_16_bits(x: Tensor) -> bool:
    """Say whether some of torch's backwards add up gradients of such a tensor in its own 16 bits: on a CPU they do.

    Args:
        x: any tensor.

    Example:
        >>> adds_in_16_bits(torch.ones(1)), adds_in_16_bits(torch.ones(1).half())
        (False, True)
    """
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def _layer_norm(x: Tensor, norm: nn.LayerNorm, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if not adds_in_16_bits(x) or weight is None:
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
    bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), norm.normalized_shape, weight.float(), bias, norm.eps).to(x.dtype)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "default_layer_norm": partial(LayerNorm, eps=EPS),
    "gain_only_layer_norm": partial(LayerNorm, eps=EPS, bias=False),
    "no_wb_layer_norm": partial(LayerNorm, eps=EPS, elementwise_affine=False),
    "lp_layer_norm": partial(LowPrecisionLayerNorm, eps=EPS),
    "gain_only_lp_layer_norm": partial(LowPrecisionLayerNorm, eps=EPS, bias=False),
    "rms_norm": partial(RMSNorm, eps=EPS),
}


def make_norm(name: str) -> Callable[[int], nn.Module]:
    """Return the constructor of a norm by its OpenLM name.

    Args:
        name: ``default_layer_norm`` (gain and bias), ``gain_only_layer_norm``, ``no_wb_layer_norm`` (neither),
            ``lp_layer_norm`` and ``gain_only_lp_layer_norm`` (the same in the autocast dtype), or ``rms_norm``.

    Returns:
        A function from a width D to a module over (..., D).

    Raises:
        ValueError: if the name is unknown.

    Example:
        >>> norm = make_norm("gain_only_layer_norm")(4)
        >>> [name for name, _ in norm.named_parameters()]
        ['weight']

    References:
        OpenLM, open_lm/norms.py, https://github.com/mlfoundations/open_lm, 2023.
    """
    return look_up(NORMS, name, what="norm (model_norm)")
