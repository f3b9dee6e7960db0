"""Launches of the kernels for Hopper whose warps do one thing each; as a program, it compiles them all.

In a process of its own, for the compiler has something to say about itself when its process ends.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moekit.experts.activations import CLAMPED_SWIGLU, GELU_MLP, SWIGLU, Activation
from moekit.experts.tiles import LayerSize, ruled_tiles

NAMES = (
    "up", "up, clamped, with biases", "up, not gated, with bias", "up, hidden rows alone", "up, pre-activation alone",
    "rows, with bias", "rows, two matrices", "weights", "weights, tall", "back", "back, not gated",
)  # fmt: skip
E, D, F = 8, 512, 1024
NOWHERE = torch.device("cpu")
TILE = ruled_tiles(LayerSize(torch.bfloat16, 4096, E, D, F, gated=True, capability=9)).up


def launches() -> dict[str, tuple[Any, list[str]]]:
    from moekit.experts.kernels._ring_back_triton import back_launch
    from moekit.experts.kernels._ring_rows_triton import rows_launch
    from moekit.experts.kernels._ring_up_triton import up_launch
    from moekit.experts.kernels._ring_weights_triton import weight_launch
    from moekit.experts.kernels._tiles_triton import matrices

    plain, turned = matrices(torch.empty(E, D, F)), matrices(torch.empty(E, F, D).transpose(1, 2))
    rows = (4096, D)

    def up(activation: Activation, weights: Any, *, biased: bool, pre: bool = True, hidden: bool = True) -> Any:
        return up_launch(
            NOWHERE, rows, weights,
            activation=activation, biased=biased, keep_pre=pre, keep_hidden=hidden, tile=TILE,
        )  # fmt: skip

    def back(activation: Activation, weights: Any) -> tuple[Any, list[str]]:
        launch, _ = back_launch(NOWHERE, rows, weights, activation=activation, num_assignments=4000, tile=TILE)
        return launch, ["*bf16", "*bf16", "*fp32", "*fp32", "*i64", "*i32"]

    return {
        "back": back(SWIGLU, turned),
        "back, not gated": back(GELU_MLP, plain),
        "up": (up(SWIGLU, plain, biased=False), ["*i32"]),
        "up, clamped, with biases": (up(CLAMPED_SWIGLU, turned, biased=True), ["*bf16", "*bf16", "*i32"]),
        "up, not gated, with bias": (up(GELU_MLP, plain, biased=True), ["*bf16", "*i32"]),
        "up, hidden rows alone": (up(SWIGLU, plain, biased=False, pre=False), ["*i32"]),
        "up, pre-activation alone": (up(GELU_MLP, turned, biased=False, hidden=False), ["*i32"]),
        "rows, with bias": (rows_launch(NOWHERE, rows, plain, two=False, biased=True, tile=TILE), ["*bf16", "*i32"]),
        "rows, two matrices": (
            rows_launch(NOWHERE, (4096, 2 * D), turned, two=True, biased=False, tile=TILE), ["*i32"],
        ),
        "weights": (
            weight_launch(NOWHERE, (4096, D), (4096, 2 * F), E, size=(D, F), parts=2, tall=False, tile=TILE), ["*i32"],
        ),
        "weights, tall": (
            weight_launch(NOWHERE, (4096, 2 * F), (4096, D), E, size=(F, D), parts=2, tall=True, tile=TILE), ["*i32"],
        ),
    }  # fmt: skip


def for_compiler(launch: Any, pointer: Callable[[str], str], *, dtype: str, whole: bool) -> dict[str, dict[Any, Any]]:
    """Say what a compiler asks of a launch: signature, constants, and which arguments 16 divides.

    ``pointer`` gives the type of a pointer by its name; descriptors are of ``dtype``. Numbers are looked at if they are
    to be ``whole``.
    """
    from moekit._operators_triton import AGAIN, POINTER, Blocks

    names = launch.kernel.arg_names
    signature, attributes = dict.fromkeys(names, "constexpr"), {}
    constants = {(names.index(name),): value for name, value in launch.constants.items() if name in names}
    for place, (name, argument) in enumerate(zip(names, launch.arguments, strict=False)):
        if argument is POINTER or argument is AGAIN:
            signature[name], attributes[place,] = pointer(name), [["tt.divisibility", 16]]
        elif isinstance(argument, Blocks):
            layout = "" if argument.layout is None else f",{argument.layout!r}"
            signature[name] = f"tensordesc<{dtype}[{', '.join(map(str, argument.block))}]{layout}>"
        elif argument is None:
            constants[place,] = None
        else:
            signature[name] = "i32"
            if whole and argument % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    return {"signature": signature, "constexprs": constants, "attrs": attributes}


def compiled(launch: Any, dtypes: list[str]) -> Any:
    """Compile a launch for Hopper, with 16-bit descriptors and pointers of dtypes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    pointers = iter(dtypes)
    source = GluonASTSource(
        launch.kernel, **for_compiler(launch, lambda name: next(pointers), dtype="bf16", whole=False)
    )
    options = {"num_warps": launch.constants["num_warps"], "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


if __name__ == "__main__":
    for name, (launch, dtypes) in launches().items():
        (Path(sys.argv[1]) / f"{name}.cubin").write_bytes(compiled(launch, dtypes).asm["cubin"])
