"""Letting a recipe choose its backend: the layer that it composes, as ``auto`` would run it, with tiles of a file."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moekit.experts import BiasedGatedParams, BiasedMlpParams, grouped
from moekit.experts.activations import CLAMPED_SWIGLU, Activation
from moekit.experts.tile_files import layer_tiles, read_tiles
from moekit.experts.tile_tables import from_table
from moekit.experts.tiles import LayerSize, LayerTiles
from moekit.recipes.backends import auto, auto_top_k, why_not_fused
from moekit.recipes.expert_layers import parts_of
from moekit.recipes.expert_networks import ACTIVATIONS, experts_of
from moekit.recipes.forms import bound, is_same
from moekit.recipes.layers import Recipe
from moekit.routing import top_k
from moekit.types import ExpertLayer, Router


def automatic(recipe: Recipe, *, choose: Callable[..., ExpertLayer] = auto) -> Recipe:
    """Let a recipe's layer run on what ``auto`` chooses for the device and dtype of its tokens.

    It computes the same, to rounding, with the same plan. Only what nobody has chosen is replaced: a layer composed of
    a dispatcher and one of moekit's expert networks on ``grouped``, the backend of recipes that were given none; and
    with it the router, if it is ``top_k`` of what its kernel knows.

    Args:
        recipe: the method.
        choose: makes the layer of ``dispatcher`` and ``activation``; ``partial(auto, keep=..., tiles=...)`` is ``auto``
            with something else for ``fused_layer``.

    Returns:
        The recipe with another layer, and perhaps another router; unchanged if its layer is of another kind.

    Example:
        >>> from moekit.experts import loop
        >>> from moekit.recipes import mixtral
        >>> automatic(mixtral()).layer.func.__name__
        '_auto'
        >>> slow = mixtral(matmul=loop)
        >>> automatic(slow) is slow
        True
    """
    parts = parts_of(recipe.layer)
    activation = None if parts is None else _activation_of(parts.experts)
    if parts is None or activation is None:
        return recipe
    return recipe._replace(layer=choose(dispatcher=parts.dispatcher, activation=activation), route=_quick(recipe.route))


def why_not_on_kernels(recipe: Recipe, device: torch.device) -> str:
    """Say why an automatic recipe's layer will not be ``fused_layer``, in any of its dtypes; "" if it will.

    Args:
        recipe: of ``automatic``.
        device: of tokens and parameters.

    Returns:
        A reason, or "".

    Raises:
        ValueError: if it is a CUDA device that torch cannot use here.

    Example:
        >>> from moekit.recipes import mixtral
        >>> why_not_on_kernels(automatic(mixtral()), torch.device("cpu"))
        'its kernels are for CUDA devices, not cpu'
    """
    layer = recipe.layer
    if not isinstance(layer, partial) or layer.func is not auto().func:  # type: ignore[attr-defined]
        return "the recipe has a layer or a backend of its own"
    return why_not_fused(device, torch.float32, dispatcher=layer.keywords["dispatcher"])


def tiles_of(path: Path | None, *, flag: str) -> Callable[[LayerSize], LayerTiles]:
    """Choose the tiles of ``fused_layer``'s kernels by a file that somebody gave, or by what comes with the package.

    Args:
        path: of a file that ``moekit tune --write`` wrote; None takes ``layer_tiles``.
        flag: that it was given by, for messages.

    Returns:
        A function LayerSize -> LayerTiles; sizes that the file has no entry near enough for go by rule.

    Raises:
        ValueError: if the file cannot be read, or is no table of tiles.

    Example:
        >>> tiles_of(Path("tuned.json"), flag="--tiles")
        Traceback (most recent call last):
        ValueError: --tiles tuned.json: No such file or directory; expected a file that `moekit tune --write` wrote.
            Give one, or leave --tiles out.
    """
    if path is None:
        return layer_tiles
    try:
        return from_table(read_tiles(path))
    except OSError as error:
        expected = f"expected a file that `moekit tune --write` wrote. Give one, or leave {flag} out."
        raise ValueError(f"{flag} {path}: {error.strerror}; {expected}") from error
    except ValueError as error:  # which begins with the path
        raise ValueError(f"{flag} {error}") from error


def _quick(route: Router) -> Router:
    if not isinstance(route, partial) or route.func is not top_k or route.args:
        return route
    known = {name: route.keywords[name] for name in route.keywords if name in ("k", "score", "normalize", "scale")}
    return partial(auto_top_k, **known) if is_same(partial(top_k, **known), route) else route


def _activation_of(experts: Callable[..., Any]) -> Activation | None:
    """Find the activation whose expert network on ``grouped`` this is, with biases or without."""
    limits = {name: value for name, value in bound(experts)[1].items() if name in ("alpha", "limit")}
    for activation in (*ACTIVATIONS, CLAMPED_SWIGLU._replace(**limits)):
        for kind in (None, BiasedGatedParams if activation.gated else BiasedMlpParams):
            if is_same(experts, partial(experts_of(activation, kind), matmul=grouped)):
                return activation
    return None
