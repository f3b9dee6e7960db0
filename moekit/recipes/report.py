"""The end of a run: scores beside simple baselines, a sample of text, a picture."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moekit.lm.batches import ValidationBatch
from moekit.lm.configs import ModelConfig
from moekit.lm.displays import load_bar
from moekit.lm.files import write_whole
from moekit.lm.generation import generate
from moekit.lm.model import LanguageModel
from moekit.lm.ngrams import bigram_loss, unigram_loss
from moekit.lm.plots import Curve, plot_run
from moekit.lm.tokenizers import Tokenizer
from moekit.lm.urls import is_remote
from moekit.recipes.evaluate import Evaluation
from moekit.recipes.language_models import has_bound, parameter_table
from moekit.recipes.settings import DataSettings
from moekit.recipes.sources import Corpus, Source, ValidationSet, read_set

MOST_BASELINE_TOKENS = 50_000_000
LARGEST_BIGRAM_VOCABULARY = 8192  # a table of counts for all pairs takes 8 V^2 bytes
_READ_TOGETHER = 64  # sequences; changes no number


class Baselines(NamedTuple):
    """What models without a network score on a domain's validation data, in nats per token.

    Attributes:
        unigram: from how often each token occurs in training.
        bigram: from the token before, smoothed; None if the vocabulary is too large for a table of pairs.
    """

    unigram: float
    bigram: float | None


def baselines(source: Source, held_out: ValidationSet, config: ModelConfig, data: DataSettings) -> Baselines:
    """Score a validation set with a unigram and a bigram model of its source's training data, all held in memory.

    They score what the model is scored on: of the set the first ``--val-num-samples`` tokens, of longer sequences the
    front. They count the front of each training sequence, and leave out as bad what the run leaves out.

    Args:
        source: of the training data.
        held_out: from the source.
        config: of the model.
        data: how the run reads.

    Returns:
        Baselines.

    Raises:
        ValueError: if data are bad and ``--on-bad-data`` is not skip, or none of them are good.
        OSError: if data cannot be read.
    """
    vocab_size = config.vocab_size
    whole = ValidationSet(source.name, source.shards, data.data_key, tokenizer=None, location=source.manifest)
    train = _rows(read_set(whole, data, config, batch_size=_READ_TOGETHER))
    scored = _rows(read_set(held_out, data, config, batch_size=_READ_TOGETHER, tokens=data.val_num_samples))
    small = vocab_size <= LARGEST_BIGRAM_VOCABULARY and len(train) > 1
    return Baselines(
        unigram_loss(train, scored, vocab_size=vocab_size),
        bigram_loss(train, scored, vocab_size=vocab_size) if small else None,
    )


def _rows(batches: Iterable[ValidationBatch]) -> Tensor:
    """Put batches together, (num_sequences, seq_len + 1) int32, without rows of which nothing is there."""
    parts = (each.batch.ids.int() for each in batches)
    return torch.cat([ids[(ids >= 0).any(1)] for ids in parts])


def simple_scores(
    corpus: Corpus, names: Iterable[str], config: ModelConfig, data: DataSettings
) -> dict[str, Baselines]:
    """Score the validation sets that were held out from a source with count models of it.

    Training data that are not on this machine, or too large to be held in memory, have no baseline.

    Args:
        corpus: of the run.
        names: of the sets to score.
        config: of the model.
        data: how the run reads.

    Returns:
        Name to baselines, for those that have any.

    Raises:
        ValueError, OSError: see ``baselines``.
    """
    sources = {source.name: source for source in corpus.sources}
    pairs = [(each, sources.get(each.name)) for each in corpus.validation if each.name in set(names)]
    return {
        each.name: baselines(source, each, config, data)
        for each, source in pairs
        if source is not None and _is_small(source, config.seq_len)
    }


def _is_small(source: Source, seq_len: int) -> bool:
    local = not source.manifest.startswith("pipe:") and not is_remote(source.manifest)
    return local and source.num_sequences * seq_len <= MOST_BASELINE_TOKENS


def plain(scores: Evaluation, simple: Baselines | None = None) -> dict[str, Any]:
    """List scores in values that JSON can hold.

    Args:
        scores: of a validation set.
        simple: its baselines, if any.

    Returns:
        Name to value; ``loss_low`` and ``loss_high`` are the 95 % interval. A perplexity too large for a float is None,
        since JSON has no infinity.
    """
    values: dict[str, Any] = {
        "loss": scores.loss,
        "perplexity": scores.perplexity if math.isfinite(scores.perplexity) else None,
        "loss_low": scores.low,
        "loss_high": scores.high,
    }
    values |= {"bits_per_byte": scores.bits_per_byte, "sequences": scores.sequences, "tokens": scores.tokens}
    values |= {"skipped_data": dict(scores.skipped), "layers": [load._asdict() for load in scores.layers]}
    return values | ({} if simple is None else simple._asdict())


def write_results(
    path: Path, summary: Mapping[str, Any], scores: Mapping[str, Evaluation], simple: Mapping[str, Baselines]
) -> None:
    """Write what a run came to as JSON.

    Args:
        path: of the file.
        summary: numbers of the run.
        scores: name of a validation set to its scores.
        simple: name to baselines.
    """
    validation = {name: plain(each, simple.get(name)) for name, each in scores.items()}
    write_whole(path, json.dumps({**summary, "validation": validation}, indent=1) + "\n")


def print_scores(console: Console, scores: Mapping[str, Evaluation], simple: Mapping[str, Baselines]) -> None:
    """Print the scores of validation sets, and how they use the experts.

    Args:
        console: where to.
        scores: name to scores; nothing is printed if there are none.
        simple: name to baselines, for those that have any.
    """
    if scores:
        console.print(_score_table(scores, simple))
    if any(each.layers for each in scores.values()):
        console.print(_load_table(scores))


def _score_table(evaluations: Mapping[str, Evaluation], simple: Mapping[str, Baselines]) -> Table:
    """Lay out the loss and perplexity of each validation set beside its baselines."""
    table = Table(title="validation, nats per token", title_justify="left")
    against = ("bigram", "unigram", "below\nbigram") if simple else ()
    for name in ("domain", "loss", "95 % interval", "perp-\nlexity", "bits/\nbyte", *against):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for domain, scores in evaluations.items():
        bits = "-" if scores.bits_per_byte is None else f"{scores.bits_per_byte:.3f}"
        interval = f"{scores.low:.3f} {scores.high:.3f}"
        row = [domain, f"{scores.loss:.3f}", interval, f"{scores.perplexity:.2f}", bits]
        table.add_row(*row, *(_against(scores.loss, simple.get(domain)) if simple else ()))
    counts = ", ".join(f"{scores.sequences:,} of {domain}" for domain, scores in evaluations.items())
    table.caption, table.caption_justify = f"intervals by bootstrap over stretches of sequences: {counts}", "left"
    return table


def _against(loss: float, simple: Baselines | None) -> tuple[str, str, str]:
    if simple is None:
        return ("-", "-", "-")
    pair = ("-", "-") if simple.bigram is None else (f"{simple.bigram:.3f}", f"{simple.bigram - loss:.3f}")
    return pair[0], f"{simple.unigram:.3f}", pair[1]


def _load_table(evaluations: Mapping[str, Evaluation]) -> Table:
    """Lay out how each domain uses the experts of each MoE block; bars are half high for a balanced load."""
    table = Table(title="expert load in validation, 1 = balanced", title_justify="left")
    for name in ("domain", "block", "load", "least", "most", "router entropy", "dropped"):
        table.add_column(name)
    for domain, scores in evaluations.items():
        for layer in scores.layers:
            least, most = (f"{edge(layer.load) * len(layer.load):.2f}" for edge in (min, max))
            bar, entropy, drops = load_bar(layer.load), f"{layer.entropy:.2f}", f"{layer.drop_rate:.1%}"
            table.add_row(domain, str(layer.layer), bar, least, most, entropy, drops)
    return table


def describe(model: LanguageModel, *, upstream_bias: bool = False) -> Table:
    """Lay out parameters and bytes by part.

    Args:
        model: on any device, the meta device included.
        upstream_bias: add what OpenLM counts on top: an expert bias per MoE layer that it never uses.

    Returns:
        A table to print.
    """
    config = model.config
    title = f"{config.n_layers} blocks of width {config.hidden_dim}, vocabulary {config.vocab_size:,}"
    table = Table(title=title, title_justify="left")
    rows = parameter_table(model)
    bound = ", at most" if has_bound(model) else ""
    for name in ("part", "parameters", f"active per token{bound}", "float32 bytes"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part, total, active in rows:
        style = "bold" if part == "all" else None
        table.add_row(part, f"{total:,}", f"{active:,}", f"{4 * total:,}", style=style)
    if upstream_bias:
        moe = [index for index in range(config.n_layers) if config.is_moe_layer(index)]
        unused = len(moe) * config.hidden_dim
        table.caption = (
            f"OpenLM's own count is {rows[-1].total + unused:,}: {unused:,} more, a bias of {config.hidden_dim} in "
            f"each of {len(moe)} MoE blocks that it allocates and never uses."
        )
        table.caption_justify = "left"
    return table


def sample(model: LanguageModel, tokenizer: Tokenizer, prompt: str, *, tokens: int = 80, seed: int = 0) -> str:
    """Continue a prompt.

    Args:
        model: the language model.
        tokenizer: that its data were made with.
        prompt: at least one token of text.
        tokens: how many to add.
        seed: of the draw.

    Returns:
        Prompt and continuation.
    """
    device = model.output.weight.device
    ids = torch.tensor(tokenizer.encode(prompt), device=device)
    generator = torch.Generator(device).manual_seed(seed)
    drawn = generate(model, ids, max_new_tokens=tokens, temperature=0.8, top_k=40, generator=generator)
    return tokenizer.decode(drawn.tolist())


def draw(
    path: Path,
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Mapping[str, Evaluation],
    simple: Mapping[str, Baselines],
) -> Path:
    """Draw the picture of a run from its metrics.

    Args:
        path: of the PNG.
        metrics: lines of ``metrics.jsonl``; a step whose loss was not finite has none to draw, and an earlier launch
            of the run may have scored other sets.
        evaluations: domain to its final scores.
        simple: domain to its baselines.

    Returns:
        The path.
    """
    curves = {
        domain: _curve((line["step"], line.get("validation", {}).get(domain)) for line in metrics)
        for domain in evaluations
    }
    return plot_run(
        path,
        whole={domain: scores.loss for domain, scores in evaluations.items()},
        train=_curve((line["step"], line.get("loss")) for line in metrics),
        validation={domain: curve for domain, curve in curves.items() if curve.steps},
        baselines={domain: pair.bigram for domain, pair in simple.items() if pair.bigram is not None},
        loads={
            domain: {layer.layer: layer.load for layer in scores.layers}
            for domain, scores in evaluations.items()
            if scores.layers
        },
    )


def _curve(points: Iterable[tuple[int, float | None]]) -> Curve:
    known = [(step, loss) for step, loss in points if loss is not None]
    return Curve([step for step, _ in known], [loss for _, loss in known])


def print_samples(console: Console, model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    """Print a continuation of each prompt.

    Args:
        console: where to.
        model: the language model.
        tokenizer: that its data were made with.
        prompts: to continue.
    """
    for number, prompt in enumerate(prompts):
        console.rule(f"sample {number + 1}", align="left")
        console.print(sample(model, tokenizer, prompt), highlight=False, markup=False)
