"""What every expert layer refuses, whatever runs it."""

from collections.abc import Sequence

from moekit.experts.activations import FUNCTIONS, Activation
from moekit.types import Routing


def check_activation(name: str, activation: Activation, functions: Sequence[str] = FUNCTIONS) -> None:
    """Refuse what is no activation, or none that a layer knows.

    Args:
        name: of the layer, for the message.
        activation: as ``SWIGLU``.
        functions: that the layer knows.

    Raises:
        ValueError: if it is none of them.

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


def check_assignments(name: str, routing: Routing) -> None:
    """Refuse a routing whose parts do not fit each other.

    Args:
        name: of the layer, for the message.
        routing: of any shape.

    Raises:
        ValueError: if weights, experts and tokens are not of one shape.

    Example:
        >>> import torch
        >>> from moekit.routing import top_k
        >>> routing = top_k(torch.zeros(3, 4), k=2)
        >>> check_assignments("a layer", routing)
        >>> check_assignments("a layer", routing._replace(weights=torch.ones(3, 1)))
        Traceback (most recent call last):
        ValueError: a layer: the routing has weights (3, 1), experts (3, 2) and tokens (3, 2); expected one shape. \
Give every assignment a weight, an expert and a token.
    """
    if not routing.weights.shape == routing.expert_indices.shape == routing.token_indices.shape:
        raise ValueError(
            f"{name}: the routing has weights {tuple(routing.weights.shape)}, experts "
            f"{tuple(routing.expert_indices.shape)} and tokens {tuple(routing.token_indices.shape)}; expected "
            f"one shape. Give every assignment a weight, an expert and a token."
        )
