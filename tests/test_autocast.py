"""Stepping out of autocast: where it is on, where it is off, and where a compiler looks on."""

from contextlib import nullcontext

import pytest
import torch

from moekit.autocast import outside_autocast
from moekit.routing import linear_gate

# Both come from torch's own compiler: Dynamo instantiates torch.autograd.Function, inductor imports torch.jit.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
]


def test_products_keep_the_dtype_of_their_operands_inside_it_alone() -> None:
    a = torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with outside_autocast("cpu"):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_there_is_nothing_to_step_out_of_where_autocast_is_off() -> None:
    assert isinstance(outside_autocast("cpu"), nullcontext)
    assert isinstance(outside_autocast("cuda"), nullcontext)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not isinstance(outside_autocast("cpu"), nullcontext)
        assert isinstance(outside_autocast("cuda"), nullcontext)  # another device's
        with torch.autocast("cpu", enabled=False):
            assert isinstance(outside_autocast("cpu"), nullcontext)


def test_a_compiled_gate_is_one_graph_with_autocast_and_without() -> None:
    """And it notices that autocast was turned on after it was compiled."""
    torch._dynamo.reset()
    x, w = torch.randn(9, 33), torch.randn(33, 5)
    compiled, expected = torch.compile(linear_gate, fullgraph=True, backend="aot_eager"), linear_gate(x, w)
    for autocast in (False, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = compiled(x, w)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
