"""Every router in the same layer: what must be alike is, what must differ does, and each can be trained."""

import inspect
import re
from collections.abc import Iterator

import pytest
import torch

from moekit import routing
from moekit.dispatch import dropless_plan
from moekit.experts import grouped, init_gated, swiglu
from moekit.recipes import MoE, Recipe, weighted_sum
from moekit.recipes.audits import audit
from moekit.recipes.layers import moe_layer
from moekit.recipes.names import find_recipe, recipe_options
from moekit.recipes.published import deepseek_moe, switch
from moekit.recipes.recipe_tables import _function_name
from moekit.recipes.routers import ROUTERS, with_experts
from moekit.routing import over_nodes

B, L, D, E, V = 3, 32, 16, 8, 50
T = B * L
MODES = [
    (name, training)
    for name, make in ROUTERS.items()
    for training in ((True, False) if "training" in inspect.signature(make).parameters else (True,))
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name: str, *, training: bool = True) -> Recipe:
    return find_recipe(f"router:{name}", training=training, vocab_size=V, tile=8)  # a tile that fits T


def layer_of(recipe: Recipe) -> MoE:
    torch.manual_seed(0)
    return MoE(D, E, recipe, hidden=24)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, L, D, generator=generator), torch.randint(V, (B, L), generator=generator)


@pytest.mark.parametrize(("name", "training"), MODES)
def test_the_experts_are_the_same_and_nothing_is_dropped(name, training):
    recipe = make(name, training=training)
    experts = recipe.layer.keywords["experts"]
    assert (experts.func, experts.keywords) == (swiglu, {"matmul": grouped})
    assert (recipe.init, recipe.plan) == (init_gated, dropless_plan)
    assert recipe.shared is None


@pytest.mark.parametrize(("name", "training"), MODES)
def test_the_causal_flag_is_what_the_audit_finds(name, training):
    recipe = make(name, training=training)
    assert recipe.causal is not audit(recipe, E, trials=14).leaks


@pytest.mark.parametrize("name", ROUTERS)
def test_the_docstring_names_the_source_and_says_whether_it_is_causal(name):
    text = (inspect.getdoc(ROUTERS[name]) or "").partition("\n")[0]
    assert re.search(r"\d{4}\.\d{5}|Megatron-LM|DeepSeek-V4|PPoPP|A control", text)
    end = re.search(r"(Causal|Causal when dropless|Not causal|Not causal in training)\.$", text)
    assert end is not None
    assert end[1].startswith("Causal") is make(name).causal
    if end[1] == "Not causal in training":
        assert make(name, training=False).causal


@pytest.mark.parametrize("name", ROUTERS)
def test_it_learns_a_little_and_its_gate_has_a_gradient(name):
    moe, (x, ids) = layer_of(make(name)), inputs()
    target = torch.roll(x, 1, dims=-1)
    optimizer = torch.optim.Adam(moe.parameters(), lr=2e-2)
    losses = []
    for _ in range(25):
        output = moe(x, token_ids=ids)
        loss = (output.y - target).square().mean()
        optimizer.zero_grad()
        (loss + weighted_sum(output.losses, moe.recipe.coefficients)).backward()
        gates = [moe.gate] if isinstance(moe.gate, torch.Tensor) else list(moe.gate.values())
        assert any(gate.grad is not None and gate.grad.abs().max() > 0 for gate in gates)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_every_router_of_the_package_is_there():
    used = " ".join(_function_name(make(name, training=training).route) for name, training in MODES)
    known = {
        name
        for name in routing.__all__
        if {"logits", "bias"} <= inspect.signature(getattr(routing, name)).parameters.keys()
    }
    # over_nodes wraps the first; the others are top_k, the last of sigmoids that differ (it is Llama 4's, published)
    wrapped = {"topology_limited", "fused_top_k", "fused_top_k_and_load", "sigmoid_of_top_k"}
    assert known
    assert {name for name in known - wrapped if name not in used} == set()


def test_names_are_those_of_the_functions():
    assert all(make.__name__ == name for name, make in ROUTERS.items())


def test_the_two_forms_of_normalised_top_k_are_one_function():
    x, _ = inputs()
    outputs = [layer_of(make(name))(x).y for name in ("top_k_normalized", "softmax_of_top_k")]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(
    "name",
    ["top_k", "noisy_top_k", "sinkhorn", "hash_choice", "sigmoid_bias", "sparse_mixer", "random_choice", "topology"],
)
def test_k_comes_from_the_command_line(name):
    moe, (x, ids) = layer_of(find_recipe(f"router:{name}", k=3, vocab_size=V)), inputs()
    assert moe(x, token_ids=ids).routing.expert_indices.shape == (T, 3)


def test_a_token_has_two_experts_wherever_the_paper_does_not_say_otherwise():
    x, ids = inputs()
    others = {"switch", "relu", "top_p", "threshold", "random_second", "soft_slots", "token_rounding"}
    for name in ROUTERS.keys() - others:
        experts = layer_of(make(name))(x, token_ids=ids).routing.expert_indices
        assert (experts >= 0).sum() == 2 * T, name


def test_evaluation_is_the_plain_choice_where_training_is_not():
    x, _ = inputs()
    plain = layer_of(make("softmax_of_top_k"))
    for name in ("topology", "token_rounding"):
        moe = layer_of(make(name, training=False))
        torch.testing.assert_close(moe(x).y, plain(x).y)
        assert not torch.allclose(layer_of(make(name))(x).y, plain(x).y)


def test_jitter_is_for_training_alone():
    x, _ = inputs()
    training, evaluating = (layer_of(make("switch", training=flag)) for flag in (True, False))
    assert not torch.equal(training(x).logits, training(x).logits)
    assert torch.equal(evaluating(x).logits, evaluating(x).logits)


def test_with_experts_leaves_the_routing_and_takes_the_rest():
    recipe = deepseek_moe(num_shared=2)
    mine = with_experts(recipe)
    assert (mine.route, mine.state, mine.losses) == (recipe.route, recipe.state, recipe.losses)
    x, _ = inputs()
    assert layer_of(mine).params().shared is None
    assert layer_of(with_experts(switch()))(x).y.shape == x.shape


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 4, 7, 20])
def test_over_nodes_routes_each_part_as_its_node_would(num_tokens):
    logits = torch.randn(num_tokens, 6, generator=torch.Generator().manual_seed(num_tokens))
    bias, mask = torch.linspace(-1, 1, 6), torch.arange(num_tokens) % 3 != 0
    found = over_nodes(logits, k=2, num_nodes=3, share=0.3, bias=bias, token_mask=mask)
    parts = torch.arange(num_tokens).tensor_split(3)  # as even as can be: no node goes without
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert torch.equal(found.token_indices, torch.arange(num_tokens).unsqueeze(1).expand(-1, 2))
    for node, own in enumerate(parts):
        options = {"num_nodes": 3, "node": node, "share": 0.3, "bias": bias, "token_mask": mask[own]}
        alone = routing.topology_limited(logits[own], k=2, **options)
        assert torch.equal(found.expert_indices[own], alone.expert_indices)
        assert torch.equal(found.weights[own], alone.weights)


def test_over_nodes_keeps_most_tokens_at_home():
    moe, (x, _) = layer_of(make("topology")), inputs()
    experts = moe(x).routing.expert_indices
    home = (torch.arange(T) >= T // 2).long().unsqueeze(1)
    left = (experts // (E // 2) != home).any(1)
    assert 0 < left.sum() <= 2 * int(0.14 * T / 2)


def test_an_unknown_router_is_named_with_its_neighbours():
    with pytest.raises(ValueError, match=r"unknown router 'topk'; did you mean 'top_k'.*Known: cosine, expert_choice"):
        find_recipe("router:topk")


def test_options_of_a_router_are_known():
    assert recipe_options("router:token_rounding") == {"k": 2, "tile": 64, "training": True}
    with pytest.raises(ValueError, match=r"recipe router:switch takes no k \(it was given as 3"):
        find_recipe("router:switch", k=3)


def test_a_selection_bias_is_remembered_and_moves_the_choice():
    moe, (x, _) = layer_of(make("sqrt_softplus_bias")), inputs()
    before = moe(x).routing.expert_indices
    assert moe.recipe.state.name == "bias"
    state = torch.full((E,), -9.0)
    state[:2] = 9.0
    moved = moe_layer(x, moe.params(), moe.recipe, state=state).routing.expert_indices
    assert set(moved.flatten().tolist()) == {0, 1}
    assert set(before.flatten().tolist()) != {0, 1}
