import ast
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from moekit import __version__
from moekit.dispatch import padded_plan
from moekit.experts import fused_layer
from moekit.recipes import mixtral, openlm
from moekit.recipes.backends import auto
from moekit.recipes.cli import PROGRAMS, main
from moekit.recipes.doctor import PACKAGES
from moekit.recipes.expert_layers import limited, recompute
from moekit.recipes.names import RECIPES
from moekit.recipes.recipe_tables import _parts, capacity_words, recipe_table

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"moekit {__version__}\n"


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_lists_every_program_with_what_it_does(capsys, words):
    main(words)
    lines = capsys.readouterr().out.splitlines()
    for name, program in PROGRAMS.items():
        assert any(line.split() == [name, *program.purpose.split()] for line in lines)


def test_words_come_from_the_command_line_by_default(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["moekit", "--version"])
    main()
    assert __version__ in capsys.readouterr().out


def test_an_unknown_program_is_answered_with_a_hint_and_the_list():
    with pytest.raises(SystemExit, match=r"unknown program 'recipe'; did you mean 'recipes'\?") as raised:
        main(["recipe"])
    assert all(name in str(raised.value) for name in PROGRAMS)


@pytest.mark.parametrize("program", ["recipes", "doctor"])
def test_programs_without_flags_refuse_words(program):
    with pytest.raises(SystemExit, match=f"moekit {program}: takes no further words, but '--fast 1' was given"):
        main([program, "--fast", "1"])


@pytest.mark.parametrize("program", sorted(PROGRAMS))
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_every_program_prints_its_help_and_ends_well(capsys, program, word):
    try:
        main([program, word])
    except SystemExit as ended:
        assert not ended.code  # noqa: PT017, some return and some exit
    assert f"usage: moekit {program}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["recipe"]])
def test_the_package_runs_as_the_console_script_does(capsys, monkeypatch, words):
    outcomes = []
    for run in (lambda: main(words), lambda: runpy.run_module("moekit", run_name="__main__")):
        monkeypatch.setattr("sys.argv", ["moekit", *words])
        try:
            run()
            code = None
        except SystemExit as ended:
            code = ended.code
        outcomes.append((code, capsys.readouterr().out))
    assert outcomes[0] == outcomes[1]


def test_a_reference_of_several_lines_is_shown_whole(capsys):
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    start = "  Meta, Llama 4, 2025, https://ai.meta.com/blog/llama-4-multimodal-intelligence; its released code, "
    assert any(line.startswith(start) and line.endswith("github.com/meta-llama/llama-models") for line in lines)
    assert any(line.startswith("  Baidu ERNIE Team") and line.endswith("ERNIE_Technical_Report.pdf") for line in lines)
    assert "  Dai et al., DeepSeekMoE, 2024, https://arxiv.org/abs/2401.06066" in lines, "the first of two alone"


def test_recipes_shows_each_with_its_settings_and_source(capsys):
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    cells = {row[0]: row[1:] for row in ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines) if row}
    assert set(RECIPES) <= set(cells)
    where = {name: [cells[name][i] for i in (0, 1, 2, 4)] for name in RECIPES}
    assert where["openlm"] == ["2", "yes", "1.25", "0.1 load_balance"]
    assert where["gshard"] == ["2", "no", "1", "0.01 load_balance"]
    assert where["olmoe"] == ["8", "yes", "dropless", "0.01 load_balance"]
    assert where["deepseek_moe"] == ["8", "yes", "dropless", "0.0001 load_balance"]
    text = "\n".join(lines)
    assert "1 shared" in text
    assert "state: l1_coefficient" in text
    assert "switch: Compose the Switch Transformer's layer: top-1 weighted by its probability" in "\n".join(lines)
    assert "  Jiang et al., Mixtral of Experts, 2024, https://arxiv.org/abs/2401.04088" in lines


@pytest.mark.parametrize("program", ["recipes", "traffic"])
def test_a_narrow_terminal_breaks_no_name(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main([program])
    narrow = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "120")
    main([program])
    assert narrow == capsys.readouterr().out


def test_an_interrupted_program_ends_without_a_traceback(capsys, monkeypatch):
    def interrupted(name, words):
        raise KeyboardInterrupt

    monkeypatch.setitem(PROGRAMS, "bench", PROGRAMS["bench"]._replace(run=interrupted))
    with pytest.raises(SystemExit) as raised:
        main(["bench", "layer"])
    assert raised.value.code == 130
    assert capsys.readouterr().err == "moekit bench: interrupted\n"


def test_a_recipe_without_losses_or_references_has_a_row_too():
    assert recipe_table({"bare": lambda: mixtral()._replace(losses={}, coefficients={})}).row_count == 1


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (fused_layer(), "fused_layer"),
        (auto(), "auto"),
        (limited(fused_layer(), plan=padded_plan), "fused_layer"),
        (recompute(mixtral().layer), "swiglu"),
        (torch.nn.Identity(), "Identity"),
    ],
)
def test_every_layer_has_a_name_among_the_parts(layer, name):
    assert _parts(mixtral()._replace(layer=layer)) == ["linear_gate", "top_k", name]


def test_capacity_is_what_the_plan_gives():
    assert capacity_words(openlm(capacity_factor=0)) == "dropless"
    assert capacity_words(mixtral()._replace(plan=partial(padded_plan, capacity_factor=0.5))) == "0.5"


def test_train_hands_its_words_on(monkeypatch):
    seen = []
    monkeypatch.setattr("moekit.recipes.train.main", lambda words, **names: seen.append((words, names)))
    main(["train", "--steps", "3"])
    assert seen == [(["--steps", "3"], {"prog": "moekit train", "launch": "moekit train"})]


def test_train_without_its_packages_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "moekit.recipes.train", None)
    with pytest.raises(SystemExit, match=r"moekit train: .*it needs rich, tyro and torchdata. `moekit doctor`"):
        main(["train"])


def packages_of(module: str, seen: set[str]) -> set[str]:
    """Return which of rich, tyro and torchdata come with a module's import, also through others of moekit."""
    top, _, _ = module.partition(".")
    if top != "moekit" or module in seen:
        return {top} & {"rich", "tyro", "torchdata"}
    seen.add(module)
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.exists():  # a name in a module
        return set()
    named = [module.rpartition(".")[0]] if "." in module else []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            named += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return set().union(*(packages_of(each, seen) for each in named))


@pytest.mark.parametrize("program", sorted(PROGRAMS.keys() - {"doctor", "recipes"}))
def test_a_program_names_the_packages_that_it_imports_and_the_doctor_names_the_program(program, monkeypatch):
    asked = []

    def missing(module):
        asked.append(module)
        raise ModuleNotFoundError("No module named 'it'")

    monkeypatch.setattr("moekit.recipes.cli.importlib.import_module", missing)
    with pytest.raises(SystemExit) as raised:
        main([program])
    found = re.fullmatch(rf"moekit {program}: No module named 'it'; it needs (.*)\. .*", str(raised.value))
    needed = packages_of(asked[0], set())
    assert set(re.split(", | and ", found[1])) == needed
    purposes = {package.name: re.split("[ ,]+", package.purpose) for package in PACKAGES}
    assert {name for name in ("rich", "tyro", "torchdata") if program in purposes[name]} == needed


def test_recipes_without_rich_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "moekit.lm.consoles", raising=False)
    with pytest.raises(SystemExit, match=r"moekit recipes: .*pip install rich"):
        main(["recipes"])


def test_doctor_reports_versions_packages_and_backends(capsys):
    main(["doctor"])
    text = capsys.readouterr().out
    assert text.startswith(f"moekit {__version__}\npython 3.")
    for section in ("devices\n  cpu: ", "optional packages\n", "grouped matmul, forward + backward\n"):
        assert section in text
