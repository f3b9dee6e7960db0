"""Each family's block against transformers' own, in eager mode: output, logits, and every gradient by its name there.

Weights are random, biases and selection biases too, and converted within the graph: so the gradients that are compared
are those of transformers' own tensors, halves, interleaved columns and all.

Where the two truly differ, which no test of equality here can show:

- transformers computes logits in the dtype of the weights in most families (Mixtral, Qwen, OLMoE, Granite, gpt-oss,
  Llama 4, ...); here they are float32, as Switch Transformers' section 2.4 asks for. In float32 there is no difference.
- transformers' balancing loss is of all layers pooled; the papers', and here, is per layer. A test below shows both.
- transformers jitters the block's input, what experts get included, in Mixtral, MiniMax and Phi (zero by default);
  Switch's paper, what the router gets alone. Recipes leave it out.
"""

import importlib
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_blocks import CASES, B, Case, D, E, S, T, build
from torch import Tensor, nn

from moekit.integrations.blocks import FAMILIES
from moekit.recipes import Recipe, moe_layer, switch
from moekit.routing import linear_gate
from moekit.types import LayerOutput

pytest.importorskip("transformers")
load_balancing_loss_func = importlib.import_module(
    "transformers.models.mixtral.modeling_mixtral"
).load_balancing_loss_func


def run_theirs(block: nn.Module, case: Case, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Return the output, the logits, and the gradient of x and of every parameter."""
    seen = []
    hook = block.get_submodule(case.router).register_forward_hook(lambda module, args, out: seen.append(out))
    block.zero_grad()
    x = x.clone().requires_grad_()
    y = block(x * 1.0)  # a copy, since jitter is in place
    hook.remove()
    y = y[0] if isinstance(y, tuple) else y
    (y.reshape(T, D) * cotangent).sum().backward()
    logits = seen[0] if case.logits is None else seen[0][case.logits]
    grads = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
    return {"y": y.detach().reshape(T, D), "logits": logits.detach().reshape(T, -1), "x": x.grad, **grads}


def run_ours(
    name: str, block: nn.Module, config: Any, x: Tensor, cotangent: Tensor, *, recipe: Recipe | None = None
) -> tuple[dict[str, Tensor], LayerOutput]:
    """Return the same of moekit's layer, with the weights converted within the graph."""
    learned = {key for key, p in block.named_parameters() if p.requires_grad}
    entries = {key: value.detach().clone() for key, value in block.state_dict().items()}
    x = x.clone().requires_grad_()
    for key in learned:
        entries[key].requires_grad_()
    mine = FAMILIES[name].to_params(entries, config)
    output = moe_layer(x, mine.params, FAMILIES[name].recipe(config) if recipe is None else recipe, state=mine.state)
    (output.y.reshape(T, D) * cotangent).sum().backward()
    grads = {key: entries[key].grad for key in learned}
    return {"y": output.y.detach().reshape(T, D), "logits": output.logits.detach(), "x": x.grad, **grads}, output


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, rtol: float) -> None:
    """Compare by name, to rounding of the largest value."""
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert expected is not None, f"{name}: transformers has no gradient"
        assert ours[name] is not None, f"{name}: no gradient"
        assert expected.abs().max() > 0, f"{name}: all zero, which compares nothing"
        atol = rtol * expected.abs().max().item()
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}\n{text}")


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(B, S, D), torch.randn(T, D)


def test_every_family_is_compared() -> None:
    assert set(CASES) == {name.removesuffix("_text") for name in FAMILIES}


@pytest.mark.parametrize("name", CASES)
def test_output_logits_and_every_gradient_are_those_of_transformers(name: str) -> None:
    case = CASES[name]
    block, config = build(case, name)
    x, cotangent = inputs()
    theirs = run_theirs(block, case, x, cotangent)
    ours, output = run_ours(name, block, config, x, cotangent)
    assert_equal(ours, theirs, rtol=case.rtol)
    used = output.routing.expert_indices.unique().numel()
    assert used == output.routing.num_experts, "an expert that no token takes is not compared; draw other inputs"


@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "mixtral", "qwen3_moe"])
def test_the_largest_of_large_logits_is_chosen(name: str) -> None:
    """Sigmoids of logits from about 17 on are one; Llama 4 chooses by logits."""
    case = CASES[name]
    block, config = build(case, name)
    with torch.no_grad():
        block.get_submodule(case.router).weight.mul_(80)
    x, cotangent = inputs()
    theirs = run_theirs(block, case, x, cotangent)
    assert theirs["logits"].amax(1).median() > 20
    ours, _ = run_ours(name, block, config, x, cotangent)
    torch.testing.assert_close(ours["y"], theirs["y"])


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_exact(name: str) -> None:
    block, config = build(CASES[name], name)
    state_dict = block.state_dict()
    mine = FAMILIES[name].to_params(state_dict, config)
    back = FAMILIES[name].from_params(mine, config)
    assert set(back) == set(state_dict)
    for key, tensor in state_dict.items():
        if (name, key) == ("longcat_flash", "experts.gate_up_proj"):
            tensor[E:] = 0  # rows of zero experts, which transformers has and never reads
        torch.testing.assert_close(back[key], tensor, rtol=0, atol=0)
    block.load_state_dict(back)


@pytest.mark.parametrize("name", CASES)
def test_what_is_converted_shares_no_memory_either_way(name: str) -> None:
    """Or a copy from the middle of training would be of later weights in parts."""
    block, config = build(CASES[name], name)
    state_dict = block.state_dict()
    mine = FAMILIES[name].to_params(state_dict, config)
    back = FAMILIES[name].from_params(mine, config)
    before = {key: tensor.clone() for key, tensor in back.items()}
    with torch.no_grad():
        for tensor in tensors_of(mine):
            tensor.add_(1)
    for key, tensor in before.items():
        assert torch.equal(back[key], tensor), key
    again = FAMILIES[name].to_params(back, config)
    expected = [tensor.clone() for tensor in tensors_of(again)]
    with torch.no_grad():
        for tensor in back.values():
            tensor.add_(1)
    assert all(map(torch.equal, tensors_of(again), expected))


def tensors_of(pieces: Any) -> list[Tensor]:
    """List the tensors of a nested tuple."""
    if isinstance(pieces, Tensor):
        return [pieces]
    return [tensor for each in pieces or () for tensor in tensors_of(each)]


def test_phi_in_training_draws_the_same_experts_and_gradients(monkeypatch) -> None:
    # transformers throws one draw away: rand_like(...).uniform_(). Without it both take the same numbers in turn.
    case, (x, cotangent) = CASES["phimoe"], inputs()
    block, config = build(case, "phimoe")
    monkeypatch.setattr(Tensor, "uniform_", lambda tensor: tensor)
    block.train()
    evaluating = FAMILIES["phimoe"].recipe(config)
    recipe = evaluating._replace(route=partial(evaluating.route, training=True))
    experts = []
    for seed in range(3):
        torch.default_generator.manual_seed(seed)
        theirs = run_theirs(block, case, x, cotangent)
        torch.default_generator.manual_seed(seed)
        ours, output = run_ours("phimoe", block, config, x, cotangent, recipe=recipe)
        assert_equal(ours, theirs, rtol=case.rtol)
        experts.append(output.routing.expert_indices)
    assert not torch.equal(experts[0], experts[1])


def test_switch_drops_as_transformers_does_within_one_sequence() -> None:
    torch.default_generator.manual_seed(2)  # a draw that uses every expert
    case, (x, cotangent) = CASES["switch_transformers"], inputs()
    block, config = build(case, "switch_transformers")
    block.router.expert_capacity = 3
    x = x.reshape(1, T, D)
    theirs = run_theirs(block, case, x, cotangent)
    ours, output = run_ours("switch_transformers", block, config, x, cotangent, recipe=limited_switch(3, tokens=T))
    assert (output.y.reshape(T, D) == 0).all(1).any(), "nothing was dropped"
    assert_equal(ours, theirs, rtol=case.rtol)


def test_switch_limits_the_batch_and_transformers_each_sequence() -> None:
    """Switch's equation 3 divides the tokens of the batch by the experts; transformers counts within a sequence."""
    case, (x, cotangent) = CASES["switch_transformers"], inputs()
    block, config = build(case, "switch_transformers")
    block.router.expert_capacity = 1
    theirs = run_theirs(block, case, x, cotangent)["y"].view(B, S, D)
    mine = FAMILIES["switch_transformers"].to_params(block.state_dict(), config)
    alone = [moe_layer(sequence, mine.params, limited_switch(1, tokens=S)).y for sequence in x]
    torch.testing.assert_close(torch.stack(alone), theirs)
    together = moe_layer(x, mine.params, limited_switch(B, tokens=T)).y  # as many rows per expert in all
    kept, theirs_kept = ((y != 0).any(-1).sum() for y in (together, theirs))
    assert kept > theirs_kept, "a full sequence can use what another leaves"


def limited_switch(rows: int, *, tokens: int) -> Recipe:
    return switch(capacity_factor=(rows + 0.5) * E / tokens)


def test_lfm2_differs_by_what_transformers_adds_to_the_sum_of_weights() -> None:
    block, config = build(CASES["lfm2_moe"], "lfm2_moe")
    x = torch.randn(T, D)
    mine = FAMILIES["lfm2_moe"].to_params(block.state_dict(), config)
    routing = moe_layer(x, mine.params, FAMILIES["lfm2_moe"].recipe(config), state=mine.state).routing
    _, weights, experts = block.gate(x, block.expert_bias)
    sums = torch.sigmoid(block.gate(x, block.expert_bias)[0]).gather(1, experts).sum(1, keepdim=True)
    assert torch.equal(routing.expert_indices, experts)
    torch.testing.assert_close(
        routing.weights.double() * (sums / (sums + 1e-6)).double(), weights.double(), rtol=3e-7, atol=0
    )


def test_mixtral_sees_float32_logits_where_transformers_rounds_them() -> None:
    """In bfloat16, transformers' logits are bfloat16. Switch's section 2.4 asks for float32, which moekit has."""
    block, config = build(CASES["mixtral"], "mixtral")
    block, x = block.bfloat16(), torch.randn(T, D).bfloat16()
    mine = FAMILIES["mixtral"].to_params(block.state_dict(), config)
    logits = moe_layer(x, mine.params, FAMILIES["mixtral"].recipe(config)).logits
    rounded = block.gate(x)[0]
    assert (logits.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(logits, x.float() @ block.gate.weight.float().T)
    assert not torch.equal(logits, rounded.float())


def test_narrow_logits_give_a_few_tokens_other_experts() -> None:
    """What docs/transformers.md says of random tokens in an OLMoE block."""
    modeling = importlib.import_module("transformers.models.olmoe.modeling_olmoe")
    sizes = {"hidden_size": 256, "intermediate_size": 8, "num_experts": 64, "num_experts_per_tok": 8}
    config = modeling.OlmoeConfig(**sizes)
    gate = modeling.OlmoeTopKRouter(config).bfloat16()
    torch.nn.init.normal_(gate.weight, std=1 / 16)
    x = torch.randn(4000, 256, dtype=torch.bfloat16)
    theirs = gate(x)[2].sort(-1).values
    ours = FAMILIES["olmoe"].recipe(config).route(linear_gate(x, gate.weight.T)).expert_indices.sort(-1).values
    assert 0.01 < (theirs != ours).any(-1).float().mean() < 0.04


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "phimoe", "jamba", "dbrx"])
def test_balancing_loss_of_one_layer_is_that_of_transformers(name: str) -> None:
    """And its coefficient is that of the configuration."""
    config = build(CASES[name], name)[1]
    recipe = FAMILIES[name].recipe(config)
    logits = torch.randn(T, E, requires_grad=True)
    # Phi's recipe counts what SparseMixer chose, which in evaluation are the best two, as transformers counts them.
    routing = recipe.route(logits)
    k = routing.expert_indices.shape[1]
    ours, theirs = recipe.losses["load_balance"](logits, routing), load_balancing_loss_func((logits,), E, k)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))
    coefficient = config.ffn_config.moe_loss_weight if name == "dbrx" else config.router_aux_loss_coef
    assert recipe.coefficients == {"load_balance": coefficient}


def test_two_collapsed_layers_look_balanced_to_transformers_alone() -> None:
    """Switch's equations 4 to 6 are of one layer. Over layers pooled, one's empty experts make up for another's."""
    recipe = FAMILIES["qwen3_moe"].recipe(build(CASES["qwen3_moe"], "qwen3_moe")[1])
    layers = [torch.tensor([[9.0, 9.0, 9.0, 0.0, 0.0, 0.0]] * T), torch.tensor([[0.0, 0.0, 0.0, 9.0, 9.0, 9.0]] * T)]
    balanced = 3.0  # K, in this form
    assert load_balancing_loss_func(tuple(layers), 6, 3).item() == pytest.approx(balanced)
    for logits in layers:
        loss = recipe.losses["load_balance"](logits, recipe.route(logits))
        assert loss.item() == pytest.approx(2 * balanced, rel=1e-3)


@pytest.mark.parametrize("name", ["ernie4_5_moe", "lfm2_moe", "granitemoeshared"])
def test_parts_that_a_configuration_leaves_out(name: str) -> None:
    off = {"ernie4_5_moe": "moe_num_shared_experts", "lfm2_moe": "use_expert_bias", "granitemoeshared": ""}[name]
    case = CASES[name]
    changes = {off: False if name == "lfm2_moe" else 0} if off else {"shared_intermediate_size": 0}
    case = case._replace(config=(case.config[0], {**case.config[1], **changes}))
    if name == "granitemoeshared":  # no shared MLP: the block is GraniteMoe's
        block, config = build(case._replace(block=case.block.split()[0], router="router"), name)
        entries = {f"block_sparse_moe.{key}": value for key, value in block.state_dict().items()}
    else:
        block, config = build(case, name)
        entries = block.state_dict()
    mine = FAMILIES[name].to_params(entries, config)
    recipe = FAMILIES[name].recipe(config)
    assert (mine.params.shared is None) == (recipe.shared is None)
    x = torch.randn(B, S, D)
    torch.testing.assert_close(moe_layer(x, mine.params, recipe, state=mine.state).y, block(x), rtol=1e-5, atol=1e-4)
    back = FAMILIES[name].from_params(mine, config)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in entries.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_module_that_the_page_makes_of_a_block_computes_the_same_and_goes_back(
    name: str, dtype: torch.dtype
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    [code] = re.findall(r"As a module, .*?```python\n(.*?)```", page, flags=re.DOTALL)
    block, config = build(CASES[name], name)
    block.to(dtype)
    family, model, x = FAMILIES[name], SimpleNamespace(config=config), torch.randn(2, 5, D, dtype=dtype)
    held = family.to_params({key: each.clone() for key, each in block.state_dict().items()}, config)
    recipe = family.recipe(config)
    expected = moe_layer(x, held.params, recipe, state=held.state).y
    scope: dict[str, Any] = {
        "torch": torch,
        "family": family,
        "held": held,
        "recipe": recipe,
        "block": block,
        "model": model,
        "dtype": held.params.experts.down.dtype,
    }
    exec(compile(code, "transformers.md", "exec"), scope)
    moe = scope["moe"]
    torch.testing.assert_close(moe(x).y, expected, rtol=0, atol=0)
    back = family.to_params(block.state_dict(), config)
    if held.state is not None:
        output = moe(x)
        moe.update_state(moe.recipe.state.observe(output.logits, output.routing, moe.state))  # rate 0.0 moves nothing
        for state in (back.state, moe.state):
            torch.testing.assert_close(state.float(), held.state.float(), rtol=0, atol=0)
    torch.testing.assert_close(moe_layer(x, back.params, recipe, state=back.state).y, expected, rtol=0, atol=0)
