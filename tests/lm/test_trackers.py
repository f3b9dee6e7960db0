import sys
from pathlib import Path

import pytest

from moekit.lm.trackers import Trackers, open_trackers, parse_report_to, read_metrics


class Recording:
    """A tracker that keeps what it is handed."""

    place = "here"

    def __init__(self, error: Exception | None = None) -> None:
        self.logged, self.closed, self.error = [], [], error

    def log(self, metrics):
        self.logged.append(metrics)

    def close(self, *, failed=False):
        self.closed.append(failed)
        if self.error:
            raise self.error


def open_(report_to, folder: Path, from_step=1):
    return open_trackers(report_to, folder, from_step=from_step, name="run", project="moekit", config={"seed": 0})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        (" ", ()),
        ("none", ()),
        ("wandb", ("wandb",)),
        ("tensorboard", ("tensorboard",)),
        ("tensorboard,wandb", ("tensorboard", "wandb")),
        (" wandb , tensorboard ", ("wandb", "tensorboard")),
        ("all", ("wandb", "tensorboard")),
        ("tensorboard,all,wandb", ("tensorboard", "wandb")),
        ("wandb,wandb", ("wandb",)),
    ],
)
def test_names_are_read(text, names):
    assert parse_report_to(text) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wandbb", "unknown tracker 'wandbb'; did you mean 'wandb'. Known: all, tensorboard, wandb"),
        ("wandb,tensorbord", "unknown tracker 'tensorbord'; did you mean 'tensorboard'"),
        ("mlflow", "unknown tracker 'mlflow'. Known: all, tensorboard, wandb"),
        ("wandb,", "unknown tracker ''"),
        ("none,wandb", "unknown tracker 'none'"),
    ],
)
def test_a_name_that_is_not_known_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        parse_report_to(text)


def test_every_tracker_gets_each_step_in_one_call():
    trackers = [Recording(), Recording()]
    with Trackers(trackers) as all_of_them:
        for step in (1, 2):
            all_of_them.log({"step": step, "loss": 0.5, "layers": []})
        assert all_of_them.places == ("here", "here")
    for tracker in trackers:
        assert tracker.logged == [{"step": step, "loss": 0.5, "layers": []} for step in (1, 2)]
        assert tracker.closed == [False]


def test_metrics_without_a_step_are_an_error_before_any_tracker_has_them():
    tracker = Recording()
    with pytest.raises(ValueError, match="metrics have no step, only loss, lr; add the step"):
        Trackers([tracker]).log({"loss": 1.0, "lr": 0.1})
    assert tracker.logged == []


@pytest.mark.parametrize("error", [FloatingPointError("loss is nan"), KeyboardInterrupt()])
def test_a_run_that_fails_closes_its_trackers_as_failed(error):
    trackers = [Recording(), Recording()]
    with pytest.raises(type(error)), Trackers(trackers):
        raise error
    assert [tracker.closed for tracker in trackers] == [[True], [True]]


def test_one_that_cannot_be_closed_does_not_keep_the_others_open():
    trackers = [Recording(), Recording(OSError("disk full")), Recording()]
    with pytest.raises(OSError, match="disk full"):
        Trackers(trackers).close()
    assert [tracker.closed for tracker in trackers] == [[False]] * 3


def test_closing_twice_closes_once():
    tracker = Recording()
    trackers = Trackers([tracker])
    trackers.close()
    trackers.close(failed=True)
    assert tracker.closed == [False]


def test_json_lines_are_written_always(tmp_path):
    with open_((), tmp_path / "run") as trackers:
        trackers.log({"step": 1, "loss": 2.0})
    assert trackers.places == ()  # closed
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_from_step_reaches_the_json_lines(tmp_path):
    for from_step, steps in ((None, (1, 2, 3)), (None, (4,)), (3, (3,))):
        with open_((), tmp_path, from_step) as trackers:
            for step in steps:
                trackers.log({"step": step})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_each_tracker_is_opened_with_what_it_needs(tmp_path, monkeypatch):
    opened = []

    def opener(name):
        def open_one(*given, **options):
            opened.append((name, given, options))
            return Recording()

        return open_one

    monkeypatch.setattr("moekit.lm.trackers.WeightsAndBiases", opener("wandb"))
    monkeypatch.setattr("moekit.lm.trackers.TensorBoard", opener("tensorboard"))
    with open_(["all"], tmp_path, from_step=7) as trackers:
        assert trackers.places == (str(tmp_path / "metrics.jsonl"), "here", "here")
    assert opened == [
        ("wandb", (tmp_path,), {"name": "run", "project": "moekit", "config": {"seed": 0}}),
        ("tensorboard", (tmp_path / "tensorboard",), {"from_step": 7}),
    ]


def test_open_trackers_knows_names_too(tmp_path):
    with pytest.raises(ValueError, match="unknown tracker 'tensorbord'"):
        open_(["tensorbord"], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_package_that_is_missing_is_named_with_the_way_to_install_it(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"--report-to {name} .*pip install 'moekit\[trackers\]'"):
        open_([name], tmp_path)


def test_what_was_open_is_closed_if_the_next_cannot_be_opened(tmp_path, monkeypatch):
    first = Recording()
    monkeypatch.setattr("moekit.lm.trackers.TensorBoard", lambda *_, **__: first)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="wandb"):
        open_(["tensorboard", "wandb"], tmp_path)
    assert first.closed == [True]
