"""The bound of the layer benchmark is six products and nothing else; the dense expert is what it is called."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moekit.recipes.bench.dense import dense_bound, dense_expert
from moekit.recipes.bench.rows import Case, Contender, make_case
from moekit.recipes.bench.shapes import LOADS, LayerShape
from moekit.recipes.bench.times import measure_memory

AWKWARD = LayerShape("awkward", 33, 12, 7, 5, 3)
SHAPES = [AWKWARD, LayerShape("one token", 1, 8, 16, 1, 1), LayerShape("every expert", 16, 16, 24, 4, 4)]
VIEWS = {torch.ops.aten.permute, torch.ops.aten.detach}


class Recorded(TorchDispatchMode):
    """Keeps every operator that runs, with its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls.append((operator.overloadpacket, args, kwargs or {}))
        return operator(*args, **(kwargs or {}))


def case(shape: LayerShape = AWKWARD, dtype: torch.dtype = torch.float32):
    return make_case(shape, "uniform", device="cpu", dtype=dtype)


def run(row: Contender):
    y = row.forward()
    return y, torch.autograd.grad(y, row.leaves, row.grad)


def recorded(row: Contender):
    with Recorded() as mode:
        run(row)
    return mode.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_bound_is_six_products_and_views(shape: LayerShape, dtype: torch.dtype) -> None:
    calls = recorded(dense_bound(case(shape, dtype)))
    others = {operator for operator, _, _ in calls} - VIEWS
    assert others == {torch.ops.aten.mm}
    assert [operator for operator, _, _ in calls].count(torch.ops.aten.mm) == 6


def test_each_product_is_the_one_that_it_stands_for() -> None:
    row = dense_bound(case())
    names = {tensor.data_ptr(): name for name, tensor in zip(("rows", "up", "down"), row.leaves, strict=True)}
    names[row.grad.data_ptr()] = "grad"
    products = [args for operator, args, _ in recorded(row) if operator is torch.ops.aten.mm]
    for drawn, name in ((products[1][0], "hidden"), (products[4][0], "slope")):
        assert drawn.data_ptr() not in names
        names[drawn.data_ptr()] = name
    found = [tuple(names.get(operand.data_ptr(), "?") for operand in operands) for operands in products]
    assert found == [
        ("rows", "up"), ("hidden", "down"),
        ("grad", "down"), ("hidden", "grad"), ("slope", "up"), ("rows", "slope"),
    ]  # fmt: skip
    n, d, f = AWKWARD.rows, AWKWARD.dim, AWKWARD.hidden
    sizes = [(a.shape[0], a.shape[1], b.shape[1]) for a, b in products]
    assert sizes == [(n, d, 2 * f), (n, f, d), (n, d, f), (f, n, d), (n, 2 * f, d), (d, n, 2 * f)]


def test_products_are_written_where_nothing_else_is() -> None:
    row = dense_bound(case())
    calls = [call for call in recorded(row) if call[0] is torch.ops.aten.mm]
    read = {tensor.untyped_storage().data_ptr() for _, args, _ in calls for tensor in args}
    written = [kwargs["out"] for _, _, kwargs in calls]
    assert len({tensor.untyped_storage().data_ptr() for tensor in written} - read) == 6
    expected = [tensor.clone() for tensor in written]
    for tensor in written:
        tensor.fill_(torch.nan)
    run(row)
    for found, before in zip(written, expected, strict=True):
        assert torch.equal(found, before)  # not a NaN is read, and all are written over
    assert measure_memory(row).held == 0


@pytest.mark.parametrize("build", [dense_bound, dense_expert])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_both_do_the_useful_operations_of_a_layer(shape: LayerShape, build) -> None:
    row = build(case(shape))
    with FlopCounterMode(display=False) as forward:
        row.forward()
    with FlopCounterMode(display=False) as both:
        run(row)
    assert forward.get_total_flops() == shape.flops == 6 * shape.tokens * shape.k * shape.dim * shape.hidden
    assert both.get_total_flops() == 18 * shape.tokens * shape.k * shape.dim * shape.hidden


def fed(given: Case, values: torch.Tensor) -> torch.Tensor:
    """The rows of all experts, one expert after the other, tokens in their order."""
    chosen = given.route(given.x.detach() @ given.gate.detach()).expert_indices
    return torch.cat([values.detach()[(chosen == expert).any(1)] for expert in range(given.shape.experts)])


@pytest.mark.parametrize("load", LOADS)
def test_operands_are_the_rows_of_the_layer_in_its_order_and_expert_zero(load: str) -> None:
    given = make_case(LayerShape("", 33, 12, 7, 12, 3), load, device="cpu", dtype=torch.float32)
    bound = dense_bound(given)
    rows, up, down = bound.leaves
    assert torch.equal(rows, fed(given, given.x))
    assert torch.equal(bound.grad, fed(given, given.grad))
    assert not (rows[1:] == rows[:-1]).all(1).any()  # of two rows that are alike the second changes no bit
    assert torch.equal(up, torch.cat([given.experts.gate[0], given.experts.up[0]], 1))
    assert torch.equal(down, given.experts.down[0])
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in (rows, up, down))


def test_drawn_operands_have_the_scale_of_a_layers() -> None:
    given = case(LayerShape("", 512, 64, 96, 2, 2))
    products = [args for operator, args, _ in recorded(dense_bound(given)) if operator is torch.ops.aten.mm]
    rows, gate, up, down = (leaf.detach() for leaf in dense_expert(given).leaves)
    halves = (rows @ gate).requires_grad_(), (rows @ up).requires_grad_()
    hidden = torch.nn.functional.silu(halves[0]) * halves[1]
    slopes = torch.autograd.grad(hidden, halves, fed(given, given.grad) @ down.T)
    assert products[1][0].std() == pytest.approx(hidden.std().item(), rel=0.1)
    assert products[4][0].std() == pytest.approx(torch.cat(slopes, 1).std().item(), rel=0.1)


def test_the_dense_expert_is_a_swiglu_expert_with_its_autograd() -> None:
    given = case(dtype=torch.float64)
    y, gradients = run(dense_expert(given))
    x = fed(given, given.x).requires_grad_()
    gate, up, down = (w.detach()[0].clone().requires_grad_() for w in given.experts)
    z = x @ gate
    expected = ((z * torch.sigmoid(z)) * (x @ up)) @ down
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected, (x, gate, up, down), fed(given, given.grad))
    for name, found, want in zip(("rows", "gate", "up", "down"), gradients, wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12, msg=name)
