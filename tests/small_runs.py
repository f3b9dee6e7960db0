"""Small shards to train on, the words that start a small run, and reading what it left."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from moekit.lm.checkpoint_checksums import file_checksums, write_checksums
from moekit.lm.checkpoints import load_checkpoint
from moekit.lm.shards import write_shards
from moekit.lm.trackers import read_metrics
from moekit.recipes import ablation_checks, report, runs, scoring, setup, train
from moekit.recipes.configuration import _read, _words
from moekit.recipes.names import RECIPES
from moekit.recipes.settings import ModelSettings, TrainSettings

SEQ_LEN = 64  # of the preset moekit_tiny
TIMES = (
    "tokens_per_second",
    "samples_per_second",
    "samples_per_second_per_gpu",
    "tflops_per_second",
    "mfu",
    "data_time",
    "batch_time",
    "forward_time",
    "backward_time",
    "sync_time",
    "optim_step_time",
)


_LOOKED_AT: dict[Any, Any] = {}
_NOTES = train._causality_notes


class Shards(NamedTuple):
    """Manifests of two sources."""

    train: tuple[Path, Path]
    validation: tuple[Path, Path]

    @property
    def flags(self) -> list[str]:
        """The command line for both sources."""
        train, validation = map(str, self.train), map(str, self.validation)
        weights = ["--train-data-mix-weights", "0.75", "0.25", "--multiple-data-passes"]
        return ["--dataset-manifest", *train, "--val-manifest", *validation, *weights]


def markov_sequences(count: int, *, first: int, seed: int, states: int = 16) -> Tensor:
    """Draw sequences of a chain in which two tokens, equally likely, can follow each: ln 2 nats per token."""
    generator = torch.Generator().manual_seed(seed)
    state, columns = torch.randint(states, (count,), generator=generator), []
    for _ in range(SEQ_LEN + 1):
        columns.append(first + state)
        state = (3 * state + torch.randint(2, (count,), generator=generator) + 1) % states
    return torch.stack(columns, dim=1)


def make_shards(folder: Path) -> Shards:
    """Write two sources with tokens of their own: 0 to 15, and 100 to 115."""
    train = [
        write_shards(folder / "train" / name, markov_sequences(48, first=first, seed=first), sequences_per_shard=20)
        for name, first in (("prose", 0), ("code", 100))
    ]
    validation = [
        write_shards(folder / "val" / name, markov_sequences(6, first=first, seed=first + 1))
        for name, first in (("prose", 0), ("code", 100))
    ]
    return Shards((train[0], train[1]), (validation[0], validation[1]))


def words(shards: Shards, logs: Path, *flags: str, name: str = "a") -> list[str]:
    """Return the command line of a small run; of a flag that is given twice, the last counts."""
    fixed = "--model moekit_tiny --precision fp32 --batch-size 4 --lr 1e-2 --log-every-n-steps 1"
    length = () if "--train-num-samples" in flags or "--steps" in flags else ("--steps", "8")
    return [*fixed.split(), *length, *shards.flags, "--name", name, "--logs", str(logs), *flags]


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without those that are a matter of time."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint."""
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    load_checkpoint(checkpoint, tensors)
    return tensors


def write_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Change what a checkpoint holds beside tensors, with checksums that fit."""
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_checksums(checkpoint, file_checksums(checkpoint))


def unflatten(values: Mapping[str, Any]) -> TrainSettings:
    """Turn what ``flat_settings`` listed back into settings, for example those in a checkpoint."""
    return _read(_words(dict(values)), prog=None)


def differing(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors that are not equal bit for bit, or are on one side only."""
    return [
        name
        for name in sorted({*left, *right})
        if name not in left or name not in right or not torch.equal(left[name], right[name])
    ]


def files(folder: Path) -> dict[Path, bytes]:
    """Read every file of a folder, so that two moments can be compared."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the loss of each line of metrics."""
    return [line["loss"] for line in lines]


def without_a_picture(patch: pytest.MonkeyPatch) -> None:
    """Let runs draw no picture: it takes longer than a small run."""
    patch.setattr(report, "plot_run", lambda path, **options: path)


def look_at_models_once(patch: pytest.MonkeyPatch) -> None:
    """Let runs of this process look once at each model of the package's.

    Whether it fits its recipe, and whether a token sees later ones, takes a third of a small run; test_setup.py and
    test_audits.py test what is found.
    """
    check = _once(setup.check_model, lambda settings: settings)
    for module in (ablation_checks, runs, scoring, train):
        patch.setattr(module, "check_model", check)
    patch.setattr(train, "_causality_notes", _once(_NOTES, lambda settings: settings.model))


def _once(look: Callable[..., Any], model_of: Callable[[Any], ModelSettings]) -> Callable[..., Any]:
    def looked(settings: Any) -> Any:
        model = model_of(settings)
        if model.preset.endswith(".json") or model.recipe not in RECIPES:  # a file, which may have changed since
            return look(settings)
        key = look.__name__, repr(model), RECIPES[model.recipe]
        if key not in _LOOKED_AT:
            _LOOKED_AT[key] = look(settings)
        return _LOOKED_AT[key]

    return looked
