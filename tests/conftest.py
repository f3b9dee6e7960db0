"""What every test gets: no network, few threads, a wide screen, a fixed seed; and, on request, poisoned memory."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "offline"}
os.environ["COLUMNS"] = "160"  # of what programs print, so that the path of a temporary folder is not broken
hypothesis.settings.register_profile("moekit", deadline=None)  # a machine that is busy elsewhere finds no fault
hypothesis.settings.load_profile("moekit")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # two workers share two cores


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option; it is known where this folder or a file in it is named on the command line."""
    parser.addoption("--full", action="store_true", help="run every case of the matrices, in float32 too")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether all cases are asked for."""
    return bool(request.config.getoption("--full", default=False))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold long tests, so that no worker has one left when the other has nothing."""
    long = {item.path for item in items if any(item.iter_markers("distributed")) or any(item.iter_markers("slow"))}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats a stack for each absent device: slow


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill freshly allocated memory with NaN, so that an entry that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def ship(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function of entries that become the table of tiles that comes with the package."""
    from moekit.experts import tile_files, tile_tables

    def replace(*entries: Any) -> None:
        tile_tables._once.cache_clear()
        monkeypatch.setattr(tile_files, "_shipped", lambda: entries)

    yield replace
    tile_tables._once.cache_clear()
