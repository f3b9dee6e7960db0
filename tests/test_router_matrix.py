"""Every router of the library x {dropless, padded} x backend against nested loops: output and every gradient, by name.

The loops take the decision from the router, whose formulas have tests of their own, with the weights still attached to
the gate. In float64, in poisoned memory, and with NaN in what the experts return for padding rows.
"""

from decimal import Decimal
from functools import partial
from typing import Any

import pytest
import reference
import torch
from router_cases import Case, router_cases, soft_case, tensors_of
from spoiled import spoiled
from torch import Tensor

from moekit import routing as r
from moekit.dispatch import dropless, padded
from moekit.experts import batched, grouped, init_gated, loop, swiglu
from moekit.ratios import as_ratio
from moekit.recipes import expert_layer, moe_layer
from moekit.recipes.layers import MoEParams
from moekit.types import RouterState, Routing

B, L, D, F, E, K = 2, 9, 5, 7, 6, 2
T = B * L
IDS = torch.arange(T).view(B, L) * 7 % 10


ROUTERS = router_cases(k=K, experts=E)
BACKENDS = {"dropless": (loop, grouped), "tight": (loop, batched, grouped), "roomy": (loop, batched, grouped)}
FACTORS = {"tight": 0.5, "roomy": 2.0}


def leaves(case: Case) -> tuple[Tensor, Any, Any, Any, Tensor | None]:
    x = torch.randn(B, L, D, dtype=torch.float64)
    gate, extra, state = tensors_of(case, D, E, dtype=torch.float64)
    drawn = x, gate, init_gated(E, D, F, dtype=torch.float64), extra
    for each in drawn:
        for tensor in (each,) if isinstance(each, Tensor) else each or ():
            tensor.requires_grad_()
    return *drawn, state


def named(x: Tensor, gate: Any, experts: Any, extra: Any) -> dict[str, Tensor]:
    found = {"x": x, **{f"expert {name}": tensor for name, tensor in experts._asdict().items()}}
    for what, group in (("gate", gate), ("simple", extra)):
        if group is not None:
            parts = {"": group} if isinstance(group, Tensor) else group._asdict()
            found |= {f"{what} {name}": tensor for name, tensor in parts.items()}
    return found


def test_a_state_may_have_several_axes() -> None:
    state = RouterState("memory", lambda num_experts, *, device=None: torch.zeros(3, num_experts, device=device))
    drawn = tensors_of(Case(partial(r.top_k, k=K), state=state), D, E)[2]
    assert drawn.shape == (3, E)
    assert drawn.unique().numel() == 3 * E


def by_loops(x: Tensor, routing: Routing, experts: Any, *, limit: int | None, extra: Any) -> Tensor:
    """Serve the list in its order, one assignment at a time."""
    rows = zip(*(each.flatten().unbind(0) for each in routing[:3]), strict=True)
    assignments = [reference.Assignment(int(t), 0, int(e), w) for t, e, w in rows]
    kept: list[reference.Assignment] = []
    for each in assignments:
        full = limit is not None and sum(other.expert == each.expert for other in kept) >= limit
        if 0 <= each.expert < E and not full:
            kept.append(each)
    tokens = x.flatten(0, 1)
    y = reference.moe(tokens, kept, reference.swiglu, experts)
    for each in assignments:
        if each.expert > E:  # expert E is the null expert
            y = y.index_add(0, torch.tensor([each.token]), (each.weight * simple_one(tokens, each, extra))[None])
    return y.view_as(x)


def simple_one(tokens: Tensor, each: reference.Assignment, extra: Any) -> Tensor:
    token, number = tokens[each.token], each.expert - E - 2
    if number < 0:
        return token
    first, second = reference.softmax(token @ extra.mix[number])
    return first * token + second * extra.vectors[number]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dispatch", BACKENDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_with_every_dispatcher_equals_the_loops(router: str, dispatch: str) -> None:
    case = ROUTERS[router]
    *drawn, state = leaves(case)
    x, gate, experts, extra = drawn
    cotangent = torch.randn_like(x)
    dispatcher = spoiled(dropless() if dispatch == "dropless" else padded(capacity_factor=FACTORS[dispatch]))
    for matmul in BACKENDS[dispatch]:
        layer = expert_layer(dispatcher=dispatcher, experts=partial(swiglu, matmul=matmul))
        torch.default_generator.manual_seed(1)  # for the routers that draw
        params = MoEParams(gate, experts, simple=extra)
        output = moe_layer(x, params, case.recipe(layer), state=state, token_ids=IDS)
        pool = as_ratio(r.without_simple(output.routing, num_experts=E).pool if extra else output.routing.pool)
        factor = Decimal(str(FACTORS[dispatch])) if dispatch in FACTORS else None
        limit = None if factor is None else max(1, int(factor * pool.numerator // (pool.denominator * E)))
        expected = by_loops(x, output.routing, experts, limit=limit, extra=extra)
        torch.testing.assert_close(output.y, expected, rtol=1e-10, atol=1e-12)
        tensors = named(*drawn)
        grads = [
            torch.autograd.grad((y * cotangent).sum(), list(tensors.values()), retain_graph=True, allow_unused=True)
            for y in (output.y, expected)
        ]
        for name, found, wanted in zip(tensors, *grads, strict=True):
            assert (found is None) == (wanted is None), name
            if found is not None:
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        assert (output.routing.expert_indices >= 0).any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("matmul", [loop, batched, grouped])
def test_soft_slots_equal_the_loops(slots: int, matmul) -> None:
    case = soft_case(slots)
    *drawn, _ = leaves(case)
    x, gate, experts, _ = drawn
    dispatcher = dropless() if matmul is not batched else padded(capacity_factor=1.0)
    layer = expert_layer(dispatcher=spoiled(dispatcher), experts=partial(swiglu, matmul=matmul))
    output = moe_layer(x, MoEParams(gate, experts), case.recipe(layer))
    logits = r.soft_gate(x.flatten(0, 1), gate).view(B, L, E, slots)
    expected = torch.zeros_like(x)
    for b in range(B):
        for e in range(E):
            for s in range(slots):
                mixed = reference.softmax(logits[b, :, e, s]) @ x[b]
                made = reference.swiglu(mixed, *(w[e] for w in experts))
                for t in range(L):
                    share = reference.softmax(logits[b, t].flatten())[e * slots + s]
                    expected[b, t] = expected[b, t] + share * made
    torch.testing.assert_close(output.y, expected, rtol=1e-10, atol=1e-12)
    tensors, cotangent = named(*drawn), torch.randn_like(x)
    found, wanted = (torch.autograd.grad((y * cotangent).sum(), list(tensors.values())) for y in (output.y, expected))
    for name, one, other in zip(tensors, found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("router", ROUTERS)
def test_the_weights_of_a_router_are_no_view(router: str) -> None:
    """FSDP2 warns of outputs of a block that are, at every step: who writes into such a one loses a gradient."""
    case = ROUTERS[router]
    x, gate, experts, extra, state = leaves(case)
    layer = expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=loop))
    params = MoEParams(gate, experts, simple=extra)
    output = moe_layer(x, params, case.recipe(layer), state=state, token_ids=IDS)
    assert output.routing.weights._base is None
