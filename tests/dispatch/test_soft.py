from functools import partial

import pytest
import torch
from torch import Tensor

from moekit import recipes
from moekit.dispatch import dropless, padded
from moekit.dispatch.soft import mix_tokens, slot_routing, spread_slots
from moekit.experts import MlpParams, batched, gelu_mlp, grouped, init_mlp, loop
from moekit.routing import load_balance_loss
from moekit.types import Dispatcher, SoftRouting

G, L, D, F, E, S = 2, 3, 4, 5, 3, 2
T = G * L


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def soft_moe(x: Tensor, routing: SoftRouting, params: MlpParams, dispatcher: Dispatcher, matmul) -> Tensor:
    slots, choice = mix_tokens(x, routing), slot_routing(routing)
    plan = dispatcher.plan(choice)
    rows = gelu_mlp(dispatcher.dispatch(slots, choice, plan), plan.groups, params, matmul=matmul)
    return spread_slots(dispatcher.combine(rows, choice, plan), routing)


def soft_moe_in_loops(x: Tensor, routing: SoftRouting, params: MlpParams) -> Tensor:
    outputs = []
    for g in range(G):
        slots = {}
        for e in range(E):
            for s in range(S):
                mixed = sum(routing.dispatch_weights[g, t, e, s] * x[g * L + t] for t in range(L))
                hidden = torch.nn.functional.gelu(mixed @ params.up[e], approximate="tanh")
                slots[e, s] = hidden @ params.down[e]
        for t in range(L):
            outputs.append(sum(routing.combine_weights[g, t, e, s] * y for (e, s), y in slots.items()))
    return torch.stack(outputs)


WAYS = {
    "dropless loop": (dropless(), loop),
    "dropless grouped": (dropless(), grouped),
    "padded loop": (padded(capacity_factor=1.0), loop),
    "padded batched": (padded(capacity_factor=1.0), batched),
}


@pytest.mark.parametrize(("dispatcher", "matmul"), WAYS.values(), ids=WAYS)
def test_soft_moe_and_every_gradient_are_those_of_loops(dispatcher: Dispatcher, matmul) -> None:
    leaves = {"x": drawn(T, D), "dispatch": drawn(G, L, E, S), "combine": drawn(G, L, E, S)}
    leaves |= {"up": drawn(E, D, F), "down": drawn(E, F, D)}
    arguments = leaves["x"], SoftRouting(leaves["dispatch"], leaves["combine"]), MlpParams(leaves["up"], leaves["down"])
    y, expected = soft_moe(*arguments, dispatcher, matmul), soft_moe_in_loops(*arguments)
    torch.testing.assert_close(y, expected)
    probe = torch.randn_like(expected)
    grads = torch.autograd.grad((y * probe).sum(), [*leaves.values()])
    wanted = torch.autograd.grad((expected * probe).sum(), [*leaves.values()])
    for name, grad, want in zip(leaves, grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, msg=lambda text: f"{name}\n{text}")  # noqa: B023


def test_slots_are_in_order_of_expert_pool_and_number() -> None:
    x = torch.eye(T)
    dispatch = torch.arange(T * E * S, dtype=torch.float32).view(G, L, E, S)
    slots = mix_tokens(x, SoftRouting(dispatch, dispatch)).view(E, G, S, T)
    for g in range(G):
        for e in range(E):
            for s in range(S):
                assert slots[e, g, s, g * L : (g + 1) * L].tolist() == dispatch[g, :, e, s].tolist()
                assert slots[e, g, s].count_nonzero() == dispatch[g, :, e, s].count_nonzero()


def test_the_two_moves_are_each_others_transpose() -> None:
    weights = torch.rand(G, L, E, S, dtype=torch.float64)
    routing = SoftRouting(weights, weights)
    mix = mix_tokens(torch.eye(T, dtype=torch.float64), routing)
    spread = spread_slots(torch.eye(E * G * S, dtype=torch.float64), routing)
    torch.testing.assert_close(mix.T, spread)


def test_slots_go_to_their_own_expert_and_fill_it_exactly() -> None:
    weights = torch.rand(G, L, E, S)
    routing = slot_routing(SoftRouting(weights, weights))
    assert routing.expert_indices.flatten().tolist() == [e for e in range(E) for _ in range(G * S)]
    assert routing.token_indices.flatten().tolist() == list(range(E * G * S))
    assert (routing.weights == 1).all()
    assert (routing.num_tokens, routing.num_experts, routing.pool) == (E * G * S, E, E * G * S)
    assert routing.weights.shape == (E * G * S, 1)
    plan = padded(capacity_factor=1.0).plan(routing)
    assert plan.groups.capacity == G * S
    assert (plan.assignments >= 0).all()


def test_the_slots_of_a_pool_without_a_real_token_are_no_assignments() -> None:
    weights = torch.rand(G, L, E, S)
    real = torch.tensor([[False, False, False], [False, True, False]])
    whole = slot_routing(SoftRouting(weights, weights))
    routing = slot_routing(SoftRouting(weights, weights), token_mask=real)
    experts = routing.expert_indices.view(E, G, S)
    assert (experts[:, 0] == -1).all()
    assert torch.equal(experts[:, 1], whole.expert_indices.view(E, G, S)[:, 1])
    assert torch.equal(routing.weights, (routing.expert_indices >= 0).float())
    assert routing[3:] == whole[3:]
    plan = padded(capacity_factor=1.0).plan(routing)
    assert (plan.groups.capacity, int((plan.assignments >= 0).sum())) == (G * S, E * S)
    everything = slot_routing(SoftRouting(weights, weights), token_mask=torch.ones(T, dtype=torch.bool))
    assert torch.equal(everything.expert_indices, whole.expert_indices)


@pytest.mark.parametrize("dispatcher", [dropless(), padded(capacity_factor=1.0)])
def test_an_empty_sequence_changes_nothing_for_the_others(dispatcher: Dispatcher) -> None:
    layer = recipes.expert_layer(dispatcher=dispatcher, experts=partial(gelu_mlp, matmul=loop))
    recipe = recipes.soft_moe(slots=S)._replace(layer=layer, plan=dispatcher.plan)
    params = recipes.MoEParams(recipe.init_gate(D, E), recipe.init(E, D, F))
    x = torch.randn(G, L, D, requires_grad=True)
    real = torch.tensor([[False], [True]]).expand(G, L)
    leaves = (x, *(each.requires_grad_() for each in params.experts))
    parts = [recipes.moe_layer(x, params, recipe, token_mask=real), recipes.moe_layer(x[1:], params, recipe)]
    torch.testing.assert_close(parts[0].y[1], parts[1].y[0])
    assert (parts[0].y[0] == 0).all()
    grads, wanted = (torch.autograd.grad(part.y.square().sum(), leaves) for part in parts)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


def test_one_slot_for_one_token_is_the_expert_itself() -> None:
    x, params, one = torch.randn(1, D), init_mlp(1, D, F), torch.ones(1, 1, 1, 1)
    y = soft_moe(x, SoftRouting(one, one), params, dropless(), loop)
    hidden = torch.nn.functional.gelu(x @ params.up[0], approximate="tanh")
    torch.testing.assert_close(y, hidden @ params.down[0])


@pytest.mark.parametrize("shape", [(1, 0, E, S), (0, L, E, S)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    weights, params = torch.zeros(shape, requires_grad=True), init_mlp(E, D, F)
    x = torch.zeros(0, D, requires_grad=True)
    y = soft_moe(x, SoftRouting(weights, weights), params, dropless(), grouped)
    assert y.shape == (0, D)
    grads = torch.autograd.grad(y.sum(), (x, weights))
    assert [g.shape for g in grads] == [(0, D), shape]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 7.0])
def test_what_masked_tokens_hold_enters_no_slot(bad: float) -> None:
    real = torch.tensor([[True, False, True], [False, True, True]])
    weights = torch.rand(G, L, E, S).masked_fill(~real.view(G, L, 1, 1), 0.0).requires_grad_()
    x = torch.randn(T, D).masked_fill(~real.view(T, 1), bad).requires_grad_()
    expected = mix_tokens(x.detach().masked_fill(~real.view(T, 1), 0.0), SoftRouting(weights, weights))
    slots = mix_tokens(x, SoftRouting(weights, weights), token_mask=real)
    assert torch.equal(slots, expected)
    of_x, of_weights = torch.autograd.grad(slots.square().sum(), (x, weights))
    assert of_weights.isfinite().all()
    assert (of_x[~real.flatten()] == 0).all()


def test_a_layer_gives_real_tokens_the_same_whatever_padding_holds() -> None:
    recipe, real = recipes.soft_moe(slots=S), torch.tensor([[True, False, True], [False, True, True]])
    params = recipes.MoEParams(recipe.init_gate(D, E), recipe.init(E, D, F))
    x = torch.randn(G, L, D)
    expected = recipes.moe_layer(x, params, recipe, token_mask=real).y[real]
    alone = recipes.moe_layer(x[real].view(G, L - 1, D), params, recipe).y.flatten(0, 1)
    torch.testing.assert_close(expected, alone)
    for bad in (torch.nan, torch.inf, 1e30):
        spoiled = x.masked_fill(~real.unsqueeze(-1), bad)
        assert torch.equal(recipes.moe_layer(spoiled, params, recipe, token_mask=real).y[real], expected)


@pytest.mark.parametrize("slots", [S, 3])
def test_a_loss_over_loads_is_refused_where_slots_are_equally_loaded(slots: int) -> None:
    recipe = recipes.soft_moe(slots=slots)._replace(losses={"load_balance": load_balance_loss})
    params = recipes.MoEParams(recipe.init_gate(D, E), recipe.init(E, D, F))
    with pytest.raises(ValueError, match=r"load_balance_loss: .* slots of soft routing are equally loaded"):
        recipes.moe_layer(torch.randn(G, L, D), params, recipe)


def test_sums_are_in_float32_and_results_have_the_dtype_of_rows() -> None:
    weights = torch.rand(1, 512, 1, 1)
    routing = SoftRouting(weights, weights)
    x = torch.rand(512, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slots = mix_tokens(x, routing)
        y = spread_slots(slots, routing)
    assert (slots.dtype, y.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(slots, (weights.flatten() @ x.float()).unsqueeze(0).bfloat16())
    assert torch.equal(y, (weights.view(-1, 1) * slots.float()).bfloat16())


def test_one_graph() -> None:
    torch._dynamo.reset()
    x, params, weights = torch.randn(T, D, requires_grad=True), init_mlp(E, D, F), torch.rand(G, L, E, S)
    routing, dispatcher = SoftRouting(weights, weights), padded(capacity_factor=1.0)
    run = partial(soft_moe, routing=routing, params=params, dispatcher=dispatcher, matmul=batched)
    (actual,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(x).square().sum(), x)
    torch.testing.assert_close(actual, torch.autograd.grad(run(x).square().sum(), x)[0])


def test_errors_say_what_was_given() -> None:
    weights = torch.rand(G, L, E, S)
    with pytest.raises(
        ValueError, match=r"mix_tokens: x has shape \(5, 4\); expected \(6, width\): T, the tokens of the"
    ):
        mix_tokens(torch.zeros(5, D), SoftRouting(weights, weights))
    with pytest.raises(
        ValueError, match=r"spread_slots: slots has shape \(6, 4\); expected \(12, width\): E\*G\*S, the slots"
    ):
        spread_slots(torch.zeros(T, D), SoftRouting(weights, weights))
    with pytest.raises(ValueError, match=r"token_mask has 5 elements .*; expected one per token, 6"):
        slot_routing(SoftRouting(weights, weights), token_mask=torch.ones(5))
