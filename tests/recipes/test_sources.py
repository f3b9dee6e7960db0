import errno
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from moekit.lm.preparation import PreparedDomain
from moekit.lm.shards import read_manifest, write_shards
from moekit.lm.tokenizers import ByteTokenizer, save_tokenizer
from moekit.recipes import sources
from moekit.recipes.settings import DataSettings, ModelSettings, RunSettings, TrainSettings
from moekit.recipes.setup import make_config
from moekit.recipes.sources import Source, ValidationSet, make_corpus

TINY = make_config(ModelSettings(preset="moekit_tiny"))


def corpus(config=TINY, *, resume=None, say=lambda text: pytest.fail(f"nothing to say, but {text!r}"), **data):
    data = {name: tuple(map(str, v)) if name.endswith("manifest") else v for name, v in data.items()}
    settings = TrainSettings(data=DataSettings(**data), run=RunSettings(resume=resume))
    return make_corpus(settings, config, say=say)


# Data that are named.


def test_named_manifests_become_sources_and_validation_sets(shards):
    found = corpus(dataset_manifest=shards.train, val_manifest=shards.validation)
    names = ("prose", "code")
    assert found.sources == tuple(
        Source(name, str(path), read_manifest(path)) for name, path in zip(names, shards.train, strict=True)
    )
    assert [source.num_sequences for source in found.sources] == [48, 48]
    assert found.validation == tuple(
        ValidationSet(name, read_manifest(path), None, None, str(path))
        for name, path in zip(names, shards.validation, strict=True)
    )
    assert found.weights == (1.0, 1.0)
    assert found.max_passes == 1
    assert found.tokenizer is None
    assert all(each.token_bytes() is None for each in found.validation)


def test_several_passes_are_without_end(shards):
    assert corpus(dataset_manifest=shards.train, multiple_data_passes=True).max_passes is None


@pytest.mark.parametrize("kind", ["the same", "a link to its folder", "another list"])
def test_no_shard_is_of_two_sources_in_one_pass(shards, tmp_path, kind):
    first = second = shards.train[0]
    if kind == "a link to its folder":
        (tmp_path / "link").symlink_to(first.parent)
        second = tmp_path / "link" / first.name
    elif kind == "another list":
        first = tmp_path / "one" / "first.jsonl"
        shutil.copytree(shards.train[0].parent, first.parent)
        second = first.with_name("second.jsonl")
        lines = (first.parent / "manifest.jsonl").read_text().splitlines()
        first.write_text("\n".join(lines[:2]))
        second.write_text("\n".join(lines[1:]))
    named = re.escape(f"--dataset-manifest {first} {second}: both name the shard ")
    with pytest.raises(ValueError, match=named + r".*0000000[01]\.tar; in one pass no data may repeat\. Name it once"):
        corpus(dataset_manifest=(first, second))
    assert len(corpus(dataset_manifest=(first, second), multiple_data_passes=True).sources) == 2


def test_folders_of_one_name_are_numbered_and_validation_may_lack(tmp_path):
    manifests = tuple(
        write_shards(tmp_path / name / "train", torch.zeros(2, 65, dtype=torch.int64)) for name in ("prose", "code")
    )
    found = corpus(dataset_manifest=manifests, train_data_mix_weights=(3, 1))
    assert [source.name for source in found.sources] == ["train-0", "train-1"]
    assert found.validation == ()
    assert found.weights == (3, 1)


def test_a_manifest_without_a_folder_is_named_by_itself(shards, monkeypatch):
    monkeypatch.chdir(shards.train[0].parent)
    assert corpus(dataset_manifest=("manifest.jsonl",)).sources[0].name == "manifest.jsonl"


def test_a_missing_manifest_is_explained(shards, tmp_path):
    absent = tmp_path / "absent.jsonl"
    message = r"there is no manifest at .*absent\.jsonl\. Make one from texts with python -m moekit\.lm\.tokenize"
    with pytest.raises(FileNotFoundError, match=message):
        corpus(dataset_manifest=(shards.train[0], absent))
    with pytest.raises(FileNotFoundError, match=message):
        corpus(dataset_manifest=shards.train[:1], val_manifest=(absent,))
    with pytest.raises(IsADirectoryError, match=r"is a folder; expected a manifest file"):
        corpus(dataset_manifest=(shards.train[0].parent,))


def test_counts_of_manifests_and_weights_must_agree(shards):
    with pytest.raises(ValueError, match="1 validation manifests were given for 2 sources; expected one each"):
        corpus(dataset_manifest=shards.train, val_manifest=shards.validation[:1])
    with pytest.raises(ValueError, match=r"has 3 numbers for 2 sources \(prose, code\); expected one each"):
        corpus(dataset_manifest=shards.train, train_data_mix_weights=(1, 2, 3))


def test_a_run_that_only_evaluates_has_no_sources(shards):
    found = corpus(val_manifest=shards.validation, resume="x.pt")
    assert found.sources == ()
    assert found.weights == ()
    assert [each.name for each in found.validation] == ["prose", "code"]


# Tars of validation.


def test_tars_are_named_by_their_file_and_keep_their_words(shards, tmp_path):
    tar = read_manifest(shards.validation[0])[0].path
    pipe = "pipe:aws s3 cp s3://bucket/folder//shard_00000000.tar -"
    found = corpus(val_data=(tar, pipe), data_key="json", resume="x.pt")
    first, second = found.validation
    assert first == ValidationSet(Path(tar).stem, [tar], "json", None, tar)
    assert second == ValidationSet("shard_00000000", ["s3://bucket/folder//shard_00000000.tar"], "json", None, pipe)


def test_braces_are_several_tars_of_one_set():
    [found] = corpus(val_data=("s3://b/v_{00..02}.tar",), resume="x.pt").validation
    assert found.shards == ["s3://b/v_00.tar", "s3://b/v_01.tar", "s3://b/v_02.tar"]
    assert found.location == "s3://b/v_{00..02}.tar"


@pytest.mark.parametrize(
    ("keys", "expected"), [((), [None, None]), (("txt",), ["txt", "txt"]), (("txt", "json"), ["txt", "json"])]
)
def test_keys_of_validation_are_one_for_all_or_one_each(keys, expected):
    found = corpus(val_data=("s3://b/a.tar", "s3://b/b.tar"), val_data_key=keys, resume="x.pt")
    assert [each.data_key for each in found.validation] == expected


def test_the_own_key_of_validation_wins_over_that_of_training():
    [found] = corpus(val_data=("s3://b/a.tar",), val_data_key=("txt",), data_key="json", resume="x").validation
    assert found.data_key == "txt"


def test_other_commands_need_leave():
    with pytest.raises(ValueError, match="--allow-pipe-commands"):
        corpus(val_data=("pipe:cat a.tar",), resume="x.pt")
    [found] = corpus(val_data=("pipe:cat a.tar",), allow_pipe_commands=True, resume="x.pt").validation
    assert found.shards == ["pipe:cat a.tar"]


def test_no_two_sets_have_one_name(shards):
    tars = ("s3://b/prose.tar", "s3://c/prose.tar", "s3://b/other.tar")
    found = corpus(val_manifest=shards.validation, val_data=tars, dataset_manifest=shards.train)
    assert [each.name for each in found.validation] == ["prose", "code", "prose-0", "prose-1", "other"]
    found = corpus(val_data=("s3://b/code.tar", "s3://b/code-0.tar"), dataset_manifest=shards.train)
    names = [each.name for each in found.validation]  # those of the sources mean sets held out from them
    assert names == ["code-1", "code-0"]


# Tokenizers.


def test_the_tokenizer_beside_a_manifest_gives_bytes(tmp_path):
    manifest = write_shards(tmp_path, torch.zeros(2, 65, dtype=torch.int64))
    save_tokenizer(ByteTokenizer(), tmp_path / "tokenizer.json")
    tar = read_manifest(manifest)[0].path
    for found in (corpus(val_manifest=(manifest,), resume="x"), corpus(val_data=(tar,), resume="x")):
        assert found.validation[0].token_bytes()[1:].tolist() == [1] * 256
        assert found.tokenizer is None


def test_the_tokenizer_of_a_domain_lies_above_its_held_out_data(tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path / "tokenizer.json")
    for folder, known in (("prose/validation", True), ("prose/other", False), ("validation", False)):
        manifest = write_shards(tmp_path / folder, torch.zeros(2, 65, dtype=torch.int64))
        [found] = corpus(val_manifest=(manifest,), resume="x").validation
        assert (found.tokenizer is not None) == known, folder


def test_a_tokenizer_may_be_a_path(shards, tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path / "mine.json")
    found = corpus(dataset_manifest=shards.train, val_manifest=shards.validation, tokenizer=f"{tmp_path}/mine.json")
    assert all(each.tokenizer.vocab_size == 257 for each in found.validation)


def test_a_tokenizer_that_cannot_be_read_is_told_as_it_was_given(shards, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"caf\xe9")
    what = (
        re.escape(f"{path} is no tokenizer that save_tokenizer wrote, nor") + ".* 'utf-8' codec can't decode byte 0xe9"
    )
    given = {"dataset_manifest": shards.train, "val_manifest": shards.validation, "tokenizer": str(path)}
    with pytest.raises(ValueError, match=f"^--tokenizer {re.escape(str(path))}: {what}"):
        corpus(**given)
    denied = PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(sources, "load_tokenizer", Mock(side_effect=denied))
    with pytest.raises(OSError, match=rf"^--tokenizer .*json: {path} cannot be read \(Permission denied\); expected a"):
        corpus(**given)


@pytest.mark.parametrize(
    ("content", "vocab_size", "told"),
    [
        ('{"model": {"type": "WordPiece"}}', 512, "is no tokenizer that save_tokenizer wrote, nor a "),
        ('{"type": "moekit.byte"}', 200, "has 257 ids, the model's vocabulary 200"),
    ],
)
def test_a_foreign_tokenizer_beside_the_data_is_told_once_and_left(tmp_path, content, vocab_size, told):
    manifest, path = write_shards(tmp_path, torch.zeros(2, 65, dtype=torch.int64)), tmp_path / "tokenizer.json"
    path.write_text(content)
    config, said = type(TINY)(**{**vars(TINY), "vocab_size": vocab_size}), []
    tar = read_manifest(manifest)[0].path
    found = corpus(config, say=said.append, dataset_manifest=(manifest,), val_manifest=(manifest,), val_data=(tar,))
    assert [each.tokenizer for each in found.validation] == [None, None]
    [line] = said
    where = re.escape(f"no bits per byte: the tokenizer beside the data: {path} ")
    assert re.fullmatch(rf"{where}{told}.* \(--tokenizer names another\)", line)
    with pytest.raises(ValueError, match=r"^--tokenizer .*is no tokenizer|^tokenizer byte has 257 ids"):
        corpus(config, dataset_manifest=(manifest,), val_manifest=(manifest,), tokenizer=str(path))


# The embedded domains.


@pytest.fixture
def prepared(monkeypatch, shards):
    """Stand in for the embedded corpora; returns the calls of ``prepare``."""
    calls = []
    pairs = zip(reversed(list(sources.MIXING_WEIGHTS)), shards.train, shards.validation, strict=True)
    domains = {name: PreparedDomain(train, validation) for name, train, validation in pairs}

    def prepare(**options):
        calls.append(options)
        options["progress"]("preparing")
        return SimpleNamespace(domains=domains, tokenizer=ByteTokenizer())

    monkeypatch.setattr(sources, "prepare", prepare)
    return calls


def embedded(config=TINY, *, say=lambda text: None, **data):
    return make_corpus(TrainSettings(data=DataSettings(**data)), config, say=say)


def test_without_manifests_the_embedded_domains_are_prepared(prepared):
    said = []
    found = embedded(say=said.append)
    assert said == ["preparing"]
    assert prepared[0]["tokenizer_name"] == "bpe-512"
    assert prepared[0]["seq_len"] == 64
    weights = dict(zip((source.name for source in found.sources), found.weights, strict=True))
    assert weights == dict(sources.MIXING_WEIGHTS)
    assert sorted(weights.values()) == [0.275, 0.725]
    assert [each.name for each in found.validation] == [source.name for source in found.sources]
    assert found.max_passes is None
    assert found.tokenizer.vocab_size == 257
    for each in found.validation:
        assert each.token_bytes()[1:].tolist() == [1] * 256


def test_the_tokenizer_can_be_named(prepared):
    embedded(tokenizer="byte")
    assert prepared[0]["tokenizer_name"] == "byte"


def test_weights_of_the_embedded_domains_are_counted_too(prepared):
    with pytest.raises(ValueError, match="has 1 numbers for 2 sources"):
        embedded(train_data_mix_weights=(1,))
    assert embedded(train_data_mix_weights=(1, 2)).weights == (1, 2)


@pytest.mark.usefixtures("prepared")
def test_a_tokenizer_larger_than_the_vocabulary_is_refused():
    small = type(TINY)(**{**vars(TINY), "vocab_size": 200})
    message = "tokenizer byte has 257 ids, the model's vocabulary 200; expected no more. Choose --tokenizer bpe-200"
    with pytest.raises(ValueError, match=message):
        embedded(small, tokenizer="byte")
