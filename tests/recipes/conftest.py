"""Small shards for the tests of the training program, so that no corpus is prepared."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moekit.lm.shards import write_shards

SEQ_LEN = 64  # of the preset moekit_tiny


class Shards(NamedTuple):
    """Manifests of two sources."""

    train: tuple[Path, Path]
    validation: tuple[Path, Path]

    @property
    def flags(self) -> list[str]:
        """The command line for both sources."""
        train, validation = map(str, self.train), map(str, self.validation)
        return ["--dataset-manifest", *train, "--val-manifest", *validation, "--train-data-mix-weights", "0.75", "0.25"]


def markov_sequences(count: int, *, first: int, seed: int, states: int = 16) -> Tensor:
    """Draw sequences of a chain in which two tokens, equally likely, can follow each: ln 2 nats per token."""
    generator = torch.Generator().manual_seed(seed)
    state, columns = torch.randint(states, (count,), generator=generator), []
    for _ in range(SEQ_LEN + 1):
        columns.append(first + state)
        state = (3 * state + torch.randint(2, (count,), generator=generator) + 1) % states
    return torch.stack(columns, dim=1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Two sources with tokens of their own: 0 to 15, and 100 to 115."""
    folder = tmp_path_factory.mktemp("shards")
    train = [
        write_shards(folder / "train" / name, markov_sequences(48, first=first, seed=first), sequences_per_shard=20)
        for name, first in (("prose", 0), ("code", 100))
    ]
    validation = [
        write_shards(folder / "val" / name, markov_sequences(6, first=first, seed=first + 1))
        for name, first in (("prose", 0), ("code", 100))
    ]
    return Shards((train[0], train[1]), (validation[0], validation[1]))
