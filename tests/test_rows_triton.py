"""Copying, adding up and weighing rows by kernels against the plain versions in torch, in float64."""

from functools import partial

import pytest
import torch
from interpreted import DEVICE, Calls, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor
from torch._subclasses import FakeTensorMode

from moekit import rows as plain
from moekit.dispatch import rows as moved
from moekit.dispatch.rows import _WeighRows
from moekit.rows import Links, copy_rows, sum_rows

# tokens, choices, rows, columns: widths around and past a tile, K around the unrolled loop, more padding than tokens
SHAPES = {
    "usual": (5, 3, 12, 24),
    "one": (1, 1, 1, 1),
    "wide": (4, 2, 6, 1100),
    "odd": (9, 1, 40, 77),
    "many choices": (3, 11, 50, 16),
    "in parts": (3, 2, 5, 1536),
    "no tokens": (0, 2, 4, 8),
    "no rows": (4, 2, 0, 8),
    "no choices": (4, 0, 3, 8),
    "no columns": (4, 2, 8, 0),
    "nothing": (0, 0, 0, 8),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
# The interpreter's float16 is numpy's; its bf16 is not to be trusted, and is tested on the GPU.
DTYPES = [torch.float64, torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAN = float("nan")


@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def kernels():
    from moekit import _rows_triton

    return _rows_triton


def draw(num_tokens: int, k: int, num_rows: int, _: int = 0) -> tuple[Links, Tensor]:
    """Give tokens up to k rows each, at random, the rest being padding; and say which assignment a row has."""
    places = torch.randperm(max(num_rows, num_tokens * k))[: num_tokens * k]
    rows = torch.where(places < num_rows, places, -1)
    assignments = plain_inverse(rows, num_rows)
    padding = assignments < 0
    return Links(assignments.clamp_min(0) // max(k, 1), padding, rows.view(num_tokens, k)), assignments


def plain_inverse(rows: Tensor, num_rows: int) -> Tensor:
    assignments = torch.full((num_rows,), -1)
    for assignment, row in enumerate(rows.tolist()):
        if row >= 0:
            assignments[row] = assignment
    return assignments


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    """Hold a result of ``dtype`` to one in float64 by the size of its values: one rounding, of sums in float32."""
    assert found.dtype == dtype
    assert found.shape == expected.shape
    bound = 2 * torch.finfo(dtype).eps * expected.abs().max().clamp_min(1) if expected.numel() else 0
    error = (found.cpu().double() - expected).abs().max() if expected.numel() else 0
    assert error <= bound, f"{name}: {error} > {bound}"


def poisoned(values: Tensor, padding: Tensor) -> Tensor:
    return values.masked_fill(padding.unsqueeze(1), NAN)


@runs_kernels
@pytest.mark.usefixtures("poison")
@dtypes
@shapes
def test_copies(shape, dtype) -> None:
    links, _ = draw(*shape)
    x = torch.randn(shape[0], shape[3], dtype=torch.float64).to(dtype)
    found = kernels().copied(x.to(DEVICE), links.rows.to(DEVICE), links.padding.to(DEVICE))
    assert torch.equal(found.cpu(), plain.copied(x, *links))


@runs_kernels
@pytest.mark.usefixtures("poison")
@dtypes
@shapes
@pytest.mark.parametrize("weighted", [False, True])
def test_sums(shape, dtype, weighted) -> None:
    links, _ = draw(*shape)
    values = torch.randn(shape[2], shape[3], dtype=torch.float64).to(dtype)
    weights = torch.randn(links.rows.shape) if weighted else None
    expected = plain.summed(values.double(), links.rows, None if weights is None else weights.double())
    given = poisoned(values, links.padding).to(DEVICE)
    found = kernels().summed(given, links.rows.to(DEVICE), None if weights is None else weights.to(DEVICE))
    close(found, expected, dtype, "sums")


@runs_kernels
@pytest.mark.usefixtures("poison")
@dtypes
@shapes
def test_gradients_of_a_weighted_sum(shape, dtype) -> None:
    links, assignments = draw(*shape)
    values = torch.randn(shape[2], shape[3], dtype=torch.float64).to(dtype)
    grad = torch.randn(shape[0], shape[3], dtype=torch.float64).to(dtype)
    weights = torch.randn(links.rows.shape, dtype=torch.promote_types(dtype, torch.float32))
    expected = plain.weighed_back(
        grad.double(), values.double(), weights.double(), links=links, assignments=assignments
    )
    given = [grad, poisoned(values, links.padding), links.rows, weights, links.padding]
    found = kernels().weigh_backward(*(each.to(DEVICE) for each in given))
    close(found[0], expected[0], dtype, "d values")
    assert found[1].dtype == weights.dtype
    # The products of narrow numbers are exact in float32; their sum is not.
    scale = (values.double().norm() * grad.double().norm()).clamp_min(1) if grad.numel() and values.numel() else 1
    error = (found[1].cpu().double() - expected[1]).abs().amax().item() if expected[1].numel() else 0
    assert error <= 4 * torch.finfo(weights.dtype).eps * scale, f"d weights: {error}"


@runs_kernels
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # 0 * inf, in the interpreter's numpy
def test_infinities_do_not_reach_those_without_rows() -> None:
    """An infinite gradient of a token times a row that it does not have is nothing."""
    links = Links(torch.tensor([0]), torch.tensor([False]), torch.tensor([[0, -1], [-1, -1]]))
    grad = torch.full((2, 3), float("inf"))
    given = [grad, torch.ones(1, 3), links.rows, torch.full((2, 2), NAN), links.padding]
    given[3][0, 0] = 2.0
    grads = kernels().weigh_backward(*(each.to(DEVICE) for each in given))
    assert grads[1].tolist() == [[float("inf"), 0], [0, 0]]
    assert kernels().summed(given[1].to(DEVICE), links.rows.to(DEVICE), given[3].to(DEVICE)).tolist() == [
        [2] * 3,
        [0] * 3,
    ]


@runs_kernels
def test_nan_of_a_token_stays_its_own() -> None:
    links = Links(torch.tensor([1, 0, 1]), torch.tensor([False, False, True]), torch.tensor([[1], [0]]))
    x = torch.tensor([[1.0], [NAN]])
    copies = kernels().copied(x.to(DEVICE), links.rows.to(DEVICE), links.padding.to(DEVICE))
    assert copies.isnan().flatten().tolist() == [True, False, False]


@runs_kernels
def test_narrow_rows_are_added_up_in_float32() -> None:
    """2048 + 1 + 1 is 2050; in float16, 2048 + 1 is 2048."""
    values = torch.tensor([[2048.0], [1.0], [1.0]], dtype=torch.float16)
    rows = torch.arange(3).unsqueeze(0)
    assert kernels().summed(values.to(DEVICE), rows.to(DEVICE), None).item() == 2050


@runs_kernels
def test_memory_in_any_order_is_read_right() -> None:
    links, assignments = draw(5, 2, 12)
    values, grad = torch.randn(6, 12).T, torch.ones(()).expand(5, 6)
    weights = torch.randn(2, 5).T
    rows = links.rows.T.contiguous().T
    found = kernels().weigh_backward(*(each.to(DEVICE) for each in (grad, values, rows, weights, links.padding)))
    expected = plain.weighed_back(grad, values, weights, links=links, assignments=assignments)
    torch.testing.assert_close(found[0].cpu(), expected[0])
    torch.testing.assert_close(found[1].cpu(), expected[1])
    sums = kernels().summed(*(each.to(DEVICE) for each in (values, rows, weights)))
    torch.testing.assert_close(sums.cpu(), plain.summed(values, rows, weights))


def test_cuda_tensors_take_the_kernels() -> None:
    """Told from fake tensors, which need no GPU: which operators run, and in float64 too."""
    with FakeTensorMode(), Calls() as calls:
        rows, padding = torch.zeros(3, 2, dtype=torch.int64, device="cuda"), torch.zeros(8, device="cuda").bool()
        links = Links(torch.zeros(8, dtype=torch.int64, device="cuda"), padding, rows)
        x = torch.zeros(3, 4, device="cuda", dtype=torch.float64)
        values = plain.copied(x, *links)
        assert (values.shape, values.dtype, values.device.type) == ((8, 4), torch.float64, "cuda")
        assert plain.summed(values, rows, None).shape == (3, 4)
        weights = torch.zeros(3, 2, device="cuda")
        grads = plain.weighed_back(x, values, weights, links=links, assignments=padding.long())
        assert [(grad.shape, grad.dtype) for grad in grads] == [((8, 4), torch.float64), ((3, 2), torch.float32)]
    assert calls.own() == ["copied_rows", "summed_rows", "weigh_rows_backward"]


@runs_kernels
def test_a_gradient_of_gradients_is_that_of_the_plain_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    links, assignments = draw(5, 3, 12)
    x, weights = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def second_gradients(device: str) -> tuple[Tensor, ...]:
        of_x, of_weights = (each.to(device, copy=True).requires_grad_() for each in (x, weights))
        there = Links(*(each.to(device) for each in links))
        rows = copy_rows(of_x, there).tanh()
        y = _WeighRows.apply(rows, of_weights, *there, assignments.to(device)).square() + sum_rows(rows, there).sin()
        first = torch.autograd.grad(y.sum(), (of_x, of_weights), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), (of_x, of_weights))

    expected = second_gradients("cpu")
    for module in (plain, moved) if DEVICE == "cpu" else ():  # as CUDA tensors do
        monkeypatch.setattr(module, "summed", kernels().summed)
    if DEVICE == "cpu":
        monkeypatch.setattr(plain, "copied", lambda x, tokens, padding, rows: kernels().copied(x, rows, padding))
    for name, found, want in zip(("x", "weights"), second_gradients(DEVICE), expected, strict=True):
        torch.testing.assert_close(found.cpu(), want, msg=partial("{}: {}".format, name))


@runs_kernels
def test_operators_are_well_formed() -> None:
    links, _ = draw(3, 2, 8)
    grad, values, weights = torch.randn(3, 4), torch.randn(8, 4), torch.randn(3, 2)
    grad, values, weights, rows, padding = (e.to(DEVICE) for e in (grad, values, weights, links.rows, links.padding))
    kernels()  # whose import registers them
    torch.library.opcheck(torch.ops.moekit.copied_rows.default, (grad, rows, padding))
    torch.library.opcheck(torch.ops.moekit.summed_rows.default, (values, rows, weights))
    torch.library.opcheck(torch.ops.moekit.weigh_rows_backward.default, (grad, values, rows, weights, padding))
