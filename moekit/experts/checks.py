"""What every expert layer refuses, whatever runs it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moekit.autocast import dtype_in_products
from moekit.checks import check_devices
from moekit.experts.activations import CLAMPED_SWIGLU, FUNCTIONS, Activation
from moekit.types import Groups


def check_activation(name: str, activation: Activation, functions: Sequence[str] = FUNCTIONS) -> None:
    """Refuse what is no activation, or none that a layer knows.

    Args:
        name: of the layer, for the message.
        activation: as ``SWIGLU``.
        functions: that the layer knows.

    Raises:
        ValueError: if it is none of them, or clamped without a gate.

    Example:
        >>> from moekit.experts import SWIGLU
        >>> check_activation("a layer", SWIGLU)
        >>> check_activation("a layer", "swiglu")
        Traceback (most recent call last):
        ValueError: a layer: activation = 'swiglu'; expected an Activation, such as moekit.experts.SWIGLU, with a \
function of silu, gelu, gelu_tanh, relu, relu2, clamped_swiglu.
    """
    if not isinstance(activation, Activation) or activation.function not in functions:
        raise ValueError(
            f"{name}: activation = {activation!r}; expected an Activation, such as moekit.experts.SWIGLU, with a "
            f"function of {', '.join(functions)}."
        )
    if activation.function == CLAMPED_SWIGLU.function and not activation.gated:
        raise ValueError(f"{name}: {activation} has no gate, and clamps one; expected gated=True.")


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
    fits = rows.ndim == 2 and w.ndim == 3 and rows.shape[1] == w.shape[1] and groups.sizes.shape == w.shape[:1]
    if not fits:
        raise ValueError(
            f"grouped matmul: rows {tuple(rows.shape)}, sizes {tuple(groups.sizes.shape)} and w {tuple(w.shape)} do "
            f"not fit; expected (R, D), (E,) and (E, D, F) with the same D and E. Weights are stored (E, in, out)."
        )
    check_devices("grouped matmul", rows, groups.sizes, w)
    if rows.dtype != w.dtype and len({dtype_in_products(t.dtype, t.device.type) for t in (rows, w)}) > 1:
        check_dtypes("grouped matmul", rows, w)
    if groups.capacity is not None and rows.shape[0] != groups.capacity * w.shape[0]:
        raise ValueError(
            f"grouped matmul: {rows.shape[0]} rows were given for {w.shape[0]} groups of {groups.capacity}; expected "
            f"{groups.capacity * w.shape[0]}. Pass the rows that this plan's dispatch returned."
        )
