"""Gated experts as Hugging Face models store them: gate and up in one tensor, and every matrix (E, out, in)."""

from typing import NamedTuple

import torch
from torch import Tensor

from moekit.experts.ffns import GatedParams


class PackedGatedParams(NamedTuple):
    """Parameters of gated experts, two tensors of matrices that rows are multiplied by transposed.

    Attributes:
        gate_up: (E, 2F, D), the F rows of the projection that goes through the activation, then those of the other.
        down: (E, D, F).

    Example:
        >>> from moekit.experts import init_gated
        >>> packed = pack_gated(init_gated(2, 4, 8))
        >>> packed.gate_up.shape, packed.down.shape
        (torch.Size([2, 16, 4]), torch.Size([2, 4, 8]))
    """

    gate_up: Tensor
    down: Tensor


def pack_gated(params: GatedParams) -> PackedGatedParams:
    """Copy the parameters of gated experts into the form of Hugging Face's. Differentiable.

    Args:
        params: of E experts.

    Returns:
        PackedGatedParams.

    Example:
        >>> from moekit.experts import init_gated
        >>> [tuple(p.shape) for p in pack_gated(init_gated(2, 4, 8))]
        [(2, 16, 4), (2, 4, 8)]
    """
    gate_up = torch.cat([params.gate, params.up], 2).transpose(1, 2).contiguous()
    return PackedGatedParams(gate_up, params.down.transpose(1, 2).contiguous())


def unpack_gated(params: PackedGatedParams) -> GatedParams:
    """View packed parameters as those of every expert network: no copies. Differentiable.

    Args:
        params: of E experts.

    Returns:
        GatedParams, three transposed views.

    Example:
        >>> packed = PackedGatedParams(torch.arange(4.0).reshape(1, 4, 1), torch.zeros(1, 1, 2))
        >>> unpack_gated(packed).gate
        tensor([[[0., 1.]]])
    """
    gate, up = params.gate_up.transpose(1, 2).chunk(2, 2)
    return GatedParams(gate, up, params.down.transpose(1, 2))
