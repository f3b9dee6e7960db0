import builtins
import errno
import math
import os
import sys

import pytest

from moekit.lm.plots import Curve, _losses, _smooth, matplotlib_parts, picture_or_why, plot_run

pytest.importorskip("matplotlib", reason="the picture of a run is an extra")
TRAIN = Curve(list(range(1, 61)), [6.0 - 0.05 * step for step in range(60)])
OPTIONS = {
    "train": TRAIN,
    "validation": {"prose": Curve([30, 60], [4.5, 3.4]), "code": Curve([30, 60], [4.0, 3.0])},
    "whole": {"prose": 3.45, "code": 2.9},
    "baselines": {"prose": 3.5},
    "loads": {"prose": {0: [0.5, 0.25, 0.25, 0.0], 2: [0.25] * 4}, "code": {0: [0.25] * 4, 2: [0.0, 0.0, 0.0, 1.0]}},
}


def pixels(path):
    from matplotlib import image

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return image.imread(path)[..., :3]


def test_the_picture_is_a_png_with_something_in_every_part(tmp_path):
    path = plot_run(tmp_path / "run.png", **OPTIONS)
    assert path == tmp_path / "run.png"
    picture = pixels(path)
    height, width, _ = picture.shape
    assert height > 400
    assert width > 2 * height
    for part in range(4):
        strip = picture[:, part * width // 4 : (part + 1) * width // 4]
        assert strip.std() > 0.02
        assert (strip < 0.9).any(axis=-1).mean() > 0.005
    assert [file.name for file in tmp_path.iterdir()] == ["run.png"]


def test_a_picture_that_cannot_be_written_is_told_with_its_name_and_another_error_is_raised(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    told = picture_or_why(lambda: plot_run(tmp_path / "run.png", **OPTIONS))
    assert told == f"none: [Errno 28] No space left on device: '{tmp_path / 'run.png'}'"
    with pytest.raises(TypeError):
        picture_or_why(lambda: plot_run(tmp_path / "run.png", **OPTIONS | {"loads": 3}))


def test_what_changes_in_the_run_changes_the_picture(tmp_path):
    first = pixels(plot_run(tmp_path / "a.png", **OPTIONS))
    assert (first == pixels(plot_run(tmp_path / "b.png", **OPTIONS))).all()
    for name, value in (("train", Curve([1, 60], [5.0, 3.0])), ("baselines", {"prose": 4.5}), ("whole", {})):
        changed = pixels(plot_run(tmp_path / "c.png", **{**OPTIONS, name: value}))
        assert changed.shape == first.shape
        assert (changed != first).any(), name


def test_a_dense_run_has_no_heat_maps(tmp_path):
    dense = pixels(plot_run(tmp_path / "dense.png", **{**OPTIONS, "loads": {}}))
    assert dense.shape[1] < pixels(plot_run(tmp_path / "run.png", **OPTIONS)).shape[1]
    assert dense.std() > 0.02


@pytest.mark.parametrize(
    "changes",
    [
        {"train": Curve([10], [6.0]), "validation": {}, "whole": {}, "baselines": {}, "loads": {}},
        {"train": Curve([], []), "validation": {}, "whole": {}, "baselines": {}},
        {"train": Curve([10, 20], [float("nan"), 3.0])},
        {"loads": {"prose": {0: [1 / 64] * 64}}},
        {"loads": {"one": {0: [1.0]}}},
    ],
)
def test_unusual_runs_are_drawn_too(tmp_path, changes):
    assert pixels(plot_run(tmp_path / "run.png", **{**OPTIONS, **changes})).std() > 0.01


def test_an_old_picture_is_replaced(tmp_path):
    path = tmp_path / "run.png"
    path.write_bytes(b"old")
    plot_run(str(path), **OPTIONS)
    assert pixels(path).size > 0


@pytest.mark.parametrize(
    ("losses", "window", "expected"),
    [
        ([4.0, 2.0, 0.0, 6.0], 1, [4.0, 2.0, 0.0, 6.0]),
        ([4.0, 2.0, 0.0, 6.0], 2, [4.0, 3.0, 1.0, 3.0]),
        ([4.0, 2.0, 0.0, 6.0], 99, [4.0, 3.0, 2.0, 3.0]),
        ([], 3, []),
    ],
)
def test_smooth(losses, window, expected):
    assert _smooth(losses, window=window) == expected


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"needs matplotlib: pip install 'moekit\[plots\]'"):
        plot_run(tmp_path / "run.png", **OPTIONS)


@pytest.mark.parametrize(
    ("losses", "validation", "baseline", "top"),
    [
        ([math.nan, 3.0, math.inf, 2.0], [], 1.0, 3.0),
        ([100.0, 50.0, 5.0] + [2.0] * 37, [], 1.0, 5.0),
        ([5.6, 5.0], [7.1, math.inf, math.nan], 5.5, 7.1),
        ([5.6, 5.0], [5.5], 6.0, 6.0),
    ],
    ids=["steps that were left out", "the first twentieth", "a set that scores badly", "a baseline"],
)
def test_the_frame_holds_all_losses_but_the_first_of_training(losses, validation, baseline, top):
    axis = matplotlib_parts()[0]().subplots()
    curves = {"good": Curve([1], [1.0]), "bad": Curve(list(range(len(validation))), validation)}
    _losses(axis, Curve(list(range(len(losses))), losses), curves, {}, {"bad": baseline})
    assert axis.get_ylim()[1] == pytest.approx(1.05 * top)


def test_final_scores_of_all_of_a_set_stand_at_the_last_step_beside_those_of_its_front():
    axis = matplotlib_parts()[0]().subplots()
    _losses(axis, TRAIN, OPTIONS["validation"], {"prose": 3.45, "code": 9.0}, {"prose": 3.5})
    points = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines() if line.get_marker() == "D"]
    assert points == [([60], [3.45]), ([60], [9.0])]
    assert axis.get_ylim()[1] > 9  # it is seen, though higher than all else
    named = [text.get_text() for text in axis.get_legend().get_texts()]
    assert named[1:4] == ["validation, front: prose", "validation, all: prose", "bigram, all: prose"]


def test_every_validation_set_is_drawn_and_the_legend_says_what_the_line_of_training_is_a_mean_of():
    axis = matplotlib_parts()[0]().subplots()
    _losses(axis, TRAIN, {str(number): Curve([1], [2.0]) for number in range(60)}, {}, {})
    assert len(axis.get_lines()) == 2 + 60
    assert axis.get_legend().get_texts()[0].get_text() == "training, mean of 10 logged steps"
