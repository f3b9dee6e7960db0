"""From settings to the pieces of a run: shape, recipe, data, precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.lm.configs import ModelConfig, load_config, read_config
from moekit.lm.corpora import MIXING_WEIGHTS
from moekit.lm.preparation import prepare
from moekit.lm.shards import read_manifest, read_shard
from moekit.lm.tokenizers import Tokenizer, token_bytes
from moekit.recipes.layers import Recipe
from moekit.recipes.names import find_recipe
from moekit.recipes.settings import DataSettings, ModelSettings


class Domain(NamedTuple):
    """One source of data.

    Attributes:
        name: shown in tables.
        train: manifest of the training shards.
        validation: manifest of the held-out shards, or None.
    """

    name: str
    train: Path
    validation: Path | None


class Corpus(NamedTuple):
    """The data of a run.

    Attributes:
        domains: the sources.
        weights: share of each source in training.
        tokenizer: that made the shards, or None if it is not known.
    """

    domains: tuple[Domain, ...]
    weights: tuple[float, ...]
    tokenizer: Tokenizer | None

    def token_bytes(self) -> Tensor | None:
        """Return the UTF-8 bytes of each token id, (V,) int64, or None without a tokenizer."""
        return None if self.tokenizer is None else token_bytes(self.tokenizer)


def make_config(settings: ModelSettings) -> ModelConfig:
    """Load the model's shape; keys in its file win over the flags, as in OpenLM.

    Args:
        settings: of the model.

    Returns:
        ModelConfig.

    Raises:
        ValueError: if the preset is unknown or a value makes no sense.
        FileNotFoundError: if the preset is a path and not there.

    Example:
        >>> make_config(ModelSettings(preset="open_lm_41m")).moe_num_experts
        8
    """
    flags = {"model_norm": settings.model_norm, "moe_freq": settings.moe_freq}
    if settings.moe_freq:
        flags |= {"moe_num_experts": settings.moe_num_experts}
        flags |= {} if settings.moe_top_k is None else {"moe_top_k": settings.moe_top_k}
    return load_config(settings.preset, defaults=flags)


def make_recipe(settings: ModelSettings) -> Recipe:
    """Find the recipe and apply the flags that concern it; keys in the model's file win over them, as in OpenLM.

    Args:
        settings: of the model.

    Returns:
        Recipe.

    Raises:
        ValueError: if the recipe is unknown, or has no load-balancing loss to weigh.
        FileNotFoundError: if it names a file that is not there.

    Example:
        >>> make_recipe(ModelSettings(recipe="openlm", moe_loss_weight=0.3)).coefficients
        {'load_balance': 0.3}
    """
    concerned = ("moe_top_k", "moe_capacity_factor", "moe_loss_weight")
    settings = replace(
        settings, **{key: value for key, value in read_config(settings.preset).items() if key in concerned}
    )
    recipe = find_recipe(settings.recipe, k=settings.moe_top_k, capacity_factor=settings.moe_capacity_factor)
    if settings.moe_loss_weight is None:
        return recipe
    if "load_balance" not in recipe.losses:
        raise ValueError(
            f"--moe-loss-weight is {settings.moe_loss_weight}, but recipe {settings.recipe} has no loss named "
            f"load_balance (it has: {', '.join(recipe.losses) or 'none'}). Leave the flag out."
        )
    return recipe._replace(coefficients={**recipe.coefficients, "load_balance": settings.moe_loss_weight})


def make_corpus(settings: DataSettings, config: ModelConfig, *, say: Callable[[str], None]) -> Corpus:
    """Find the data that the settings name, or prepare the embedded domains on first use.

    Args:
        settings: of the data.
        config: gives sequence length and, for the default tokenizer, vocabulary.
        say: called with a line of text before each step that takes time.

    Returns:
        Corpus.

    Raises:
        ValueError: if the numbers of manifests and weights differ, the sequences have another length than the model's,
            or the tokenizer has more ids than the model.
        FileNotFoundError: if a manifest is not there.
    """
    corpus = _named(settings, config) if settings.dataset_manifest else _embedded(settings, config, say)
    if len(corpus.weights) != len(corpus.domains):
        raise ValueError(
            f"--train-data-mix-weights has {len(corpus.weights)} numbers for {len(corpus.domains)} sources "
            f"({', '.join(domain.name for domain in corpus.domains)}); expected one each."
        )
    if corpus.tokenizer is not None and corpus.tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer {corpus.tokenizer.name} has {corpus.tokenizer.vocab_size} ids, the model's vocabulary "
            f"{config.vocab_size}; expected no more. Choose --tokenizer bpe-{config.vocab_size} or another preset."
        )
    return corpus


def _embedded(settings: DataSettings, config: ModelConfig, say: Callable[[str], None]) -> Corpus:
    name = settings.tokenizer or f"bpe-{config.vocab_size}"
    prepared = prepare(tokenizer_name=name, seq_len=config.seq_len, progress=say)
    domains = tuple(Domain(key, shards.train, shards.validation) for key, shards in prepared.domains.items())
    weights = settings.train_data_mix_weights or tuple(MIXING_WEIGHTS[domain.name] for domain in domains)
    return Corpus(domains, weights, prepared.tokenizer)


def _named(settings: DataSettings, config: ModelConfig) -> Corpus:
    manifests, held_out = settings.dataset_manifest, settings.val_manifest
    for path in (*manifests, *held_out):
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no manifest at {path}. Expected a manifest.jsonl with the shards beside it; "
                f"moekit.lm.shards.write_shards writes both. Without --dataset-manifest the embedded data are used."
            )
    if held_out and len(held_out) != len(manifests):
        raise ValueError(
            f"{len(held_out)} validation manifests were given for {len(manifests)} sources; expected one each, in order"
        )
    for path in (*manifests, *held_out):
        _check_length(path, config.seq_len)
    names = [path.parent.name or str(path) for path in manifests]
    names = [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]
    pairs = zip(names, manifests, held_out or (None,) * len(manifests), strict=True)
    weights = settings.train_data_mix_weights or (1.0,) * len(manifests)
    return Corpus(tuple(Domain(*triple) for triple in pairs), weights, None)


def _check_length(manifest: Path, seq_len: int) -> None:
    # One sequence will do: whoever loads the manifest checks that all are as long.
    first = next((tokens for shard in read_manifest(manifest) for tokens in read_shard(shard.path)), None)
    if first is not None and len(first) != seq_len + 1:
        raise ValueError(
            f"the sequences of {manifest} have {len(first)} tokens; expected {seq_len + 1}, one more than the model's "
            f"seq_len. Choose a --preset with seq_len {len(first) - 1}, or tokenize the data again."
        )


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Say whether a precision setting means bf16 autocast on this hardware.

    A CPU gains from bf16 only with AMX: without it bf16 products took 1.2 to 2 times as long as float32 ones.

    Args:
        precision: "auto", "fp32" or "amp_bfloat16".
        device: that trains.

    Returns:
        True for bf16 autocast.

    Example:
        >>> uses_bfloat16("fp32", torch.device("cpu"))
        False
    """
    if precision != "auto":
        return precision == "amp_bfloat16"
    return device.type == "cuda" or bool(torch.cpu.get_capabilities().get("amx_bf16"))


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the autocast context of a precision setting; see ``uses_bfloat16``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(precision, device))
