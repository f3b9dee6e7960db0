"""The shapes that benchmarks run at, and the tensors that they start from."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moekit.routing import round_robin
from moekit.types import Routing


class Shape(NamedTuple):
    """T tokens of width D; E experts of width F, K of them per token; on a device, in a dtype."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    k: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> int:
        return self.tokens * self.k

    def random(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Draw a leaf tensor that wants a gradient, at the scale of a unit-variance product."""
        drawn = torch.randn(*size, device=self.device, dtype=self.dtype if dtype is None else dtype)
        return drawn.mul_(size[-2] ** -0.5).requires_grad_()

    def logits(self) -> Tensor:
        return self.random(self.tokens, self.experts, dtype=torch.float32)

    def balanced(self) -> Routing:
        """Deal assignments out in turn: capacity factor 1 then drops nothing, and every backend has equal work."""
        return round_robin(self.logits().detach(), k=self.k)


CPU_SHAPES = (
    Shape(2048, 256, 512, 8, 2),
    Shape(2048, 512, 512, 32, 4),
    Shape(4096, 512, 1024, 16, 2),
    Shape(512, 1024, 512, 64, 8),
)
CUDA_SHAPES = (
    Shape(16384, 768, 2048, 8, 2, "cuda", torch.bfloat16),
    Shape(16384, 2048, 1024, 64, 8, "cuda", torch.bfloat16),
)


def tiny(shape: Shape) -> Shape:
    """Shrink a shape for the run that only asks whether the body works."""
    return shape._replace(tokens=16, dim=16, hidden=32, experts=8, k=2)


def shape_id(shape: Shape) -> str:
    return f"{shape.device} T={shape.tokens} D={shape.dim} F={shape.hidden} E={shape.experts} K={shape.k}"


_needs_cuda = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
ON_CPU = [pytest.param(shape, id=shape_id(shape)) for shape in CPU_SHAPES]
ON_CUDA = [pytest.param(shape, id=shape_id(shape), marks=_needs_cuda) for shape in CUDA_SHAPES]
EVERY_SHAPE = [*ON_CPU, *ON_CUDA]
NARROW_AND_WIDE = [ON_CPU[0], ON_CPU[-1], *ON_CUDA]  # few experts and many
