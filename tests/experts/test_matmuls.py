import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from moekit.experts import batched, grouped, loop, triton
from moekit.experts.matmuls import _check_kernel, _grouped_mm
from moekit.types import Groups

D, F = 5, 7
# Awkward sizes: empty first, middle and last groups, one row, everything on one, nothing at all.
SIZES = [[4, 0, 1, 9, 2], [0, 3, 0, 2, 0], [0, 0, 13, 0, 0], [0, 0, 0, 0, 0], [1], [0], [1, 1, 1]]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}

every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def make(sizes: list[int], *, tail: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Groups, Tensor]:
    rows = torch.randn(sum(sizes) + tail, D).to(dtype).requires_grad_()
    w = torch.randn(len(sizes), D, F).to(dtype).requires_grad_()
    return rows, Groups(torch.tensor(sizes, dtype=torch.int32), None), w


def row_by_row(rows: Tensor, sizes: list[int], w: Tensor) -> Tensor:
    owners = [e for e, size in enumerate(sizes) for _ in range(size)]
    return torch.stack([row @ w[e] for row, e in zip(rows, owners, strict=False)]) if owners else rows.new_zeros(0, F)


@pytest.mark.parametrize("matmul", [grouped, triton])
def test_gradients_in_forward_mode_are_refused(matmul) -> None:
    rows, groups, w = make([2, 3], dtype=torch.float32)
    rows, w = rows.detach(), w.detach()
    with pytest.raises(NotImplementedError, match=r"(grouped|triton): it has no forward-mode gradient"):
        torch.func.jvp(lambda rows: matmul(rows, groups, w), (rows,), (torch.ones_like(rows),))


@pytest.mark.usefixtures("poison")
@every_size
@every_dtype
@pytest.mark.parametrize("matmul", [loop, grouped])
def test_unequal_groups_equal_row_by_row(matmul, dtype: torch.dtype, sizes: list[int]) -> None:
    rows, groups, w = make(sizes, dtype=dtype)
    out = matmul(rows, groups, w)
    expected = row_by_row(rows.double(), sizes, w.double())
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype], "check_dtype": False}
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, **close)
    cotangent = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, (rows, w), cotangent)
    wanted = torch.zeros_like(rows), torch.zeros_like(w)
    if expected.requires_grad:
        wanted = torch.autograd.grad(expected, (rows, w), cotangent.double())
    for name, grad, want in zip(("rows", "w"), grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, msg=lambda text: f"{name}\n{text}", **close)  # noqa: B023


@pytest.mark.usefixtures("poison")
@every_dtype
@pytest.mark.parametrize("capacity", [0, 1, 4])
@pytest.mark.parametrize("matmul", [loop, batched, grouped])
def test_equal_groups_equal_row_by_row(matmul, dtype: torch.dtype, capacity: int) -> None:
    rows, groups, w = make([capacity] * 3, dtype=dtype)
    out = matmul(rows, groups._replace(capacity=capacity), w)
    expected = row_by_row(rows.double(), [capacity] * 3, w.double())
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], check_dtype=False)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("matmul", [loop, grouped])
@pytest.mark.parametrize("junk", [0.0, torch.nan])
def test_rows_past_the_last_group_touch_nothing(matmul, junk: float) -> None:
    sizes = [2, 0, 3]
    rows, groups, w = make(sizes, tail=4)
    out = matmul(rows, groups, w)
    assert out.shape == (9, F)
    cotangent = torch.randn(9, F, dtype=torch.float64)
    cotangent[5:] = junk
    grad_rows, grad_w = torch.autograd.grad(out, (rows, w), cotangent)
    expected = row_by_row(rows, sizes, w)
    torch.testing.assert_close(out[:5], expected)
    wanted = torch.autograd.grad(expected, (rows, w), cotangent[:5])
    torch.testing.assert_close(grad_rows[:5], wanted[0][:5])
    torch.testing.assert_close(grad_w, wanted[1])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("matmul", [loop, grouped])
def test_an_empty_group_has_a_gradient_of_zero(matmul) -> None:
    rows, groups, w = make([2, 0, 3])
    (grad,) = torch.autograd.grad(matmul(rows, groups, w).sum(), w)  # also a gradient of stride 0
    assert (grad[1] == 0).all()
    assert (grad[0] != 0).all()


def test_torchs_product_takes_the_gradient_of_a_sum() -> None:
    groups = Groups(torch.tensor([2, 0, 3]), None)
    rows, w = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((5, 8), (3, 8, 16)))
    expected = torch.autograd.grad(loop(rows, groups, w).sum(), (rows, w))
    for product in (_grouped_mm, torch.compile(_grouped_mm, fullgraph=True, backend="aot_eager")):
        found = torch.autograd.grad(product(rows, groups.sizes, w).sum(), (rows, w))
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[rows.dtype], atol=TOLERANCE[rows.dtype])


@pytest.mark.parametrize("wanted", [(0, 1), (0,), (1,), ()], ids=["both", "rows", "w", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_torchs_product_compiles_whole_in_every_dtype(dtype: torch.dtype, wanted: tuple[int, ...]) -> None:
    """torch's rules for tensors without memory know bfloat16 alone."""
    groups = Groups(torch.tensor([2, 0, 3]), None)
    rows, w = torch.randn(7, 8, dtype=dtype), torch.randn(3, 16, 8, dtype=dtype).transpose(1, 2)  # two rows of nobody
    leaves = [(rows, w)[i].requires_grad_() for i in wanted]
    torch._dynamo.reset()
    out = torch.compile(_grouped_mm, fullgraph=True)(rows, groups.sizes, w)
    expected = loop(rows, groups, w)
    torch.testing.assert_close(out[:5], expected[:5])
    cotangent = torch.randn_like(expected)
    if leaves:
        found = torch.autograd.grad(out, leaves, cotangent)
        for each, other in zip(found, torch.autograd.grad(expected, leaves, cotangent), strict=True):
            torch.testing.assert_close(each[:5], other[:5])


def test_what_torchs_product_returns_may_be_changed_in_place() -> None:
    sizes = torch.tensor([2, 0, 3])
    rows, w = (torch.randn(shape, requires_grad=True) for shape in ((5, 8), (3, 8, 16)))
    found = torch.autograd.grad(_grouped_mm(rows, sizes, w).relu_().sum(), (rows, w))
    expected = torch.autograd.grad(loop(rows, Groups(sizes, None), w).relu().sum(), (rows, w))
    torch.testing.assert_close(found, expected)
    product = torch.func.grad(lambda x: _grouped_mm(x, sizes, w.detach()).relu().sum())
    torch.testing.assert_close(product(rows.detach()), expected[0])


def test_the_loop_takes_its_weights_apart_once() -> None:
    rows, groups, w = make([2, 0, 3])
    seen, rest = [], [loop(rows, groups, w).grad_fn]
    while rest:
        node = rest.pop()
        seen.append(type(node).__name__)
        rest += [each for each, _ in node.next_functions if each is not None]
    assert not [name for name in seen if name.startswith(("Select", "Index"))], "each has a gradient as large as w"
    assert "UnbindBackward0" in seen


@pytest.mark.parametrize("matmul", [loop, grouped])
def test_views_are_read_as_they_are(matmul) -> None:
    rows, groups, w = make([2, 3])
    transposed = w.detach().transpose(1, 2).contiguous().transpose(1, 2)
    strided = torch.stack([rows.detach(), rows.detach()], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(matmul(strided, groups, transposed), matmul(rows, groups, w))


def test_transposed_weights_get_a_gradient_of_their_own_layout() -> None:
    rows, groups, w = make(SIZES[0])
    stored = w.detach().transpose(1, 2).contiguous().requires_grad_()  # (E, out, in), as others store it
    grouped(rows, groups, stored.transpose(1, 2)).square().sum().backward()
    expected = torch.autograd.grad(grouped(rows, groups, w).square().sum(), w)[0]
    torch.testing.assert_close(stored.grad, expected.transpose(1, 2))
    view = stored.detach().transpose(1, 2).requires_grad_()
    grad = torch.autograd.grad(grouped(rows, groups, view).square().sum(), view)[0]
    assert grad.stride() == view.stride()


@pytest.mark.parametrize(("first", "second"), [(loop, grouped), (loop, batched)])
def test_autocast_computes_in_bfloat16_and_returns_gradients_in_float32(first, second) -> None:
    rows, groups, w = make([3, 3], dtype=torch.float32)
    groups = groups._replace(capacity=3)
    results = []
    for matmul in (first, second):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = matmul(rows, groups, w)
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.float().square().sum(), (rows, w))
        assert [grad.dtype for grad in grads] == [torch.float32] * 2
        results.append((out, *grads))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(
        results[0][0].double(), row_by_row(rows.double(), [3, 3], w.double()), rtol=2e-2, atol=2e-2
    )


def test_frozen_weights_and_frozen_rows() -> None:
    rows, groups, w = make([2, 3])
    expected = torch.autograd.grad(row_by_row(rows, [2, 3], w).sum(), (rows, w))
    torch.testing.assert_close(torch.autograd.grad(grouped(rows, groups, w.detach()).sum(), rows)[0], expected[0])
    torch.testing.assert_close(torch.autograd.grad(grouped(rows.detach(), groups, w).sum(), w)[0], expected[1])


@pytest.mark.parametrize("matmul", [loop, batched, grouped])
@pytest.mark.parametrize(
    ("rows", "experts", "w"),
    [((6, 4), 2, (2, 5, 3)), ((6, 5), 3, (2, 5, 3)), ((6, 5), 2, (5, 3)), ((2, 3, 5), 2, (2, 5, 3))],
    ids=["width", "experts", "w axes", "rows axes"],
)
def test_shapes_that_do_not_fit(matmul, rows, experts: int, w) -> None:
    groups = Groups(torch.full((experts,), 3, dtype=torch.int32), 3)
    with pytest.raises(
        ValueError, match=r"rows .*, sizes .* and w .* do not fit; expected \(R, D\), \(E,\) and \(E, D, F\)"
    ):
        matmul(torch.zeros(rows), groups, torch.zeros(w))


@pytest.mark.parametrize("matmul", [loop, batched, grouped])
def test_another_number_of_rows_than_the_plan(matmul) -> None:
    groups = Groups(torch.full((2,), 3, dtype=torch.int32), 3)
    with pytest.raises(
        ValueError, match=r"7 rows were given for 2 groups of 3; expected 6. Pass the rows that this plan's"
    ):
        matmul(torch.zeros(7, D), groups, torch.zeros(2, D, F))


def test_batched_names_what_to_use_for_unequal_groups() -> None:
    rows, groups, w = make([2, 3])
    with pytest.raises(
        ValueError, match=r"no common capacity .* Use the padded dispatcher, or the matmul `grouped` or"
    ):
        batched(rows, groups, w)


def test_cuda_alignment_error_names_the_width() -> None:
    _check_kernel(torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(1, 8, 16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"F = 12 in torch.bfloat16 is 24 bytes a row; .* multiple of 16 bytes"):
        _check_kernel(torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(1, 8, 12, dtype=torch.bfloat16))


def test_a_dtype_that_torchs_product_lacks_on_cuda_is_refused_with_what_takes_it() -> None:
    with pytest.raises(ValueError, match=r"torch\.float64, torch\.float64; expected .* `loop`, which take any"):
        _check_kernel(torch.zeros(2, 8, dtype=torch.float64), torch.zeros(1, 8, 8, dtype=torch.float64))


def test_more_groups_than_torchs_product_takes_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekit.experts.matmuls.compute_capability", lambda device: (9, 0))
    for dtype in (torch.float16, torch.bfloat16):
        _check_kernel(torch.zeros(1, 8, dtype=dtype), torch.zeros(1023, 8, 8, dtype=dtype))
    _check_kernel(torch.zeros(1, 8, dtype=torch.float16), torch.zeros(1024, 8, 8, dtype=torch.float16))
    with pytest.raises(ValueError, match="1024 groups; CUDA's grouped_mm takes at most 1023 in bfloat16"):
        _check_kernel(torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(1024, 8, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("matmul", [loop, batched, grouped])
def test_rows_of_another_dtype_are_refused_outside_autocast(matmul) -> None:
    rows, w = torch.randn(6, D), torch.randn(2, D, F)
    groups = Groups(torch.full((2,), 3, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match=r"torch\.float32, torch\.bfloat16; expected one dtype for all"):
        matmul(rows, groups, w.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matmul(rows, groups, w.bfloat16()), matmul(rows, groups, w))


@pytest.mark.parametrize("matmul", [loop, grouped])
def test_no_experts_give_zeros_that_have_gradients(matmul) -> None:
    rows, w = torch.randn(3, D, requires_grad=True), torch.randn(0, D, F, requires_grad=True)
    out = matmul(rows, Groups(torch.zeros(0, dtype=torch.int32), None), w)
    assert out.shape == (3, F)
    of_rows, of_w = torch.autograd.grad(out.sum(), (rows, w))
    assert (of_rows.shape, of_w.shape) == (rows.shape, w.shape)
    if matmul is loop:
        assert not out.any()
        assert not of_rows.any()


@pytest.mark.parametrize("matmul", [loop, batched, grouped])
def test_weights_of_the_other_order_are_refused_with_a_word_on_how_to_turn_them(matmul) -> None:
    rows, groups = torch.zeros(6, D), Groups(torch.full((2,), 3, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match=r"stored \(E, in, out\), and these fit the other way round: pass w\.mT"):
        matmul(rows, groups, torch.zeros(2, F, D))
    with pytest.raises(ValueError, match=r"stored \(E, in, out\)\.$"):
        matmul(rows, groups, torch.zeros(2, F, D + 1))


@pytest.mark.parametrize("matmul", [loop, batched, grouped])
def test_rows_of_three_axes_are_refused(matmul) -> None:
    groups = Groups(torch.full((2,), 3, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match=r"do not fit; expected \(R, D\), \(E,\) and"):
        matmul(torch.zeros(6, D, 2), groups, torch.zeros(2, D, F))


def test_loop_reads_no_sizes_where_the_capacity_is_known() -> None:
    with FakeTensorMode():
        groups = Groups(torch.full((2,), 3, dtype=torch.int32), 3)
        assert loop(torch.zeros(6, D), groups, torch.zeros(2, D, F)).shape == (6, F)


def test_cuda_alignment_error_names_the_width_of_the_rows_too() -> None:
    with pytest.raises(ValueError, match=r"D = 12 in torch.bfloat16 is 24 bytes a row"):
        _check_kernel(torch.zeros(2, 12, dtype=torch.bfloat16), torch.zeros(1, 12, 16, dtype=torch.bfloat16))
