"""Small shards and small runs for the tests of the training program, so that no corpus is prepared."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Shards, look_at_models_once, make_shards, without_a_picture, words

from moekit.recipes.recording import Recorder
from moekit.recipes.train import main


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Two sources with tokens of their own."""
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Draw no picture, and run on one thread, unless the test asks for them: small models gain nothing from two."""
    if "picture" not in request.fixturenames:
        without_a_picture(monkeypatch)
    look_at_models_once(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if "two_threads" in request.fixturenames else 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def picture() -> None:
    """Ask for the picture."""


@pytest.fixture
def two_threads() -> None:
    """Ask for two threads."""


@pytest.fixture
def program(quick: None, shards: Shards, tmp_path: Path) -> Callable[..., Path]:
    """Run the program on the small shards, to its end or to a signal, and return the run folder."""

    def run(*flags: str, name: str = "a") -> Path:
        try:
            main(words(shards, tmp_path / "logs", *flags, name=name))
        except SystemExit as error:
            if error.code not in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                raise
        return tmp_path / "logs" / name

    return run


@pytest.fixture(autouse=True)
def _heeds_sigterm() -> Iterator[None]:
    """Put the handler of SIGTERM back, which a program that was stopped leaves out until its end."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def interrupt_after() -> Iterator[Callable[..., None]]:
    """Send this process a signal in the middle of the report of a step, once."""
    with pytest.MonkeyPatch.context() as patch:
        data = Recorder.data

        def interrupt(step: int, number: int = signal.SIGINT) -> None:
            def interrupted(self: Any, at: int) -> None:
                if at == step:
                    patch.setattr(Recorder, "data", data)
                    signal.raise_signal(number)
                data(self, at)

            patch.setattr(Recorder, "data", interrupted)

        yield interrupt
