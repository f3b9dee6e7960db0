"""The example of moekit inside a Hugging Face model: it learns, says how tokens are routed, and equals eager."""

import importlib.util
from pathlib import Path

import pytest
from transformers.integrations.moe import ExpertsInterface

FILE = Path(__file__).parents[2] / "examples" / "hf_experts.py"


@pytest.fixture
def example():
    before = dict(ExpertsInterface._global_mapping)
    spec = importlib.util.spec_from_file_location("hf_experts_example", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    ExpertsInterface._global_mapping.clear()
    ExpertsInterface._global_mapping.update(before)


def test_it_trains_and_reports_each_layer(example, capsys) -> None:
    first, last = example.main(steps=1), example.main(steps=12)
    assert last < first - 0.3
    printed = capsys.readouterr().out
    assert printed.count("model.layers.1.mlp.experts: load in %") == 4  # before and after, two runs
    assert "step 12: loss" in printed
    assert "% of the tokens changed their experts" in printed


def test_moekit_and_eager_reach_the_same_loss(example) -> None:
    losses = [example.main(steps=3, implementation=name) for name in ("moekit", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
