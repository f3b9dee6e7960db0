"""Turn text into shards for training: ``python -m moekit.lm.tokenize --input FILES --output FOLDER --tokenizer byte``.

Documents are joined by end-of-text and cut into sequences of ``seq_len + 1`` tokens, back to back and without overlap,
in OpenLM's format. No text is lost or seen twice: the last sequence is filled up with OpenLM's pad id -1, which
training must mask. Only documents without text are left out, and counted. The sequences come in a random order that
depends on ``--seed`` alone.

A run that was stopped, at whatever moment, goes on when the same command is given again, with any number of workers,
and ends in the same bytes. Until its end the folder also holds the tokens at 4 bytes each (`moekit.lm.tokenize_parts`).
A document, hence a text file, must fit into memory; larger texts go into JSON lines.
"""

import errno
import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from moekit.lm import tokenize_parts as phases
from moekit.lm import tokenize_plans as plans
from moekit.lm.consoles import plain_console, print_lines
from moekit.lm.documents import find_files, in_capitals, read_pieces
from moekit.lm.files import check_folder
from moekit.lm.folder_locks import FolderLock
from moekit.lm.processes import available_cores, process_pool, run_in_order
from moekit.lm.shard_members import MAX_MEMBER_BYTES
from moekit.lm.shards import MANIFEST
from moekit.lm.tokenize_progress import Progress, Summary, show_progress
from moekit.lm.tokenizers import END_OF_TEXT, ByteTokenizer, Tokenizer, load_tokenizer, save_tokenizer

_TASKS_PER_WORKER = 2  # one under way and one to go on with


@dataclass(frozen=True)
class Command:
    """Turn text or JSON lines into shards. The same command goes on where it was stopped."""

    input: tuple[str, ...]
    """Text files, one document each, and JSON lines (.jsonl, .ndjson, .json), plain or .gz; or folders, or globs.
    Links are followed; a link's own suffix counts."""
    output: Path
    """Folder of the shards and their manifest. Nothing in it is ever overwritten."""
    tokenizer: str
    """byte, or the path of a byte-level BPE's tokenizer.json, such as GPT-NeoX's."""
    end_of_text: str | None = None
    """The token that ends a document, where the tokenizer's file does not say; by default <|endoftext|>."""
    seq_len: int = 2048
    """Inputs per sequence, which has one token more."""
    sequences_per_shard: int = 2048
    """Most sequences in one tar."""
    text_key: str = "text"
    """Where a line of JSON has its text."""
    workers: int | None = None
    """Processes that tokenize; by default one per core."""
    seed: int = 0
    """Of the random order of the sequences."""
    shuffle: bool = True
    """Put the sequences in random order, or leave them in that of the input."""
    on_bad_document: Literal["raise", "skip"] = "raise"
    """Text that is no UTF-8, lines that are no JSON object or lack the key: stop, or leave them out and count."""
    piece_bytes: int = 4 << 20
    """Text that is tokenized at a time; a worker needs some fifty times as much memory."""


def main(arguments: list[str] | None = None, *, prog: str = "python -m moekit.lm.tokenize") -> None:
    """Run the command line.

    Args:
        arguments: its words; None takes ``sys.argv``.
        prog: what the program is called in messages.

    Raises:
        SystemExit: with a message and status 1, if it cannot go on; with status 130 at Ctrl-C.
    """
    command = tyro.cli(Command, prog=prog, args=arguments)
    console = plain_console()
    start = time.monotonic()
    again = "The same command goes on where this one stopped"
    try:
        workers = available_cores() if command.workers is None else command.workers
        with process_pool(workers, preload=phases.__name__) as pool, show_progress(console) as progress:
            summary = tokenize(command, pool, most=_TASKS_PER_WORKER * workers, progress=progress)
    except KeyboardInterrupt:
        print(f"{prog}: stopped. {again}: give it again", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenProcessPool:
        raise SystemExit(
            f"{prog}: a worker was killed, perhaps for want of memory. {again}; try fewer --workers"
        ) from None
    except (ValueError, OSError, ModuleNotFoundError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        hint = f". It was writing to {command.output}. {again} once there is room" if full else ""
        raise SystemExit(f"{prog}: {error}{hint}") from None
    seconds = max(time.monotonic() - start, 1e-9)
    print_lines(console, f"{command.output / MANIFEST} is done")
    print_lines(console, *summary.lines(length=command.seq_len + 1, seconds=seconds))


def tokenize(command: Command, executor: Executor, *, most: int, progress: Progress) -> Summary:
    """Do what a command says, or what is left of it.

    Args:
        command: the settings.
        executor: where tasks run.
        most: how many tasks may be begun at a time.
        progress: called with what goes on.

    Returns:
        The totals.

    Raises:
        ValueError: if settings, tokenizer or input make no sense, or the folder was begun by another command, or holds
            what is damaged.
        OSError: if files cannot be found, read or written, or another process works in the folder.
    """
    _check(command)
    files = find_files(command.input)
    folder = command.output.resolve()
    parts = folder / plans.PARTS
    inside = [file for file in files if file.resolve().is_relative_to(folder)]
    if inside:
        raise ValueError(f"the input {inside[0]} lies in the output {folder}; give another --output")
    tokenizer = _tokenizer(command)
    _check_size(command.seq_len, tokenizer)
    plan = _plan(command, files, tokenizer)
    with FolderLock(folder, flag="--output"):
        if (folder / MANIFEST).exists():
            return _finished(folder, plan)
        plans.open_plan(folder, {**plan, "versions": plans.library_versions()})
        save_tokenizer(tokenizer, parts / phases.TOKENIZER)
        run = functools.partial(run_in_order, executor, most=most)
        index, new_tokens = _encode(run, files, parts, plan, progress)
        shards = _write_shards(run, folder, plan, index, progress)
        summary = Summary(index.tally, sum(index.rows), len(shards), index.padding, new_tokens)
        _finish(folder, plan, summary, shards)
        shutil.rmtree(parts)
    return summary


def _check(command: Command) -> None:
    if not command.input:
        raise ValueError("--input names nothing; expected files, folders or globs")
    for name in ("seq_len", "sequences_per_shard", "piece_bytes"):
        if getattr(command, name) < 1:
            raise ValueError(f"{name} is {getattr(command, name)}; expected at least 1")
    if command.seq_len >= 2**31:
        raise ValueError(f"seq_len is {command.seq_len}; expected less than 2^31, for the last sequence is padded")
    if not 0 <= command.seed < 2**63:
        raise ValueError(f"seed is {command.seed}; expected 0 to 2**63 - 1")
    if "://" in str(command.output) or ":/" in str(command.output):  # Path makes one slash of two
        raise ValueError(f"the output {command.output} is a URL; expected a local folder. Copy it there afterwards")
    check_folder(command.output.resolve(), given=f"the output {command.output}")


def _check_size(seq_len: int, tokenizer: Tokenizer) -> None:
    """A member that no reader takes would be noticed in training alone."""
    widest = len(f"{tokenizer.vocab_size - 1}, ")
    most = MAX_MEMBER_BYTES // widest - 1
    if seq_len > most:
        raise ValueError(
            f"seq_len is {seq_len}, whose sequences may take {(seq_len + 1) * widest:,} bytes in a shard; expected at "
            f"most {most}, for {MAX_MEMBER_BYTES // 2**20} MiB is the most that is read"
        )


def _tokenizer(command: Command) -> Tokenizer:
    if command.tokenizer == "byte":
        if command.end_of_text not in (None, END_OF_TEXT):
            raise ValueError(f"the byte tokenizer ends documents with {END_OF_TEXT!r}; leave --end-of-text out")
        return ByteTokenizer()
    if not Path(command.tokenizer).is_file():
        raise FileNotFoundError(
            f"the tokenizer is {command.tokenizer!r}; expected 'byte' or the path of a tokenizer.json"
        )
    try:
        return load_tokenizer(command.tokenizer, end_of_text=command.end_of_text)
    except ValueError as error:
        raise ValueError(f"--tokenizer {command.tokenizer}: {error}") from error


def _plan(command: Command, files: list[Path], tokenizer: Tokenizer) -> dict[str, Any]:
    kept = ("seq_len", "sequences_per_shard", "text_key", "on_bad_document", "piece_bytes")
    return {
        "format": plans.FORMAT,
        "inputs": plans.sizes_and_times(files),
        "tokenizer": plans.tokenizer_digest(tokenizer),
        "seed": command.seed if command.shuffle else "no shuffle",
        **({"suffixes": "in capitals, too"} if any(map(in_capitals, files)) else {}),
        **{name: getattr(command, name) for name in kept},
    }


def _finished(folder: Path, plan: dict[str, Any]) -> Summary:
    if not (folder / plans.RECORD).exists():
        plans.check_free(folder)
    recorded, summary = plans.read_finished(folder)
    plans.check_same(recorded, plan, folder)
    shutil.rmtree(folder / plans.PARTS, ignore_errors=True)  # a run may have been killed while it did this
    tally, sequences, shards, padding = summary
    return Summary(phases.Tally(*tally), sequences, shards, padding, new_tokens=0)


def _encode(
    run: Callable[..., Iterator[Any]], files: list[Path], parts: Path, plan: dict[str, Any], progress: Progress
) -> tuple[phases.Index, int]:
    length = plan["seq_len"] + 1
    index = phases.read_index(parts, length=length)
    if index is not None:
        return index, 0
    skip_bad = plan["on_bad_document"] == "skip"
    settings = {"digest": plan["tokenizer"], "text_key": plan["text_key"], "skip_bad": skip_bad}
    encode = functools.partial(phases.encode_piece, parts=parts, **settings)
    total_bytes = sum(size for size, _ in plan["inputs"].values())
    number = new_tokens = 0

    def tasks() -> Iterator[tuple[int, Callable[[], Any]]]:
        nonlocal number
        for piece in read_pieces(files, piece_bytes=plan["piece_bytes"]):
            number = piece.number + 1
            if not phases.part_path(parts, piece.number).exists():
                yield piece.position, functools.partial(encode, piece)

    for position, tally in run(tasks()):
        new_tokens += tally.tokens
        progress("tokenizing", position, total_bytes, f"{new_tokens:,} tokens")
    plans.check_unchanged(plan, files, parts.parent)
    try:
        return phases.write_index(parts, number, length=length), new_tokens
    except phases.NoTextError:
        shutil.rmtree(parts)
        raise


def _write_shards(
    run: Callable[..., Iterator[Any]], folder: Path, plan: dict[str, Any], index: phases.Index, progress: Progress
) -> list[tuple[str, int]]:
    per_shard, seed = plan["sequences_per_shard"], plan["seed"]
    chosen = phases.shard_places(index.rows, per_shard=per_shard, seed=seed if isinstance(seed, int) else None)
    sequences = sum(index.rows)
    names = [f"{number:08d}" for number in range(len(chosen))]
    shards = [(name, min(per_shard, sequences - i * per_shard)) for i, name in enumerate(names)]
    for name, size in shards:
        if (path := folder / f"{name}.tar").exists():
            phases.check_shard(path, size)
    make = functools.partial(phases.make_shard, parts=folder / plans.PARTS, length=plan["seq_len"] + 1)
    tasks = (
        (number, functools.partial(make, places(), target=folder / f"{name}.tar", first=number * per_shard))
        for number, (name, places) in enumerate(zip(names, chosen, strict=True))
        if not (folder / f"{name}.tar").exists()
    )
    for number, _ in run(tasks):
        progress("writing shards", number + 1, len(names), f"{number + 1:,} of {len(names):,}")
    return shards


def _finish(folder: Path, plan: dict[str, Any], summary: Summary, shards: list[tuple[str, int]]) -> None:
    parts = folder / plans.PARTS
    phases.place_whole(folder / phases.TOKENIZER, (parts / phases.TOKENIZER).read_bytes(), parts=parts)
    record = {"plan": plan, "summary": summary[:-1]}
    phases.place_whole(folder / plans.RECORD, json.dumps(record, indent=1) + "\n", parts=parts)
    lines = (json.dumps({"shard": name, "num_sequences": number}) + "\n" for name, number in shards)
    phases.place_whole(folder / MANIFEST, "".join(lines), parts=parts)


if __name__ == "__main__":
    main()
