"""Models of checkpoints, in Python: what a run trained comes back, weights and what routers remember."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.lm.checkpoints import checkpoint_folder, save_checkpoint
from moekit.lm.configs import load_config
from moekit.lm.generation import generate
from moekit.recipes import mixtral
from moekit.recipes.backends import auto
from moekit.recipes.language_models import language_model, moe_layers
from moekit.recipes.names import find_recipe
from moekit.recipes.trained import trained_model
from moekit.recipes.weights import newest_of


def checkpoint_of(folder: Path, recipe: str, *, step: int = 3, seed: int = 0, **shape):
    torch.manual_seed(seed)
    model = language_model(load_config("moekit_tiny", moe_freq=2, moe_num_experts=8, **shape), find_recipe(recipe))
    for _, moe in moe_layers(model):
        if moe.state is not None:
            moe.state.normal_()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    settings = {"model": "moekit_tiny", "recipe": recipe}
    return save_checkpoint(checkpoint_folder(folder, step), tensors, {"step": step, "settings": settings}), model


@pytest.mark.parametrize("recipe", ["openlm", "remoe", "router:relu", "router:sigmoid_bias", "expert_choice"])
def test_a_model_comes_back_with_what_its_routers_remember(recipe: str, tmp_path: Path) -> None:
    checkpoint_of(tmp_path, recipe, step=2, seed=1)
    newest, model = checkpoint_of(tmp_path, recipe, step=10)
    for place in (tmp_path, str(tmp_path), newest):
        found = trained_model(place, training=True)
        assert found.training
        assert found.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), name
    prompt = torch.tensor([5, 6, 7])
    assert torch.equal(
        generate(found, prompt, max_new_tokens=4, temperature=0),
        generate(model, prompt, max_new_tokens=4, temperature=0),
    )
    sum(p.sum() for p in found.parameters()).backward()  # it can be trained on
    with pytest.raises(ValueError, match="device = meta, which holds no weights; expected cpu or cuda"):
        trained_model(newest, device="meta")


@pytest.mark.parametrize("recipe", ["openlm", "gshard", "sparsely_gated", "router:sparse_mixer"])
def test_a_sequence_alone_is_scored_as_in_a_batch_and_alike_each_time(recipe: str, tmp_path: Path) -> None:
    newest, _ = checkpoint_of(tmp_path, recipe)
    model, ids = trained_model(newest), torch.arange(28).view(4, 7)
    assert not model.training
    whole = model(ids).logits
    torch.testing.assert_close(model(ids[2:3]).logits[0], whole[2])
    torch.testing.assert_close(model(ids[:, :4]).logits, whole[:, :4])
    assert torch.equal(model(ids).logits, whole)


@pytest.mark.parametrize("recipe", ["openlm", "gshard", "sparsely_gated"])
def test_what_is_to_be_trained_on_has_limits_and_noise_whatever_its_mode(recipe: str, tmp_path: Path) -> None:
    newest, _ = checkpoint_of(tmp_path, recipe)
    ids = torch.arange(28).view(4, 7)
    model = trained_model(newest, training=True).eval()
    found = [model(ids[2:3]).logits[0], model(ids).logits[2]]
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_parameters_of_bf16_come_back_exactly_in_float32(tmp_path: Path) -> None:
    _, model = checkpoint_of(tmp_path, "mixtral")
    tensors = {f"model.{name}": tensor.bfloat16() for name, tensor in model.state_dict().items()}
    settings = {"model": "moekit_tiny", "recipe": "mixtral", "precision": "bf16"}
    newest = save_checkpoint(checkpoint_folder(tmp_path, 4), tensors, {"step": 4, "settings": settings})
    found = trained_model(newest).state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], tensors[f"model.{name}"].float()) for name in found)


def test_a_recipe_may_be_given_as_a_value(tmp_path: Path) -> None:
    newest, model = checkpoint_of(tmp_path, "mixtral")
    found = trained_model(newest, recipe=mixtral()._replace(coefficients={}))
    [(_, moe)] = moe_layers(found)
    assert moe.recipe.coefficients == {}
    assert moe.recipe.layer.func is auto().func  # on kernels where there are some, as by the recipe's name
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.state_dict().items())
    with pytest.raises(
        TypeError, match=r"trained_model: recipe = <function mixtral .*; expected a name, .* or a Recipe"
    ):
        trained_model(newest, recipe=mixtral)


def test_names_of_checkpoints(tmp_path: Path) -> None:
    newest, _ = checkpoint_of(tmp_path, "mixtral")
    assert newest_of(tmp_path) == newest_of(newest) == newest
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        trained_model(tmp_path / "nothing")


def test_a_recipe_of_a_file_is_run_if_it_is_named(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text("from moekit.recipes import mixtral\n")
    newest, model = checkpoint_of(tmp_path, f"{code}:mixtral")
    with pytest.raises(
        ValueError, match=r"is code in a file\. If it is yours, say so with --recipe .*, in Python recip"
    ):
        trained_model(newest)
    found = trained_model(newest, recipe=f"{code}:mixtral")
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("name", "value"), [("recipe", 3), ("recipe", None), ("moe_top_k", "x"), ("model", [])])
def test_a_setting_of_another_kind_is_told(name: str, value: Any, tmp_path: Path) -> None:
    settings = {"model": "moekit_tiny", "recipe": "openlm", name: value}
    place = save_checkpoint(checkpoint_folder(tmp_path, 1), {"model.w": torch.zeros(1)}, {"settings": settings})
    with pytest.raises(ValueError, match=rf"settings say {name} = {re.escape(repr(value))}, which is no value of"):
        trained_model(place)
