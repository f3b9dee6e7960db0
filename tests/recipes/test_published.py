"""Each published method against its formulas, its losses, and what it says about causality."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import reference
import torch
from torch import Tensor

from moekit.experts import batched, grouped, loop
from moekit.recipes import MoE, Recipe, deepseek_moe, gshard, mixtral, olmoe, openlm, switch, weighted_sum

T, D, F, E = 17, 6, 5, 7


class Method(NamedTuple):
    """The formulas of a method, from its paper. ``factor`` None is dropless."""

    recipe: Recipe
    ffn: Callable
    k: int
    weigh: Callable
    factor: float | None
    losses: dict[str, Callable]
    coefficients: dict[str, float]
    scores: Callable = staticmethod(lambda z, bias: z)
    priority: str = "by_position"


softmax_normalized = partial(reference.weights_at, normalize=True)
METHODS = {
    "openlm": Method(
        openlm(),
        reference.gelu_mlp,
        2,
        reference.weights_at,
        1.25,
        {"load_balance": reference.load_balance},
        {"load_balance": 0.1},
    ),
    "openlm dropless": Method(
        openlm(k=3, capacity_factor=0),
        reference.gelu_mlp,
        3,
        reference.weights_at,
        None,
        {"load_balance": reference.load_balance},
        {"load_balance": 0.1},
    ),
    "switch": Method(
        switch(capacity_factor=1.0),
        reference.relu_mlp,
        1,
        reference.weights_at,
        1.0,
        {"load_balance": reference.load_balance},
        {"load_balance": 0.01},
    ),
    "gshard": Method(
        gshard(),
        reference.relu_mlp,
        2,
        lambda z, experts: softmax_normalized(z, reference.best(z, 2)),
        1.0,
        {"load_balance": partial(reference.load_balance, choices=1)},
        {"load_balance": 0.01},
        priority="by_choice",
    ),
    "mixtral": Method(
        mixtral(),
        reference.swiglu,
        2,
        reference.softmax_over_chosen,  # section 2.1: softmax over the top-k logits
        None,
        {"load_balance": reference.load_balance},
        {"load_balance": 0.02},
    ),
    "olmoe": Method(
        olmoe(k=4),
        reference.swiglu,
        4,
        reference.weights_at,
        None,
        {"load_balance": reference.load_balance, "z": lambda logits, _: reference.z_loss(logits)},
        {"load_balance": 0.01, "z": 0.001},
    ),
    "deepseek_moe": Method(
        deepseek_moe(k=3, num_shared=2),
        reference.swiglu,
        3,
        partial(reference.weights_at, score=reference.sigmoid, normalize=True, scale=2.5),
        None,
        {"load_balance": partial(reference.load_balance, score=reference.sigmoid)},
        {"load_balance": 0.0001},
        scores=staticmethod(lambda z, bias: reference.sigmoid(z) + bias),
    ),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def build(recipe: Recipe, *, scale: float = 1.0) -> MoE:
    moe = MoE(D, E, recipe, hidden=F, dtype=torch.float64)
    for parameter in moe.parameters():  # OpenLM's 0.02 would hide differences
        torch.nn.init.normal_(parameter, std=parameter.shape[-2] ** -0.5)
    with torch.no_grad():
        moe.gate *= scale
    if moe.state is not None:
        moe.bias = 0.2 * torch.randn(E, dtype=torch.float64)
    return moe


def by_the_formulas(method: Method, moe: MoE, x: Tensor, drawn: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = x @ moe.gate

    def choose(z: Tensor, t: int) -> list[int]:
        best = reference.best(method.scores(z.detach(), moe.state), method.k)
        assert all(got in (want, -1) for got, want in zip(drawn[t], best, strict=True))  # -1: GShard's dice
        return drawn[t]

    assignments = reference.route(logits, choose, method.weigh)
    limit = None if method.factor is None else reference.capacity(len(x), method.k, E, method.factor)
    params = moe.params()
    y = reference.moe(x, reference.keep(assignments, limit=limit, priority=method.priority), method.ffn, params.experts)
    if params.shared is not None:
        y = y + torch.stack([method.ffn(row, *(w[0] for w in params.shared)) for row in x])
    return y, {name: loss(logits, assignments) for name, loss in method.losses.items()}


@pytest.mark.usefixtures("poison")
@every_method
def test_output_losses_and_gradients_follow_the_formulas(method: Method) -> None:
    moe, x = build(method.recipe), torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    output = moe(x)
    y, losses = by_the_formulas(method, moe, x, output.routing.expert_indices.tolist())
    torch.testing.assert_close(output.y, y)
    torch.testing.assert_close(output.losses, losses)
    assert dict(method.recipe.coefficients) == method.coefficients
    leaves = {"x": x, **dict(moe.named_parameters())}
    cotangent = torch.randn(T, D, dtype=torch.float64)
    total = (output.y * cotangent).sum() + weighted_sum(output.losses, method.recipe.coefficients)
    expected = (y * cotangent).sum() + sum(method.coefficients[name] * loss for name, loss in losses.items())
    grads = torch.autograd.grad(total, list(leaves.values()))
    for name, grad, wanted in zip(leaves, grads, torch.autograd.grad(expected, list(leaves.values())), strict=True):
        torch.testing.assert_close(grad, wanted, msg=lambda text: f"{name}\n{text}")  # noqa: B023


@every_method
def test_plan_of_the_recipe_is_the_plan_of_its_layer(method: Method) -> None:
    moe, x = build(method.recipe), torch.randn(T, D, dtype=torch.float64)
    routing = moe(x).routing
    kept = method.recipe.plan(routing).assignments
    kept = kept[kept >= 0]
    gone = torch.ones(routing.expert_indices.numel(), dtype=torch.bool)
    gone[kept] = False
    without = routing._replace(expert_indices=routing.expert_indices.masked_fill(gone.view_as(routing.weights), -1))
    # Taking out what the plan drops changes nothing; taking out one assignment that it keeps does.
    y = method.recipe.layer(x, routing, moe.params().experts)
    torch.testing.assert_close(method.recipe.layer(x, without, moe.params().experts), y)
    gone[kept[0]] = True
    less = routing._replace(expert_indices=routing.expert_indices.masked_fill(gone.view_as(routing.weights), -1))
    assert not torch.allclose(method.recipe.layer(x, less, moe.params().experts), y)


@pytest.mark.parametrize("recipe", [openlm, switch, gshard])
def test_backends_agree_behind_a_capacity(recipe) -> None:
    x, outputs = torch.randn(T, D, dtype=torch.float64), []
    moe = build(recipe())
    for matmul in (loop, batched, grouped):
        torch.manual_seed(1)
        moe.recipe = recipe(matmul=matmul)
        outputs.append(moe(x).y)
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0])


@pytest.mark.parametrize("recipe", [mixtral, olmoe, deepseek_moe])
def test_dropless_methods_refuse_the_batched_backend(recipe) -> None:
    with pytest.raises(ValueError, match="no common capacity"):
        build(recipe(k=2, matmul=batched))(torch.randn(T, D, dtype=torch.float64))


def earlier_outputs_change(moe: MoE, x: Tensor, changed: Tensor, position: int) -> bool:
    """Whether outputs before ``position`` differ between two inputs that agree before it."""
    outputs = []
    for tokens in (x, changed):
        torch.manual_seed(1)
        outputs.append(moe(tokens).y[:position])
    return not torch.allclose(*outputs, rtol=1e-12, atol=1e-12)


def any_look_ahead(recipe: Recipe, *, tries: int = 25) -> bool:
    """Intervene on later tokens, many times, at a sharp gate so that experts overflow."""
    for seed in range(tries):
        torch.manual_seed(100 + seed)
        moe, x = build(recipe, scale=3.0), torch.randn(T, D, dtype=torch.float64)
        position = 1 + seed % (T - 1)
        changed = torch.cat([x[:position], 3 * torch.randn(T - position, D, dtype=torch.float64)])
        if earlier_outputs_change(moe, x, changed, position):
            return True
    return False


@pytest.mark.parametrize(
    "recipe",
    [
        openlm(capacity_factor=0.5),
        *(method.recipe for method in METHODS.values()),
        switch(capacity_factor=0.5),
        gshard(capacity_factor=0),
        gshard(capacity_factor=0.5),
    ],
    ids=["openlm tight", *METHODS, "switch tight", "gshard dropless", "gshard tight"],
)
def test_causality_is_what_the_recipe_says(recipe: Recipe) -> None:
    assert any_look_ahead(recipe) == (not recipe.causal)


def test_flags_of_causality() -> None:
    assert not gshard().causal
    assert gshard(capacity_factor=0).causal
    assert all(recipe.causal for recipe in (openlm(), switch(), mixtral(), olmoe(), deepseek_moe()))


@every_method
def test_balancing_loss_is_one_at_perfect_balance(method: Method) -> None:
    moe = build(method.recipe)
    with torch.no_grad():
        moe.gate.zero_()
    if moe.state is not None:
        moe.bias.zero_()
    # Equal scores: P is 1/E, so that f, whatever it is, gives one.
    assert moe(torch.randn(T, D, dtype=torch.float64)).losses["load_balance"].item() == pytest.approx(1)


@pytest.mark.parametrize("make", [openlm, switch, gshard])
def test_a_bad_capacity_factor_says_so(make) -> None:
    with pytest.raises(ValueError, match="capacity_factor = -1; expected a finite number >= 0, where 0 means dropless"):
        make(capacity_factor=-1)


def test_openlm_starts_from_a_normal_distribution_of_width_002() -> None:
    moe = MoE(64, 8, openlm())
    for name, parameter in moe.named_parameters():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    assert moe.experts.up.shape == (8, 64, 256)


def test_routing_settings_reach_the_router() -> None:
    x = torch.randn(T, D, dtype=torch.float64)
    for k in (1, 3):
        for make in (openlm, mixtral, olmoe, deepseek_moe):
            assert build(make(k=k))(x).routing.expert_indices.shape == (T, k)
    doubled = deepseek_moe(k=2, scale=5.0)
    torch.testing.assert_close(build(doubled)(x).routing.weights.sum(-1), torch.full((T,), 5.0, dtype=torch.float64))
    assert deepseek_moe(bias_rate=0.25).state.update.keywords["rate"] == 0.25
    assert deepseek_moe(bias_rate=0.0).state is None
