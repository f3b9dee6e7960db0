"""moekit inside Hugging Face models: their experts on moekit's backends, and their routing recorded.

    from moekit.integrations.transformers import register, track_routing, why_not_fused

    register()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moekit")
    why_not_fused(model)
    with track_routing(model) as recorder:
        model(**batch)
    recorder.stats()

Importing this module changes nothing and does not need transformers; ``register`` does.
"""

from functools import partial
from typing import Any

from moekit.integrations.hf_experts import ModuleParams, experts_forward, module_ffn, module_layer, routing_of
from moekit.integrations.hf_fused import auto_module_layer, fused_module_layer, why_not_fused
from moekit.integrations.hf_tracking import RoutingRecorder, track_routing
from moekit.types import ExpertLayer

__all__ = [
    "register",
    "track_routing",
    "RoutingRecorder",
    "why_not_fused",
    "auto_module_layer",
    "fused_module_layer",
    "module_layer",
    "module_ffn",
    "ModuleParams",
    "experts_forward",
    "routing_of",
]


def register(name: str = "moekit", *, layer: ExpertLayer | None = None) -> None:
    """Offer a moekit expert layer to transformers, as ``experts_implementation=name``.

    The name then works in ``from_pretrained``, ``from_config`` and ``model.set_experts_implementation``. It is
    transformers' own table that remembers it, for the life of the process; a second call with the same name replaces
    the layer, also for models that are loaded already.

    Args:
        name: what users pass as ``experts_implementation``. Several names with different layers can be compared on one
            model.
        layer: an expert layer over ``ModuleParams``; None takes ``auto_module_layer()``: dropless, by the fused
            kernels where they know the experts (``why_not_fused`` tells), and on ``grouped`` elsewhere.

    Raises:
        ImportError: if transformers is not installed, or is older than its experts interface.
        ValueError: if transformers has an implementation of its own under that name.

    Example:
        >>> from moekit.experts import loop
        >>> register()
        >>> register("moekit_loop", layer=module_layer(matmul=loop))

    References:
        The table is ``ALL_EXPERTS_FUNCTIONS`` of transformers, ``transformers/integrations/moe.py``.
    """
    interface = _interface()
    taken = name == "eager" or (name in interface and not _is_ours(interface[name]))
    if taken:
        raise ValueError(
            f"register: transformers has an experts implementation named {name!r} that is not moekit's. Choose another "
            f"name; the default is 'moekit'."
        )
    interface.register(name, partial(experts_forward, layer=auto_module_layer() if layer is None else layer))


def _is_ours(function: Any) -> bool:
    return isinstance(function, partial) and function.func is experts_forward


def _interface() -> Any:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "moekit.integrations.transformers needs transformers >= 5 with its experts interface "
            "(transformers.integrations.moe). Install it with: pip install 'moekit[transformers]'"
        ) from error
    return ALL_EXPERTS_FUNCTIONS
