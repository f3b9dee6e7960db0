"""The end of a run: scores beside simple baselines, a sample of text, a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from moekit.lm.displays import load_bar
from moekit.lm.generation import generate
from moekit.lm.model import LanguageModel
from moekit.lm.ngrams import bigram_loss, unigram_loss
from moekit.lm.plots import Curve, plot_run
from moekit.lm.shards import load_sequences
from moekit.lm.tokenizers import Tokenizer
from moekit.recipes.evaluate import Evaluation
from moekit.recipes.language_models import parameter_table
from moekit.recipes.setup import Domain

LARGEST_BIGRAM_VOCABULARY = 8192  # a table of counts for all pairs takes 8 V^2 bytes


class Baselines(NamedTuple):
    """What models without a network score on a domain's validation data, in nats per token.

    Attributes:
        unigram: from how often each token occurs in training.
        bigram: from the token before, smoothed; None if the vocabulary is too large for a table of pairs.
    """

    unigram: float
    bigram: float | None


def baselines(domain: Domain, *, vocab_size: int) -> Baselines:
    """Score a domain's validation data with a unigram and a bigram model of its training data.

    Args:
        domain: with validation data.
        vocab_size: V.

    Returns:
        Baselines.

    Raises:
        ValueError: if the domain has no validation data.
    """
    if domain.validation is None:
        raise ValueError(f"domain {domain.name} has no validation data; give them with --val-manifest")
    train = load_sequences(domain.train, vocab_size=vocab_size)
    held_out = load_sequences(domain.validation, vocab_size=vocab_size)
    small = vocab_size <= LARGEST_BIGRAM_VOCABULARY and len(train) > 1
    return Baselines(
        unigram_loss(train, held_out, vocab_size=vocab_size),
        bigram_loss(train, held_out, vocab_size=vocab_size) if small else None,
    )


def score_table(evaluations: Mapping[str, Evaluation], simple: Mapping[str, Baselines]) -> Table:
    """Lay out each domain's loss and perplexity beside its baselines.

    Args:
        evaluations: domain to its scores.
        simple: domain to its baselines.

    Returns:
        A table to print.
    """
    table = Table(title="validation, nats per token", title_justify="left")
    for name in ("domain", "loss", "perplexity", "bits/byte", "bigram", "unigram", "below bigram"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for domain, scores in evaluations.items():
        unigram, bigram = simple[domain]
        bits = "-" if scores.bits_per_byte is None else f"{scores.bits_per_byte:.3f}"
        pair = ("-", "-") if bigram is None else (f"{bigram:.3f}", f"{bigram - scores.loss:.3f}")
        table.add_row(
            domain, f"{scores.loss:.3f}", f"{scores.perplexity:.2f}", bits, pair[0], f"{unigram:.3f}", pair[1]
        )
    return table


def load_table(evaluations: Mapping[str, Evaluation]) -> Table:
    """Lay out how each domain uses the experts of each MoE block.

    Args:
        evaluations: domain to its scores.

    Returns:
        A table to print; its bars are half high for a balanced load.
    """
    table = Table(title="expert load in validation, 1 = balanced", title_justify="left")
    for name in ("domain", "block", "load", "least", "most", "dropped"):
        table.add_column(name)
    for domain, scores in evaluations.items():
        for index, load in scores.loads.items():
            least, most = min(load) * len(load), max(load) * len(load)
            drops = f"{scores.drop_rate:.1%}" if index == min(scores.loads) else ""
            table.add_row(domain, str(index), load_bar(load), f"{least:.2f}", f"{most:.2f}", drops)
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
    for name in ("part", "parameters", "active per token", "float32 bytes"):
        table.add_column(name, justify="left" if name == "part" else "right")
    rows = parameter_table(model)
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
        metrics: lines of ``metrics.jsonl``.
        evaluations: domain to its final scores.
        simple: domain to its baselines.

    Returns:
        The path.
    """
    scored = [line for line in metrics if "validation" in line]
    curves = {
        domain: Curve([line["step"] for line in scored], [line["validation"][domain] for line in scored])
        for domain in evaluations
        if scored
    }
    return plot_run(
        path,
        train=Curve([line["step"] for line in metrics], [line["loss"] for line in metrics]),
        validation=curves,
        baselines={domain: pair.bigram for domain, pair in simple.items() if pair.bigram is not None},
        loads={domain: scores.loads for domain, scores in evaluations.items() if scores.loads},
    )


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
