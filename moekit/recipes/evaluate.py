"""Evaluation: loss, perplexity, bits per byte and routing of a model on held-out sequences."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.lm.batches import ValidationBatch
from moekit.lm.bootstrap import bootstrap_interval
from moekit.lm.displays import LayerLoad
from moekit.lm.generation import evaluation_mode
from moekit.lm.model import LanguageModel
from moekit.lm.shard_members import Reason
from moekit.parallel import World, all_sum, any_true, one_process
from moekit.recipes.language_models import moe_layers
from moekit.recipes.layers import Recipe
from moekit.recipes.routing_sums import all_routing_sums, layer_loads
from moekit.recipes.steps import same_random_numbers, split_ids


class Evaluation(NamedTuple):
    """What a model scores on one set of sequences.

    Attributes:
        loss: mean cross-entropy over tokens, nats.
        low: lower end of its 95 % interval, by bootstrap over 32 stretches of sequences (``bootstrap_interval``).
        high: upper end.
        sequences: scored.
        tokens: predicted.
        bits_per_byte: cross-entropy in bits per UTF-8 byte of text, independent of the vocabulary; None without a
            tokenizer.
        layers: routing of each MoE block.
        skipped: sequences left out as bad data over all ranks, by reason.
        precision: of the model, as ``--precision`` names it; None where nobody named it.
    """

    loss: float
    low: float
    high: float
    sequences: int
    tokens: int
    bits_per_byte: float | None
    layers: Sequence[LayerLoad]
    skipped: Mapping[str, int]
    precision: str | None = None

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that is more than a float can hold, above 709 nats."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


class _Sequences(NamedTuple):
    """Sums over each sequence of one batch, left on the model's device, so that nobody waits; its place among all."""

    indices: Tensor  # (b,) int64, on the CPU
    sums: Tensor  # (b, 3) float64: nats, targets, bytes


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[ValidationBatch],
    *,
    token_bytes: Tensor | None = None,
    precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    recipe: Recipe | None = None,
    world: World | None = None,
) -> Evaluation:
    """Score sequences, each once, over all ranks.

    Every sequence is summed up by itself, in float64, and the sums are added in the order of the data: batch size and
    number of ranks do not matter, but for the rounding of the model's own products, and unless a capacity limit drops,
    or the router draws random numbers (`gshard`) or chooses by the whole batch (`expert_choice`).

    Training mode and torch's random state are as before afterwards.

    Args:
        model: to score.
        batches: this rank's, see ``moekit.lm.batches.read_validation``; equally many on every rank.
        token_bytes: bytes of each id, for bits per byte; of fewer than V ids, the others have none.
        precision: makes the context of a forward, for example autocast.
        recipe: that the MoE layers run meanwhile; None leaves them their own.
        world: the ranks; None is one process.

    Returns:
        Evaluation, the same on every rank.

    Raises:
        ValueError: if there is no token to score.
        FloatingPointError: if a loss is not finite.
    """
    world = world or one_process()
    device = model.output.weight.device
    if token_bytes is not None:  # the vocabulary may have ids without a token
        missing = max(model.config.vocab_size - len(token_bytes), 0)
        token_bytes = F.pad(token_bytes, (0, missing)).to(device)
    parts, skipped = [], Counter[str]()
    routing = torch.zeros((), dtype=torch.float64, device=device)
    with evaluating(model, recipe):
        for batch in _together(batches, world):
            skipped.update(batch.skipped)
            inputs, targets, mask = split_ids(batch.batch.ids.to(device, non_blocking=True))
            token_mask = mask if batch.batch.has_padding else None
            with precision():
                output = model(inputs, token_mask=token_mask)
            routing = routing + all_routing_sums(model, output.layers, token_mask=token_mask)
            parts.append(_Sequences(batch.indices, _sequence_sums(output.logits, targets, token_bytes)))
            del output  # else its logits would be held beside those of the next
    sums = _in_order(parts, world)
    loads = layer_loads(model, all_sum(world, routing)) if routing.ndim == 2 else []
    return _evaluated(sums, loads, sum_skipped(skipped, world), with_bytes=token_bytes is not None)


def sum_skipped(skipped: Mapping[str, int], world: World) -> Counter[str]:
    """Add up what was left out as bad data over all ranks, which call it together.

    Args:
        skipped: reason to number of sequences, of this rank.
        world: the ranks.

    Returns:
        Reason to number of sequences, the same on every rank; reasons that did not occur are left out.

    Example:
        >>> sum_skipped({"short sequence": 2}, one_process())
        Counter({'short sequence': 2})
    """
    reasons = get_args(Reason)
    counts = all_sum(world, torch.tensor([skipped.get(reason, 0) for reason in reasons])).tolist()
    return Counter({reason: count for reason, count in zip(reasons, counts, strict=True) if count})


def _together(batches: Iterable[ValidationBatch], world: World) -> Iterator[ValidationBatch]:
    """Yield batches until the end or until any rank cannot read its own; then all ranks stop, each with an error."""
    reading, trouble = iter(batches), None
    while True:
        batch: ValidationBatch | None = None
        try:
            batch = next(reading, None)
        except Exception as error:
            trouble = error
        if any_true(world, trouble is not None):
            raise trouble or OSError("another rank cannot read the validation data; its own message says why")
        if batch is None:
            return
        yield batch


def _sequence_sums(logits: Tensor, targets: Tensor, token_bytes: Tensor | None) -> Tensor:
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    real = targets >= 0
    sizes = torch.zeros_like(targets) if token_bytes is None else token_bytes[targets.clamp_min(0)] * real
    return torch.stack([nats.double().sum(1), real.sum(1).double(), sizes.sum(1).double()], dim=1)


def _in_order(parts: Sequence[_Sequences], world: World) -> Tensor:
    """Put the sums of all ranks' sequences into the order of the data: (n, 3)."""
    rows = [part.indices >= 0 for part in parts]
    count = all_sum(world, torch.tensor(sum(int(row.sum()) for row in rows)))
    sums = torch.zeros(int(count), 3, dtype=torch.float64)
    for part, row in zip(parts, rows, strict=True):
        sums[part.indices[row]] = part.sums.cpu()[row]
    return all_sum(world, sums)


def _evaluated(sums: Tensor, layers: Sequence[LayerLoad], skipped: Counter[str], *, with_bytes: bool) -> Evaluation:
    sums = sums[sums[:, 1] > 0]  # a sequence that was left out has no target
    if not len(sums):
        raise ValueError(
            f"there is nothing to evaluate on: no sequence of the validation data could be scored "
            f"({sum(skipped.values())} left out as bad data); expected at least one"
        )
    nats, tokens, num_bytes = sums.sum(0).tolist()
    if not math.isfinite(nats):
        raise FloatingPointError(
            f"the validation loss is {nats / tokens}, expected a finite number: the model's parameters or outputs are "
            "not finite. Train with a lower --lr or a longer --warmup, or go back to an earlier checkpoint"
        )
    low, high = bootstrap_interval(sums[:, 0], sums[:, 1])
    return Evaluation(
        loss=nats / tokens,
        low=low,
        high=high,
        sequences=len(sums),
        tokens=int(tokens),
        bits_per_byte=nats / math.log(2) / num_bytes if with_bytes and num_bytes else None,
        layers=layers,
        skipped=dict(skipped),
    )


@contextmanager
def evaluating(model: LanguageModel, recipe: Recipe | None) -> Iterator[None]:
    """Put a model into evaluation mode for a while; torch's random state is as before afterwards.

    Args:
        model: to evaluate.
        recipe: that its MoE layers run meanwhile; None leaves them their own.
    """
    own = [(layer, layer.recipe) for _, layer in moe_layers(model)]
    try:
        for layer, kept in own:
            layer.recipe = kept if recipe is None else recipe
        with evaluation_mode(model), same_random_numbers(model.output.weight.device):
            yield
    finally:
        for layer, kept in own:
            layer.recipe = kept
