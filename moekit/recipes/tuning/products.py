"""The six products of a fused layer, each alone on operands like the layer's own."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.experts.activations import GELU_MLP, SWIGLU
from moekit.experts.tiles import LayerSize, LayerTiles, Tile
from moekit.recipes.tuning.candidates import ROW_PRODUCTS

_TOKENS = 4096  # rows are copies of that many; more would change nothing but the memory


class Operands(NamedTuple):
    """What the products of a layer read. R rows in groups that begin at multiples of a number; zero in between.

    Attributes:
        sizes: (E,) int32, multiples of the alignment.
        total: their sum; rows from there on belong to nobody.
        rows: (R, D), of the tokens.
        hidden: (R, F).
        grad_rows: (R, D), of the output.
        grad_pre: (R, P F), of the pre-activation, and stands for that too; P is 2 for gated experts.
        ups: gate and up, or up alone, (E, D, F) each.
        down: (E, F, D).
        weights: (N,) float32, of the assignments.
        assignments: (R,) int64, of each row; -1 for a row of nobody.
    """

    sizes: Tensor
    total: int
    rows: Tensor
    hidden: Tensor
    grad_rows: Tensor
    grad_pre: Tensor
    ups: tuple[Tensor, ...]
    down: Tensor
    weights: Tensor
    assignments: Tensor


def draw_operands(size: LayerSize, *, align: int, device: torch.device, like: Operands | None = None) -> Operands:
    """Draw operands for a routing in which every expert is equally likely. Same sizes give the same numbers.

    Synchronises with the host.

    Args:
        size: of the layer.
        align: of the groups.
        device: to compute on.
        like: operands of the same size with another ``align``, whose matrices are taken.

    Returns:
        Operands.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device, dtype=size.dtype)
    experts = torch.randint(size.experts, (size.assignments,), generator=generator, device=device)
    sizes, places, num_rows = _aligned(experts, size.experts, align)
    tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
    tokens[places] = torch.arange(size.assignments, device=device) % _TOKENS
    assignments = tokens.new_full((num_rows,), -1)
    assignments[places] = torch.arange(size.assignments, device=device)
    padding = (assignments < 0).unsqueeze(1)
    parts = 2 if size.gated else 1
    widths = (size.dim, size.hidden, size.dim, parts * size.hidden)
    num_tokens = min(_TOKENS, size.assignments)
    rows, hidden, grad_rows, grad_pre = (draw(num_tokens, n)[tokens].masked_fill_(padding, 0.0) for n in widths)
    if like is None:
        ups = tuple(draw(size.experts, size.dim, size.hidden) for _ in range(parts))
        down = draw(size.experts, size.hidden, size.dim)
    else:
        ups, down = like.ups, like.down
    weights = torch.rand(size.assignments, generator=generator, device=device)
    total = int(sizes.sum())
    return Operands(sizes, total, rows, hidden, grad_rows, grad_pre, ups, down, weights, assignments)


def _aligned(experts: Tensor, num_experts: int, align: int) -> tuple[Tensor, Tensor, int]:
    """Return aligned sizes (E,), the row of each assignment (N,), and how many rows the layer allocates."""
    from moekit.experts.kernels import _tiles_triton

    counts = experts.bincount(minlength=num_experts)
    sizes = (counts + align - 1) // align * align
    shifts = (sizes.cumsum(0) - sizes) - (counts.cumsum(0) - counts)
    order = experts.argsort(stable=True)
    places = torch.empty_like(experts)
    places[order] = torch.arange(len(experts), device=experts.device) + shifts[experts[order]]
    return sizes.to(torch.int32), places, _tiles_triton.aligned_rows(len(experts), num_experts, align)


def schedule_of(operands: Operands, height: int) -> Any:
    """Return the schedule of tiles of ``height`` rows.

    Args:
        operands: of the products.
        height: m of the tiles.

    Returns:
        A ``Schedule`` of the kernels.
    """
    from moekit.experts.kernels import _tiles_triton

    return _tiles_triton.make_schedule(operands.sizes, operands.rows.shape[0], height)


@dataclass(frozen=True)
class ProductRun:
    """One product, ready to run: calling it computes it as the fused layer does.

    Attributes:
        product: a field of ``LayerTiles``.
        tile: of the product.
        operands: for gradients of matrices with groups aligned at multiples of the tile's ``k``.
        plan: ``schedule_of(operands, tile.m)``.
        precision: of float32 products, "ieee" or "tf32".
    """

    product: str
    tile: Tile
    operands: Operands
    plan: Any
    precision: str

    def __call__(self) -> Tensor:
        """Compute rows (R, ...), of which those from ``operands.total`` on are anything; or gradients of matrices.

        The gradient of the hidden rows goes on to the pre-activations (R, P F), as it does in the layer, on Hopper in
        the same kernel.
        """
        from moekit.experts.kernels import _back_triton, _gemms_triton, _hidden_triton

        o, parts = self.operands, len(self.operands.ups)
        activation = SWIGLU if parts == 2 else GELU_MLP
        if self.product == "grad_hidden":
            return _back_triton.back_through(
                o.grad_rows, self.plan, o.down, o.grad_pre, o.weights, o.assignments,
                activation=activation, precision=self.precision, tile=self.tile,
            )[1]  # fmt: skip
        if self.product == "up":
            return _hidden_triton.up(
                o.rows, self.plan, o.ups, activation=activation, precision=self.precision, tile=self.tile
            )[1]
        rows = partial(_gemms_triton.grouped_rows, precision=self.precision, tile=self.tile)
        weight = partial(_gemms_triton.grouped_weight, aligned=True, precision=self.precision, tile=self.tile)
        runs = {
            "down": lambda: rows(o.hidden, self.plan, (o.down,)),
            "grad_rows": lambda: rows(o.grad_pre, self.plan, tuple(up.transpose(1, 2) for up in o.ups)),
            "grad_up": lambda: weight(o.rows, self.plan, o.grad_pre, parts=parts),
            "grad_down": lambda: weight(o.hidden, self.plan, o.grad_rows),
        }
        return runs[self.product]()


def products_flops(size: LayerSize) -> dict[str, int]:
    """Count the useful operations of each product: 2 N D F, twice that where there are two up-projections.

    Args:
        size: of the layer.

    Returns:
        Product to number.

    Example:
        >>> products_flops(LayerSize(torch.bfloat16, 4, 2, 8, 16, gated=True))["up"]
        2048
    """
    once = 2 * size.assignments * size.dim * size.hidden
    both = once * (2 if size.gated else 1)
    return dict(zip(LayerTiles._fields, (both, once, once, both, both, once), strict=True))


def differs(found: Tensor, expected: Tensor, *, product: str, total: int) -> str:
    """Say by how much two outputs of a product differ, if it is more than the order of sums explains.

    Args:
        found: of one tile.
        expected: of another.
        product: a field of ``LayerTiles``.
        total: how many rows belong to somebody.

    Returns:
        A text; empty if they agree.

    Example:
        >>> differs(torch.ones(3, 2), torch.full((3, 2), 2.0), product="down", total=3)
        'its output is wrong: off by 1, where entries are of size 2'
    """
    if product in ROW_PRODUCTS:
        found, expected = found[:total], expected[:total]
    tolerance = max(4 * torch.finfo(expected.dtype).eps, 1e-4)
    scale = expected.abs().mean(dtype=torch.float32).item() if expected.numel() else 0.0
    if torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale):
        return ""
    most = (found - expected).abs().max().item()
    return f"its output is wrong: off by {most:.3g}, where entries are of size {scale:.3g}"


def miniature(size: LayerSize) -> LayerSize:
    """Shrink a layer to one whose kernels are compiled to the same code.

    Triton compiles a whole number into the code by whether it is 1 and whether 16 divides it, and the launchers look
    at whether a tile's columns, 256 at most, divide a width; so widths keep their rest by 256.

    Args:
        size: of the layer.

    Returns:
        LayerSize.

    Example:
        >>> miniature(LayerSize(torch.bfloat16, 131072, 64, 2048, 1000, gated=True, capability=9))[1:5]
        (64, 16, 256, 488)
    """
    dim, hidden = (width if width <= 512 else 256 + width % 256 for width in (size.dim, size.hidden))
    experts = size.experts if size.experts <= 16 else 16 if size.experts % 16 == 0 else 17
    return size._replace(assignments=min(64, size.assignments), experts=experts, dim=dim, hidden=hidden)
