"""The README's Python runs, its commands parse, and it names exactly two commands to set things up."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from moekit.experts.tile_files import read_tiles, shipped
from moekit.lm.checkpoints import checkpoint_folder, save_checkpoint
from moekit.lm.configs import load_config
from moekit.recipes import cli, openlm
from moekit.recipes.configuration import parse_settings
from moekit.recipes.language_models import language_model
from moekit.recipes.setup import make_config, make_recipe
from moekit.recipes.tuning.files import write_tiles

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(start: str) -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [
        words for words in (shlex.split(line, comments=True) for line in lines) if " ".join(words).startswith(start)
    ]


def test_python_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("moekit_tiny", moe_freq=2, moe_num_experts=8)
    tensors = {f"model.{name}": each for name, each in language_model(config, openlm()).state_dict().items()}
    settings = {"model": "moekit_tiny", "recipe": "openlm"}
    save_checkpoint(checkpoint_folder(tmp_path / "logs" / "short", 200), tensors, {"step": 200, "settings": settings})
    tokenizer = SimpleNamespace(encode=lambda text: [*text.encode()], decode=str)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moekit.lm.preparation.prepare", lambda **_: SimpleNamespace(tokenizer=tokenizer))
    scope: dict[str, object] = {}
    assert len(blocks("python")) >= 2
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)


def test_python_of_the_page_on_performance_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiles(tmp_path / "tiles.json", shipped())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moekit.recipes.tuning.tune.tune", lambda sizes: [])  # it needs a GPU
    found = blocks("python", (ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))
    assert len(found) >= 3
    for block in found:
        exec(compile(block, "performance.md", "exec"), {"__name__": "__main__"})
    assert read_tiles(tmp_path / "tiles.json") == shipped()


def test_make_targets_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {words[1] for words in commands("make")}
    assert named == {"train", "test", "bench"}
    assert named <= set(targets)


@pytest.mark.parametrize("words", commands("python examples/train_moe.py"), ids=" ".join)
def test_training_commands_make_a_recipe_and_a_shape(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = parse_settings(words[2:])
    assert make_recipe(settings.model).causal
    assert make_config(settings.model).n_layers > 0


@pytest.mark.parametrize("words", commands("moekit"), ids=" ".join)
def test_console_commands_run(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(words[1:])
    assert capsys.readouterr().out


def test_files_it_names_exist() -> None:
    named = re.findall(r"`([\w/]+\.(?:py|md|ipynb))`", README) + re.findall(r"\]\((docs/[^)]+)\)", README)
    assert len(named) > 4
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / "tests" / name).exists()]
    assert not missing
