"""A model is built for any recipe; what ranks need to know of it is asked where there are ranks."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moekit.experts import EVERYTHING, INPUTS, PREACTIVATION
from moekit.experts.tile_files import layer_tiles, table_text
from moekit.parallel import one_process
from moekit.recipes import Recipe, construction
from moekit.recipes.configuration import parse_settings
from moekit.recipes.construction import kernel_notes, make_model, run_layer
from moekit.recipes.expert_parameters import hidden_axes
from moekit.recipes.language_models import moe_layers
from moekit.recipes.settings import RunSettings
from moekit.routing import linear_gate, top_k


class ScaleParams(NamedTuple):
    scale: Tensor


def init_scale(num_experts, dim, hidden=None, *, generator=None, device=None, dtype=None):
    return ScaleParams(torch.ones(num_experts, dim, 1, device=device, dtype=dtype))


def scaled() -> Recipe:
    """Compose experts that have no hidden dimension: each multiplies a token by a vector."""

    def route(logits, *, bias=None):
        return top_k(logits, k=1)

    def layer(x, routing, params):
        return x * params.scale[routing.expert_indices[:, 0], :, 0] * routing.weights

    return Recipe(linear_gate, route, layer, init=init_scale)


def test_experts_without_a_hidden_axis_train_on_one_process():
    words = ["--model", "moekit_tiny", "--precision", "fp32", "--recipe", f"{__file__}:scaled"]
    model, _, _ = make_model(parse_settings(words, prog="test"), one_process())
    ids = torch.zeros(1, 4, dtype=torch.int64, device=next(model.parameters()).device)
    model(ids).logits.logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_ranks_cannot_share_experts_without_a_hidden_axis():
    with pytest.raises(ValueError, match=r"'scale' has shape \(1, 64, 1\) .* expected exactly one axis"):
        hidden_axes(init_scale, 64, 1)


KEEPS = {"preactivation": PREACTIVATION, "inputs": INPUTS, "everything": EVERYTHING}


@pytest.mark.parametrize("recipe", ["openlm", "mixtral", "router:relu"])
@pytest.mark.parametrize("keep", KEEPS)
def test_layers_of_a_run_get_its_keep_and_its_tiles(tmp_path, monkeypatch, recipe, keep):
    path = tmp_path / "tiles.json"
    path.write_text(table_text([]))
    tables, by_table = [], lambda size: None
    monkeypatch.setattr("moekit.recipes.automatic.from_table", lambda table: tables.append(table) or by_table)
    words = ["--model", "moekit_tiny", "--precision", "fp32", "--recipe", recipe, "--moe-keep", keep]
    for flags, tiles in (((), layer_tiles), (("--moe-tiles", str(path)), by_table)):
        model, evaluation, _ = make_model(parse_settings([*words, *flags], prog="test"), one_process())
        for each in (*(layer.recipe for _, layer in moe_layers(model)), evaluation):
            assert (each.layer.keywords["keep"], each.layer.keywords["tiles"]) == (KEEPS[keep], tiles)
    assert set(tables) == {()}


def test_a_run_without_flags_chooses_as_auto_does():
    assert run_layer(RunSettings()).keywords == {"keep": PREACTIVATION, "tiles": layer_tiles}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--recipe", "mixtral"], ""),
        (["--recipe", "openlm", "--moe-capacity-factor", "0"], ""),
        (["--recipe", "openlm"], ""),
        (["--recipe", "llama4"], "it copies rows and adds them up by weight, and the dispatcher has ways of its own"),
        (["--recipe", "gpt_oss"], ""),
        (["--moe-freq", "0"], "the model is dense"),
    ],
)
def test_flags_of_kernels_that_do_not_train_are_named(monkeypatch, words, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("moekit.recipes.backends.HAS_TRITON", True)
    words, flags = ["--model", "moekit_tiny", *words], ["--moe-keep", "everything", "--moe-tiles", "t.json"]
    lines = kernel_notes(parse_settings([*words, *flags], prog="test"), torch.device("cuda"))
    named = ["--moe-keep everything", "--moe-tiles t.json"] if why else []
    assert lines == [f"{flag} is of fused_layer, which trains no layer here: {why}" for flag in named]
    monkeypatch.setattr(construction, "make_recipe", lambda *arguments, **options: pytest.fail("asked of nothing"))
    assert kernel_notes(parse_settings(words, prog="test"), torch.device("cuda")) == []
