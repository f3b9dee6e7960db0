"""Scores of checkpoints that a run has left name the folders where these lie."""

import json
from pathlib import Path

import pytest
import torch

from moekit.lm.checkpoints import checkpoint_folder, save_checkpoint
from moekit.lm.trackers import read_metrics
from moekit.recipes import abandoned
from moekit.recipes.abandoned import abandon

CUT = b'{"checkpoint_path": "logs/r/checkpoints/step_00000024", "lo'


def save(run: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(checkpoint_folder(run, step), {"w": torch.ones(1)}, {"step": step})


def write(run: Path, *paths: str, end: bytes = b"") -> None:
    lines = [json.dumps({"checkpoint_path": path, "name": "prose", "loss": 0.1 + n}) for n, path in enumerate(paths)]
    (run / "checkpoints" / "results.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode() + end)


def paths_in(run: Path) -> list[str]:
    return [line["checkpoint_path"] for line in read_metrics(run / "checkpoints" / "results.jsonl")]


def test_lines_name_the_folder_of_each_branch_that_was_left(program):
    flags = ("--save-every-n-steps", "4", "--steps", "12")
    folder = program(*flags)
    back = ("--resume", str(checkpoint_folder(folder, 8)))
    for rate in ("3e-3", "1e-3"):
        program(*flags, *back, "--lr", rate)
    lines = read_metrics(folder / "checkpoints" / "results.jsonl")
    names = [f"{name}step_00000012{place}" for name, place in (("abandoned_", ""), ("abandoned_", "-2"), ("", ""))]
    assert [line["checkpoint_path"] for line in lines] == [
        str(folder / "checkpoints" / name) for name in names for _ in ("prose", "code")
    ]
    assert all(Path(line["checkpoint_path"]).is_dir() for line in lines)
    assert len({line["loss"] for line in lines}) == 6
    assert [line["step"] for line in lines] == [12] * 6


def test_lines_are_found_by_relative_paths_and_of_other_places_they_stay(tmp_path, monkeypatch):
    run, copied = tmp_path / "r", tmp_path / "copied"
    save(run, 20, 24)
    save(copied, 24)
    kept = [str(checkpoint_folder(run, 20)), "elsewhere/final", str(checkpoint_folder(copied, 24)), "step_00000024.pt"]
    relative, gone = "logs/r/checkpoints/step_00000024", "/moved/since/step_00000024"
    write(run, *kept, relative, gone, str(checkpoint_folder(run, 24)))
    moved = abandon(run, after=20)
    assert moved == [run / "checkpoints" / "abandoned_step_00000024"]
    assert paths_in(run) == [
        *kept,
        *(path.replace("step_00000024", "abandoned_step_00000024") for path in (relative, gone)),
        str(moved[0]),
    ]


def test_other_bytes_stay_as_they_are(tmp_path):
    save(tmp_path, 20, 24)
    path = tmp_path / "checkpoints" / "results.jsonl"
    odd = b'[{"checkpoint_path": "step_00000024"}]\n\n{"checkpoint_path": null}\n\xff\r\n'
    path.write_bytes(odd + b'{"checkpoint_path": "step_00000024", "loss": 0.30000000000000004}\n' + CUT)
    abandon(tmp_path, after=20)
    new = b'{"checkpoint_path": "abandoned_step_00000024", "loss": 0.30000000000000004}\n'
    assert path.read_bytes() == odd + new + CUT
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert abandon(tmp_path, after=20) == []
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before, "nothing to rewrite"


def test_a_run_without_scores_goes_back(tmp_path):
    save(tmp_path, 20, 24)
    assert [each.name for each in abandon(tmp_path, after=20)] == ["abandoned_step_00000024"]
    assert not (tmp_path / "checkpoints" / "results.jsonl").exists()


def test_a_kill_before_the_lines_are_rewritten_is_mended(tmp_path, monkeypatch):
    save(tmp_path, 20, 22, 24)
    write(tmp_path, "step_00000024", "step_00000022", end=CUT)
    abandon(tmp_path, after=22)
    save(tmp_path, 24)
    with (tmp_path / "checkpoints" / "results.jsonl").open("ab") as file:
        file.write(b'\n{"checkpoint_path": "step_00000024"}\n')
    with monkeypatch.context() as patch:
        patch.setattr(abandoned, "write_whole", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            abandon(tmp_path, after=20)
    content = (tmp_path / "checkpoints" / "results.jsonl").read_bytes()
    assert content.count(b'"step_000000') == 2, "the old file, whole"
    assert abandon(tmp_path, after=20) == []
    lines = (tmp_path / "checkpoints" / "results.jsonl").read_bytes().split(b"\n")
    names = ["abandoned_step_00000024", "abandoned_step_00000022", None, "abandoned_step_00000024-2"]
    assert lines[2] == CUT
    assert [json.loads(lines[n])["checkpoint_path"] for n in (0, 1, 3)] == [names[n] for n in (0, 1, 3)]


@pytest.mark.parametrize("gone", ["abandoned_step_00000024", "step_00000024"])
def test_names_of_removed_checkpoints_are_not_given_again(tmp_path, gone):
    """Their scores are kept, so another checkpoint under such a name would share their path."""
    save(tmp_path, 20, 24)
    write(tmp_path, "step_00000024")
    if gone.startswith("abandoned"):
        abandon(tmp_path, after=20)
    folder = tmp_path / "checkpoints" / gone
    folder.rename(tmp_path / "removed")
    abandon(tmp_path, after=20)
    assert paths_in(tmp_path) == ["abandoned_step_00000024"]
    save(tmp_path, 24)
    assert [each.name for each in abandon(tmp_path, after=20)] == ["abandoned_step_00000024-2"]
    assert paths_in(tmp_path) == ["abandoned_step_00000024"]
