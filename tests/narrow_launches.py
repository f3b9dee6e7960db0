"""Compile the plain kernels of a layer for a card of little shared memory, with the tiles of the rule.

A program of its own, for what decides about descriptors is replaced in it: python tests/narrow_launches.py CAPABILITY,
86 or 120. It prints the bytes of shared memory that each kernel takes, as JSON.
"""

import json
import sys
from typing import Any

import torch
from ring_launches import for_compiler

E, D, F = 8, 512, 1024


def launches(dtype: torch.dtype, capability: int, rows: int) -> dict[str, Any]:
    """Decide the launches of a layer of so many rows, with descriptors where such a card has them."""
    from moekit.experts.activations import SWIGLU
    from moekit.experts.kernels import _gemms_triton, _hidden_triton
    from moekit.experts.kernels._tiles_triton import matrices
    from moekit.experts.tiles import LayerSize, ruled_tiles

    for module in (_gemms_triton, _hidden_triton):
        module.has_tma = lambda device: capability >= 90  # type: ignore[attr-defined]
    size = LayerSize(dtype, rows, E, D, F, gated=True, capability=capability // 10, narrow=True)
    tiles, nowhere = ruled_tiles(size), torch.device("cpu")
    up, down = (matrices(torch.empty(E, *axes, device="meta", dtype=dtype)) for axes in ((D, F), (F, D)))
    of_up, of_down = (
        matrices(torch.empty(E, *axes, device="meta", dtype=dtype).transpose(1, 2)) for axes in ((D, F), (F, D))
    )

    def product(width: int, weights: Any, tile: Any, *, two: bool = False) -> Any:
        return _gemms_triton._rows_launch(nowhere, dtype, (rows, width), weights, two, False, True, "ieee", tile)

    def weight(left: int, right: int, parts: int, tile: Any) -> Any:
        shapes = (rows, left), (rows, right)
        return _gemms_triton._weight_launch(nowhere, dtype, *shapes, E, parts, False, True, True, "ieee", tile)

    return {
        "up": _hidden_triton._up_launch(
            nowhere, dtype, (rows, D), up, SWIGLU, False, True, True, True, "ieee", tiles.up
        ),
        "down": product(F, down, tiles.down),
        "grad_hidden": product(D, of_down, tiles.grad_hidden),
        "grad_rows": product(2 * F, of_up, tiles.grad_rows, two=True),
        "grad_up": weight(D, 2 * F, 2, tiles.grad_up),
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


if __name__ == "__main__":
    capability = int(sys.argv[1])
    decided = launches(torch.bfloat16, capability, 16384)
    print(json.dumps({name: shared_memory(launch, capability, "bf16") for name, launch in decided.items()}))
