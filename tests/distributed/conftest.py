"""The option of the tests that start several processes."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option; it is known where this folder or a file in it is named on the command line."""
    parser.addoption("--kills", type=int, default=4, help="how often test_kills.py kills its run")
