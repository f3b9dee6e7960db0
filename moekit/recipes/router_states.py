"""What training does with what routers remember: lets them observe, moves them, and looks whether they are numbers.

NaN or infinity there stays, and no later step can mend it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moekit.lm.model import LanguageModel
from moekit.recipes.choices import num_choices
from moekit.recipes.language_models import moe_layers
from moekit.recipes.modules import MoE
from moekit.types import LayerOutput


@torch.no_grad()
def observe_state(output: LayerOutput, layer: MoE, token_mask: Tensor | None) -> Tensor:
    """Let a router's state observe what its layer did with a micro-batch.

    Args:
        output: of the layer.
        layer: that holds the state.
        token_mask: (T,) bool, True for real tokens; None if all are.

    Returns:
        (n,) float64, to be added up over micro-batches and ranks; (0,) without a state that observes.

    Example:
        >>> from moekit.recipes import deepseek_moe
        >>> layer = MoE(4, 2, deepseek_moe(k=1), hidden=8)
        >>> observe_state(layer(torch.ones(3, 4)), layer, None).sum()
        tensor(3., dtype=torch.float64)
    """
    state = layer.recipe.state
    if state is None or state.observe is None:
        return torch.zeros(0, dtype=torch.float64, device=output.y.device)
    return state.observe(output.logits, output.routing, layer.state, token_mask=token_mask)


def update_router_states(model: LanguageModel, observed: Sequence[Tensor]) -> None:
    """Let the state of every router take its step, from what was observed in this optimizer step over all ranks.

    Args:
        model: whose MoE layers hold the states; layers without one are left alone.
        observed: one tensor per MoE layer, of ``StepLoss``.
    """
    for (_, layer), sums in zip(moe_layers(model), observed, strict=True):
        layer.update_state(sums)


def nonfinite_in_states(model: LanguageModel) -> Tensor | None:
    """Look for NaN and infinity in the states of all routers, without reading the device.

    Args:
        model: whose MoE layers hold them.

    Returns:
        0-dimensional bool; None of a model whose routers remember no floating-point numbers.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.recipes import deepseek_moe
        >>> from moekit.recipes.language_models import language_model
        >>> config = load_config("moekit_tiny", moe_freq=2, moe_num_experts=4)
        >>> nonfinite_in_states(language_model(config, deepseek_moe(k=2)))
        tensor(False)
    """
    states = [state.flatten() for _, layer in moe_layers(model) if (state := _numbers(layer)) is not None]
    return torch.cat(states).isfinite().logical_not().any() if states else None


def check_states(model: LanguageModel, *, step: int) -> None:
    """Refuse states that have become NaN or infinite. Reads the device, if any router remembers numbers.

    Args:
        model: whose MoE layers hold them.
        step: optimizer steps done.

    Raises:
        FloatingPointError: if one holds NaN or infinity and did not begin with it.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.recipes import deepseek_moe
        >>> from moekit.recipes.language_models import language_model
        >>> config = load_config("moekit_tiny", moe_freq=2, moe_num_experts=4)
        >>> check_states(language_model(config, deepseek_moe(k=2)), step=1)
    """
    found = nonfinite_in_states(model)
    if found is None or not found:
        return
    for block, layer in moe_layers(model):
        state, kind = _numbers(layer), layer.recipe.state
        if state is None or kind is None or state.isfinite().all():
            continue
        first = kind.init(num_choices(layer.recipe, layer.num_experts), device=state.device)
        for word, among in (("NaN", torch.isnan), ("infinity", torch.isinf)):
            if among(state).any() and not among(first).any():
                raise FloatingPointError(
                    f"the state {kind.name!r} of block {block} holds {word} after step {step}: its update made it so. "
                    f"No checkpoint has it. Mend recipe.state.update, or what recipe.state.observe returns, and start "
                    f"anew or resume from an older checkpoint"
                )


def _numbers(layer: MoE) -> Tensor | None:
    state = layer.state
    return state if state is not None and state.is_floating_point() else None
