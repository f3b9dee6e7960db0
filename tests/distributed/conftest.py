"""The options of the tests that start several processes."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options; they are known where this folder or a file in it is named on the command line."""
    parser.addoption("--kills", type=int, default=4, help="how often test_kills.py kills its run")
    parser.addoption("--full", action="store_true", help="run every case of the matrices, in float32 too")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether all cases are asked for."""
    return request.config.getoption("--full", default=False)
