"""The option of the tests that start several processes; no pictures of what this process trains, and no GPUs."""

from collections.abc import Iterator

import pytest
import torch

from moekit.recipes import report


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option; it is known where this folder or a file in it is named on the command line."""
    parser.addoption("--kills", type=int, default=4, help="how often test_kills.py kills its run")


@pytest.fixture(scope="module", autouse=True)
def _no_gpus(request: pytest.FixtureRequest) -> Iterator[None]:
    """Show none to processes over gloo, nor to what they are compared with, also beside fewer GPUs than ranks."""
    with pytest.MonkeyPatch.context() as patch:
        if not any(request.node.iter_markers("gpu")):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Draw no picture: it takes longer than a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot_run", lambda path, **options: path)
        yield
