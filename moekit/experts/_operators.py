"""Registering operators that compilers leave whole, at the least cost of a call: no gradient, nothing checked."""

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of tensors as ``moekit::name``, with ``fake``, which returns what it does but for the values.

    ``torch.library.custom_op`` does this too, and then looks at every tensor of every call, which takes longer than
    the launch of a kernel. The function must neither change nor return what it was given.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        qualified = f"moekit::{name}"
        torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(qualified, ("cpu", "cuda"), function)
        torch.library.register_fake(qualified, fake)
        registered: Callable[..., Any] = getattr(torch.ops.moekit, name).default
        return registered

    return register
