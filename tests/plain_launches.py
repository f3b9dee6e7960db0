"""Compile the plain kernels of a layer for cards, with the tiles of the rule.

A program of its own, for what decides about descriptors is replaced in it: python tests/plain_launches.py CAPABILITY
PRODUCTS, and any more such pairs, where a capability is 80, 86, 90, 100 or 120, and products are bf16, ieee or tf32. It
prints, a line of JSON for each pair, the bytes of shared memory that each kernel takes, of gated experts and, but for
tf32, of others.
"""

import json
import sys
from typing import Any

import torch
from ring_launches import for_compiler

E, D, F, ROWS = 8, 512, 1024, 16384


def launches(products: str, capability: int, *, gated: bool) -> dict[str, Any]:
    """Decide the launches of a layer, with descriptors where such a card has them."""
    from moekit.experts.activations import GELU_MLP, SWIGLU
    from moekit.experts.kernels import _gemms_triton, _hidden_triton
    from moekit.experts.kernels._tiles_triton import matrices
    from moekit.experts.tiles import LayerSize, ruled_tiles

    for module in (_gemms_triton, _hidden_triton):
        module.has_tma = lambda device: capability >= 90  # type: ignore[attr-defined]
    for decide in (_gemms_triton._rows_launch, _gemms_triton._weight_launch, _hidden_triton._up_launch):
        decide.cache_clear()  # of launches for another card
    dtype, precision = (torch.bfloat16, "ieee") if products == "bf16" else (torch.float32, products)
    narrow, parts, nowhere = capability in (86, 120), 2 if gated else 1, torch.device("cpu")
    tiles = ruled_tiles(LayerSize(dtype, ROWS, E, D, F, gated, capability // 10, narrow, precision))

    def weights(depth: int, width: int, *, turned: bool) -> Any:
        """Return matrices in the order of memory in which they are multiplied."""
        turned = {"bf16": turned, "ieee": False, "tf32": True}[products]
        axes = (width, depth) if turned else (depth, width)
        matrix = torch.empty(E, *axes, device="meta", dtype=dtype)
        return matrices(matrix.transpose(1, 2) if turned else matrix)

    def product(width: int, matrix: Any, tile: Any, *, two: bool = False) -> Any:
        return _gemms_triton._rows_launch(nowhere, dtype, (ROWS, width), matrix, two, False, True, precision, tile)

    def weight(left: int, right: int, parts: int, tile: Any) -> Any:
        across = products == "tf32" and capability >= 90
        return _gemms_triton._weight_launch(
            nowhere, dtype, (ROWS, left), (ROWS, right), E, parts, False, True, across, True, precision, tile
        )

    of_up = weights(D, F, turned=False), SWIGLU if gated else GELU_MLP
    return {
        "up": _hidden_triton._up_launch(
            nowhere, dtype, (ROWS, D), *of_up, False, True, True, True, precision, tiles.up
        ),
        "down": product(F, weights(F, D, turned=False), tiles.down),
        "grad_hidden": product(D, weights(D, F, turned=True), tiles.grad_hidden),
        "grad_rows": product(parts * F, weights(F, D, turned=True), tiles.grad_rows, two=gated),
        "grad_up": weight(D, parts * F, parts, tiles.grad_up),
        "grad_down": weight(F, D, 1, tiles.grad_down),
    }  # fmt: skip


def shared_memory(launch: Any, capability: int, dtype: str) -> int:
    """Compile a launch of a plain kernel, and return its bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def pointer(name: str) -> str:
        return "*i32" if name == "schedule" else f"*{dtype}"

    source = ASTSource(launch.kernel, **for_compiler(launch, pointer, dtype=dtype, whole=True))
    options = {name: launch.constants[name] for name in ("num_warps", "num_stages")}
    found: int = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared
    return found


def of_card(capability: int, products: str) -> list[dict[str, int]]:
    """Return what the kernels of each kind of experts take, by name."""
    dtype = "bf16" if products == "bf16" else "fp32"
    kinds = [launches(products, capability, gated=gated) for gated in (True, False)[: 1 if products == "tf32" else 2]]
    return [{name: shared_memory(each, capability, dtype) for name, each in kind.items()} for kind in kinds]


if __name__ == "__main__":
    for capability, products in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        print(json.dumps(of_card(int(capability), products)))
