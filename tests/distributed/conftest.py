"""The option of the tests that kill a run."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--kills``; it is known where this folder or a file in it is named on the command line."""
    parser.addoption("--kills", type=int, default=6, help="how often test_kills.py kills its run")
