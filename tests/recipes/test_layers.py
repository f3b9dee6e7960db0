from functools import partial

import pytest
import reference
import torch
from torch import Tensor

from moekit.dispatch import by_choice, by_position, by_weight, dropless, padded
from moekit.experts import (
    GatedParams,
    batched,
    fused_cpu,
    fused_layer,
    gelu_mlp,
    grouped,
    init_gated,
    init_mlp,
    loop,
    relu_mlp,
    swiglu,
)
from moekit.recipes import (
    MoE,
    MoEParams,
    Recipe,
    deepseek_moe,
    expert_layer,
    limited,
    moe_layer,
    recompute,
    shared_experts,
    weighted_sum,
)
from moekit.routing import (
    expert_choice,
    hash_choice,
    hash_table,
    linear_gate,
    load_balance_loss,
    mask_tokens,
    top_k,
    z_loss,
)
from moekit.routing.top_k import token_choice
from moekit.types import Ratio, RouterState, Routing, SharedExperts

D, F, E, K = 6, 7, 5, 2
DISPATCHERS = {"dropless": dropless(), "padded": padded(capacity_factor=1.0)}
every_dispatcher = pytest.mark.parametrize("dispatcher", DISPATCHERS.values(), ids=DISPATCHERS)


def recipe_of(dispatcher=None, *, matmul=grouped, **rest) -> Recipe:
    layer = expert_layer(dispatcher=dispatcher or dropless(), experts=partial(swiglu, matmul=matmul))
    losses = {"load_balance": load_balance_loss, "z": z_loss}
    return Recipe(linear_gate, partial(top_k, k=K), layer, losses)._replace(**rest)


def draw_params(num_experts: int = E) -> MoEParams:
    gate = torch.randn(D, num_experts, dtype=torch.float64, requires_grad=True)
    experts = init_gated(num_experts, D, F, dtype=torch.float64)
    return MoEParams(gate, GatedParams(*(w.requires_grad_() for w in experts)))


def leaves_of(params: MoEParams) -> list[Tensor]:
    return [params.gate, *params.experts]


def test_leading_axes_are_kept() -> None:
    x, params = torch.randn(2, 3, 4, D, dtype=torch.float64), draw_params()
    output = moe_layer(x, params, recipe_of())
    assert output.y.shape == x.shape
    assert output.routing.expert_indices.shape == (24, K)
    assert output.logits.shape == (24, E)
    torch.testing.assert_close(output.y.view(-1, D), moe_layer(x.view(-1, D), params, recipe_of()).y)
    torch.testing.assert_close(moe_layer(x.transpose(0, 2), params, recipe_of()).y, output.y.transpose(0, 2))


@pytest.mark.usefixtures("poison")
@every_dispatcher
@pytest.mark.parametrize("matmul", [loop, grouped])
def test_no_tokens(dispatcher, matmul) -> None:
    x, params = torch.zeros(2, 0, D, dtype=torch.float64, requires_grad=True), draw_params()
    output = moe_layer(x, params, recipe_of(dispatcher, matmul=matmul))
    assert output.y.shape == (2, 0, D)
    total = output.y.sum() + sum(output.losses.values())
    assert total.item() == 0
    for grad in torch.autograd.grad(total, [x, *leaves_of(params)]):
        assert (grad == 0).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("matmul", [loop, batched, grouped])
@pytest.mark.parametrize("chosen", [[[1, 3]] * 7, [[2, -1]] * 7, [[0, 4]] * 3 + [[-1, -1]] * 4], ids=str)
def test_empty_experts_get_a_gradient_of_zero(matmul, chosen: list[list[int]]) -> None:
    """Everything on one or two experts, and tokens without any."""
    x, params = torch.randn(7, D, dtype=torch.float64), draw_params()
    experts = torch.tensor(chosen)

    def route(logits: Tensor, *, bias=None):
        return token_choice(experts, logits.softmax(-1).gather(1, experts.clamp_min(0)), logits)

    dispatcher = padded(capacity_factor=1.0) if matmul is batched else dropless()
    output = moe_layer(x, params, recipe_of(dispatcher, matmul=matmul, route=route))
    total = output.y.square().sum() + sum(output.losses.values())
    grads = torch.autograd.grad(total, leaves_of(params))
    assert all(grad.isfinite().all() for grad in grads)
    used = {e for row in chosen for e in row if e >= 0}
    for grad in grads[1:]:
        assert {e for e in range(E) if grad[e].abs().sum() > 0} == used
    assert (output.y[experts[:, 0] < 0] == 0).all()


@pytest.mark.usefixtures("poison")
@every_dispatcher
def test_everything_dropped(dispatcher) -> None:
    x, params = torch.randn(7, D, dtype=torch.float64, requires_grad=True), draw_params()
    output = moe_layer(x, params, recipe_of(dispatcher), token_mask=torch.zeros(7, dtype=torch.bool))
    assert (output.y == 0).all()
    assert all(loss == 0 for loss in output.losses.values())
    for grad in torch.autograd.grad(output.y.sum() + sum(output.losses.values()), [x, *leaves_of(params)]):
        assert (grad == 0).all()


def test_dropped_choices_give_the_router_no_gradient() -> None:
    """One expert, one row: only the first token's weight reaches the output, the others' gradient is zero, not NaN."""
    x = torch.randn(4, D, dtype=torch.float64)
    params = draw_params()
    gate = params.gate.detach() * 0 + torch.tensor([9.0, 0, 0, 0, 0], dtype=torch.float64)
    logits = (x.abs() @ gate.abs()).requires_grad_()
    recipe = recipe_of(padded(capacity_factor=0.5), gate=lambda x, w: logits, route=partial(top_k, k=1))
    (grad,) = torch.autograd.grad(moe_layer(x, params, recipe).y.sum(), logits)
    assert (grad[0] != 0).any()
    assert (grad[1:] == 0).all()


@every_dispatcher
def test_one_expert(dispatcher) -> None:
    params = draw_params(1)
    output = moe_layer(torch.randn(5, D, dtype=torch.float64), params, recipe_of(dispatcher, route=partial(top_k, k=1)))
    assert output.losses["load_balance"].item() == pytest.approx(1)
    assert output.y.isfinite().all()


def test_mask_reaches_the_routing_and_the_losses() -> None:
    x, params = torch.randn(2, 4, D, dtype=torch.float64), draw_params()
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])
    output = moe_layer(x, params, recipe_of(), token_mask=mask)
    real = moe_layer(x[mask], params, recipe_of())
    assert (output.routing.expert_indices[~mask.flatten()] == -1).all()
    assert (output.y[~mask] == 0).all()
    torch.testing.assert_close(output.y[mask], real.y)
    torch.testing.assert_close(output.losses, real.losses)


def test_masked_tokens_take_no_capacity() -> None:
    x = torch.randn(1, D, dtype=torch.float64).expand(4, D)
    params, recipe = draw_params(), recipe_of(padded(capacity_factor=1.25), route=partial(top_k, k=1))
    mask = torch.tensor([False, False, False, True])
    assert (moe_layer(x, params, recipe).y[3] == 0).all()  # all want one expert, which has a single row
    assert (moe_layer(x, params, recipe, token_mask=mask).y[3] != 0).all()


def test_a_layer_may_return_the_dtype_of_its_rows_inside_autocast() -> None:
    x, params = torch.randn(9, D), MoEParams(torch.randn(D, E), init_gated(E, D, F))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = moe_layer(x, params, recipe_of())
    assert output.logits.dtype == output.routing.weights.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in output.losses.values())
    exact = moe_layer(x, params, recipe_of())
    assert torch.equal(output.routing.expert_indices, exact.routing.expert_indices)
    torch.testing.assert_close(output.y.float(), exact.y, rtol=0, atol=0.02 * exact.y.abs().max().item())


# Shared experts.


@pytest.mark.parametrize("ffn", ["swiglu", "relu_mlp"])
@pytest.mark.parametrize("count", [1, 3])
def test_shared_experts_are_the_sum_of_separate_ones(ffn: str, count: int) -> None:
    experts, init, row_ffn = {
        "swiglu": (swiglu, init_gated, reference.swiglu),
        "relu_mlp": (relu_mlp, init_mlp, reference.relu_mlp),
    }[ffn]
    x = torch.randn(5, D, dtype=torch.float64)
    separate = [init(1, D, F, dtype=torch.float64) for _ in range(count)]
    joined = type(separate[0])(
        *(
            torch.cat(parts, dim=1 if name == "down" else 2)
            for name, *parts in zip(separate[0]._fields, *separate, strict=True)
        )
    )
    expected = torch.stack([sum(row_ffn(row, *(w[0] for w in one)) for one in separate) for row in x])
    torch.testing.assert_close(shared_experts(x, joined, experts=partial(experts, matmul=grouped)), expected)


def test_layer_adds_shared_experts_to_every_token_masked_or_not() -> None:
    x, params = torch.randn(5, D, dtype=torch.float64), draw_params()
    shared = init_mlp(1, D, F, dtype=torch.float64)
    ffn = partial(gelu_mlp, matmul=loop)
    mask = torch.arange(5) != 2
    both = moe_layer(x, params._replace(shared=shared), recipe_of(shared=SharedExperts(ffn)), token_mask=mask)
    routed = moe_layer(x, params, recipe_of(), token_mask=mask)
    torch.testing.assert_close(both.y - routed.y, shared_experts(x, shared, experts=ffn))


# The recipe.


def test_hash_router_gets_its_token_ids() -> None:
    table = hash_table(10, E, k=K)
    recipe = recipe_of(route=partial(hash_choice, table=table), needs=("token_ids",))
    ids = torch.tensor([[1, 5, 9], [0, 0, 5]])
    output = moe_layer(torch.randn(2, 3, D, dtype=torch.float64), draw_params(), recipe, token_ids=ids)
    assert torch.equal(output.routing.expert_indices, table[ids.flatten()])


def test_missing_token_ids_say_so() -> None:
    recipe = recipe_of(route=partial(hash_choice, table=hash_table(10, E, k=K)), needs=("token_ids",))
    with pytest.raises(
        ValueError, match=r"router needs 'token_ids', which was not given; pass token_ids= to the layer"
    ):
        moe_layer(torch.randn(3, D, dtype=torch.float64), draw_params(), recipe)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (
            ("memry",),
            r"recipe\.needs names 'memry', which no layer knows; known: memory, sequence_length, token_ids, tok",
        ),
        ("token_ids", r"recipe\.needs = 'token_ids'; expected a tuple of names: \('token_ids',\)"),
    ],
)
def test_needs_that_nobody_can_give_are_told_from_those_left_out(needs, message: str) -> None:
    state = RouterState("memory", lambda num_experts, *, device=None: torch.zeros(3, num_experts, device=device))
    recipe = recipe_of(route=lambda logits, *, bias=None, **_: top_k(logits, k=K), needs=needs, state=state)
    with pytest.raises(ValueError, match=message):
        moe_layer(torch.randn(3, D, dtype=torch.float64), draw_params(), recipe, state=torch.zeros(3, E))


@pytest.mark.parametrize("shape", [(2, 3, D), (6, D)])
@pytest.mark.parametrize("wrong", [lambda y: y[:, :4], lambda y: y[:-1]])
def test_a_layer_that_returns_another_shape_is_refused(shape, wrong) -> None:
    recipe = recipe_of()
    other = recipe._replace(layer=lambda x, routing, params: wrong(recipe.layer(x, routing, params)))
    with pytest.raises(ValueError, match=r"the expert layer returned \(.*\); expected \(6, 6\), as the tokens are"):
        moe_layer(torch.randn(shape, dtype=torch.float64), draw_params(), other)


def test_a_token_mask_is_bool() -> None:
    x, params = torch.randn(2, 3, D, dtype=torch.float64), draw_params()
    for mask in (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(TypeError, match=rf"token_mask is {mask.dtype}, expected bool, True for real tokens"):
            moe_layer(x, params, recipe_of(), token_mask=mask)


def test_router_and_losses_get_a_mask_and_ids_of_flat_tokens() -> None:
    """As ``Router`` and ``Loss`` say: one of a user's own would broadcast (B, L) against (T,)."""
    x, params, seen = torch.randn(2, 3, D, dtype=torch.float64), draw_params(), []

    def route(logits: Tensor, *, token_ids: Tensor, token_mask: Tensor, bias: Tensor | None = None) -> Routing:
        seen.extend((token_ids, token_mask))
        return top_k(logits, k=K)

    def loss(logits: Tensor, routing: Routing, *, token_mask: Tensor, sequence_length: int) -> Tensor:
        seen.append(token_mask)
        return logits.sum()

    ids, mask = torch.arange(6).view(2, 3), torch.tensor([[True, True, False], [True, True, True]])
    recipe = recipe_of(route=route, needs=("token_ids", "token_mask"), losses={"own": loss})
    moe_layer(x, params, recipe, token_ids=ids, token_mask=mask)
    expected = [ids.flatten(), mask.flatten(), mask.flatten()]
    assert len(seen) == len(expected)
    assert all(map(torch.equal, seen, expected))


def test_shared_experts_are_gated_as_the_recipe_says_or_not_at_all() -> None:
    plain = deepseek_moe()._replace(state=None)
    gated = plain._replace(shared=plain.shared._replace(gated=True))
    for recipe, other in ((gated, plain), (plain, gated)):
        params = MoE(D, 8, recipe, hidden=F).params()
        with pytest.raises(ValueError, match=rf"shared experts have gated={other.shared.gated}, and the parameters"):
            moe_layer(torch.randn(3, D), params, other)


def test_a_network_alone_is_no_shared_experts() -> None:
    recipe = recipe_of(shared=partial(swiglu, matmul=grouped))
    with pytest.raises(ValueError, match=r"moe_layer: the recipe's shared experts are .*; expected None, or Shared"):
        moe_layer(torch.randn(3, D, dtype=torch.float64), draw_params(), recipe)


def test_a_backend_is_a_function() -> None:
    with pytest.raises(
        ValueError, match=r"expert_layer: the experts' matmul is 'grouped'; expected a function, such as"
    ):
        expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul="grouped"))


def test_token_ids_are_kept_from_routers_that_do_not_want_them() -> None:
    moe_layer(torch.randn(3, D, dtype=torch.float64), draw_params(), recipe_of(), token_ids=torch.arange(3))


def test_wrong_widths_say_so() -> None:
    with pytest.raises(ValueError, match=r"linear_gate: x has shape \(3, 4\) and w \(6, 5\)"):
        moe_layer(torch.randn(3, 4, dtype=torch.float64), draw_params(), recipe_of())
    with pytest.raises(ValueError, match=r"token_mask has the shape \(2,\); expected \(3,\)"):
        moe_layer(torch.randn(3, D, dtype=torch.float64), draw_params(), recipe_of(), token_mask=torch.ones(2).bool())


def test_replacing_one_part_changes_that_part_alone() -> None:
    x, params = torch.randn(12, D, dtype=torch.float64), draw_params()
    recipe = recipe_of()
    before = moe_layer(x, params, recipe)
    swapped = recipe._replace(route=partial(top_k, k=K, normalize=True))
    after = moe_layer(x, params, swapped)
    assert torch.equal(after.routing.expert_indices, before.routing.expert_indices)
    assert torch.equal(after.logits, before.logits)
    torch.testing.assert_close(after.losses, before.losses)
    torch.testing.assert_close(after.routing.weights.sum(-1), torch.ones(12, dtype=torch.float64))
    assert not torch.allclose(after.y, before.y)
    tight = expert_layer(
        dispatcher=padded(capacity_factor=0.5, priority=by_choice), experts=partial(swiglu, matmul=grouped)
    )
    assert not torch.allclose(moe_layer(x, params, recipe._replace(layer=tight)).y, before.y)
    assert torch.equal(moe_layer(x, params, recipe).y, before.y)


def test_an_own_router_is_a_function_of_a_few_lines() -> None:
    def first_k(logits: Tensor, *, bias=None):
        experts = torch.arange(K).expand(logits.shape[0], K)
        return token_choice(experts, logits.sigmoid()[:, :K], logits)

    output = moe_layer(torch.randn(4, D, dtype=torch.float64), draw_params(), recipe_of(route=first_k))
    assert output.routing.expert_indices.tolist() == [[0, 1]] * 4


def test_gradient_of_the_total_loss_is_linear_in_each_coefficient() -> None:
    x, params = torch.randn(12, D, dtype=torch.float64), draw_params()

    def gradient(**coefficients: float) -> Tensor:
        losses = moe_layer(x, params, recipe_of()).losses
        return torch.autograd.grad(weighted_sum(losses, coefficients), params.gate)[0]

    balance, z = gradient(load_balance=1.0), gradient(z=1.0)
    torch.testing.assert_close(gradient(load_balance=0.3, z=2.0), 0.3 * balance + 2.0 * z)
    torch.testing.assert_close(gradient(load_balance=0.6), 2 * gradient(load_balance=0.3))


def test_a_loss_is_one_number() -> None:
    losses = {"load": torch.ones(E), "z": torch.ones(())}
    assert weighted_sum(losses, {"z": 0.5}) == 0.5  # the other is only reported
    with pytest.raises(ValueError, match=r"the loss 'load' has shape \(5,\); expected a scalar"):
        weighted_sum(losses, {"load": 0.5})


def test_weighted_sum() -> None:
    losses = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert weighted_sum(losses, {"a": 0.5, "b": 1.0}).item() == 4
    assert weighted_sum(losses, {"a": 0.5}).item() == 1  # b is only reported
    assert weighted_sum({}, {}) == 0.0
    with pytest.raises(
        ValueError, match=r"coefficients name \['c'\], but the losses are \['a', 'b'\]; expected a subset"
    ):
        weighted_sum(losses, {"a": 1.0, "c": 1.0})


def test_inputs_are_left_alone() -> None:
    x, params = torch.randn(4, D, dtype=torch.float64), draw_params()
    copies = [tensor.detach().clone() for tensor in (x, *leaves_of(params))]
    output = moe_layer(x, params, recipe_of(padded(capacity_factor=0.5)))
    output.y.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, *leaves_of(params)), strict=True))
    routing = top_k(torch.randn(4, E), k=K)
    before = routing.weights.clone()
    mask_tokens(routing, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(routing.weights, before)


# Computing activations again.


def saved_bytes(run) -> tuple[Tensor, int]:
    """Run, and count what autograd keeps for the backward, each storage once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = run()
    return y, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.usefixtures("poison")
@every_dispatcher
@pytest.mark.parametrize("masked", [False, True])
def test_recomputing_changes_no_output_and_no_gradient(dispatcher, masked: bool) -> None:
    x, params = torch.randn(12, D, dtype=torch.float64, requires_grad=True), draw_params()
    recipe = recipe_of(dispatcher)
    mask = torch.arange(12) % 3 != 0 if masked else None
    results = []
    for each in (recipe, recipe._replace(layer=recompute(recipe.layer))):
        output = moe_layer(x, params, each, token_mask=mask)
        total = output.y.square().sum() + sum(output.losses.values())
        results.append((output.y, torch.autograd.grad(total, [x, *leaves_of(params)])))
    (y, grads), (again, others) = results
    assert torch.equal(y, again)
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert all(torch.equal(grad, other) for grad, other in zip(grads, others, strict=True))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("priority", [by_position, by_choice, by_weight])
@pytest.mark.parametrize("factor", [0.3, 1.0, 9.0])
@pytest.mark.parametrize("masked", [False, True])
def test_a_dropless_layer_within_a_limit_is_the_padded_one(priority, factor: float, masked: bool) -> None:
    x, params = torch.randn(12, D, dtype=torch.float64, requires_grad=True), draw_params()
    tight = padded(capacity_factor=factor, priority=priority)
    composed = recipe_of(tight, plan=tight.plan)
    mask = torch.arange(12) % 3 != 0 if masked else None
    results = []
    for layer in (composed.layer, limited(fused_cpu(plan=dropless().plan), plan=tight.plan)):
        y = moe_layer(x, params, composed._replace(layer=layer), token_mask=mask).y
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *leaves_of(params)])))
    for name, one, other in zip(("y", "x", "gate", *GatedParams._fields), *results, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def test_a_layer_is_made_of_what_it_needs() -> None:
    """Wrong parts are refused when a layer is made, not when it is called."""
    tight, experts = padded(capacity_factor=0.5), partial(swiglu, matmul=loop)
    with pytest.raises(
        ValueError, match=r"^limited: plan is a Dispatcher; expected a function routing -> DispatchPlan\. "
    ):
        limited(fused_layer(), plan=tight)
    with pytest.raises(ValueError, match=r"^limited: plan is 1\.25; expected a function .*Pass that of a dispatcher"):
        limited(fused_layer(), plan=1.25)
    with pytest.raises(
        ValueError, match=r"^limited: layer = 'fused_layer'; expected a function \(x, routing, params\)"
    ):
        limited("fused_layer", plan=tight.plan)
    for wrong in (padded, tight.plan, None):
        with pytest.raises(
            ValueError, match=r"^expert_layer: dispatcher = .*; expected a Dispatcher, such as dropless"
        ):
            expert_layer(dispatcher=wrong, experts=experts)
    with pytest.raises(ValueError, match=r"^expert_layer: experts are 'swiglu'; expected a function \(rows, groups"):
        expert_layer(dispatcher=tight, experts="swiglu")


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_layer_within_a_limit_takes_routings_that_are_lists(exchanged: bool) -> None:
    x, params = torch.randn(12, D, dtype=torch.float64), draw_params().experts
    tight = padded(capacity_factor=0.5)
    routing = expert_choice(torch.randn(12, E, dtype=torch.float64), capacity_factor=2.0)
    if exchanged:  # what arrives from other ranks has its places, and a share of all assignments
        routing = type(routing)(*(each.flatten() if isinstance(each, Tensor) else each for each in routing))
        places = torch.randperm(routing.expert_indices.numel())
        routing = routing._replace(positions=places, pool=Ratio(70, 3))
    composed = expert_layer(dispatcher=tight, experts=partial(swiglu, matmul=loop))
    within = limited(expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=loop)), plan=tight.plan)
    torch.testing.assert_close(within(x, routing, params), composed(x, routing, params))
    assert not torch.allclose(within(x, routing, params), recipe_of().layer(x, routing, params)), "it drops"


def test_recomputing_decides_the_routing_once_and_runs_the_experts_twice() -> None:
    calls = []
    recipe = recipe_of()

    def spy(name: str, function):
        return lambda *args, **options: (calls.append(name), function(*args, **options))[1]

    watched = recipe._replace(
        gate=spy("gate", recipe.gate),
        route=spy("route", recipe.route),
        layer=recompute(spy("layer", recipe.layer)),
    )
    output = moe_layer(torch.randn(9, D, dtype=torch.float64), draw_params(), watched)
    assert calls == ["gate", "route", "layer"]
    output.y.sum().backward()
    assert calls == ["gate", "route", "layer", "layer"]


def test_recomputing_without_a_gradient_runs_once() -> None:
    calls = []
    layer = recompute(lambda x, routing, params: (calls.append(1), x)[1])
    with torch.no_grad():
        moe_layer(torch.randn(9, D, dtype=torch.float64), draw_params(), recipe_of(layer=layer))
    assert calls == [1]


@every_dispatcher
def test_recomputing_keeps_less_memory(dispatcher) -> None:
    x = torch.randn(64, D, requires_grad=True)
    params = MoEParams(torch.randn(D, E, requires_grad=True), init_gated(E, D, 32))
    for weight in params.experts:
        weight.requires_grad_()
    recipe = recipe_of(dispatcher)
    y, plain = saved_bytes(lambda: moe_layer(x, params, recipe).y)
    again, saving = saved_bytes(lambda: moe_layer(x, params, recipe._replace(layer=recompute(recipe.layer))).y)
    assert torch.equal(y, again)
    own = sum(4 * tensor.numel() for tensor in (x, *params.experts))
    rows = 4 * 64 * K * 32  # one activation of the experts
    assert plain > own + 3 * rows
    assert saving < own + rows
    again.sum().backward()


def test_recomputing_compiles_whole() -> None:
    torch._dynamo.reset()
    recipe = recipe_of()
    recipe = recipe._replace(layer=recompute(recipe.layer))
    x = torch.randn(12, D, requires_grad=True)
    params = MoEParams(torch.randn(D, E, requires_grad=True), init_gated(E, D, F))
    for weight in params.experts:
        weight.requires_grad_()

    def run(x: Tensor, params: MoEParams) -> Tensor:
        return moe_layer(x, params, recipe).y

    expected, found = run(x, params), torch.compile(run, fullgraph=True, backend="aot_eager")(x, params)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(expected.square().sum(), [x, *leaves_of(params)]),
        torch.autograd.grad(found.square().sum(), [x, *leaves_of(params)]),
        strict=True,
    ):
        torch.testing.assert_close(other, one)
