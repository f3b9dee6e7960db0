"""Evaluation: loss, perplexity, bits per byte and expert loads of a model on held-out sequences."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.lm.model import LanguageModel
from moekit.recipes.steps import layer_stats


class Evaluation(NamedTuple):
    """What a model scores on one set of sequences.

    Attributes:
        loss: mean cross-entropy over tokens, nats.
        tokens: predicted tokens.
        bits_per_byte: cross-entropy in bits per UTF-8 byte of text, independent of the vocabulary; None without a
            tokenizer.
        loads: index of each MoE block to the share of assignments per expert.
        drop_rate: share of assignments dropped, over all MoE layers.
    """

    loss: float
    tokens: int
    bits_per_byte: float | None
    loads: Mapping[int, list[float]]
    drop_rate: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[Tensor],
    *,
    token_bytes: Tensor | None = None,
    precision: AbstractContextManager[None] | None = None,
) -> Evaluation:
    """Score sequences. Sums are taken over tokens, so the size of batches does not matter (unless capacity drops).

    Training mode and torch's random state are as before afterwards.

    Args:
        model: to score.
        batches: each (B, L + 1) int64.
        token_bytes: (V,) bytes of each id, for bits per byte.
        precision: context of the forward, for example autocast.

    Returns:
        Evaluation.

    Raises:
        ValueError: if there are no batches.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.recipes import mixtral
        >>> from moekit.recipes.language_models import language_model
        >>> model = language_model(load_config("moekit_tiny", moe_freq=1, moe_num_experts=4), mixtral())
        >>> evaluate(model, [torch.zeros(2, 9, dtype=torch.int64)]).tokens
        16
    """
    device = model.output.weight.device
    nats, tokens, num_bytes = torch.zeros((), dtype=torch.float64), 0, 0
    counts: dict[int, Tensor] = {}
    dropped = assigned = torch.zeros((), dtype=torch.float64)
    with _evaluation(model, device), precision or nullcontext():
        for batch in batches:
            batch = batch.to(device)
            output = model(batch[:, :-1])
            targets = batch[:, 1:].flatten()
            loss = F.cross_entropy(output.logits.flatten(0, 1), targets, reduction="none")
            nats += loss.double().sum().cpu()
            tokens += targets.numel()
            num_bytes += 0 if token_bytes is None else int(token_bytes[targets.cpu()].sum())
            for index, stats in layer_stats(model, output.layers).items():
                load = stats.tokens_per_expert.double().cpu()
                counts[index] = counts.get(index, torch.zeros_like(load)) + load
                dropped = dropped + stats.drop_rate.double().cpu() * load.sum()
                assigned = assigned + load.sum()
    if not tokens:
        raise ValueError("there is nothing to evaluate on: the validation data have no batch; expected at least one")
    return Evaluation(
        loss=nats.item() / tokens,
        tokens=tokens,
        bits_per_byte=nats.item() / math.log(2) / num_bytes if num_bytes else None,
        loads={index: (count / count.sum()).tolist() for index, count in counts.items()},
        drop_rate=(dropped / assigned).item() if assigned > 0 else 0.0,
    )


@contextmanager
def _evaluation(model: LanguageModel, device: torch.device) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(training)
