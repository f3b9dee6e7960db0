"""Two hundred malformed inputs: each ends in a clear error or a counted skip, and no file is lost.

What is damaged is told by code of its own, with ``tarfile`` and ``json``, and not by moekit's readers. Every case is
drawn from its number alone: ``pytest "tests/test_malformed.py::test_a_malformed_input[57]"`` repeats one.
"""

import gzip
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from malformations import MANIFEST, MANIFESTS, MEMBERS, SHARDS, TARS, Maker, Trial, manifest, member, tar
from malformed_launches import CHECKPOINTS, LAUNCHES
from small_runs import look_at_models_once, markov_sequences, without_a_picture

from moekit.lm.shards import write_shards
from moekit.recipes.train import main

_SEQ_LEN, _VOCABULARY = 64, 512  # of the preset moekit_tiny
_SECONDS = 20
_RUN_FILES = {"config.json", "params.txt", "metrics.jsonl", "data.jsonl", "results.json", "results.jsonl"}
_RUN_FILES |= {"results_1.json"}  # of the end that a run goes on past


def _some(makers: Sequence[Maker], count: int) -> list[Maker]:
    return list(islice(cycle(makers), count))


CASES: list[Maker] = [
    *_some([manifest(damage) for damage in MANIFESTS], 36),
    *_some([tar(damage) for damage in TARS], 40),
    *_some([member(damage) for damage in MEMBERS], 36),
    *_some(LAUNCHES, 48),
    *_some(CHECKPOINTS, 40),
]


class Hang(BaseException):
    """The time is up. No ``except Exception`` catches it."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# The oracle: what is in the data, read without moekit.


class Content(NamedTuple):
    """What some shards hold: sequences to be used, and sequences to be counted as skipped."""

    good: int
    bad: int


def _tar_members(path: Path) -> tuple[list[tuple[str, bytes]], bool]:
    """Read the members up to the first fault, and whether there is one; what is no regular file is empty."""
    members: list[tuple[str, bytes]] = []
    end = 0  # of the last one; where tarfile itself stands behind it depends on Python's version
    try:
        raw = path.read_bytes()
        with tarfile.open(path, "r:") as file:
            for entry in file:
                end = entry.offset_data + -(-_stored_bytes(entry, raw) // 512) * 512
                if entry.isdir():
                    continue
                if not 0 <= entry.size <= 2**26:
                    return members, True
                found = file.extractfile(entry) if entry.isreg() and not entry.issparse() else None
                members.append((entry.name, b"" if found is None else found.read()))
        rest = raw[end:]
        return members, len(rest) < 512 or any(rest)
    except (OSError, tarfile.TarError, ValueError, OverflowError):
        return members, True


def _stored_bytes(entry: tarfile.TarInfo, raw: bytes) -> int:
    """Say how many bytes follow a header; a sparse file is larger than they are, and a link or a folder has none."""
    if entry.issparse():
        return int(tarfile.nti(raw[entry.offset_data - 388 : entry.offset_data - 376]))  # type: ignore[attr-defined]
    return entry.size if entry.isreg() or entry.type not in tarfile.SUPPORTED_TYPES else 0


def _is_sequence(name: str, content: bytes) -> bool:
    if not name.endswith((".json", ".json.gz", ".txt")):
        return False
    try:
        ids = json.loads((gzip.decompress(content) if name.endswith(".gz") else content).decode("utf-8"))
    except (ValueError, RecursionError, OSError, EOFError, zlib.error):
        return False
    whole = isinstance(ids, list) and all(type(token) is int and -2 <= token < _VOCABULARY for token in ids)
    return whole and len(ids) > _SEQ_LEN


def _shard_content(path: Path, promised: int | None) -> Content:
    members, broken = _tar_members(path)
    usable = [_is_sequence(*each) for each in members[:promised]]
    if promised is None:
        return Content(sum(usable), len(usable) - sum(usable) + broken)
    behind = len(members) - promised if len(members) >= promised else 0
    return Content(sum(usable), promised - sum(usable) + (behind or (broken and len(members) == promised)))


def _manifest_shards(path: Path) -> list[tuple[Path, int]] | None:
    """Read a manifest; None if it is none."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().decode("utf-8").split("\n") if line.strip()]
    except (ValueError, OSError, RecursionError):
        return None
    shards: dict[Path, int] = {}
    for line in lines:
        count = line.get("num_sequences") if isinstance(line, dict) else None
        name = line.get("shard") if isinstance(line, dict) else None
        if not isinstance(name, str) or type(count) is not int or not 0 <= count < 2**63:
            return None
        if not name or name.startswith("/") or "://" in name or ".." in name.split("/") or "\0" in name:
            return None
        file = path.parent / os.path.normpath(name if name.endswith(".tar") else f"{name}.tar")
        if file in shards or not os.path.isfile(file):
            return None
        shards[file] = count
    return list(shards.items()) if sum(shards.values()) else None


def _content(role: str, root: Path) -> Content | None:
    folder = root / ("data" if role == "train" else "val")
    if role == "val-data":
        if not all((folder / name).is_file() for name in SHARDS):
            return None
        each = [_shard_content(folder / name, None) for name in SHARDS]
    else:
        shards = _manifest_shards(folder / MANIFEST)
        if shards is None:
            return None
        each = [_shard_content(*shard) for shard in shards]
    return Content(*map(sum, zip(*each, strict=True)))


def _is_whole(checkpoint: Path) -> bool:
    """Compare a checkpoint with its checksums."""
    try:
        checksums = json.loads((checkpoint / "checksums.json").read_text("utf-8"))
        found = {name: f"{zlib.crc32((checkpoint / name).read_bytes()):08x}" for name in checksums}
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    return checksums == found and {".metadata", "state.json", "__0_0.distcp"} <= set(checksums)


# Running the program, and what it may come to.


class Outcome(NamedTuple):
    """How a run ended: by itself, or by ``SystemExit`` with a message."""

    refusal: str | None
    warned: str


def _run(words: Sequence[str], capsys: pytest.CaptureFixture[str], *, seconds: float = _SECONDS) -> Outcome:
    capsys.readouterr()
    refusal = None
    with warnings.catch_warnings(record=True) as caught, _time_limit(seconds):
        warnings.simplefilter("always")
        try:
            main(list(words))
        except SystemExit as error:
            said = capsys.readouterr().err
            refusal = error.code if isinstance(error.code, str) else said if error.code == 2 else ""
    return Outcome(refusal, "\n".join(str(each.message) for each in caught))


def _check_clear(text: str, names: Sequence[str]) -> None:
    assert "Traceback" not in text
    flat = "".join(c for c in text if c not in "│╭╮╰╯─" and not c.isspace())
    assert any("".join(name.split()) in flat for name in names), f"names none of {names}: {text[:2000]}"
    said = text.removeprefix("train_moe.py: ")
    assert not re.match(r"\[Errno|'[^']*'$|'\w+' object|'[\w-]+' codec|\w+ ?argument|\w+ indices", said), (
        f"a bare message of a library: {text}"
    )
    assert len(said.split()) >= 5, text


def _words(trial: Trial, root: Path, role: str, content: Content | None) -> list[str]:
    """Let the run have one step of one whole pass; with a checkpoint, the third of three."""
    total = 12
    if role == "train" and content is not None and content.good + content.bad <= 60:
        total = sum(count for _, count in _manifest_shards(root / "data" / MANIFEST) or [])
    size, steps = (4, 3) if role == "checkpoint" else (total, 1)
    fixed = "--model moekit_tiny --precision fp32 --lr 1e-2 --log-every-n-steps 1 --log-data"
    length = f"--batch-size {size} --steps {steps} --name a"
    data = ["--dataset-manifest", str(root / "data" / MANIFEST), "--logs", str(root / "logs")]
    return [*fixed.split(), *length.split(), *data, *trial.flags]


def _snapshot(root: Path) -> dict[str, bytes | str]:
    """Read everything that must stay as it is; a run may add to its own reports."""
    reports = {root / "logs" / "a" / name for name in _RUN_FILES} | {
        root / "logs" / "a" / "checkpoints" / "results.jsonl"
    }
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"link to {path.readlink()}"
        elif path.is_file() and path not in reports:
            found[str(path)] = path.read_bytes()
    return found


def _check_files(before: dict[str, bytes | str], root: Path) -> None:
    after = _snapshot(root)
    lost = [name for name, content in before.items() if after.get(name) != content]
    assert not lost, f"lost or changed: {lost}"
    new = [Path(name).relative_to(root) for name in after if name not in before]
    strange = [str(path) for path in new if path.parts[:3] != ("logs", "a", "checkpoints") or len(path.parts) != 5]
    strange += [str(path) for path in new if path.name.startswith(".") and path.name != ".metadata"]
    strange += [str(path) for path in root.rglob(".*") if path.name != ".metadata"]
    assert not strange, f"left behind: {strange}"


def _check_training(root: Path, content: Content, total: int) -> None:
    run = root / "logs" / "a"
    [line] = [json.loads(each) for each in (run / "data.jsonl").read_text().splitlines()]
    read = [tuple(each) for each in line["sequences"]]
    assert len(set(read)) == len(read) == total
    [metrics] = [json.loads(each) for each in (run / "metrics.jsonl").read_text().splitlines()]
    skipped = sum(metrics["skipped_data"].values())
    assert bool(skipped) is bool(content.bad)
    if content.good + content.bad <= 60:  # else a pass would be too long
        assert skipped == content.bad


def _check_validation(root: Path, content: Content) -> None:
    [scores] = json.loads((root / "logs" / "a" / "results.json").read_text())["validation"].values()
    found = Content(scores["sequences"], sum(scores["skipped_data"].values()))
    assert found == content


def _check_data(trial: Trial, outcome: Outcome, root: Path, content: Content | None, policy: str, total: int) -> str:
    if outcome.refusal is not None:
        assert content is None or content.bad, f"the data are good, but: {outcome.refusal}"
        assert content is None or policy == "raise" or not content.good, f"not skipped: {outcome.refusal}"
        return "refused"
    assert content is not None, "it is no manifest, but the run went on"
    assert policy == "skip" or not content.bad, f"{content} was not refused"
    if trial.oracle == "train":
        _check_training(root, content, total)
    else:
        _check_validation(root, content)
    return "skipped" if content.bad else "valid"


def _check_checkpoint(outcome: Outcome, root: Path, whole: list[bool], trial: Trial) -> str:
    """``whole``: of the checkpoints of steps 1 and 2."""
    by_path = trial.flags[1].endswith("step_00000002")
    if outcome.refusal is not None:
        whole_is_there = whole[1] or (whole[0] and not by_path)
        assert not whole_is_there, f"a whole checkpoint is there, but: {outcome.refusal}"
        return "refused"
    assert whole[1] or (not by_path and whole[0]), "went on from a damaged checkpoint"
    assert whole[1] or re.search(r"skipping .*step_00000002: ", outcome.warned)
    lines = [json.loads(line)["step"] for line in (root / "logs" / "a" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3]
    return "valid" if whole[1] else "older"


@pytest.fixture(scope="session")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good data, and a run with checkpoints of its first two steps."""
    root = tmp_path_factory.mktemp("good")
    for name, first in (("data", 0), ("val", 100)):
        write_shards(root / name, markov_sequences(12, first=first, seed=first), sequences_per_shard=4)
    with pytest.MonkeyPatch.context() as patch:
        without_a_picture(patch)
        flags = ["--steps", "2", "--save-every-n-steps", "1"]
        main([*_words(Trial([], []), root, "checkpoint", None), *flags])
    return root


@pytest.fixture
def place(good_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place of its own, one thread, no picture, and one look at each model."""
    without_a_picture(monkeypatch)
    look_at_models_once(monkeypatch)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # beside a recipe's file, which is Python's own
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "nobody")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name in ("data", "val"):
        shutil.copytree(good_run / name, tmp_path / name)
    yield tmp_path
    torch.set_num_threads(threads)
    shutil.rmtree(tmp_path)  # two hundred runs would be a gigabyte


def _attempt(number: int, maker: Maker, good: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    rng = random.Random(f"moekit, malformed input {number}")
    if maker in CHECKPOINTS:
        shutil.copytree(good / "logs", root / "logs")
    trial, policy = maker(rng, root), ("raise", "skip")[number % 2]
    data = trial.oracle in ("train", "val-manifest", "val-data")
    content = _content(trial.oracle, root) if data else None
    checkpoints = root / "logs" / "a" / "checkpoints"
    whole = [_is_whole(checkpoints / f"step_{step:08d}") for step in (1, 2)]
    words = _words(trial, root, "checkpoint" if maker in CHECKPOINTS else trial.oracle, content)
    before = _snapshot(root)
    outcome = _run([*words, "--on-bad-data", policy] if data else words, capsys)
    if outcome.refusal is not None:
        _check_clear(outcome.refusal, trial.names)
    _check_files(before, root)
    if data:
        return _check_data(trial, outcome, root, content, policy, int(words[words.index("--batch-size") + 1]))
    if trial.oracle == "checkpoint":
        return _check_checkpoint(outcome, root, whole, trial)
    assert outcome.refusal is not None or trial.oracle == "either", f"{trial.flags} went through: {trial}"
    return "refused" if outcome.refusal is not None else "valid"


@pytest.mark.slow  # all of them
@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_malformed_input(number: int, good_run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _attempt(number, CASES[number], good_run, place, capsys)
