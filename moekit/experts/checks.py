"""What every expert layer refuses, whatever runs it."""

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moekit.autocast import dtype_in_products
from moekit.checks import check_devices
from moekit.experts.activations import CLAMPED_SWIGLU, FUNCTIONS, Activation
from moekit.experts.keep import Keep
from moekit.operators import HAS_TRITON, constant_in_graphs
from moekit.types import Groups


def check_activation(name: str, activation: Activation, functions: Sequence[str] = FUNCTIONS) -> None:
    """Refuse what is no activation, or none that a layer knows.

    Args:
        name: of the layer, for the message.
        activation: as ``SWIGLU``.
        functions: that the layer knows.

    Raises:
        ValueError: if it is none of them, clamped without a gate, or has constants that its function would not use.

    Example:
        >>> from moekit.experts import SWIGLU
        >>> check_activation("a layer", SWIGLU)
        >>> check_activation("a layer", "swiglu")
        Traceback (most recent call last):
        ValueError: a layer: activation = 'swiglu'; expected an Activation, such as moekit.experts.SWIGLU, with a \
function of silu, gelu, gelu_tanh, relu, relu2, clamped_swiglu. For any other compose the layer of `expert_layer` and \
an expert network of your own over `grouped` or `triton`.
    """
    if not isinstance(activation, Activation) or activation.function not in functions:
        raise ValueError(
            f"{name}: activation = {activation!r}; expected an Activation, such as moekit.experts.SWIGLU, with a "
            f"function of {', '.join(functions)}. For any other compose the layer of `expert_layer` and an expert "
            f"network of your own over `grouped` or `triton`."
        )
    clamped = activation.function == CLAMPED_SWIGLU.function
    if clamped and not activation.gated:
        raise ValueError(f"{name}: {activation} has no gate, and clamps one; expected gated=True.")
    if not clamped and activation[2:] != _NO_CONSTANTS:
        raise ValueError(
            f"{name}: {activation} has an alpha or a limit, which {activation.function} does not use; expected "
            f"alpha=1.0 and limit=inf. Leave both out, or take the function {CLAMPED_SWIGLU.function}."
        )


_NO_CONSTANTS = Activation("", gated=True)[2:]
"""The alpha and the limit of functions that have none."""


KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels multiply."""


def check_dtypes(name: str, *tensors: Tensor, allowed: Sequence[torch.dtype] | None = None) -> None:
    """Refuse tokens or rows and parameters of several dtypes.

    Args:
        name: of the function, for the message.
        tensors: that are multiplied.
        allowed: their dtypes; None is any.

    Raises:
        ValueError: if they are of several dtypes, or of another.

    Example:
        >>> check_dtypes("a layer", torch.ones(1), torch.ones(1).half())
        Traceback (most recent call last):
        ValueError: a layer: tokens and parameters are torch.float32, torch.float16; expected one dtype for all. Cast \
them, or run inside torch.autocast.
    """
    dtypes = [t.dtype for t in tensors]
    if len(set(dtypes)) == 1 and (allowed is None or dtypes[0] in allowed):
        return
    among = "" if allowed is None else f" of {', '.join(map(str, allowed))}"
    other = ", or compose the layer of `expert_layer` and `loop`, which take any" if len(set(dtypes)) == 1 else ""
    raise ValueError(
        f"{name}: tokens and parameters are {', '.join(map(str, dtypes))}; expected one dtype{among} for all. Cast "
        f"them, or run inside torch.autocast{other}."
    )


def check_kernel_dtypes(name: str, *tensors: Tensor) -> None:
    """Refuse tokens or rows and parameters that the kernels do not multiply, or not where they are.

    Args:
        name: of the function, for the message.
        tensors: that are multiplied, of one device, as they are in autocast.

    Raises:
        ValueError: if they are of several dtypes, or not of ``KERNEL_DTYPES``; if they are bfloat16 and Triton's
            interpreter would multiply them; if they are on an AMD card.

    Example:
        >>> check_kernel_dtypes("a layer", torch.ones(1), torch.ones(1))
    """
    check_dtypes(name, *tensors, allowed=KERNEL_DTYPES)
    if tensors[0].is_cuda and torch.version.hip is not None:
        raise ValueError(
            f"{name}: tokens and parameters are on {tensors[0].device} of a torch for AMD cards (ROCm "
            f"{torch.version.hip}); expected an NVIDIA card, for which its kernels are. Use `auto` for a layer, "
            f"`grouped` for a product."
        )
    if tensors[0].dtype == torch.bfloat16 and tensors[0].device.type == "cpu" and _is_interpreted():
        raise ValueError(
            f"{name}: tokens and parameters are torch.bfloat16 on the CPU, also if torch.autocast makes them so, and "
            f"Triton's interpreter multiplies bfloat16 wrongly; expected torch.float32 or torch.float16 there, or a "
            f"CUDA device. Cast them, or move them."
        )


@constant_in_graphs
def _is_interpreted() -> bool:
    if not HAS_TRITON:
        return False
    from moekit._operators_triton import is_interpreted

    return is_interpreted()


def check_precision(name: str, precision: str) -> None:
    """Refuse a precision of float32 products that the kernels do not have.

    Args:
        name: of the function, for the message.
        precision: "ieee" or "tf32".

    Raises:
        ValueError: if it is neither.

    Example:
        >>> check_precision("a layer", "ieee")
    """
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"{name}: precision = {precision!r}; expected 'ieee' or 'tf32'.")


def check_keep(name: str, keep: Any) -> None:
    """Refuse what is no choice of what to keep.

    Args:
        name: of the layer, for the message.
        keep: as ``INPUTS``.

    Raises:
        ValueError: if it is no ``Keep``.

    Example:
        >>> check_keep("a layer", "inputs")
        Traceback (most recent call last):
        ValueError: a layer: keep = 'inputs'; expected EVERYTHING, PREACTIVATION, INPUTS or another Keep.
    """
    if not isinstance(keep, Keep):
        raise ValueError(f"{name}: keep = {keep!r}; expected EVERYTHING, PREACTIVATION, INPUTS or another Keep.")


def check_chooser(name: str, tiles: Any) -> None:
    """Refuse what chooses no tiles: a file's name, a table, or tiles themselves.

    Args:
        name: of the layer, for the message.
        tiles: a function of a ``LayerSize``.

    Raises:
        ValueError: if it cannot be called.

    Example:
        >>> check_chooser("a layer", "tiles.json")
        Traceback (most recent call last):
        ValueError: a layer: tiles = 'tiles.json'; expected a function of a LayerSize, such as \
from_table(read_tiles(path)).
    """
    if not callable(tiles):
        raise ValueError(
            f"{name}: tiles = {reprlib.repr(tiles)}; expected a function of a LayerSize, such as "
            f"from_table(read_tiles(path))."
        )


PASS_TURNED = "pass w.mT of each, a view, which is not copied in 16 bits."
"""How to mend weights that fit the other way round."""


def turned(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape with its last two axes swapped.

    Args:
        shape: of any number of axes.

    Returns:
        As many.

    Example:
        >>> turned((2, 3, 4)), turned((5,))
        ((2, 4, 3), (5,))
    """
    return (*shape[:-2], *shape[:-3:-1])


def check_product(rows: Tensor, groups: Groups, w: Tensor) -> None:
    """Refuse what is no grouped product.

    Args:
        rows: (R, D).
        groups: of E groups.
        w: (E, D, F).

    Raises:
        ValueError: if the shapes do not fit, the tensors are on several devices, or of two dtypes, in autocast too.

    Example:
        >>> check_product(torch.ones(3, 2), Groups(torch.tensor([1, 2]), None), torch.ones(2, 2, 4))
    """
    if not _is_product(rows.shape, groups.sizes.shape, w.shape):
        fits_turned = _is_product(rows.shape, groups.sizes.shape, turned(w.shape))
        raise ValueError(
            f"grouped matmul: rows {tuple(rows.shape)}, sizes {tuple(groups.sizes.shape)} and w {tuple(w.shape)} do "
            f"not fit; expected (R, D), (E,) and (E, D, F) with the same D and E. Weights are stored (E, in, out)"
            f"{f', and these fit the other way round: {PASS_TURNED}' if fits_turned else '.'}"
        )
    check_devices("grouped matmul", rows, groups.sizes, w)
    if rows.dtype != w.dtype and len({dtype_in_products(t.dtype, t.device.type) for t in (rows, w)}) > 1:
        check_dtypes("grouped matmul", rows, w)
    if groups.capacity is not None and rows.shape[0] != groups.capacity * w.shape[0]:
        raise ValueError(
            f"grouped matmul: {rows.shape[0]} rows were given for {w.shape[0]} groups of {groups.capacity}; expected "
            f"{groups.capacity * w.shape[0]}. Pass the rows that this plan's dispatch returned."
        )


def _is_product(rows: Sequence[int], sizes: Sequence[int], w: Sequence[int]) -> bool:
    return len(rows) == 2 and len(w) == 3 and rows[1] == w[1] and tuple(sizes) == tuple(w[:1])
