"""Routing statistics as sums, which add up over micro-batches, ranks and batches of an evaluation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.lm.displays import LayerLoad
from moekit.lm.model import LanguageModel
from moekit.recipes.language_models import moe_layers
from moekit.recipes.layers import Recipe, routing_of_networks
from moekit.routing import clean, routing_stats
from moekit.segments import tokens_per_expert
from moekit.types import LayerOutput, Routing

_EXTRA = 3  # after the counts: assignments dropped, nats of router entropy, tokens


def choice_counts(routing: Routing) -> Tensor:
    """Count the assignments of each expert by choice.

    Args:
        routing: the decision, padding tokens already taken out.

    Returns:
        (K, E) int64 for token choice, (1, E) for any other routing.

    Example:
        >>> from moekit.routing import top_k
        >>> choice_counts(top_k(torch.tensor([[3.0, 2.0, 1.0]] * 5), k=2)).tolist()
        [[5, 0, 0], [0, 5, 0]]
    """
    experts, num_experts = routing.expert_indices, routing.num_experts
    rows = experts.unbind(1) if experts.ndim == 2 else (experts,)
    return torch.stack([tokens_per_expert(row, num_experts) for row in rows])


def routing_sums(output: LayerOutput, recipe: Recipe, *, token_mask: Tensor | None = None) -> Tensor:
    """Describe what one MoE layer did with a batch, in numbers that add up.

    Args:
        output: of the layer.
        recipe: of the layer, which says how it plans.
        token_mask: (...) bool, True for real tokens.

    Returns:
        (E + 3,) float64: assignments per expert before any drop, simple experts included; assignments dropped; the sum
        over real tokens of the router's entropy in nats; real tokens. No host synchronisation.
    """
    assert output.routing is not None
    assert output.logits is not None
    networks = routing_of_networks(output.routing, recipe)
    plan = recipe.plan(networks)
    stats = routing_stats(output.logits, output.routing, plan, token_mask=token_mask)
    counts = stats.tokens_per_expert.double()
    dropped = (networks.expert_indices >= 0).sum() - (plan.assignments >= 0).sum()
    tokens = (
        torch.full_like(counts[0], clean(output.logits).shape[0]) if token_mask is None else token_mask.sum().double()
    )
    extra = torch.stack([dropped.double(), stats.entropy.double() * tokens, tokens])
    return torch.cat([counts, extra])


def counts_alone(output: LayerOutput) -> Tensor:
    """Do what ``routing_sums`` does for the counts, and leave the rest at zero, at less cost.

    Args:
        output: of one MoE layer.

    Returns:
        (E + 3,) float64.
    """
    assert output.routing is not None
    return F.pad(choice_counts(output.routing).sum(0).double(), (0, _EXTRA))


def stacked(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Stack the sums of MoE layers.

    Args:
        rows: of ``routing_sums``, one of each layer.
        like: a tensor of the model's device.

    Returns:
        (MoE layers, E + 3) float64; (0, 3) where there is none.

    Example:
        >>> stacked([], torch.ones(1)).shape
        torch.Size([0, 3])
    """
    return torch.stack(list(rows)) if rows else like.new_zeros(0, _EXTRA, dtype=torch.float64)


def all_routing_sums(
    model: LanguageModel, layers: Sequence[LayerOutput], *, token_mask: Tensor | None = None
) -> Tensor:
    """Describe what every MoE layer did with a batch.

    Args:
        model: the language model.
        layers: what each block returned.
        token_mask: (...) bool, True for real tokens.

    Returns:
        (MoE layers, E + 3) float64; see ``routing_sums``. (0, 3) for a dense model.
    """
    rows = [routing_sums(layers[index], layer.recipe, token_mask=token_mask) for index, layer in moe_layers(model)]
    return stacked(rows, model.output.weight)


def layer_loads(model: LanguageModel, sums: Tensor) -> list[LayerLoad]:
    """Turn sums into what a display or a file shows.

    Args:
        model: the language model.
        sums: (MoE layers, E + 3); see ``routing_sums``.

    Returns:
        One per MoE layer. Reads the device once.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.recipes import mixtral
        >>> from moekit.recipes.language_models import language_model
        >>> model = language_model(load_config("moekit_tiny", moe_freq=2, moe_num_experts=2), mixtral())
        >>> load = layer_loads(model, torch.tensor([[6.0, 2.0, 4.0, 2.0, 4.0]]))[0]
        >>> load.load, load.max_violation, load.drop_rate, load.entropy, load.dead_experts
        ([0.75, 0.25], 0.5, 0.5, 0.5, 0)
        >>> load.layer, load.assignments, load.tokens, load.simple_experts
        (0, 8, 4, 0)
    """
    rows = zip(moe_layers(model), sums.tolist(), strict=True)
    return [_load(index, row, layer.num_experts) for (index, layer), row in rows]


def _load(index: int, row: list[float], num_experts: int) -> LayerLoad:
    counts, (dropped, entropy, tokens) = row[:-_EXTRA], row[-_EXTRA:]
    networks, total = counts[:num_experts], sum(counts)
    load = [count / total if total else 0.0 for count in counts]
    return LayerLoad(
        layer=index,
        load=load,
        max_violation=max(networks) * num_experts / sum(networks) - 1 if any(networks) else 0.0,
        drop_rate=dropped / total if total else 0.0,
        entropy=entropy / tokens if tokens else 0.0,
        dead_experts=networks.count(0),
        assignments=int(total),
        tokens=int(tokens),
        simple_experts=len(counts) - num_experts,
    )
