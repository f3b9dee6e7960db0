"""What the layer benchmark runs at: shapes of layers, and loads of experts."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

_FAR = 16.0  # added to a logit of unit variance it decides alone; its softmax, 1e-7, is no denormal number


class LayerShape(NamedTuple):
    """T tokens of width D; E experts of width F, K of them per token.

    Attributes:
        name: what tables call it.
        tokens: T.
        dim: D.
        hidden: F.
        experts: E.
        k: K.
    """

    name: str
    tokens: int
    dim: int
    hidden: int
    experts: int
    k: int

    @property
    def rows(self) -> int:
        """T K, the rows that experts get."""
        return self.tokens * self.k

    @property
    def flops(self) -> int:
        """Useful operations of a forward: 3 matrices, 2 operations each; a backward has twice as many."""
        return 6 * self.rows * self.dim * self.hidden


def _named(*shapes: LayerShape) -> Mapping[str, LayerShape]:
    return MappingProxyType({shape.name: shape for shape in shapes})


GPU_SHAPES = _named(
    LayerShape("olmoe-1b-7b", 16384, 2048, 1024, 64, 8),
    LayerShape("sonic-default", 32768, 4096, 1024, 128, 8),
    LayerShape("mixtral-8x7b", 8192, 4096, 14336, 8, 2),
    LayerShape("openlm-small", 16384, 768, 2048, 8, 2),
)
CPU_SHAPES = _named(
    LayerShape("cpu-8", 2048, 256, 512, 8, 2),
    LayerShape("cpu-32", 2048, 512, 512, 32, 4),
    LayerShape("cpu-16", 4096, 512, 1024, 16, 2),
    LayerShape("cpu-64", 512, 1024, 512, 64, 8),
)
LOADS = ("uniform", "zipf", "hot", "dead")


def shape_of(text: str) -> LayerShape:
    """Read a shape: one of the names, or T,D,F,E,K.

    Args:
        text: of a command line.

    Returns:
        LayerShape.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> shape_of("512,64,128,8,2").flops, shape_of("olmoe-1b-7b").experts
        (50331648, 64)
    """
    known = {**GPU_SHAPES, **CPU_SHAPES}
    if text in known:
        return known[text]
    parts = text.split(",")
    if len(parts) != 5 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"shape {text!r} is neither T,D,F,E,K, five whole numbers, nor one of {', '.join(known)}.")
    shape = LayerShape(text, *(int(part) for part in parts))
    if min(shape[1:]) < 1 or shape.k > shape.experts:
        raise ValueError(f"shape {text!r}: T, D, F, E and K are {shape[1:]}; expected positive ones with K <= E.")
    most = max(shape.tokens * shape.k * shape.dim, shape.experts * shape.dim * shape.hidden)
    if most >= 2**60:  # of numbers; more bytes than an address can count
        raise ValueError(f"shape {text!r}: a tensor of it has {most:,} numbers; expected fewer than {2**60:,}.")
    return shape


def load_offsets(load: str, shape: LayerShape) -> Tensor:
    """Say what to add to each expert's logits, of unit variance, so that experts are loaded in a certain way.

    uniform adds nothing: experts differ by chance. zipf adds -log(rank), a popularity like 1 / rank. hot sends every
    token to expert 0, and its other choices anywhere. dead leaves half of the experts, or E - K, without a token.

    Args:
        load: one of ``LOADS``.
        shape: of the layer.

    Returns:
        (E,) float32.

    Raises:
        ValueError: if there is no such load.

    Example:
        >>> load_offsets("dead", LayerShape("", 8, 8, 8, 4, 1))
        tensor([  0.,   0., -16., -16.])
    """
    if load not in LOADS:
        raise ValueError(f"load {load!r}; expected one of {', '.join(LOADS)}.")
    offsets = torch.zeros(shape.experts, device="cpu")
    if load == "zipf":
        return -torch.arange(1.0, shape.experts + 1, device="cpu").log()
    if load == "hot":
        offsets[0] = _FAR
    if load == "dead":
        offsets[max(shape.experts - shape.experts // 2, shape.k) :] = -_FAR
    return offsets
