"""What do routers cost beside their gate, and balancing losses beside a softmax? Forward + backward."""

import pytest
import torch
from router_cases import router_cases, tensors_of
from shapes import NARROW_AND_WIDE

from moekit.routing import (
    entropy_loss,
    importance_loss,
    load_balance_loss,
    round_robin,
    sequence_balance_loss,
    top_k,
    weighted_l1_loss,
    z_loss,
)
from moekit.routing.fused_top_k import fused_top_k

LENGTH = 16  # of a sequence: also the tokens of the run that only asks whether the bodies work


def loss_of(loss, **options):
    return lambda logits, shape: loss(logits, round_robin(logits.detach(), k=shape.k), **options)


LOSSES = {
    "softmax": lambda logits, shape: torch.softmax(logits, dim=-1),
    "top_k": lambda logits, shape: top_k(logits, k=shape.k).weights,
    "fused_top_k": lambda logits, shape: fused_top_k(logits, k=shape.k).weights,
    "load_balance_loss": loss_of(load_balance_loss),
    "sequence_balance_loss": loss_of(sequence_balance_loss, sequence_length=LENGTH),
    "z_loss": loss_of(z_loss),
    "entropy_loss": loss_of(entropy_loss),
    "importance_loss": lambda logits, shape: importance_loss(logits, top_k(logits, k=shape.k)),
    "weighted_l1_loss": lambda logits, shape: weighted_l1_loss(logits, top_k(logits, k=shape.k), k=shape.k),
}
ROUTERS = tuple(router_cases(k=2, experts=8))


@pytest.mark.benchmark(max_time=0.3)
@pytest.mark.parametrize("name", ["gate", *ROUTERS])
@pytest.mark.parametrize("shape", NARROW_AND_WIDE, indirect=True)
def test_every_router(measure, shape, name):
    """Gate and router, beside the gate's products alone."""
    cases = router_cases(k=shape.k, experts=shape.experts, tile=min(128, shape.tokens))
    case = cases["softmax" if name == "gate" else name]
    gate, _, state = tensors_of(case, shape.dim, shape.experts, device=shape.device)
    leaves = [gate] if isinstance(gate, torch.Tensor) else list(gate)
    x = shape.random(shape.tokens, shape.dim)
    for leaf in leaves:
        leaf.requires_grad_()
    ids = torch.arange(shape.tokens, device=shape.device) % 10
    known = {"sequence_length": LENGTH, "token_mask": None, "token_ids": ids}
    if case.state is not None:
        known[case.state.name] = state
    needs = {need: known[need] for need in case.needs}
    bias = None if case.state is None or case.state.name != "bias" else state

    def weights():
        logits = case.gate(x, gate)
        return logits if name == "gate" else case.route(logits, bias=bias, **needs).weights

    grad = torch.ones_like(weights())

    def body():
        return torch.autograd.grad(weights(), (x, *leaves), grad, allow_unused=True)

    flops = 6 * shape.tokens * shape.dim * shape.experts
    measure(body, shape, stage="gate + router, both ways", name=name, reference="gate", work=flops, unit="TFLOP/s")


@pytest.mark.benchmark(max_time=0.3)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", NARROW_AND_WIDE, indirect=True)
def test_losses(measure, shape, name):
    logits = shape.logits()
    grad = torch.ones_like(LOSSES[name](logits, shape))

    def body():
        return torch.autograd.grad(LOSSES[name](logits, shape), logits, grad)

    traffic = 2 * logits.numel() * logits.element_size()  # at least: read the logits, write their gradient
    measure(
        body,
        shape,
        stage="choice and losses, forward + backward",
        name=name,
        reference="softmax",
        work=traffic,
        unit="GB/s",
    )
