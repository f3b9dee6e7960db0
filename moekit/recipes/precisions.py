"""What ``--precision`` means on this hardware."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

_PURE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def parameter_dtype(precision: str) -> torch.dtype:
    """Return the dtype that parameters, gradients and optimizer state have.

    Args:
        precision: of the settings.

    Returns:
        bfloat16 or float16 for the pure precisions of that name, else float32.

    Example:
        >>> parameter_dtype("bf16"), parameter_dtype("amp_bfloat16")
        (torch.bfloat16, torch.float32)
    """
    return _PURE.get(precision, torch.float32)


def product_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype that products are computed in, where it is not that of the parameters.

    A CPU gains from bf16 only with AMX: without it bf16 products took 1.2 to 2 times as long as float32 ones.

    Args:
        precision: of the settings; "auto" decides by the hardware's description.
        device: that trains.

    Returns:
        bfloat16, float16, or None for no autocast.

    Example:
        >>> product_dtype("fp32", torch.device("cpu")) is None
        True
        >>> product_dtype("amp", torch.device("cuda"))
        torch.float16
    """
    if precision == "auto":
        fast = device.type == "cuda" or bool(torch.cpu.get_capabilities().get("amx_bf16"))
        return torch.bfloat16 if fast else None
    return {"amp": torch.float16, "amp_bfloat16": torch.bfloat16, "amp_bf16": torch.bfloat16}.get(precision)


def resolved_precision(precision: str, device: torch.device) -> str:
    """Say by name what "auto" means here.

    Args:
        precision: of the settings.
        device: that trains.

    Returns:
        The same, or what "auto" stands for on the device.

    Example:
        >>> resolved_precision("auto", torch.device("cuda"))
        'amp_bfloat16'
    """
    if precision != "auto":
        return precision
    return "fp32" if product_dtype(precision, device) is None else "amp_bfloat16"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of a forward; see ``product_dtype``.

    Args:
        precision: of the settings.
        device: that trains.

    Returns:
        An autocast context, which may do nothing.
    """
    dtype = product_dtype(precision, device)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def gradient_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the scaler that keeps small fp16 gradients above zero; it does nothing unless the precision is "amp".

    Args:
        precision: of the settings.
        device: that trains.

    Returns:
        GradScaler.

    References:
        Micikevicius et al., Mixed Precision Training, 2017, section 3.2, https://arxiv.org/abs/1710.03740
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "amp")


def precision_words(precision: str, device: torch.device) -> str:
    """Say in words what is computed in what.

    Args:
        precision: of the settings.
        device: that trains.

    Returns:
        A few words.

    Example:
        >>> precision_words("amp_bfloat16", torch.device("cpu")), precision_words("fp32", torch.device("cpu"))
        ('bf16 autocast', 'fp32')
    """
    dtype = product_dtype(precision, device)
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return names[parameter_dtype(precision)] if dtype is None else f"{names[dtype]} autocast"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch take kernels that give the same bits every time; afterwards it is as it was.

    It matters on CUDA, where sums of gradients over tokens and attention's backward otherwise add in any order. An
    operation that has no such kernel raises an error. cuBLAS needs a fixed workspace, by a variable that it reads once,
    before the first product of the process; that one stays.

    Args:
        wanted: whether to; False leaves torch as it is.

    Example:
        >>> with deterministic(True):
        ...     torch.are_deterministic_algorithms_enabled()
        True
    """
    if not wanted:
        yield
        return
    import torch._inductor.config as compiled  # slow to import; torch turns its switch, too

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fills = torch.utils.deterministic  # memory with NaN, which is slow, and for debugging
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, in_compiled = fills.fill_uninitialized_memory, compiled.deterministic  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    fills.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        fills.fill_uninitialized_memory, compiled.deterministic = filled, in_compiled  # type: ignore[attr-defined]
