import sys
from pathlib import Path

import pytest

from moekit.lm.trackers import JsonLines, Trackers, open_trackers, parse_report_to, read_metrics


class Recording:
    """A tracker that keeps what it is handed."""

    place = "here"

    def __init__(self, error: Exception | None = None, *, fails_at: int | None = None) -> None:
        self.logged, self.closed, self.error, self.fails_at = [], [], error, fails_at

    def log(self, metrics):
        if metrics["step"] == self.fails_at:
            raise ConnectionError("Connection lost")
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
    with Trackers(trackers[0], {"wandb": trackers[1]}) as all_of_them:
        for step in (1, 2):
            all_of_them.log({"step": step, "loss": 0.5, "layers": []})
        assert all_of_them.places == ("here", "here")
    for tracker in trackers:
        assert tracker.logged == [{"step": step, "loss": 0.5, "layers": []} for step in (1, 2)]
        assert tracker.closed == [False]


def test_metrics_without_a_step_are_an_error_before_any_tracker_has_them():
    tracker = Recording()
    with pytest.raises(ValueError, match="metrics have no step, only loss, lr; add the step"):
        Trackers(tracker, {"wandb": tracker}).log({"loss": 1.0, "lr": 0.1})
    assert tracker.logged == []


@pytest.mark.parametrize("error", [FloatingPointError("loss is nan"), KeyboardInterrupt()])
def test_a_run_that_fails_closes_its_trackers_as_failed(error):
    trackers = [Recording(), Recording()]
    with pytest.raises(type(error)), Trackers(trackers[0], {"wandb": trackers[1]}):
        raise error
    assert [tracker.closed for tracker in trackers] == [[True], [True]]


def test_a_dashboard_that_cannot_be_closed_is_a_warning_and_the_others_are_closed():
    trackers = [Recording(), Recording(), Recording(OSError("disk full")), Recording()]
    words = "wandb, which writes to here, failed when it was closed: OSError: disk full.*here has every step"
    with pytest.warns(RuntimeWarning, match=words):
        Trackers(trackers[0], dict(zip(("a", "wandb", "b"), trackers[1:], strict=True))).close()
    assert [tracker.closed for tracker in trackers] == [[False]] * 4


def test_a_file_that_cannot_be_closed_is_an_error_and_the_dashboards_are_closed():
    dashboard = Recording()
    with pytest.raises(OSError, match="disk full"):
        Trackers(Recording(OSError("disk full")), {"wandb": dashboard}).close()
    assert dashboard.closed == [False]


def test_a_dashboard_that_fails_is_told_of_once_and_gets_nothing_more(tmp_path):
    file, lost, other = JsonLines(tmp_path / "metrics.jsonl"), Recording(OSError("gone"), fails_at=3), Recording()
    words = (
        r"wandb, which writes to here, failed at step 3: ConnectionError: Connection lost\. The run goes on without it;"
        r" .*metrics\.jsonl has every step\. .* go on with it by --resume latest"
    )
    trackers = Trackers(file, {"wandb": lost, "b": other})
    for step in (1, 2):
        trackers.log({"step": step})
    with pytest.warns(RuntimeWarning, match=words) as warned:
        trackers.log({"step": 3})
    for step in (4, 5):
        trackers.log({"step": step})
    trackers.close()  # fails for the one that is lost, and says nothing new: a warning would end this test
    lines = read_metrics(file.path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line.get("warnings") for line in lines] == [None, None, [str(warned[0].message)], None, None]
    assert [line["step"] for line in lost.logged] == [1, 2]
    assert other.logged == [{"step": step} for step in range(1, 6)]
    assert (lost.closed, other.closed) == ([False], [False])


def test_an_error_of_the_file_is_an_error():
    with Trackers(Recording(fails_at=2), {"wandb": Recording()}) as trackers:
        trackers.log({"step": 1})
        with pytest.raises(ConnectionError, match="Connection lost"):
            trackers.log({"step": 2})


def test_closing_twice_closes_once():
    tracker = Recording()
    trackers = Trackers(tracker)
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
