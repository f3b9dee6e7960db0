import json

import pytest

from moekit.lm.trackers import JsonLines, read_metrics

LINES = [{"step": step, "loss": 1 / step, "layers": [{"load": [0.5, 0.5]}]} for step in (10, 20, 30)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonLines(path)
    for line in LINES:
        tracker.log(line)
    return path


def test_every_log_is_a_line_and_comes_back(path):
    assert path.read_text().count("\n") == 3
    assert [json.loads(line) for line in path.read_text().splitlines()] == LINES
    assert read_metrics(path) == LINES


def test_a_tracker_appends(path):
    JsonLines(path).log({"step": 40})
    assert read_metrics(path) == [*LINES, {"step": 40}]


def test_a_line_is_on_disk_when_log_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonLines(path)
    for step in range(3):
        tracker.log({"step": step})
        assert read_metrics(path)[-1] == {"step": step}


def test_the_file_is_there_before_the_first_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    JsonLines(path, from_step=1)
    assert read_metrics(path) == []


@pytest.mark.parametrize("kept", range(1, 10))
def test_a_last_line_that_was_cut_off_is_left_out(path, kept):
    text = path.read_text()
    start = text.rindex("\n", 0, -1) + 1
    path.write_text(text[: start + kept])
    assert read_metrics(path) == LINES[:2]


@pytest.mark.parametrize(("from_step", "left"), [(1, 0), (10, 0), (11, 1), (20, 1), (21, 2), (30, 2), (31, 3), (99, 3)])
def test_from_step_takes_out_what_comes_again(path, from_step, left):
    JsonLines(path, from_step=from_step)
    assert read_metrics(path) == LINES[:left]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_from_step_mends_a_cut_line_so_that_the_next_one_is_whole(path):
    path.write_text(path.read_text() + '{"step": 40, "lo')
    JsonLines(path, from_step=35).log({"step": 40, "loss": 0.0})
    assert read_metrics(path) == [*LINES, {"step": 40, "loss": 0.0}]


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "metrics.jsonl")


def test_what_json_cannot_hold_is_an_error_and_writes_nothing(path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        JsonLines(path).log({"step": 40, "loss": object()})
    assert read_metrics(path) == LINES
