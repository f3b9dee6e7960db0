"""The grouped product in Triton against one product per row, in float64."""

import pytest
import torch
from differentiated_once import check_differentiated_once
from interpreted import DEVICE, INTERPRETED, Calls, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor

from moekit.experts.triton_matmul import triton
from moekit.operators import HAS_TRITON
from moekit.types import Groups

# Awkward sizes: empty first, middle and last groups, one row, all on one, more than a tile, nothing at all.
SIZES = [[4, 0, 1, 37], [0, 3, 0, 2, 0], [0, 0, 33], [0, 0], [16, 1]]
WIDTHS = {"by descriptors": (24, 40), "by pointers": (21, 35), "one column": (1, 1)}
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"  # rows that nobody reads are garbage
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def _low_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take tiles so low that a group has several, in every direction."""
    if INTERPRETED or DEVICE == "cuda":
        from moekit.experts.kernels import _gemms_triton
        from moekit.experts.tiles import Tile

        small = Tile(m=16, n=16, k=16, warps=4, stages=2, band=2, overlap=True)
        monkeypatch.setattr(_gemms_triton, "row_tile", lambda *_, **__: small)
        monkeypatch.setattr(_gemms_triton, "weight_tile", lambda *_, **__: small)


def make(sizes: list[int], widths: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Groups, Tensor]:
    """Draw rows, with three past the last group that hold NaN, and weights."""
    rows = torch.randn(sum(sizes) + 3, widths[0]).to(dtype)
    rows[sum(sizes) :] = torch.nan
    w = torch.randn(len(sizes), *widths).to(dtype)
    groups = Groups(torch.tensor(sizes, dtype=torch.int32, device=DEVICE), None)
    return rows.to(DEVICE).requires_grad_(), groups, w.to(DEVICE).requires_grad_()


def row_by_row(rows: Tensor, sizes: list[int], w: Tensor) -> Tensor:
    owners = [e for e, size in enumerate(sizes) for _ in range(size)]
    products = [row @ w[e] for row, e in zip(rows, owners, strict=False)]
    return torch.stack(products) if products else rows[:0] @ w[0]


def expect(rows: Tensor, sizes: list[int], w: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Return output and gradients in float64, without the rows past the last group."""
    rows = rows.detach().cpu().double()[: sum(sizes)].requires_grad_()
    w = w.detach().cpu().double().requires_grad_()
    out = row_by_row(rows, sizes, w)
    grads = torch.autograd.grad(out, (rows, w), cotangent.cpu().double()[: sum(sizes)], allow_unused=True)
    return [out, *(torch.zeros_like(p) if g is None else g for p, g in zip((rows, w), grads, strict=True))]


def close(found: Tensor, expected: Tensor, name: str) -> None:
    """Hold a result to one in float64 by the size of its values."""
    assert found.shape == expected.shape, name
    if expected.numel():
        error = (found.detach().cpu().double() - expected).abs().max()
        bound = TOLERANCE[found.dtype] * expected.abs().max().clamp_min(1)
        assert error <= bound, f"{name}: {error} > {bound}"


@runs_kernels
@pytest.mark.usefixtures("poison")
@dtypes
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_groups_equal_row_by_row(sizes: list[int], widths: tuple[int, int], dtype: torch.dtype) -> None:
    rows, groups, w = make(sizes, widths, dtype)
    out = triton(rows, groups, w)
    cotangent = torch.randn(out.shape).to(DEVICE, dtype)
    cotangent[sum(sizes) :] = torch.nan
    grad_rows, grad_w = torch.autograd.grad(out, (rows, w), cotangent)
    wanted = expect(rows, sizes, w, cotangent)
    assert {out.dtype, grad_rows.dtype, grad_w.dtype} == {dtype}
    close(out[: sum(sizes)], wanted[0], "out")
    close(grad_rows[: sum(sizes)], wanted[1], "rows")
    close(grad_w, wanted[2], "w")


@runs_kernels
def test_views_are_read_as_they_are() -> None:
    sizes = [5, 0, 20]
    rows, groups, w = make(sizes, (24, 40), torch.float32)
    transposed = w.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    strided = torch.stack([rows.detach()] * 2, dim=-1)[..., 0]
    assert not strided.is_contiguous()
    out, plain = triton(strided, groups, transposed)[:25], triton(rows, groups, w)[:25]
    torch.testing.assert_close(out, plain)
    grad = torch.autograd.grad(out.square().sum(), transposed)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(plain.square().sum(), w)[0])
    assert grad.stride() == transposed.stride()


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sizes_may_lie_apart_in_memory(dtype: torch.dtype) -> None:
    rows, groups, w = make([2, 2, 2], (24, 40), torch.float32)
    column = torch.tensor([[2, 9]] * 3, dtype=dtype, device=DEVICE)[:, 0]
    expected = triton(rows, groups, w)[:6]
    wanted = torch.autograd.grad(expected.square().sum(), (rows, w))
    for sizes in (column, column[:1].expand(3)):
        assert not sizes.is_contiguous()
        out = triton(rows, Groups(sizes, None), w)[:6]
        assert torch.equal(out, expected)
        for found, grad in zip(torch.autograd.grad(out.square().sum(), (rows, w)), wanted, strict=True):
            assert torch.equal(found[: 6 if found.ndim == 2 else None], grad[: 6 if grad.ndim == 2 else None])


@runs_kernels
def test_sizes_of_more_rows_than_there_are_reach_no_other_memory() -> None:
    rows, groups, w = make([3, 2, 0], (24, 40), torch.float32)
    rows = rows[:5].detach().requires_grad_()
    too_many = Groups(torch.tensor([3, 30, 2], dtype=torch.int32, device=DEVICE), None)
    found, expected = (triton(rows, each, w) for each in (too_many, groups))
    assert torch.equal(found, expected)
    cotangent = torch.randn(5, 40).to(DEVICE)
    for back, want in zip(*(torch.autograd.grad(y, (rows, w), cotangent) for y in (found, expected)), strict=True):
        assert torch.equal(back, want)


@runs_kernels
def test_it_works_inside_checkpoint_and_refuses_gradients_of_gradients() -> None:
    rows, groups, w = make([2, 3], (24, 40), torch.float32)
    rows = rows[:5].detach().requires_grad_()
    total = lambda rows, w: triton(rows, groups, w).square().sum()  # noqa: E731
    check_differentiated_once("triton", total, rows, w)


@runs_kernels
def test_autocast_casts_to_its_dtype() -> None:
    rows, groups, w = make([5, 3], (24, 40), torch.float32)
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = triton(rows, groups, w)
    assert out.dtype == torch.float16
    assert torch.autograd.grad(out[:8].sum(), w)[0].dtype == torch.float32


@runs_kernels
@pytest.mark.skipif(DEVICE != "cpu", reason="is of Triton's interpreter")
def test_bfloat16_is_refused_where_the_interpreter_would_multiply_it() -> None:
    rows, groups, w = make([5, 3], (24, 40), torch.float32)
    message = r"triton: .* torch\.bfloat16 on the CPU, .*interpreter multiplies bfloat16 wrongly; expected .*float16"
    with pytest.raises(ValueError, match=message):
        triton(rows.bfloat16(), groups, w.bfloat16())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=message):
        triton(rows, groups, w)


@runs_kernels
def test_a_second_call_gives_the_same_bits() -> None:
    rows, groups, w = make([5, 0, 30], (21, 35), torch.float32)
    first, second = (triton(rows, groups, w)[:35] for _ in range(2))
    assert torch.equal(first, second)


def test_shapes_are_known_without_a_device() -> None:
    rows, w = (torch.ones(shape, device="meta", requires_grad=True) for shape in ((3, 2), (2, 2, 4)))
    groups = Groups(torch.ones(2, device="meta"), None)
    y = triton(rows, groups, w)
    y.sum().backward()
    assert (y.shape, rows.grad.shape, w.grad.shape) == ((3, 4), rows.shape, w.shape)
    with torch.no_grad():
        assert triton(rows, groups, w).shape == (3, 4)


def test_errors_say_what_was_given_and_expected() -> None:
    groups = Groups(torch.tensor([1, 2]), None)
    rows, w = torch.ones(3, 2), torch.ones(2, 2, 4)
    with pytest.raises(
        ValueError, match=r"float64, torch\.float64; expected one dtype of torch.float32, torch.bfloat16, torch.float16"
    ):
        triton(rows.double(), groups, w.double())
    with pytest.raises(ValueError, match=r"float16, torch\.float32; expected one dtype for all"):
        triton(rows.half(), groups, w)
    with pytest.raises(ValueError, match="precision = 'bf16'; expected 'ieee' or 'tf32'"):
        triton(rows, groups, w, precision="bf16")
    with pytest.raises(ValueError, match=r"rows \(3, 2\).*do not fit; expected \(R, D\)"):
        triton(rows, groups, w[:, :1])
    with pytest.raises(ValueError, match=r"w \(2, 4, 2\) do not fit; .* these fit the other way round: pass w\.mT"):
        triton(rows, groups, w.mT)
    many = torch.ones(2**14 + 1, 2, 4, device="meta")
    sizes = torch.ones(2**14 + 1, device="meta")
    with pytest.raises(
        ValueError, match=r"triton: E = 16385 experts; expected at most 16384, .* Take loop, which takes"
    ):
        triton(rows.to("meta"), Groups(sizes, None), many)
    assert triton(rows.to("meta"), Groups(sizes[1:], None), many[1:]).shape == (3, 4)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_more_groups_are_refused_than_a_program_compares_with_its_tiles() -> None:
    import triton.language as tl

    from moekit.experts.kernels._tiles_triton import _schedule_launch

    def entries(num_groups: int) -> int:
        constants = _schedule_launch(num_groups, 1, 1, 16).constants
        return constants["GROUPS"] * constants["BLOCK"]

    assert entries(2**14) <= tl.TRITON_MAX_TENSOR_NUMEL < entries(2**14 + 1)


@runs_kernels
def test_every_product_has_the_precision_that_was_asked_for() -> None:
    rows, w = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((5, 24), (2, 24, 40)))
    groups = Groups(torch.tensor([2, 3], device=DEVICE), None)  # int64, as some plans count
    with Calls() as calls:
        triton(rows, groups, w, precision="tf32").sum().backward()
    ours = [args for function, args in calls.calls if function.namespace == "moekit"]
    assert [args[-1] for args in ours] == ["tf32"] * 3
    assert {args[1].dtype for args in ours} == {torch.int32}
