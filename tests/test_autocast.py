"""Stepping out of autocast: where it is on, where it is off, and where a compiler looks on."""

from contextlib import nullcontext
from functools import partial

import torch

from moekit.autocast import in_autocast, outside_autocast
from moekit.dispatch import dropless
from moekit.experts import grouped, init_gated, loop, swiglu
from moekit.experts.fused_cpu import fused_cpu
from moekit.recipes import auto, expert_layer
from moekit.routing import linear_gate, top_k


def test_products_keep_the_dtype_of_their_operands_inside_it_alone() -> None:
    a = torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with outside_autocast("cpu"):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_float64_stays_float64_inside_it_as_in_torch() -> None:
    x, w = torch.randn(2, 3), torch.randn(3, 3).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [each.dtype for each in in_autocast(x, w)] == [torch.bfloat16, torch.float64]
    x, params = torch.randn(9, 8).double(), init_gated(4, 8, 16, dtype=torch.float64)
    routing = top_k(torch.randn(9, 4).double(), k=2)
    layers = [expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=each)) for each in (loop, grouped)]
    expected = layers[0](x, routing, params)
    for layer in (*layers, fused_cpu(plan=dropless().plan), auto()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = layer(x, routing, params)
        torch.testing.assert_close(found, expected)


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
