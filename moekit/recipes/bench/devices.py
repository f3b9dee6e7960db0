"""The device that a measurement is asked for: read, looked for, and made the current one."""

from contextlib import AbstractContextManager, nullcontext

import torch

CUDA = "cuda, or one of several as cuda:1"
CPU_OR_CUDA = f"cpu, {CUDA}"


def device_of(name: str, *, given: str = "--device", expected: str = CPU_OR_CUDA) -> torch.device:
    """Read the name of a device, and look whether it is there.

    Args:
        name: "cpu", "cuda", or "cuda:" and a number.
        given: what the name was given as, for messages.
        expected: what could have been given, for messages.

    Returns:
        The device; where torch finds no CUDA device at all, any: the caller says what to do then.

    Raises:
        ValueError: if it is no such name, or torch finds CUDA devices, and not this one.

    Example:
        >>> device_of("cpu")
        device(type='cpu')
        >>> device_of("cuda:x")
        Traceback (most recent call last):
        ValueError: --device cuda:x; expected cpu, cuda, or one of several as cuda:1.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{given} {name}; expected {expected}.") from error
    kind, _, number = name.partition(":")  # not the device's: torch makes cuda:0 of cuda:256
    if kind != "cuda" and name != "cpu":
        raise ValueError(f"{given} {name}; expected {expected}.")
    count = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
    if count and int(number or 0) >= count:
        found = "1 CUDA device, cuda:0" if count == 1 else f"{count} CUDA devices, cuda:0 to cuda:{count - 1}"
        raise ValueError(
            f"{given} {name}, and torch finds {found}; take one that is there. `moekit doctor` lists them."
        )
    return device


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one: for launches, events, captures and counts of memory; leave any other alone.

    Args:
        device: of the tensors.

    Returns:
        A context.

    Example:
        >>> with on_device(torch.device("cpu")):
        ...     torch.ones(2).sum()
        tensor(2.)
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
