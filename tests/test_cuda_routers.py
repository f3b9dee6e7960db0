"""Every router on CUDA: the decision of the CPU, no reading of the device, the same twice, and whole under Inductor."""

from functools import partial
from typing import Any

import pytest
import torch
from router_cases import Case, router_cases, soft_case, tensors_of
from torch import Tensor
from waiting import nothing_waits

from moekit.dispatch import dropless
from moekit.experts import grouped, init_gated, swiglu
from moekit.recipes import MoEParams, expert_layer, moe_layer
from moekit.types import LayerOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
B, L, D, F, E, K = 3, 85, 64, 32, 8, 2
CASES = router_cases(k=K, experts=E, tile=16) | {"soft": soft_case(2)}
DRAWS = {"noisy", "jitter", "gumbel", "logit noise", "random second", "sparse mixer", "random"}
LAYER = expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=grouped))
IDS = torch.arange(B * L).view(B, L) % 10


def drawn(case: Case) -> tuple[Tensor, MoEParams, Tensor | None]:
    """Draw tokens and parameters on the CPU."""
    torch.default_generator.manual_seed(0)
    gate, simple, state = tensors_of(case, D, E)
    return torch.randn(B, L, D), MoEParams(gate, init_gated(E, D, F), simple=simple), state


def moved(value: Any, device: str) -> Any:
    """Copy tensors, as leaves that want a gradient, or tuples of them."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True).requires_grad_(value.is_floating_point())
    return type(value)(*(moved(each, device) for each in value))


def ran(case: Case, x: Tensor, params: MoEParams, state: Tensor | None) -> LayerOutput:
    mask = torch.ones(B, L, dtype=torch.bool, device=x.device)
    state = None if state is None else state.detach()
    return moe_layer(x, params, case.recipe(LAYER), state=state, token_ids=IDS.to(x.device), token_mask=mask)


def flat(params: Any) -> list[Tensor]:
    return [params] if isinstance(params, Tensor) else [t for each in params if each is not None for t in flat(each)]


def everything(case: Case, device: str) -> list[Tensor]:
    """Return output, decision and all gradients."""
    x, params, state = (moved(each, device) for each in drawn(case))
    output = ran(case, x, params, state)
    (output.y * torch.linspace(-1, 1, D, device=device)).sum().backward()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (x, *flat(params))]
    return [output.routing.expert_indices, output.y.detach(), *grads]


@pytest.mark.parametrize("name", [name for name in CASES if name not in DRAWS])
def test_the_decision_output_and_gradients_are_those_of_the_cpu(name):
    torch.backends.cuda.matmul.allow_tf32 = False
    (chosen, *found), (wanted, *expected) = (everything(CASES[name], device) for device in ("cuda", "cpu"))
    # Two logits that rounding cannot tell apart may be taken in another order.
    assert (chosen.cpu() == wanted).float().mean() > 0.98
    if torch.equal(chosen.cpu(), wanted):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_nothing_reads_the_device(name):
    case = CASES[name]
    x, params, state = (moved(each, "cuda") for each in drawn(case))
    x, params = x.to(torch.bfloat16), params._replace(experts=moved(init_gated(E, D, F, dtype=torch.bfloat16), "cuda"))
    mask = torch.arange(L, device="cuda").expand(B, L) < 60
    ids, recipe, held = IDS.cuda(), case.recipe(LAYER), None if state is None else state.detach()

    def run() -> None:
        output = moe_layer(x, params, recipe, state=held, token_ids=ids, token_mask=mask)
        output.y.float().square().sum().backward()

    run()  # the first call may set libraries up
    with nothing_waits():
        run()


@pytest.mark.parametrize("name", CASES)
def test_it_is_deterministic(name):
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            torch.cuda.manual_seed(0)
            results.append(everything(CASES[name], "cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", CASES)
def test_gate_and_router_compile_whole(name):
    case = CASES[name]
    x, params, state = (moved(each, "cuda") for each in drawn(case))
    known = {"sequence_length": L, "token_mask": torch.ones(B, L, dtype=torch.bool, device="cuda")}
    known |= {"token_ids": IDS.cuda()} | ({} if state is None else {case.state.name: state})
    needs = {need: known[need] for need in case.needs}
    bias = None if state is None or case.state.name != "bias" else state.detach()

    def decide(x: Tensor) -> Any:
        return tuple(case.route(case.gate(x, params.gate), bias=bias, **needs)[:3])

    torch.compiler.reset()
    x = x.flatten(0, 1)
    found, expected = torch.compile(decide, fullgraph=True)(x), decide(x)
    weights = found[-1] if len(found) > 2 else found[1]
    assert weights.isfinite().all()
    if name not in DRAWS:
        assert (found[0] == expected[0]).float().mean() > 0.98 or found[0].is_floating_point()
        torch.testing.assert_close(weights.sum(), expected[-1].sum(), rtol=1e-3, atol=1e-3)
