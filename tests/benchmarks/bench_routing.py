"""What do routers and balancing losses cost beside the softmax that most of them start with? Forward + backward."""

from functools import partial

import pytest
import torch
from shapes import NARROW_AND_WIDE

from moekit.routing import load_balance_loss, round_robin, sigmoid, softmax_of_top_k, top_k, z_loss


def weights_of(router):
    return lambda logits, shape: router(logits, k=shape.k).weights


ROUTERS = {
    "softmax": lambda logits, shape: torch.softmax(logits, dim=-1),
    "top_k": weights_of(top_k),
    "top_k, sigmoid": weights_of(partial(top_k, score=sigmoid, normalize=True)),
    "softmax_of_top_k": weights_of(softmax_of_top_k),
    "round_robin": weights_of(round_robin),
    "load_balance_loss": lambda logits, shape: load_balance_loss(logits, round_robin(logits.detach(), k=shape.k)),
    "z_loss": lambda logits, shape: z_loss(logits),
}


@pytest.mark.benchmark(max_time=0.5)
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("shape", NARROW_AND_WIDE, indirect=True)
def test_routing(measure, shape, name):
    logits = shape.logits()
    grad = torch.ones_like(ROUTERS[name](logits, shape))

    def body():
        return torch.autograd.grad(ROUTERS[name](logits, shape), logits, grad)

    traffic = 2 * logits.numel() * logits.element_size()  # at least: read the logits, write their gradient
    measure(body, shape, stage="routing forward + backward", name=name, reference="softmax", work=traffic, unit="GB/s")
