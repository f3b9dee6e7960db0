"""Every published recipe compiles without a graph break, forward and backward, and computes the same."""

import inspect
from functools import partial

import pytest
import torch
from torch import Tensor

from moekit.dispatch import padded
from moekit.experts import batched, swiglu
from moekit.recipes import (
    MoE,
    Recipe,
    deepseek_moe,
    expert_choice,
    expert_layer,
    gshard,
    mixtral,
    moe_plus_plus,
    names,
    olmoe,
    openlm,
    switch,
)
from moekit.recipes.routers import PREFIX, ROUTERS
from moekit.types import Dispatcher

T, D, F, E = 24, 16, 24, 4
RECIPES = {
    "openlm": openlm(),
    "openlm dropless": openlm(capacity_factor=0),
    "openlm batched": openlm(matmul=batched),
    "switch": switch(),
    "switch dropless": switch(capacity_factor=0),
    "gshard": gshard(),
    "gshard dropless": gshard(capacity_factor=0),
    "mixtral": mixtral(),
    "olmoe": olmoe(k=3),
    "deepseek_moe": deepseek_moe(k=2),
}


def run(layer, moe: MoE, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    torch.default_generator.manual_seed(1)  # GShard draws
    output = layer(x, token_mask=mask)
    total = output.y.square().sum() + sum(output.losses.values())
    leaves = {"x": x, **dict(moe.named_parameters())}
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {"y": output.y, **output.losses, **{f"d {name}": g for name, g in zip(leaves, grads, strict=True)}}


def check(recipe: Recipe, *, backend: str, masked: bool = False) -> None:
    torch._dynamo.reset()
    moe, x = MoE(D, E, recipe, hidden=F), torch.randn(T, D, requires_grad=True)
    mask = torch.arange(T) % 5 != 0 if masked else None
    expected = run(moe, moe, x, mask)
    actual = run(torch.compile(moe, fullgraph=True, backend=backend), moe, x, mask)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}\n{text}")  # noqa: B023


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_compiles_to_one_graph(recipe: Recipe) -> None:
    check(recipe, backend="aot_eager")


DRAWS = ("phi_moe", f"{PREFIX}sparse_mixer")  # from another stream when compiled


@pytest.mark.parametrize("name", [*names.RECIPES, *(PREFIX + name for name in ROUTERS)])
def test_every_name_compiles_to_one_graph(full: bool, name: str) -> None:
    if not full:
        pytest.skip("is for --full: recipes of every kind are above, and a kind of router each below")
    makes = names.RECIPES.get(name) or ROUTERS[name.removeprefix(PREFIX)]
    offered = {"vocab_size": 16} if "vocab_size" in inspect.signature(makes).parameters else {}
    recipe = names.find_recipe(name, **offered)
    torch._dynamo.reset()
    moe, x = MoE(D, 16, recipe, hidden=8), torch.randn(2, 12, D, requires_grad=True)
    ids = {"token_ids": torch.randint(0, 16, (2, 12))} if "token_ids" in recipe.needs else {}
    results = []
    for layer in (moe, torch.compile(moe, fullgraph=True, backend="aot_eager")):
        torch.default_generator.manual_seed(1)
        output = layer(x, token_mask=torch.arange(24).view(2, 12) % 5 != 0, **ids)
        total = output.y.square().sum() + sum(output.losses.values())
        results.append([output.y, *torch.autograd.grad(total, [x, *moe.parameters()], allow_unused=True)])
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if found is not None and name not in DRAWS:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["openlm", "gshard", "mixtral"])
def test_a_mask_compiles_too(name: str) -> None:
    check(RECIPES[name], backend="aot_eager", masked=True)


@pytest.mark.parametrize("name", ["openlm", "mixtral", "deepseek_moe"])
def test_an_exported_layer_takes_other_sizes(name: str) -> None:
    class Output(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = MoE(D, E, RECIPES[name], hidden=F)

        def forward(self, x: Tensor) -> Tensor:
            return self.moe(x).y

    layer, dims = Output(), {0: torch.export.Dim("B"), 1: torch.export.Dim("L")}
    exported = torch.export.export(layer, (torch.randn(4, 5, D),), dynamic_shapes=(dims,)).module()
    for shape in ((4, 5), (3, 7)):
        x = torch.randn(*shape, D)
        torch.testing.assert_close(exported(x), layer(x))


def limited(dispatcher: Dispatcher) -> Recipe:
    layer = expert_layer(dispatcher=dispatcher, experts=partial(swiglu, matmul=batched))
    return moe_plus_plus()._replace(layer=layer, plan=dispatcher.plan)


# A recipe with a factor, whatever it limits. The compiler takes what changes between calls for a symbol.
FACTORS = {
    "openlm": lambda factor: openlm(capacity_factor=factor),
    "expert_choice": lambda factor: expert_choice(k=factor),
    "topology": lambda factor: ROUTERS["topology"](share=factor / 4),
    "moe_plus_plus": lambda factor: moe_plus_plus(tau=factor),
    "limited moe_plus_plus": lambda factor: limited(padded(capacity_factor=factor)),
}

COUNTING = ("expert_choice", "topology")  # the real tokens behind a mask


@pytest.mark.parametrize("name", FACTORS)
def test_other_sizes_and_other_factors_compile_after_the_first(name: str) -> None:
    torch._dynamo.reset()
    for factor in (1.0, 4 / 3):
        moe = MoE(D, E, FACTORS[name](factor), hidden=F)
        compiled = torch.compile(moe, fullgraph=True, backend="eager")
        for tokens in (T, 31):
            x, mask = torch.randn(tokens, D), torch.arange(tokens) % 5 != 0 if name in COUNTING else None
            found, expected = compiled(x, token_mask=mask), moe(x, token_mask=mask)
            torch.testing.assert_close(found.y, expected.y)
            torch.testing.assert_close(found.losses, expected.losses)


@pytest.mark.slow
def test_generated_code_computes_the_same() -> None:
    check(openlm(), backend="inductor")
