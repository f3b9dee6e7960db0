"""Every transformers family with the experts interface, run by moekit: output and all gradients equal to eager."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from hf_families import Family, deviations, experts_of, families, run, tiny_model
from transformers.integrations.moe import ExpertsInterface

from moekit import moe_layer
from moekit.dispatch import padded
from moekit.experts import batched, loop
from moekit.integrations.transformers import module_layer, register

FAMILIES = families()
# Families that differ or cannot be built tiny: the name of the experts class to the reason. A test that passes fails.
DIFFERENT: dict[str, str] = {}
# Of a gradient's largest entry. Where gradients are small differences of large sums (decay rates of linear attention,
# scales of hyper-connections), transformers' own implementations differ from each other by 1e-5.
TOLERANCE = 5e-5
LOOSER = {"qwen4_exp": 1e-4}  # its decay rates: 6e-5 on one processor


@pytest.fixture
def names() -> Iterator[None]:
    """Take registered names out of transformers' table again."""
    before = dict(ExpertsInterface._global_mapping)
    yield
    ExpertsInterface._global_mapping.clear()
    ExpertsInterface._global_mapping.update(before)


def marked(family: Family):
    reason = DIFFERENT.get(family.experts)
    marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
    return pytest.param(family, id=f"{family.name}-{family.experts}", marks=marks)


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("family", [marked(family) for family in FAMILIES])
def test_a_family_computes_what_eager_does(family: Family) -> None:
    calls = []

    def counted(x, routing, params):
        calls.append(routing)
        return module_layer()(x, routing, params)

    register(layer=counted)
    model = tiny_model(family)
    modules = experts_of(model, family)
    expected = run(model, family, "eager")
    assert not calls
    actual = run(model, family, "moekit")
    assert len(calls) >= len(modules) > 0  # looped models call their layers several times
    used = {name for name in modules if expected[f"{name}.down_proj"].abs().max() > 0}
    assert used == set(modules), "an experts module got no gradient, so that comparing it says nothing"
    worst, tolerance = deviations(actual, expected), LOOSER.get(family.name, TOLERANCE)
    assert max(worst.values()) < tolerance, {name: value for name, value in worst.items() if value >= tolerance}


def test_at_least_58_modeling_files_are_covered() -> None:
    assert len({family.module for family in FAMILIES if family.experts not in DIFFERENT}) >= 58
    assert set(DIFFERENT) <= {family.experts for family in FAMILIES}


def test_the_documents_table_has_every_family() -> None:
    text = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    rows = re.findall(r"^\| (\w+) \| \w+ \| .*\| \d", text, flags=re.MULTILINE)
    assert sorted(rows) == sorted(family.name for family in FAMILIES), "run: python tests/hf_families.py"


def test_the_documents_block_is_a_recipe_and_comes_back() -> None:
    text = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text.split("\n## Blocks as recipes\n")[1], flags=re.DOTALL)
    assert len(blocks) == 2
    scope = {"model": mixtral()}
    before = {name: each.clone() for name, each in scope["model"].state_dict().items()}
    x = torch.randn(2, 10, scope["model"].config.hidden_size)
    for code in blocks:
        exec(compile(code, "transformers.md", "exec"), scope)
    torch.testing.assert_close(scope["moe"](x).y, scope["block"](x))
    output = moe_layer(x, scope["held"].params, scope["recipe"], state=scope["held"].state)
    torch.testing.assert_close(output.y, scope["block"](x))
    torch.testing.assert_close(scope["model"].state_dict(), before, rtol=0, atol=0)
    number = re.search(r"sparse MoE block of (\d+) families", text)
    assert number is not None
    assert int(number[1]) == len({name.removesuffix("_text") for name in scope["FAMILIES"]})


def mixtral() -> transformers.MixtralForCausalLM:
    family = next(family for family in FAMILIES if family.name == "mixtral")
    return tiny_model(family)


@pytest.mark.usefixtures("names")
def test_importing_registers_nothing_and_register_does() -> None:
    ExpertsInterface._global_mapping.pop("moekit", None)
    model = mixtral()
    with pytest.raises(ValueError, match="moekit"):
        model.set_experts_implementation("moekit")
    register()
    model.set_experts_implementation("moekit")
    assert model.get_experts_implementation() == {"": "moekit"}


@pytest.mark.usefixtures("names")
def test_from_pretrained_takes_the_name_and_keeps_the_weights(tmp_path) -> None:
    register()
    eager = mixtral()
    eager.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moekit")
    assert loaded.config._experts_implementation == "moekit"
    ids = torch.arange(12).view(2, 6) + 3
    eager.set_experts_implementation("eager")
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, eager(input_ids=ids).logits)


@pytest.mark.usefixtures("names")
def test_it_generates_what_eager_generates() -> None:
    register()
    model, ids = mixtral(), torch.arange(12).view(2, 6) + 3
    texts = []
    for name in ("eager", "moekit"):
        model.set_experts_implementation(name)
        texts.append(model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True, eos_token_id=None))
    assert texts[0].shape == (2, 11)
    torch.testing.assert_close(texts[1], texts[0])


@pytest.mark.usefixtures("names")
def test_names_choose_layers_and_a_second_call_replaces() -> None:
    family = next(family for family in FAMILIES if family.name == "mixtral")
    register("moekit_loop", layer=module_layer(matmul=loop))
    register("moekit_full", layer=module_layer(matmul=batched, dispatcher=padded(capacity_factor=4.0)))
    register("moekit_tight", layer=module_layer(dispatcher=padded(capacity_factor=0.25)))
    model = tiny_model(family)
    eager = run(model, family, "eager")
    for name in ("moekit_loop", "moekit_full"):
        assert max(deviations(run(model, family, name), eager).values()) < TOLERANCE
    assert deviations(run(model, family, "moekit_tight"), eager)["output"] > 1e-2  # a tight capacity drops
    register("moekit_tight")
    assert max(deviations(run(model, family, "moekit_tight"), eager).values()) < TOLERANCE


@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
def test_names_of_transformers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"named '{name}' that is not moekit's. Choose another name"):
        register(name)


@pytest.mark.usefixtures("names")
def test_gradient_checkpointing_computes_the_same() -> None:
    register()
    family = next(family for family in FAMILIES if family.name == "mixtral")
    model = tiny_model(family)
    plain = run(model, family, "moekit")
    model.activation_checkpointing_enable()
    model.train()
    assert max(deviations(run(model, family, "moekit"), plain).values()) < TOLERANCE


WITHOUT = """
import sys
sys.modules["transformers"] = None  # importing it is an ImportError
import moekit
from moekit.integrations.transformers import register
try:
    register()
except ImportError as error:
    assert "pip install 'moekit[transformers]'" in str(error), error
else:
    raise AssertionError("register() went through")
"""


def test_the_absence_of_transformers_is_an_error_that_names_the_extra() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_the_integration_leaves_transformers_alone() -> None:
    code = "import sys, moekit.integrations.transformers; assert 'transformers' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
