"""Which parameters a whole layer takes, and whether they fit tokens and routing."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moekit.checks import check_devices, check_routing
from moekit.experts.activations import Activation
from moekit.experts.biased import BiasedGatedParams, BiasedMlpParams
from moekit.experts.checks import PASS_TURNED, turned
from moekit.experts.ffns import GatedParams, MlpParams
from moekit.experts.packed import PackedGatedParams
from moekit.types import Routing


def check_params(
    name: str, x: Tensor, routing: Routing, params: Any, activation: Activation, kinds: Sequence[type[Any]]
) -> None:
    """Refuse parameters that a layer does not take, and tokens, routing and parameters that do not fit each other.

    Args:
        name: of the layer, for the message.
        x: (T, D).
        routing: of T tokens and E experts.
        params: of the experts.
        activation: of the layer.
        kinds: the types of parameters that it takes with this activation.

    Raises:
        ValueError: if parameters are of no such type, shapes do not fit, the routing is none, or the tensors are on
            several devices.

    Example:
        >>> import torch
        >>> from moekit.experts import SWIGLU, init_gated
        >>> from moekit.routing import top_k
        >>> x, routing, params = torch.ones(3, 4), top_k(torch.zeros(3, 2), k=1), init_gated(2, 4, 8)
        >>> check_params("a layer", x, routing, params, SWIGLU, [GatedParams])
        >>> check_params("a layer", x, routing, GatedParams(*[w.mT for w in params]), SWIGLU, [GatedParams])
        Traceback (most recent call last):
        ValueError: a layer: x (3, 4) and parameters [(2, 8, 4), (2, 8, 4), (2, 4, 8)] do not fit a routing of 3 \
tokens and 2 experts; expected x (T, D), gate (E, D, F), up (E, D, F), down (E, F, D): [(2, 4, 8), (2, 4, 8), \
(2, 8, 4)]. Matrices of GatedParams are stored (E, in, out), and these fit the other way round: pass w.mT of each, a \
view, which is not copied in 16 bits.
    """
    check_routing(name, routing)
    kind = next((each for each in kinds if isinstance(params, each)), None)
    if kind is None:
        *others, last = [each.__name__ for each in kinds]
        expected = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(
            f"{name}: the parameters are {type(params).__name__}, and the activation {activation}; expected "
            f"{expected}. Pass the activation of these experts, or other parameters."
        )
    shapes = [tuple(p.shape) for p in params]
    if x.shape[:-1] != (routing.num_tokens,) or shapes != _shapes_of(kind, routing, x, shapes):
        raise ValueError(_what_does_not_fit(name, x, routing, shapes, kind))
    check_devices(name, x, *routing[:3], *params)


def kind_of(params: Any) -> type[Any]:
    """Say which type of experts' parameters these are, also where they are a subclass of it.

    Args:
        params: of the experts.

    Returns:
        The type among moekit's, or that of ``params`` if it is none of them.

    Example:
        >>> from moekit.experts import init_mlp
        >>> kind_of(init_mlp(2, 4, 8)).__name__, kind_of(7).__name__
        ('MlpParams', 'int')
    """
    return next((kind for kind in _AXES if isinstance(params, kind)), type(params))


_UP, _DOWN = ("E", "D", "F"), ("E", "F", "D")
_AXES: dict[type[Any], tuple[tuple[str, ...], ...]] = {
    GatedParams: (_UP, _UP, _DOWN),
    BiasedGatedParams: (_UP, _UP, _DOWN, ("E", "1", "F"), ("E", "1", "F"), ("E", "1", "D")),
    PackedGatedParams: (("E", "2F", "D"), ("E", "D", "F")),
    MlpParams: (_UP, _DOWN),
    BiasedMlpParams: (_UP, _DOWN, ("E", "1", "F"), ("E", "1", "D")),
}


def _shapes_of(
    kind: type[Any], routing: Routing, x: Tensor, shapes: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]] | None:
    """Return the shapes that parameters have to have, of the hidden units that down has; None if that is no matrix."""
    axes, down = _AXES[kind], shapes[kind._fields.index("down")]
    if len(down) != 3 or x.ndim == 0:
        return None
    hidden = down[2 if kind is PackedGatedParams else 1]
    sizes = {"E": routing.num_experts, "D": x.shape[-1], "F": hidden, "2F": 2 * hidden, "1": 1}
    return [tuple(sizes[axis] for axis in each) for each in axes]


def _what_does_not_fit(
    name: str, x: Tensor, routing: Routing, shapes: Sequence[tuple[int, ...]], kind: type[Any]
) -> str:
    axes, wanted = _AXES[kind], _shapes_of(kind, routing, x, shapes)
    others = [turned(shape) if "1" not in each else shape for shape, each in zip(shapes, axes, strict=True)]
    advice = " Flatten the tokens." if x.ndim != 2 else ""
    if shapes != wanted and others == (of_others := _shapes_of(kind, routing, x, others)):
        wanted = of_others
        stored = "(E, out, in)" if kind is PackedGatedParams else "(E, in, out)"
        advice += f" Matrices of {kind.__name__} are stored {stored}, and these fit the other way round: {PASS_TURNED}"
    elif kind is PackedGatedParams and not advice:
        advice = _OF_PACKED
    named = ", ".join(f"{field} ({', '.join(each)})" for field, each in zip(kind._fields, axes, strict=True))
    return (
        f"{name}: x {tuple(x.shape)} and parameters {shapes} do not fit a routing of {routing.num_tokens} tokens and "
        f"{routing.num_experts} experts; expected x (T, D), {named}{'' if wanted is None else f': {wanted}'}.{advice}"
    )


_OF_PACKED = (
    " Packed halves are the rows of gate, then those of up; pass interleaved ones as "
    "GatedParams(w[:, 0::2].mT, w[:, 1::2].mT, .)."
)
