"""The steps beside the gate's products by kernels against the plain ones in torch, bit for bit."""

import pytest
import torch
from interpreted import DEVICE, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor

from moekit.routing._half_steps import HALF, PLAIN

# rows, columns: none, one, around and past a tile of either axis
SHAPES = [(0, 8), (1, 1), (7, 3), (130, 8), (65, 16), (3, 1024), (2, 1100)]
shapes = pytest.mark.parametrize(("rows", "width"), SHAPES)
# The interpreter cuts float32 off where bfloat16 ends and does not round; its float16 is numpy's, which rounds.
HALVES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
halves = pytest.mark.parametrize("half", HALVES, ids=str)
gates = pytest.mark.parametrize("wide", [False, True], ids=["narrow gate", "float32 gate"])


@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def kernels():
    from moekit.routing._half_steps_triton import KERNELS

    return KERNELS


def drawn(rows: int, width: int) -> Tensor:
    """Draw numbers whose third part still has bits, and zeros of both signs."""
    values = torch.randn(rows, width, device=DEVICE)
    return torch.where(values.abs() < 0.05, 0.0 * values, values)


def same(found: Tensor, expected: Tensor, name: str) -> None:
    """Compare dtypes, shapes and bits: -0.0 is not 0.0."""
    bits = {2: torch.int16, 4: torch.int32}[expected.itemsize]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert torch.equal(found.view(bits), expected.contiguous().view(bits)), name


@runs_kernels
@pytest.mark.usefixtures("poison")
@halves
@shapes
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_parts(rows, width, terms, half) -> None:
    values = drawn(rows, width)
    same(kernels().split(values, terms, half=half), PLAIN.split(values, terms, half=half), "parts")


@runs_kernels
@pytest.mark.usefixtures("poison")
@halves
@shapes
@pytest.mark.parametrize("terms", [2, 3])
def test_parts_of_a_gradient(rows, width, terms, half) -> None:
    grad = drawn(rows, width)
    found, expected = (steps.grad_parts(grad, terms, half=half) for steps in (kernels(), PLAIN))
    same(found[0], expected[0], "parts")
    same(found[1], expected[1], "left")
    assert found[1].shape == (rows, (2 if terms == 2 else 4) * width)


@runs_kernels
@pytest.mark.usefixtures("poison")
@shapes
@pytest.mark.parametrize("terms", [2, 3])
def test_terms_are_added_up_from_the_first_to_the_last(rows, width, terms) -> None:
    sums = drawn(rows, terms * width)
    expected = torch.zeros(rows, width, device=DEVICE)
    for block in sums.unflatten(1, (terms, width)).unbind(1):
        expected = expected + block
    same(kernels().folded(sums, terms), expected, "by kernel")
    same(PLAIN.folded(sums, terms), expected, "plain")


@runs_kernels
@pytest.mark.usefixtures("poison")
@halves
@shapes
@gates
def test_the_gradient_of_a_gate_and_its_pairs(rows, width, wide, half) -> None:
    w = drawn(rows, width).to(torch.float32 if wide else half)
    sums = drawn(rows, (3 if wide else 2) * width)
    found, expected = (steps.gate_gradient(sums, w, half=half) for steps in (kernels(), PLAIN))
    same(found[0], expected[0], "d gate")
    same(found[1], expected[1], "pairs")
    assert found[1].shape == (rows, (4 if wide else 2) * width)


@runs_kernels
@pytest.mark.usefixtures("poison")
@halves
@pytest.mark.parametrize(
    ("num_tokens", "depth", "dim"), [(0, 16, 8), (1, 6, 3), (70, 16, 130), (65, 100, 24), (130, 256, 136)]
)
def test_a_product_is_added_to_what_is_beside_it(num_tokens, depth, dim, half) -> None:
    left, right, beside = (drawn(*each).to(half) for each in ((num_tokens, depth), (dim, depth), (num_tokens, dim)))
    expected = left.double() @ right.double().T + beside.double()
    for steps in (kernels(), PLAIN):
        found = steps.add_product(left, right, beside)
        assert (found.dtype, found.shape) == (half, (num_tokens, dim))
        error = torch.finfo(half).eps * expected.abs() + 1e-5 * (1 + depth**0.5)
        assert ((found.double() - expected).abs() <= error).all()
    spread = beside.T.contiguous().T  # another order of memory
    assert torch.equal(kernels().add_product(left, right, spread), kernels().add_product(left, right, beside))


@runs_kernels
@halves
def test_memory_in_any_order_is_read_right(half) -> None:
    values, sums = drawn(5, 12).T, drawn(12, 15)
    same(kernels().grad_parts(values, 3, half=half)[1], PLAIN.grad_parts(values, 3, half=half)[1], "left")
    same(kernels().gate_gradient(sums, values, half=half)[1], PLAIN.gate_gradient(sums, values, half=half)[1], "pairs")
    one = torch.ones((), device=DEVICE).expand(4, 3)
    same(kernels().split(one, 2, half=half), PLAIN.split(one, 2, half=half), "parts")


@runs_kernels
def test_parts_are_bfloat16_if_nothing_else_is_asked() -> None:
    values, w, sums = drawn(6, 4), drawn(6, 4).to(HALF), drawn(6, 8)
    parts, left = kernels().grad_parts(values, 3)
    grad, pairs = kernels().gate_gradient(sums, w)
    assert {each.dtype for each in (kernels().split(values, 1), parts, left, grad, pairs)} == {HALF}
    # to the bits that even cut-off parts have; rounded ones are held to the bit above
    found = parts.double().unflatten(1, (3, 4)).sum(1)
    assert ((found - values).abs() <= 2.0**-21 * values.abs()).all()
    same(pairs, torch.cat([w, w], 1), "pairs")
