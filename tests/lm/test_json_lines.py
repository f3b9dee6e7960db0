import json
import math

import pytest

from moekit.lm.json_lines import JsonLines, read_metrics

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
    assert JsonLines(path, from_step=1).place == str(path)
    assert read_metrics(path) == []


@pytest.mark.parametrize("kept", range(1, 10))
def test_a_last_line_that_was_cut_off_is_left_out(path, kept):
    text = path.read_text()
    start = text.rindex("\n", 0, -1) + 1
    path.write_text(text[: start + kept])
    assert read_metrics(path) == LINES[:2]


def test_lines_are_taken_out_and_the_others_stay_as_they_are(path):
    text, tracker = path.read_text(), JsonLines(path)
    before = path.stat()
    assert tracker.take_out(lambda line: line["step"] > 30) == 0
    assert path.stat().st_ino == before.st_ino  # no new file was put in its place
    path.write_text(text + '{"step": 35, "lo')  # another process is about to append it
    assert tracker.take_out(lambda line: line["step"] > 30) == 0
    assert path.read_text() == text + '{"step": 35, "lo'
    path.write_text(text)
    assert tracker.take_out(lambda line: line["step"] == 20) == 1
    assert path.read_text().splitlines() == text.splitlines()[::2]
    tracker.log({"step": 40})
    assert [line["step"] for line in read_metrics(path)] == [10, 30, 40]


@pytest.mark.parametrize(("from_step", "left"), [(1, 0), (10, 0), (11, 1), (20, 1), (21, 2), (30, 2), (31, 3), (99, 3)])
def test_from_step_takes_out_what_comes_again(path, from_step, left):
    text = path.read_text()
    JsonLines(path, from_step=from_step)
    assert read_metrics(path) == LINES[:left]
    assert text.startswith(path.read_text())
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("from_step", [None, 35])
def test_opening_mends_a_cut_line_so_that_the_next_one_is_whole(path, from_step):
    path.write_text(path.read_text() + '{"step": 40, "lo')
    JsonLines(path, from_step=from_step).log({"step": 40, "loss": 0.0})
    assert read_metrics(path) == [*LINES, {"step": 40, "loss": 0.0}]


def test_a_file_is_cut_whole_or_not_at_all(path, monkeypatch):
    before = path.read_bytes()

    def no_space(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="no space left"):
        JsonLines(path, from_step=20)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "garbage", [b'{"step": 20, "lo{"step": 20}', b"\0" * 9, b"\xff\xfe", b"20", b"NaN", b"[" * 99_999]
)
def test_garbage_in_the_middle_is_an_error_that_names_file_and_line(path, garbage):
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], garbage, *lines[1:]]))
    before = path.read_bytes()
    for read in (read_metrics, JsonLines):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is .*expected a JSON object.*delete it"):
            read(path)
    assert path.read_bytes() == before


def test_empty_lines_are_passed_over_and_counted(path):
    path.write_bytes(b"\n\n" + path.read_bytes() + b"!\n")
    with pytest.raises(ValueError, match="line 6 is b'!'"):
        read_metrics(path)
    path.write_bytes(path.read_bytes()[:-2])
    assert read_metrics(path) == LINES


@pytest.mark.parametrize("line", ['{"loss": 1.0}', '{"step": null, "loss": 1.0}', '{"step": "1", "loss": 1.0}'])
def test_a_line_without_a_step_cannot_be_ordered(path, line):
    path.write_text(line + "\n" + path.read_text())
    JsonLines(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is .*loss.*without a step; delete it"):
        JsonLines(path, from_step=20)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "metrics.jsonl")


def test_what_json_cannot_hold_is_an_error_and_writes_nothing(path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        JsonLines(path).log({"step": 40, "loss": object()})
    assert read_metrics(path) == LINES


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    layers = [{"layer": 0, "entropy": 1.0}, {"layer": 2, "entropy": math.nan, "load": (0.5, -math.inf)}]
    JsonLines(path).log(
        {"step": 1, "loss": 2.0, "grad_norm": math.inf, "layers": layers, "validation": {"a": math.nan}}
    )

    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["nonfinite"] == ["grad_norm", "layers/1/entropy", "layers/1/load/1", "validation/a"]
    assert line["layers"] == [{"layer": 0, "entropy": 1.0}, {"layer": 2, "entropy": None, "load": [0.5, None]}]
    assert (line["step"], line["loss"], line["grad_norm"], line["validation"]) == (1, 2.0, None, {"a": None})
    assert read_metrics(path) == [line]


def test_finite_lines_have_no_such_key(path):
    assert "nonfinite" not in path.read_text()


def test_the_name_is_taken(path):
    with pytest.raises(ValueError, match=r"a metric is called 'nonfinite'.*rename it"):
        JsonLines(path).log({"step": 40, "nonfinite": 1})
    assert read_metrics(path) == LINES
