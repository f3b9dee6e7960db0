"""docs/python.md: its Python runs, and what comes out is what the page says."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moekit.recipes import MoE, mixtral, olmoe, remoe, weighted_sum
from moekit.routing import top_k

TEXT = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        found: dict[str, Any] = {}
        for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
            exec(compile(block, "docs/python.md", "exec"), found)
            found.setdefault("after", []).append(found.get("state"))
    return found


def test_the_loop_learns_and_moves_what_routers_remember(scope: dict[str, Any]) -> None:
    losses = [loss for loss, _ in scope["history"]]
    assert losses[-1] < 0.2 * losses[0]
    layers = [moe for _, moe in scope["moe_layers"](scope["model"])]
    assert len(layers) == len(scope["history"][-1][1]) == 2
    assert all(0 < moe.bias.abs().max() <= 0.001 * len(losses) * 1.001 for moe in layers)


def test_the_checkpoint_comes_back_with_and_without_its_settings(scope: dict[str, Any]) -> None:
    model, again, ids = scope["model"], scope["again"], torch.arange(20).view(2, 10)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)
    assert scope["after"][1] == {"step": 20, "settings": scope["settings"]}


def test_a_state_that_scales_a_loss_is_its_coefficient() -> None:
    moe = MoE(16, 8, remoe(), hidden=8)
    [name] = moe(torch.randn(3, 16)).losses
    assert moe.recipe.state.scales == name
    total = weighted_sum({name: torch.tensor(3.0)}, {**moe.recipe.coefficients, moe.recipe.state.scales: moe.state})
    assert total == 3.0 * moe.state > 0


def dense(x: torch.Tensor, scope: dict[str, Any]) -> torch.Tensor:
    return scope["down"](F.silu(scope["gate"](x)) * scope["up"](x))


def test_without_normalised_weights_an_upcycled_network_is_smaller_by_their_sum(scope: dict[str, Any]) -> None:
    moe = MoE(64, 8, olmoe(k=2), hidden=160)
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            getattr(moe.experts, name).copy_(scope[name].weight.T.expand(8, -1, -1))
    x = torch.randn(20, 64)
    output = moe(x)
    share = output.routing.weights.sum(-1, keepdim=True)
    assert share.max() < 1
    torch.testing.assert_close(output.y, share * dense(x, scope))


def test_slices_of_a_dense_network_add_up_to_it(scope: dict[str, Any]) -> None:
    route = partial(top_k, k=8, normalize=True, scale=4.0)
    moe = MoE(64, 4 * 8, mixtral()._replace(route=route), hidden=160 // 4)
    with torch.no_grad():
        for name, axis in (("gate", 1), ("up", 1), ("down", 0)):
            getattr(moe.experts, name).copy_(torch.stack(scope[name].weight.T.chunk(4, axis) * 8))
        moe.gate.copy_(moe.gate[:, ::4].repeat_interleave(4, 1))
    x = torch.randn(20, 64)
    torch.testing.assert_close(moe(x).y, dense(x, scope))


def test_widths_are_those_of_the_recipe_unless_one_is_given(scope: dict[str, Any]) -> None:
    assert MoE(64, 32, scope["narrow"]).experts.up.shape == (32, 64, 48)
    given = MoE(64, 32, scope["narrow"], hidden=24).params()
    assert (given.experts.up.shape, given.shared.up.shape) == ((32, 64, 24), (1, 64, 48))


def test_the_branch_is_geglu_of_four_widths_beside_shared_swiglu_of_two(scope: dict[str, Any]) -> None:
    moe, x = MoE(64, 32, scope["both"]), torch.randn(5, 64)
    gate, up, down = (each[0] for each in moe.params().shared)
    assert gate.shape == (64, 6 * 48)
    shared = (F.silu(x @ gate[:, :96]) * (x @ up[:, :96])) @ down[:96]
    branch = (F.gelu(x @ gate[:, 96:]) * (x @ up[:, 96:])) @ down[96:]
    routed = moe.recipe._replace(shared=None)
    alone = MoE(64, 32, routed)
    alone.load_state_dict({name: each for name, each in moe.state_dict().items() if not name.startswith("shared")})
    torch.testing.assert_close(moe(x).y, alone(x).y + shared + branch)


def test_the_state_of_ones_own_moves_by_its_formulas(scope: dict[str, Any]) -> None:
    logits, routing, memory = scope["output"].logits, scope["output"].routing, scope["moe"].memory
    counts = routing.expert_indices.flatten().bincount(minlength=8)
    away = (counts.double().mean() - counts).sign().float()
    sizes = logits.abs().mean(0)
    expected = torch.stack([0.001 * away, 0.1 * away, 0.9 + 0.1 * sizes / sizes.mean()])
    assert away.any()
    torch.testing.assert_close(memory, expected)
    mask = torch.arange(len(logits)) < 7
    masked = scope["observe"](logits, routing, memory, token_mask=mask)[8:]
    torch.testing.assert_close(masked, logits[:7].abs().double().sum(0))
    assert scope["update"](memory, torch.zeros(16, dtype=torch.float64)).isfinite().all()
