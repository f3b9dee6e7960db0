"""No recipe reads the device: a fake tensor holds no value, and who reads one gets an error."""

import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode

from moekit import MoE
from moekit.recipes.names import RECIPES, find_recipe
from moekit.recipes.routers import PREFIX, ROUTERS


@pytest.mark.parametrize("name", [*RECIPES, *(PREFIX + name for name in ROUTERS)])
def test_forward_and_backward_read_no_value(name: str) -> None:
    makes = RECIPES.get(name) or ROUTERS[name.removeprefix(PREFIX)]
    recipe = find_recipe(name, **({"vocab_size": 16} if "vocab_size" in inspect.signature(makes).parameters else {}))
    moe = MoE(8, 16, recipe, hidden=8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, mask = torch.randn(2, 12, 8, requires_grad=True), torch.rand(2, 12) > 0.3
        ids = {"token_ids": torch.randint(0, 16, (2, 12))} if "token_ids" in recipe.needs else {}
        output = moe(x, token_mask=mask, **ids)
        (output.y.square().sum() + sum(output.losses.values())).backward()
        with pytest.raises(RuntimeError):
            output.y.sum().item()
