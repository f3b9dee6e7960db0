"""What does a grouped matrix product cost beside a dense one of the same size?

Forward + backward, balanced groups.
"""

import pytest
import torch
from shapes import EVERY_SHAPE

from moekit.experts import batched, grouped, loop
from moekit.types import Groups


def dense(rows, groups, w):
    return rows @ w[0]


MATMULS = {"dense": dense, "loop": loop, "batched": batched, "grouped": grouped}


@pytest.mark.benchmark(max_time=1.0)
@pytest.mark.parametrize("name", MATMULS)
@pytest.mark.parametrize("shape", EVERY_SHAPE, indirect=True)
def test_grouped_matmul(measure, shape, name):
    rows, grad = shape.random(shape.rows, shape.dim), shape.random(shape.rows, shape.hidden).detach()
    w = shape.random(1 if name == "dense" else shape.experts, shape.dim, shape.hidden)
    each = shape.rows // shape.experts
    sizes = torch.full((shape.experts,), each, dtype=torch.int32, device=shape.device)
    groups = Groups(sizes, capacity=each if name == "batched" else None)

    def body():
        return torch.autograd.grad(MATMULS[name](rows, groups, w), (rows, w), grad)

    flops = 6 * shape.rows * shape.dim * shape.hidden  # 2 operations, 1 product forward and 2 backward
    measure(body, shape, stage="matmul forward + backward", name=name, reference="dense", work=flops, unit="TFLOP/s")
