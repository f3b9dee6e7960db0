"""The loss of an optimizer step and its gradient, over micro-batches and ranks."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.lm.model import LanguageModel
from moekit.lm.token_rows import batch_of, real_targets
from moekit.parallel import World, all_sum, gradient_sync, one_process
from moekit.recipes.language_models import moe_layers
from moekit.recipes.layers import Recipe, weighted_sum
from moekit.recipes.modules import MoE
from moekit.recipes.router_states import observe_state
from moekit.recipes.routing_sums import choice_counts, counts_alone, routing_sums, stacked
from moekit.routing.scopes import uses_counts
from moekit.types import LayerOutput


class Tokens(NamedTuple):
    """How many tokens the global batch of a step has.

    Attributes:
        inputs: that the model reads, padding not counted.
        targets: that it predicts, each behind an input that is a token.
    """

    inputs: float
    targets: float


class StepLoss(NamedTuple):
    """The loss of an optimizer step: means over the global batch, the same on every rank. None requires a gradient.

    Attributes:
        total: what was differentiated: cross-entropy plus the other losses with their coefficients.
        cross_entropy: mean over targets, nats.
        balancing: name to the mean over MoE layers, without coefficient; at perfect balance ``load_balance`` is 1, or
            K for a recipe whose loss counts per token (``per_token=1.0``).
        z: mean squared log-sum-exp of the output logits.
        logit_mean: mean of the output logits.
        routing: (MoE layers, E + 3) float64, see ``moekit.recipes.routing_sums``.
        observed: for each MoE layer what its router's state observed, summed; nothing for a layer without.
        backward_time: seconds that the backwards took on this rank's clock, which waits for no GPU.
    """

    total: Tensor
    cross_entropy: Tensor
    balancing: Mapping[str, Tensor]
    z: Tensor
    logit_mean: Tensor
    routing: Tensor
    observed: tuple[Tensor, ...]
    backward_time: float


class Forward(NamedTuple):
    """What a step wants of a model, for some sequences.

    Attributes:
        layers: one per block, as ``ModelOutput``.
        cross_entropy: summed over targets, nats.
        z: sum over targets of the squared log-sum-exp of the output logits, or 0.
        logit_mean: sum over targets of the mean of the output logits, or 0.
    """

    layers: tuple[LayerOutput, ...]
    cross_entropy: Tensor
    z: Tensor
    logit_mean: Tensor


def run_forward(
    model: LanguageModel, inputs: Tensor, targets: Tensor, token_mask: Tensor | None, *, z: bool, logit_mean: bool
) -> Forward:
    """Run a model, and add up what a loss needs of its logits (B, L, V).

    Nobody else sees those, the largest tensor of a step: they are not held through the backward, and a compiler need
    not write them in float32.

    Args:
        model: to run.
        inputs: (B, L) int64.
        targets: (B, L) int64; -100 where there is none.
        token_mask: (B, L) bool, of real inputs; None if all are.
        z: whether ``z`` is wanted.
        logit_mean: whether ``logit_mean`` is.

    Returns:
        Forward.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> model = LanguageModel(load_config("moekit_tiny"))
        >>> inputs, targets, mask = split_ids(torch.tensor([[5, 6, 7, -1]]))
        >>> found = run_forward(model, inputs, targets, mask, z=False, logit_mean=False)
        >>> len(found.layers), bool(found.cross_entropy > 0), found.z
        (2, True, tensor(0.))
    """
    logits, layers = model(inputs, token_mask=token_mask)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    nothing = torch.zeros((), device=logits.device)
    squares = logits.logsumexp(-1).square().masked_fill(targets < 0, 0.0).sum() if z else nothing
    means = logits.detach().mean(-1).masked_fill(targets < 0, 0.0).sum() if logit_mean else nothing
    return Forward(layers, cross_entropy, squares, means)


class LossRules(NamedTuple):
    """What a step's loss is made of, beside the recipe's coefficients.

    Attributes:
        z_coefficient: weight of the mean squared log-sum-exp of the output logits.
        whole_step: balance the load over the whole step (all micro-batches and ranks); else within each micro-batch
            of each rank, as OpenLM.
        precision: makes the context of a forward, for example autocast.
        scale: what a loss goes through before its backward, for example a gradient scaler.
        logit_mean: compute the mean of the output logits.
        forward: ``run_forward``, or a compiled form of it.
    """

    z_coefficient: float = 0.0
    whole_step: bool = True
    precision: Callable[[], AbstractContextManager[None]] = nullcontext
    scale: Callable[[Tensor], Tensor] = lambda loss: loss
    logit_mean: bool = False
    forward: Callable[..., Forward] = run_forward


def split_ids(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a batch into what the model reads and what it predicts.

    Args:
        ids: (B, L + 1) int64; -1 where there is no token.

    Returns:
        inputs (B, L), 0 where there is no token; targets (B, L), -100 there and where the input is none; and the mask
        (B, L) of real inputs.

    Example:
        >>> split_ids(torch.tensor([[5, 6, -1]]))
        (tensor([[5, 6]]), tensor([[   6, -100]]), tensor([[True, True]]))
    """
    inputs = ids[:, :-1]
    return inputs.clamp_min(0), ids[:, 1:].masked_fill(~real_targets(ids), -100), inputs >= 0


def count_tokens(ids: Tensor) -> Tokens:
    """Count the tokens of a batch.

    Args:
        ids: (B, L + 1) int64; -1 where there is no token.

    Returns:
        Tokens.

    Example:
        >>> count_tokens(torch.tensor([[5, 6, -1]]))
        Tokens(inputs=2, targets=1)
    """
    batch = batch_of(ids)
    return Tokens(batch.num_inputs, batch.num_targets)


def take_gradient(
    model: LanguageModel,
    batches: Sequence[Tensor],
    *,
    tokens: Tokens | None = None,
    rules: LossRules | None = None,
    world: World | None = None,
    masked: bool = True,
    statistics: bool = True,
) -> StepLoss:
    """Compute the loss of an optimizer step, and add its gradient to the parameters'.

    The loss is a mean over the global batch, so its gradient is the same for any number of micro-batches and ranks, to
    rounding, wherever tokens are routed one by one: no capacity limit drops assignments (a limit counts within a
    micro-batch), and the router draws no random numbers and does not look at the whole batch. Losses that are no means
    over tokens, as ``importance_loss``, are those of micro-batches. Balancing losses that use the load take that of
    the whole step: with several micro-batches it is counted by a forward without gradients before the first
    backward; with several ranks it is summed over them. Neither happens if no loss with a weight uses it, see
    ``moekit.routing.scopes.ignores_counts``.

    Args:
        model: whose MoE layers carry their recipe's coefficients.
        batches: this rank's micro-batches, (B, L + 1) int64 each; -1 where there is no token.
        tokens: of the global batch; None counts this rank's.
        rules: what the loss is made of; None takes the defaults.
        world: the ranks; None is one process. Their gradients are left to be summed, see ``moekit.parallel``.
        masked: whether any id is -1. False spares the model the mask.
        statistics: compute all of ``routing``; else its counts alone.

    Returns:
        StepLoss.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.recipes import mixtral
        >>> from moekit.recipes.language_models import language_model
        >>> model = language_model(load_config("moekit_tiny", moe_freq=1, moe_num_experts=4), mixtral())
        >>> sorted(take_gradient(model, [torch.zeros(2, 9, dtype=torch.int64)]).balancing)
        ['load_balance']

    References:
        Qiu et al., Demons in the Detail: load balancing loss over the global batch, 2025,
        https://arxiv.org/abs/2501.11873
    """
    rules, world = rules or LossRules(), world or one_process()
    tokens = Tokens(*map(sum, zip(*map(count_tokens, batches), strict=True))) if tokens is None else tokens
    layers = [layer for _, layer in moe_layers(model)]
    weighs = rules.whole_step and any(_weighs_counts(layer.recipe) for layer in layers)
    counts = _count_ahead(model, batches, rules, world, masked) if weighs and len(batches) > 1 else None
    parts: list[list[Tensor]] = []  # of each micro-batch, as _joined lays them out
    names, backward_time = sorted({name for layer in layers for name in layer.recipe.losses}), 0.0
    for number, ids in enumerate(batches, start=1):
        gradient_sync(model, last=number == len(batches))
        inputs, targets, mask = split_ids(ids)
        token_mask = mask if masked else None
        with rules.precision():
            output = rules.forward(
                model, inputs, targets, token_mask, z=bool(rules.z_coefficient), logit_mean=rules.logit_mean
            )
            outputs = [each for each in output.layers if each.routing is not None]
            if weighs and counts is None and world.size > 1:
                counts = _sum_of_each(world, [_choice_counts(outputs)])
            terms = [each / max(tokens.targets, 1) for each in output[1:]]
            share = _share(mask, tokens, masked, dtype=terms[0].dtype)
            real = None if token_mask is None else token_mask.flatten()  # (T,)
            options = {"token_mask": real, "sequence_length": inputs.shape[1]}
            ahead = None if counts is None else [each.double() * share for each in counts]
            weighted, balancing = _balancing(layers, outputs, ahead, options)
            total = terms[0] + rules.z_coefficient * terms[1] + share * weighted
        asked = time.perf_counter()
        rules.scale(total).backward()
        backward_time += time.perf_counter() - asked
        numbers = [total, *terms, *(share * balancing[name] for name in names)]
        parts.append(_joined(numbers, zip(outputs, layers, strict=True), real, statistics))
    return _taken_apart(parts, names, world, backward_time)


def _joined(
    numbers: Sequence[Tensor],
    pairs: Iterable[tuple[LayerOutput, MoE]],
    token_mask: Tensor | None,
    statistics: bool,
) -> list[Tensor]:
    """Lay out what adds up over micro-batches and ranks, (n,) each: the numbers, then two pieces for every layer."""
    pieces = [torch.stack([each.detach().double() for each in numbers])]
    for output, layer in pairs:
        pieces += [_routing(output, layer, token_mask, statistics), observe_state(output, layer, token_mask)]
    return pieces


def _taken_apart(parts: Sequence[list[Tensor]], names: Sequence[str], world: World, backward_time: float) -> StepLoss:
    """Add up what ``_joined`` laid out, over micro-batches and, in one sum, ranks; and name the pieces again."""
    flat = all_sum(world, torch.stack([torch.cat(part) for part in parts]).sum(0))
    numbers, *of_layers = flat.split([len(piece) for piece in parts[0]])
    total, cross_entropy, z, logit_mean, *means = numbers.unbind()
    balancing = dict(zip(names, means, strict=True))
    routing, observed = stacked(of_layers[::2], flat), tuple(of_layers[1::2])
    return StepLoss(total, cross_entropy, balancing, z, logit_mean, routing, observed, backward_time)


def _share(mask: Tensor, tokens: Tokens, masked: bool, *, dtype: torch.dtype) -> Tensor | float:
    """Return the share of the global batch's tokens that this micro-batch has; a quotient of ints would be float32."""
    return (mask.sum().to(dtype) if masked else mask.numel()) / max(tokens.inputs, 1)


def _balancing(
    layers: Sequence[MoE], outputs: Sequence[LayerOutput], counts: Sequence[Tensor] | None, options: Mapping[str, Any]
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """Return the mean over layers of the weighted losses, and of each loss by name, over this micro-batch's tokens."""
    by_layer = []
    for number, (layer, output) in enumerate(zip(layers, outputs, strict=True)):
        losses = output.losses  # of this micro-batch's own load
        if counts is not None:
            assert output.logits is not None
            assert output.routing is not None
            losses = {
                name: loss(output.logits, output.routing, tokens_per_expert=counts[number], **options)
                for name, loss in layer.recipe.losses.items()
            }
        by_layer.append(losses)
    weighted = [weighted_sum(losses, _coefficients(layer)) for losses, layer in zip(by_layer, layers, strict=True)]
    names = sorted({name for losses in by_layer for name in losses})
    means = {name: torch.stack([losses[name] for losses in by_layer if name in losses]).mean() for name in names}
    return sum(weighted) / max(len(layers), 1), means


def _weighs_counts(recipe: Recipe) -> bool:
    """Return whether a loss that may use counts of a larger batch has a weight."""
    weighed = {name for name, weight in recipe.coefficients.items() if weight}
    if recipe.state is not None:
        weighed.add(recipe.state.scales)
    return any(name in weighed and uses_counts(loss) for name, loss in recipe.losses.items())


def _coefficients(layer: MoE) -> Mapping[str, float | Tensor]:
    """Return the recipe's coefficients, and the one that is the router's state."""
    recipe, state = layer.recipe, layer.state
    if recipe.state is None or not recipe.state.scales or state is None:
        return recipe.coefficients
    return {**recipe.coefficients, recipe.state.scales: state}


def _count_ahead(
    model: LanguageModel, batches: Sequence[Tensor], rules: LossRules, world: World, masked: bool
) -> list[Tensor]:
    """Count each MoE layer's (K, E) assignments over all micro-batches and ranks, by a forward without gradients."""
    counts: list[list[Tensor]] = []
    with torch.no_grad(), same_random_numbers(world.device):
        for ids in batches:
            inputs, _, mask = split_ids(ids)
            with rules.precision():
                layers = model(inputs, token_mask=mask if masked else None, num_logits=0).layers
            counts.append(_choice_counts(layers))
    return _sum_of_each(world, counts)


def _choice_counts(outputs: Sequence[LayerOutput]) -> list[Tensor]:
    """Count each MoE layer's (K, E) assignments; dense layers have none."""
    return [choice_counts(each.routing) for each in outputs if each.routing is not None]


def _sum_of_each(world: World, counts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Add up over micro-batches and ranks, in one exchange; K differs between layers where their recipes do."""
    flat = torch.stack([torch.cat([each.flatten() for each in of_batch]) for of_batch in counts]).sum(0)
    pieces = all_sum(world, flat).split([each.numel() for each in counts[0]])
    return [piece.view_as(each) for piece, each in zip(pieces, counts[0], strict=True)]


def same_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Leave torch's random state as it was, so that what follows draws the same numbers again."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _routing(output: LayerOutput, layer: MoE, token_mask: Tensor | None, statistics: bool) -> Tensor:
    return routing_sums(output, layer.recipe, token_mask=token_mask) if statistics else counts_alone(output)
