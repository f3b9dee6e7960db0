"""Registering operators that compilers leave whole, at the least cost of a call: no gradient, nothing checked."""

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of tensors as ``torch.ops.moekit.<name>``.

    ``torch.library.custom_op`` does this too, and then looks at every tensor of every call, which takes longer than
    the launch of a kernel. For a gradient, call ``torch.library.register_autograd`` with ``"moekit::<name>"``.

    Args:
        name: of the operator.
        fake: returns tensors of the shapes and dtypes of the function's, with any values, for compilers.

    Returns:
        A decorator. The function must neither change nor return what it was given, and its annotations are the schema.

    Example:
        >>> @operator("doubled_for_an_example", torch.empty_like)
        ... def doubled(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> doubled(torch.ones(2))
        tensor([2., 2.])
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        qualified = f"moekit::{name}"
        torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(qualified, ("cpu", "cuda"), function)
        torch.library.register_fake(qualified, fake)
        registered: Callable[..., Any] = getattr(torch.ops.moekit, name).default
        return registered

    return register
