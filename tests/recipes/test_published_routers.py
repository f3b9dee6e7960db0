"""Published methods with other routers: they are what their parts are, they learn, and they evaluate without noise."""

import pytest
import torch

from moekit.recipes import MoE, weighted_sum
from moekit.recipes.names import RECIPES, find_recipe, recipe_options

D, E, B, L = 12, 16, 2, 24
NO_ROUTER_GRADIENT = {"hash_layer"}  # one expert with weight one


def build(name: str, **options) -> MoE:
    given = {"vocab_size": 64, "tile": 4, **options}  # a tile of 128 would leave so few tokens without experts
    return MoE(D, E, find_recipe(name, **given), hidden=8, dtype=torch.float64)


def run(moe: MoE, x: torch.Tensor, **options):
    return moe(x, token_ids=torch.arange(B * L).view(B, L) * 7 % 64, **options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_learns(name, masked):
    moe, x = build(name, **({"k": 1} if name in NO_ROUTER_GRADIENT else {})), torch.randn(B, L, D, dtype=torch.float64)
    mask = torch.arange(L).expand(B, L) < L - 5 if masked else None
    output = run(moe, x, token_mask=mask)
    recipe = moe.recipe
    scaled = {} if recipe.state is None or not recipe.state.scales else {recipe.state.scales: 1.0}
    assert set(recipe.coefficients) | set(scaled) <= set(recipe.losses)
    (output.y.square().sum() + weighted_sum(output.losses, {**recipe.coefficients, **scaled})).backward()
    for parameter_name, parameter in moe.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        fixed = name in NO_ROUTER_GRADIENT and parameter_name == "gate"
        assert fixed != (parameter.grad.abs().max() > 1e-12), parameter_name


@pytest.mark.parametrize("name", RECIPES)
def test_padding_changes_nothing_for_real_tokens(name):
    """What padding tokens hold does not matter; where a batch is balanced, nor does that they are there."""
    moe = build(name, **({"training": False} if "training" in recipe_options(name) else {}))
    x = torch.randn(B, L, D, dtype=torch.float64)
    mask = torch.arange(L).expand(B, L) < torch.tensor([[L], [L - 7]])
    other = torch.where(mask.unsqueeze(-1), x, 100 * torch.randn_like(x))
    first, second = (run(moe, each, token_mask=mask) for each in (x, other))
    torch.testing.assert_close(first.y[mask], second.y[mask], rtol=1e-9, atol=1e-9)
    for loss in first.losses:
        torch.testing.assert_close(first.losses[loss], second.losses[loss])


@pytest.mark.parametrize("name", [name for name in RECIPES if "training" in recipe_options(name)])
def test_evaluation_draws_nothing_and_training_another_decision(name):
    x = torch.randn(B, L, D, dtype=torch.float64)
    moe = build(name)
    if name == "sparsely_gated":  # its gate begins with zeros
        torch.nn.init.normal_(moe.gate["w"])
    trained = run(moe, x).routing
    moe.recipe = build(name, training=False).recipe
    one, two = run(moe, x), run(moe, x)
    assert torch.equal(one.y, two.y)
    same = trained.expert_indices.shape == one.routing.expert_indices.shape
    assert not (same and torch.equal(trained.expert_indices, one.routing.expert_indices))


@pytest.mark.parametrize("name", RECIPES)
def test_no_tokens_and_half_precision(name):
    moe = build(name).float()
    empty = moe(torch.zeros(B, 0, D), token_ids=torch.zeros(B, 0, dtype=torch.int64))
    assert empty.y.shape == (B, 0, D)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(moe, torch.randn(B, L, D))
    assert output.y.dtype == torch.bfloat16
    assert output.routing.weights.dtype == torch.float32
