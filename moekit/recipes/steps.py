"""One training step, in parts that can be tested alone."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.lm.displays import LayerLoad
from moekit.lm.model import LanguageModel
from moekit.recipes.language_models import moe_layers
from moekit.recipes.layers import weighted_sum
from moekit.routing import RoutingStats, routing_stats
from moekit.segments import tokens_per_expert
from moekit.types import LayerOutput


class StepLoss(NamedTuple):
    """The loss of one batch.

    Attributes:
        total: what is differentiated: cross-entropy plus the balancing losses with their coefficients.
        cross_entropy: mean over tokens, nats.
        balancing: name to the mean over MoE layers, without coefficient.
        layers: what each block returned.
    """

    total: Tensor
    cross_entropy: Tensor
    balancing: Mapping[str, Tensor]
    layers: Sequence[LayerOutput]


def batch_loss(model: LanguageModel, batch: Tensor) -> StepLoss:
    """Compute the loss of a batch.

    The balancing losses are averaged over MoE layers, so that a coefficient means the same for any depth.

    Args:
        model: whose MoE layers carry their recipe's coefficients.
        batch: (B, L + 1) int64; the model reads all columns but the last and predicts all but the first.

    Returns:
        StepLoss.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.recipes import mixtral
        >>> from moekit.recipes.language_models import language_model
        >>> model = language_model(load_config("moekit_tiny", moe_freq=1, moe_num_experts=4), mixtral())
        >>> sorted(batch_loss(model, torch.zeros(2, 9, dtype=torch.int64)).balancing)
        ['load_balance']
    """
    output = model(batch[:, :-1])
    cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
    moe = list(moe_layers(model))
    sums = [weighted_sum(output.layers[index].losses, layer.recipe.coefficients) for index, layer in moe]
    total = cross_entropy + sum(sums) / len(moe) if moe else cross_entropy
    names = sorted({name for index, _ in moe for name in output.layers[index].losses})
    balancing = {
        name: torch.stack([layer.losses[name] for layer in output.layers if name in layer.losses]).mean()
        for name in names
    }
    return StepLoss(total, cross_entropy, balancing, output.layers)


def learning_rate(step: int, *, steps: int, peak: float, warmup: int, end: float) -> float:
    """Compute the learning rate: linear warm-up, then a cosine from ``peak`` to ``end``.

    Args:
        step: optimizer steps done before this one.
        steps: steps in all.
        peak: the largest rate.
        warmup: steps of warm-up; less than ``steps``.
        end: the rate that the cosine reaches after the last step.

    Returns:
        The rate of this step: peak (step + 1) / warmup, then end + (peak - end) (1 + cos(pi e / E)) / 2 with
        e = step - warmup and E = steps - warmup, as OpenLM.

    Example:
        >>> [learning_rate(step, steps=4, peak=1.0, warmup=2, end=0.0) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return end + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * (peak - end)


def update_selection_biases(model: LanguageModel, layers: Sequence[LayerOutput]) -> None:
    """Move every selection bias one step toward balance, from the loads of this optimizer step.

    Args:
        model: whose MoE layers hold the biases; layers without one are left alone.
        layers: what each block returned.
    """
    for index, layer in moe_layers(model):
        routing = layers[index].routing
        if layer.bias is not None and routing is not None:
            layer.update_selection_bias(tokens_per_expert(routing.expert_indices, routing.num_experts))


def layer_stats(model: LanguageModel, layers: Sequence[LayerOutput]) -> dict[int, RoutingStats]:
    """Compute the routing statistics of every MoE layer.

    Args:
        model: whose recipes say how the layers plan.
        layers: what each block returned.

    Returns:
        Index of the block to its statistics.
    """
    stats = {}
    for index, layer in moe_layers(model):
        output = layers[index]
        assert output.routing is not None
        assert output.logits is not None
        stats[index] = routing_stats(output.logits, output.routing, layer.recipe.plan(output.routing))
    return stats


def layer_load(index: int, stats: RoutingStats) -> LayerLoad:
    """Read one layer's statistics off the device, for a display or a file.

    Args:
        index: of the block.
        stats: its statistics.

    Returns:
        LayerLoad.
    """
    return LayerLoad(
        layer=index,
        load=stats.load.tolist(),
        max_violation=stats.max_violation.item(),
        drop_rate=stats.drop_rate.item(),
        entropy=stats.entropy.item(),
        dead_experts=int(stats.dead_experts.item()),
    )
