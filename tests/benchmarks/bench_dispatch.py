"""What do planning and moving rows cost beside copying the rows once? The moves are forward + backward."""

import pytest
import torch
from shapes import NARROW_AND_WIDE

from moekit.dispatch import dropless_plan, gather_rows, padded_plan, scatter_rows

ROUTING_BYTES = 8  # an int64 in, an int64 out


def copy(shape, routing):
    rows = shape.random(shape.rows, shape.dim).detach()
    return rows.clone, 2 * shape.rows * shape.dim * rows.element_size()


def dropless(shape, routing):
    return lambda: dropless_plan(routing), 2 * shape.rows * ROUTING_BYTES


def padded(shape, routing):
    return lambda: padded_plan(routing, capacity_factor=1.0), 2 * shape.rows * ROUTING_BYTES


def gather(shape, routing):
    plan = dropless_plan(routing)
    x, grad = shape.random(shape.tokens, shape.dim), shape.random(shape.rows, shape.dim).detach()

    def body():
        return torch.autograd.grad(gather_rows(x, routing, plan), x, grad)

    # Forward: read each token, write its rows. Backward: read the rows, write each token.
    return body, 2 * (shape.tokens + shape.rows) * shape.dim * x.element_size()


def scatter(shape, routing):
    plan = dropless_plan(routing)
    routing = routing._replace(weights=routing.weights.detach().requires_grad_())
    rows, grad = shape.random(shape.rows, shape.dim), shape.random(shape.tokens, shape.dim).detach()

    def body():
        return torch.autograd.grad(scatter_rows(rows, routing, plan), (rows, routing.weights), grad)

    # As gather the other way round; the gradient of the weights reads the rows once more.
    return body, (2 * shape.tokens + 3 * shape.rows) * shape.dim * rows.element_size()


STEPS = {
    "copy": copy,
    "dropless_plan": dropless,
    "padded_plan": padded,
    "gather_rows": gather,
    "scatter_rows": scatter,
}


@pytest.mark.benchmark(max_time=0.5)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("shape", NARROW_AND_WIDE, indirect=True)
def test_dispatch(measure, shape, name):
    body, traffic = STEPS[name](shape, shape.balanced())
    measure(body, shape, stage="dispatch", name=name, reference="copy", work=traffic, unit="GB/s")
