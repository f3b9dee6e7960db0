"""The router that CONTRIBUTING shows: the same text as the file, short, right, and trained from a user's own file."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from moekit.experts import init_gated
from moekit.recipes import MoE, MoEParams, moe_layer
from moekit.recipes.audits import audit
from moekit.recipes.names import find_recipe

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "my_router.py"
T, D, E = 12, 8, 4


def my_moe(k=None):
    return find_recipe(f"{FILE}:my_moe", k=k)


BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)


def test_contributing_shows_the_file_as_it_is():
    assert BLOCKS[0] == FILE.read_text()


def test_contributing_shows_a_router_that_keeps_a_budget_in_each_sequence_and_a_plan_that_drops():
    scope = {}
    exec(compile(BLOCKS[1], "CONTRIBUTING.md", "exec"), scope)
    routing = scope["output"].routing
    assert (routing.expert_indices >= 0).view(3, 24).sum(1).tolist() == [15, 15, 15]  # 1.25 of 12 tokens
    weights = routing.weights.view(3, 24).sort(dim=1, descending=True).values
    assert (weights[:, :15] > 0).all()
    assert not weights[:, 15:].any()
    assert audit(scope["recipe"], 8).leaks
    exec(compile(BLOCKS[2], "CONTRIBUTING.md", "exec"), scope)
    routing = scope["output"].routing
    kept = routing.weights.flatten()[scope["heavy"].plan(routing).assignments.unique()[1:]]
    assert len(kept) == (routing.weights >= 0.4).sum() < routing.weights.numel()
    assert kept.min() >= 0.4
    assert BLOCKS[3:] == []


def test_it_has_less_than_thirty_lines():
    assert len(FILE.read_text().splitlines()) < 30


def test_it_keeps_close_seconds_and_leaves_out_far_ones():
    logits = torch.tensor([[0.0, 1.0, 0.9], [0.0, 5.0, 1.0]])
    routing = my_moe().route(logits)
    assert routing.expert_indices.tolist() == [[1, 2], [1, -1]]
    first = torch.sigmoid(torch.tensor(0.1)).item()  # the softmax over two
    assert routing.weights.tolist() == [[pytest.approx(first), pytest.approx(1 - first)], [1.0, 0.0]]


def test_a_selection_bias_chooses_and_leaves_the_weights_alone():
    logits = torch.tensor([[1.0, 0.9, 0.8]])
    routing = my_moe().route(logits, bias=torch.tensor([0.0, 0.0, 9.0]))
    assert set(routing.expert_indices.flatten().tolist()) == {0, 2}
    assert routing.weights.max(-1).indices == routing.expert_indices.flatten().tolist().index(0)


def test_the_number_of_choices_comes_from_the_command_line():
    assert my_moe(k=3).route(torch.zeros(T, E)).expert_indices.shape == (T, 3)


def test_the_layer_equals_a_loop_over_tokens():
    x, params = torch.randn(T, D), MoEParams(2 * torch.randn(D, E), init_gated(E, D, 16))
    output = moe_layer(x, params, my_moe())
    assert (output.routing.expert_indices < 0).any()
    expected = torch.zeros(T, D)
    for t, probs in enumerate(torch.softmax(x @ params.gate, dim=-1)):
        chosen = [e for e in probs.topk(2).indices.tolist() if probs[e] >= 0.5 * probs.max()]
        for e in chosen:
            gate, up, down = (w[e] for w in params.experts)
            y = (torch.nn.functional.silu(x[t] @ gate) * (x[t] @ up)) @ down
            expected[t] += probs[e] / sum(probs[i] for i in chosen) * y
    torch.testing.assert_close(output.y, expected)


def test_it_trains():
    moe = MoE(D, E, my_moe(), hidden=16)
    x, target = torch.randn(64, D), torch.randn(64, D)
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (moe(x).y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert moe.gate.grad.norm() > 0
    assert losses[-1] < 0.7 * losses[0]


def test_it_is_a_partial_so_that_its_share_can_be_ablated():
    recipe = my_moe()
    all_kept = recipe._replace(route=partial(recipe.route, share=0.0)).route(torch.randn(T, E))
    assert (all_kept.expert_indices >= 0).all()
