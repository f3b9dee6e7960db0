"""Every router x dispatcher x backend x expert FFN against nested loops: output and every gradient, by name.

In float64, in poisoned memory, and with NaN in what the experts return for padding rows (contract 2 of the design).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import reference
import torch
from spoiled import spoiled
from torch import Tensor

from moekit.dispatch import by_choice, by_position, by_weight, dropless, padded
from moekit.experts import batched, geglu, gelu_mlp, grouped, init_gated, init_mlp, loop, relu2, relu_mlp, swiglu
from moekit.recipes import Recipe, expert_layer, moe_layer
from moekit.recipes.layers import MoEParams
from moekit.recipes.published import gshard_route
from moekit.routing import (
    hash_choice,
    hash_table,
    linear_gate,
    random_choice,
    round_robin,
    sigmoid,
    softmax_of_top_k,
    top_k,
)
from moekit.types import Routing

T, D, F, E, K = 13, 5, 7, 5, 3
BIAS = torch.tensor([0.3, -0.2, 0.0, 0.1, -0.4], dtype=torch.float64)
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9])
TABLE = hash_table(10, E, k=K)


class Router(NamedTuple):
    """A router of moekit and the formulas that it should follow; ``choose`` None takes the decision that was drawn."""

    route: Callable[..., Routing]
    choose: Callable[[Tensor, int], list[int]] | None
    weigh: Callable[[Tensor, list[int]], list[Tensor]] = reference.weights_at
    k: int = K
    bias: Tensor | None = None


ROUTERS = {
    "softmax": Router(partial(top_k, k=K), lambda z, t: reference.best(z, K)),
    "softmax normalized": Router(
        partial(top_k, k=K, normalize=True),
        lambda z, t: reference.best(z, K),
        partial(reference.weights_at, normalize=True),
    ),
    "sigmoid normalized biased scaled": Router(
        partial(top_k, k=K, score=sigmoid, normalize=True, scale=2.5),
        lambda z, t: reference.best(reference.sigmoid(z) + BIAS, K),
        partial(reference.weights_at, score=reference.sigmoid, normalize=True, scale=2.5),
        bias=BIAS,
    ),
    "softmax of top k": Router(
        partial(softmax_of_top_k, k=K), lambda z, t: reference.best(z, K), reference.softmax_over_chosen
    ),
    "top 1": Router(partial(top_k, k=1), lambda z, t: reference.best(z, 1), k=1),
    "hash": Router(partial(hash_choice, token_ids=IDS, table=TABLE), lambda z, t: TABLE[IDS[t]].tolist()),
    "round robin": Router(partial(round_robin, k=K), lambda z, t: [(t * K + i) % E for i in range(K)]),
    "random": Router(partial(random_choice, k=K), None),
    # The weights of GShard come from the two best, whether the second is then kept or not.
    "gshard": Router(
        gshard_route,
        None,
        lambda z, experts: reference.weights_at(z, reference.best(z, 2), normalize=True),
        k=2,
    ),
}
FFNS = {
    "swiglu": (swiglu, init_gated, reference.swiglu),
    "geglu": (geglu, init_gated, reference.geglu),
    "gelu_mlp": (gelu_mlp, init_mlp, reference.gelu_mlp),
    "relu_mlp": (relu_mlp, init_mlp, reference.relu_mlp),
    "relu2": (relu2, init_mlp, reference.relu2),
}
PRIORITIES = {"by_position": by_position, "by_choice": by_choice, "by_weight": by_weight}
# None is dropless. At factor 2 hardly anything is dropped, so that the order of priority hardly matters.
DISPATCHERS = [None, *((factor, priority) for factor in (0.5, 1.0) for priority in PRIORITIES), (2.0, "by_position")]


def draw_inputs(init: Callable) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    x = torch.randn(T, D, dtype=torch.float64)
    gate = torch.randn(D, E, dtype=torch.float64)
    return x, gate, init(E, D, F, dtype=torch.float64)


def gradients(y: Tensor, cotangent: Tensor, x: Tensor, gate: Tensor, experts) -> dict[str, Tensor]:
    named = {"x": x, "gate": gate, **experts._asdict()}
    return dict(zip(named, torch.autograd.grad((y * cotangent).sum(), list(named.values())), strict=True))


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=lambda text: f"{what}\n{text}")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("dispatch", DISPATCHERS, ids=str)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_combination_equals_the_loops(router: str, dispatch: tuple[float, str] | None, ffn: str) -> None:
    case, (experts, init, row_ffn) = ROUTERS[router], FFNS[ffn]
    x, gate, params = draw_inputs(init)
    for tensor in (x, gate, *params):
        tensor.requires_grad_()
    cotangent = torch.randn(T, D, dtype=torch.float64)
    dispatcher = (
        dropless() if dispatch is None else padded(capacity_factor=dispatch[0], priority=PRIORITIES[dispatch[1]])
    )

    outputs = {}
    for matmul in (loop, grouped) if dispatch is None else (loop, batched, grouped):
        layer = expert_layer(dispatcher=spoiled(dispatcher), experts=partial(experts, matmul=matmul))
        recipe = Recipe(linear_gate, case.route, layer)
        torch.default_generator.manual_seed(1)  # for the routers that draw
        outputs[matmul.__name__] = moe_layer(x, MoEParams(gate, params), recipe, state=case.bias)

    drawn = outputs["loop"].routing.expert_indices.tolist()
    assignments = reference.route(x @ gate, case.choose or (lambda z, t: drawn[t]), case.weigh)
    limits = {}
    if dispatch is not None:
        limits = {"limit": reference.capacity(T, case.k, E, dispatch[0]), "priority": dispatch[1]}
    expected = reference.moe(x, reference.keep(assignments, **limits), row_ffn, params)
    expected_grads = gradients(expected, cotangent, x, gate, params)

    for name, output in outputs.items():
        assert output.routing.expert_indices.flatten().tolist() == [a.expert for a in assignments]
        assert_same(output.y, expected, f"{name}: y")
        for part, grad in gradients(output.y, cotangent, x, gate, params).items():
            assert_same(grad, expected_grads[part], f"{name}: gradient of {part}")


def test_tight_capacity_of_the_matrix_drops_something() -> None:
    x, gate, _ = draw_inputs(init_mlp)
    assignments = reference.route(x @ gate, lambda z, t: reference.best(z, K), reference.weights_at)
    assert len(reference.keep(assignments, limit=reference.capacity(T, K, E, 0.5))) < len(assignments)


def test_batched_refuses_unequal_groups() -> None:
    x, gate, params = draw_inputs(init_gated)
    layer = expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=batched))
    with pytest.raises(ValueError, match=r"no common capacity.*Use the padded dispatcher, or the matmul `grouped`"):
        moe_layer(x, MoEParams(gate, params), Recipe(linear_gate, partial(top_k, k=K), layer))
