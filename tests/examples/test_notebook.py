"""The notebook runs from top to bottom, says what it should, and is committed with its outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "anatomy.ipynb"


pytestmark = pytest.mark.slow


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return "".join(output.get("text", "") for output in outputs if output.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(committed) -> nbformat.NotebookNode:
    copy = nbformat.from_dict(committed)
    for cell in copy.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    return NotebookClient(copy, timeout=120, kernel_name="python3", coalesce_streams=True).execute()


def test_it_runs_and_its_stages_agree(executed):
    text = printed(executed)
    assert "x (512, 32) -> rows (1024, 32) -> out (1024, 32) -> y (512, 32)" in text
    assert "expert_layer equals the stages: True" in text
    assert "moe_layer equals the stages:    True" in text


def test_it_swaps_the_router_drops_and_balances(executed):
    lines = printed(executed).splitlines()
    taken = next(line for line in lines if "experts per token in place of 2" in line)
    assert 1 < float(taken.split("with ")[1].split()[0]) < 2
    dropped = [float(line.split("dropped")[1].split("%")[0]) for line in lines if line.startswith("factor")]
    assert len(dropped) == 4
    assert dropped[0] == 0
    assert dropped == sorted(dropped)
    assert dropped[-1] >= 50  # at half the rows, half the assignments or more
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines if line.startswith("step")]
    assert losses[0] > 1.05
    assert losses[-1] == pytest.approx(1, abs=0.01)


def test_it_draws_the_loads(executed):
    assert pictures(executed) == 1


def test_it_is_committed_with_outputs_small_and_without_local_paths(committed):
    assert committed.metadata.kernelspec.name == "python3"
    assert all(cell.outputs for cell in committed.cells if cell.cell_type == "code")
    assert pictures(committed) == 1
    assert NOTEBOOK.stat().st_size < 100_000
    assert "/home/" not in NOTEBOOK.read_text()
    assert "/tmp/" not in NOTEBOOK.read_text()
