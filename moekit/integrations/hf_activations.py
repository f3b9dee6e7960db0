"""Which activation of moekit's fused layer the experts of a transformers module have, if any.

A module says it by a function of its own, so functions are known by where they are defined; any other is unknown, also
one that overrides a known one. Nothing is tried out: the tests hold what is said here to what the functions compute.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from torch import nn

from moekit.experts import Activation
from moekit.operators import constant_in_graphs

_FUNCTIONS = MappingProxyType(
    {
        "transformers.activations.SiLUActivation": "silu",
        "torch.nn.modules.activation.SiLU": "silu",
        "transformers.activations.GELUActivation": "gelu",
        "transformers.activations.GELUTanh": "gelu_tanh",
        "transformers.activations.NewGELUActivation": "gelu_tanh",
        "torch.nn.modules.activation.ReLU": "relu",
        "transformers.activations.ReLUSquaredActivation": "relu2",
    }
)


def activation_of(experts: nn.Module) -> Activation | None:
    """Say which activation of a fused layer an experts module has.

    Args:
        experts: a module whose class carries transformers' ``use_experts_implementation``.

    Returns:
        Activation of two halves that lie one after the other, or of a single projection; None for any other function,
        as one of interleaved columns, or one that learns.

    Example:
        >>> from transformers.models.mixtral import modeling_mixtral as mixtral
        >>> config = mixtral.MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=4)
        >>> activation_of(mixtral.MixtralExperts(config))
        Activation(function='silu', gated=True, alpha=1.0, limit=inf)
    """
    module: Any = experts
    if not module.has_gate:
        return _named(module, gated=False)
    read = _GATES.get(_gate_of(type(module)))
    return None if read is None or "_apply_gate" in module.__dict__ else read(module)


@constant_in_graphs
def _gate_of(kind: Any) -> str:
    """Say where a class has its gate function from; Dynamo does not read a function's names right."""
    gate = kind._apply_gate
    return f"{gate.__module__}.{gate.__qualname__}"


def _gated(module: Any) -> Activation | None:
    return _named(module, gated=True)


def _named(module: Any, *, gated: bool) -> Activation | None:
    act = module.act_fn
    kind = type(act)
    if getattr(act, "_forward_hooks", None) or getattr(act, "_forward_pre_hooks", None):
        return None  # a hook wants to see what goes through, and kernels do not show it
    name = "silu" if act is F.silu else _FUNCTIONS.get(f"{kind.__module__}.{kind.__qualname__}")
    return None if name is None else Activation(name, gated=gated)


def _privacy_filter(module: Any) -> Activation:
    return Activation("clamped_swiglu", gated=True, alpha=module.alpha, limit=module.limit)


def _minimax_m3(module: Any) -> Activation:
    return Activation("clamped_swiglu", gated=True, alpha=module.swiglu_alpha, limit=module.swiglu_limit)


_MODELS = "transformers.models"
_GATES: MappingProxyType[str, Callable[[Any], Activation | None]] = MappingProxyType(
    {
        "transformers.integrations.moe._default_apply_gate": _gated,
        # the default's function in float32, which is what kernels compute in
        f"{_MODELS}.beam.modeling_beam.BeamExperts._apply_gate": _gated,
        f"{_MODELS}.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts._apply_gate": _minimax_m3,
        f"{_MODELS}.openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts._apply_gate": (
            _privacy_filter
        ),
    }
)
