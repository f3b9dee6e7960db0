"""What the hidden units of an expert do, as a value that whole layers take as an argument."""

from typing import NamedTuple


class Activation(NamedTuple):
    """What the hidden units of fused experts do.

    Attributes:
        function: f; the kernels know silu, gelu (exact), gelu_tanh, relu, relu2 = relu(x)^2, and clamped_swiglu, which
            stands for both factors of gpt-oss's gated experts: f(a, u) = a' sigmoid(alpha a') * (u' + 1), with
            a' = min(a, limit) and u' = clamp(u, -limit, limit).
        gated: whether experts are f(x W_gate) * (x W_up), of a gate and an up-projection, or f(x W_up).
        alpha: the steepness of clamped_swiglu's gate.
        limit: where clamped_swiglu clamps.

    Example:
        >>> Activation("gelu", gated=True) == GEGLU
        True
        >>> RELU2.parts
        1
    """

    function: str
    gated: bool
    alpha: float = 1.0
    limit: float = float("inf")

    @property
    def parts(self) -> int:
        """How many pre-activations a hidden unit has, those of gate and up or of up alone."""
        return 2 if self.gated else 1


FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu")

SWIGLU = Activation("silu", gated=True)
GEGLU = Activation("gelu", gated=True)
GEGLU_TANH = Activation("gelu_tanh", gated=True)
CLAMPED_SWIGLU = Activation("clamped_swiglu", gated=True, alpha=1.702, limit=7.0)
GELU_MLP = Activation("gelu_tanh", gated=False)
RELU_MLP = Activation("relu", gated=False)
RELU2 = Activation("relu2", gated=False)
