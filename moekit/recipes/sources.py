"""From settings to the data of a run: sources to train on, and sets to score."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from moekit.lm.batches import Batching, RowFormat, ValidationBatch, read_validation
from moekit.lm.configs import ModelConfig
from moekit.lm.corpora import MIXING_WEIGHTS
from moekit.lm.orders import check_budget
from moekit.lm.preparation import prepare
from moekit.lm.shards import Shard, read_manifest
from moekit.lm.tokenizers import Tokenizer, load_tokenizer, token_bytes
from moekit.lm.urls import expand_braces, is_remote, resolve_url
from moekit.parallel import World, one_process
from moekit.recipes.budgets import Budget
from moekit.recipes.settings import DataSettings, TrainSettings

_TokenizerOf = Callable[[str], Tokenizer | None]  # given where the data are


class Source(NamedTuple):
    """One source of training data.

    Attributes:
        name: shown in tables and messages.
        manifest: path or URL.
        shards: that the manifest lists.
    """

    name: str
    manifest: str
    shards: Sequence[Shard]

    @property
    def num_sequences(self) -> int:
        """How many sequences the source holds, by its manifest."""
        return sum(shard.num_sequences for shard in self.shards)


class ValidationSet(NamedTuple):
    """A set of sequences to score.

    Attributes:
        name: shown in tables; that of a source if it was held out from it.
        shards: lines of a manifest, or paths and URLs of tars.
        data_key: extension of the members; None takes whichever they have.
        tokenizer: that made them, or None if it is not known.
        location: as the user gave it, for result files.
    """

    name: str
    shards: Sequence[Shard | str]
    data_key: str | None
    tokenizer: Tokenizer | None
    location: str

    def token_bytes(self) -> Tensor | None:
        """Return the UTF-8 bytes of each token id, (V,) int64, or None without a tokenizer."""
        return None if self.tokenizer is None else token_bytes(self.tokenizer)


class Corpus(NamedTuple):
    """The data of a run.

    Attributes:
        sources: of training; none when a run only evaluates.
        weights: share of each source in training.
        validation: what is scored.
        max_passes: how often a source may be gone through; None is without end.
        tokenizer: of the embedded domains, whose samples can be shown; or None.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    validation: tuple[ValidationSet, ...]
    max_passes: int | None
    tokenizer: Tokenizer | None


def make_corpus(settings: TrainSettings, config: ModelConfig, *, say: Callable[[str], None]) -> Corpus:
    """Find the data that the settings name, or prepare the embedded domains on first use.

    Args:
        settings: of the run.
        config: gives sequence length and, for the default tokenizer, vocabulary.
        say: called with a line of text before each step that takes time, and of a tokenizer beside the data that does
            not serve.

    Returns:
        Corpus.

    Raises:
        ValueError: if the numbers of manifests and weights differ, two sources share a shard and there is one pass, or
            the tokenizer that the settings name is none or has more ids than the model.
        FileNotFoundError: if a manifest is not there.
    """
    data = settings.data
    tokenizer_of = partial(_tokenizer, data=data, found=cache(partial(_found, vocab_size=config.vocab_size, say=say)))
    named = bool(data.dataset_manifest) or settings.evaluates_only
    corpus = _named(data, tokenizer_of) if named else _embedded(data, config, tokenizer_of, say)
    if len(corpus.weights) != len(corpus.sources):
        raise ValueError(
            f"--train-data-mix-weights has {len(corpus.weights)} numbers for {len(corpus.sources)} sources "
            f"({', '.join(source.name for source in corpus.sources)}); expected one each."
        )
    for tokenizer in (corpus.tokenizer, *(each.tokenizer for each in corpus.validation)):
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model's vocabulary "
                f"{config.vocab_size}; expected no more. Choose --tokenizer bpe-{config.vocab_size} or another model."
            )
    return corpus


def read_set(
    held_out: ValidationSet,
    data: DataSettings,
    config: ModelConfig,
    *,
    batch_size: int,
    tokens: int | None = None,
    world: World | None = None,
) -> Iterator[ValidationBatch]:
    """Read a validation set as it is scored.

    Args:
        held_out: the set.
        data: how a run reads.
        config: gives sequence length and vocabulary.
        batch_size: sequences per batch over all ranks.
        tokens: read the first so many, rounded up to whole sequences; None reads all.
        world: the ranks that share the sequences; None is one process.

    Returns:
        The batches.

    Raises:
        ValueError, OSError: see ``read_validation``.
    """
    batching = batching_of(data, config, world or one_process(), batch_size=batch_size)
    num_sequences = None if tokens is None else -(-tokens // config.seq_len)
    return read_validation(held_out.shards, batching._replace(data_key=held_out.data_key), num_sequences=num_sequences)


def batching_of(data: DataSettings, config: ModelConfig, world: World, *, batch_size: int) -> Batching:
    """Say how a run makes batches of shards.

    Args:
        data: how it reads.
        config: gives sequence length and vocabulary.
        world: the ranks that share the batches.
        batch_size: sequences per batch over all ranks.

    Returns:
        Batching, of members with the extension that training data have.
    """
    row_format = RowFormat(config.seq_len, config.vocab_size)
    reading = data.on_bad_data, data.data_key, data.allow_pipe_commands
    return Batching(batch_size, row_format, world.rank, world.size, *reading)


def check_lasts(corpus: Corpus, budget: Budget) -> None:
    """Check before the first step that the training data last for the whole run.

    Args:
        corpus: the data.
        budget: the length of the run.

    Raises:
        ValueError: if they do not; it names every source, with what it holds and what is needed.

    Example:
        >>> endless = Corpus((Source("a", "a/manifest.jsonl", ()),), (1.0,), (), max_passes=None, tokenizer=None)
        >>> check_lasts(endless, Budget(5, 8, 1, 40, 128))
    """
    check_budget(
        [source.manifest for source in corpus.sources],
        [[shard.num_sequences for shard in source.shards] for source in corpus.sources],
        corpus.weights,
        num_sequences=budget.sequences,
        max_passes=corpus.max_passes,
    )


def _embedded(
    data: DataSettings, config: ModelConfig, tokenizer_of: _TokenizerOf, say: Callable[[str], None]
) -> Corpus:
    prepared = prepare(
        tokenizer_name=data.tokenizer or f"bpe-{config.vocab_size}", seq_len=config.seq_len, progress=say
    )
    sources, held_out = [], []
    for name, manifests in prepared.domains.items():
        sources.append(Source(name, str(manifests.train), read_manifest(manifests.train)))
        held_out.append(_validation_set(name, str(manifests.validation), data, lambda _: prepared.tokenizer))
    weights = data.train_data_mix_weights or tuple(MIXING_WEIGHTS[source.name] for source in sources)
    taken = [source.name for source in sources]
    return Corpus(tuple(sources), weights, (*held_out, *_tars(data, taken, tokenizer_of)), None, prepared.tokenizer)


def _named(data: DataSettings, tokenizer_of: _TokenizerOf) -> Corpus:
    manifests, held_out = data.dataset_manifest, data.val_manifest
    if manifests and held_out and len(held_out) != len(manifests):
        raise ValueError(
            f"{len(held_out)} validation manifests were given for {len(manifests)} sources; expected one each, in order"
        )
    _check_tokenizer(data)
    names = _names(manifests or held_out)
    read = [read_manifest(manifest, allow_commands=data.allow_pipe_commands) for manifest in manifests]
    sources = tuple(Source(*triple) for triple in zip(names, manifests, read, strict=False))
    if not data.multiple_data_passes:
        _check_once(sources)
    sets = [_validation_set(name, url, data, tokenizer_of) for name, url in zip(names, held_out, strict=False)]
    weights = data.train_data_mix_weights or (1.0,) * len(manifests)
    passes = None if data.multiple_data_passes else 1
    return Corpus(sources, weights, (*sets, *_tars(data, names, tokenizer_of)), passes, None)


def _check_once(sources: Sequence[Source]) -> None:
    """Refuse a shard of two sources, which one pass would go through twice."""
    seen: dict[str, str] = {}
    for source in sources:
        paths = {shard.path if is_remote(shard.path) else os.path.realpath(shard.path) for shard in source.shards}
        for path in sorted(paths & seen.keys()):
            raise ValueError(
                f"--dataset-manifest {seen[path]} {source.manifest}: both name the shard {path}; in one pass no data "
                "may repeat. Name it once, or add --multiple-data-passes; more of it: --train-data-mix-weights"
            )
        seen |= dict.fromkeys(paths, source.manifest)


def _check_tokenizer(data: DataSettings) -> None:
    if data.tokenizer and not data.tokenizer.endswith(".json"):
        raise ValueError(
            f"--tokenizer {data.tokenizer} is one of the embedded domains; for data that are named, expected the path "
            "of a tokenizer.json. Leave it out to take the one beside the manifest"
        )
    if data.tokenizer and not Path(data.tokenizer).is_file():
        raise FileNotFoundError(f"--tokenizer {data.tokenizer}: there is no such file; expected a tokenizer.json")


def _names(locations: Sequence[str]) -> list[str]:
    """Name each source by its manifest's folder; two of one name get numbers."""
    names = [location.rstrip("/").split("/")[-2] if "/" in location else location for location in locations]
    return _distinct(names, ())


def _distinct(names: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Number the names that occur twice or are taken: a name is what scores are listed under."""
    found: list[str] = []
    for name in names:
        if names.count(name) > 1 or name in taken:
            numbered = (f"{name}-{number}" for number in count())
            name = next(each for each in numbered if each not in (*names, *taken, *found))
        found.append(name)
    return found


def _validation_set(name: str, manifest: str, data: DataSettings, tokenizer_of: _TokenizerOf) -> ValidationSet:
    shards = read_manifest(manifest, allow_commands=data.allow_pipe_commands)
    return ValidationSet(name, shards, data.data_key, tokenizer_of(manifest), manifest)


def _tars(data: DataSettings, taken: Sequence[str], tokenizer_of: _TokenizerOf) -> list[ValidationSet]:
    sets = []
    for number, text in enumerate(data.val_data):
        urls = [resolve_url(each, allow_commands=data.allow_pipe_commands) for each in expand_braces(text)]
        for url in urls:
            if os.path.isdir(url):
                raise IsADirectoryError(f"--val-data {text}: {url} is a folder; expected a tar of sequences")
            if not (url.startswith("pipe:") or is_remote(url) or os.path.exists(url)):
                raise FileNotFoundError(f"--val-data {text}: there is no file {url}; expected a tar of sequences")
        keys = data.val_data_key or ((data.data_key,) if data.data_key else ())
        key = keys[number if len(keys) > 1 else 0] if keys else None
        sets.append(ValidationSet(_tar_name(text), urls, key, tokenizer_of(urls[0]), text))
    names = _distinct([each.name for each in sets], taken)
    return [each._replace(name=name) for each, name in zip(sets, names, strict=True)]


def _tar_name(text: str) -> str:
    words = [word for word in text.split() if word != "-"]
    return words[-1].rsplit("/", 1)[-1].removesuffix(".tar") or text


def _tokenizer(beside: str, *, data: DataSettings, found: Callable[[Path], Tokenizer | None]) -> Tokenizer | None:
    if data.tokenizer.endswith(".json"):
        return _load(data.tokenizer, given=f"--tokenizer {data.tokenizer}")
    if beside.startswith("pipe:") or is_remote(beside):
        return None
    folder = Path(beside).absolute().parent
    folders = [folder, folder.parents[1]] if folder.name in ("train", "validation") else [folder]  # as domains lie
    path = next((path for each in folders if (path := each / "tokenizer.json").is_file()), None)
    return None if path is None else found(path)


def _found(path: Path, *, vocab_size: int, say: Callable[[str], None]) -> Tokenizer | None:
    """Read a tokenizer that nobody named and that may be of anything: where it does not serve, it is told and left."""
    given = "the tokenizer beside the data"
    trouble: Exception | str
    try:
        tokenizer = _load(path, given=given)
        if tokenizer.vocab_size <= vocab_size:
            return tokenizer
        trouble = f"{given}: {path} has {tokenizer.vocab_size} ids, the model's vocabulary {vocab_size}"
    except (ValueError, OSError, ModuleNotFoundError) as error:
        trouble = error
    say(f"no bits per byte: {trouble} (--tokenizer names another)")
    return None


def _load(path: str | Path, *, given: str) -> Tokenizer:
    """Read a tokenizer; what is wrong with it begins with how it was given."""
    try:
        return load_tokenizer(path)
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from error
    except OSError as error:
        raise type(error)(
            f"{given}: {path} cannot be read ({error.strerror or error}); expected a tokenizer.json"
        ) from error
