import pytest
import torch
from interpreted import Calls
from torch import Tensor
from torch._subclasses import FakeTensorMode

from moekit import rows as plain
from moekit.rows import Links, copy_rows, sum_rows

D = 3
SHAPES = {"usual": (5, 3, 12), "one": (1, 1, 1), "narrow": (6, 1, 9), "no tokens": (0, 2, 4), "no rows": (4, 2, 0)}
SHAPES |= {"neither": (0, 2, 0), "no copies": (4, 0, 3), "nothing": (0, 0, 0)}
shapes = pytest.mark.parametrize(("num_tokens", "k", "num_rows"), SHAPES.values(), ids=SHAPES)


def draw(num_tokens: int, k: int, num_rows: int) -> Links:
    """Give tokens up to k rows each, at random; rows that are left are padding, which points anywhere."""
    places = torch.randperm(max(num_rows, num_tokens * k))[: num_tokens * k]
    rows = torch.where(places < num_rows, places, -1).view(num_tokens, k)
    tokens = torch.randint(num_tokens, (num_rows,)) if num_tokens else torch.full((num_rows,), 7)
    padding = torch.ones(num_rows, dtype=torch.bool)
    for token, mine in enumerate(rows.tolist()):
        for row in mine:
            if row >= 0:
                tokens[row], padding[row] = token, False
    return Links(tokens, padding, rows)


def matrix(links: Links) -> Tensor:
    """Write the links as (R, T) of zeros and ones."""
    links_of = torch.zeros(links.tokens.shape[0], links.rows.shape[0], dtype=torch.float64)
    for row, (token, padding) in enumerate(zip(links.tokens.tolist(), links.padding.tolist(), strict=True)):
        if not padding:
            links_of[row, token] = 1
    return links_of


@pytest.mark.usefixtures("poison")
@shapes
def test_copies_and_sums_are_products_with_a_matrix_and_its_transpose(num_tokens, k, num_rows):
    links = draw(num_tokens, k, num_rows)
    x = torch.randn(num_tokens, D, dtype=torch.float64, requires_grad=True)
    values = torch.randn(num_rows, D, dtype=torch.float64, requires_grad=True)
    copies, sums = copy_rows(x, links), sum_rows(values, links)
    torch.testing.assert_close(copies, matrix(links) @ x, rtol=0, atol=0)
    torch.testing.assert_close(sums, matrix(links).T @ values)
    [of_x] = torch.autograd.grad(copies, x, values.detach())
    [of_values] = torch.autograd.grad(sums, values, x.detach())
    assert torch.equal(of_x, sums)
    assert torch.equal(of_values, copies)


@shapes
def test_the_two_moves_are_transposes(num_tokens, k, num_rows):
    links = draw(num_tokens, k, num_rows)
    x = torch.randn(num_tokens, D, dtype=torch.float64)
    values = torch.randn(num_rows, D, dtype=torch.float64)
    torch.testing.assert_close((copy_rows(x, links) * values).sum(), (x * sum_rows(values, links)).sum())


@pytest.mark.parametrize(("num_tokens", "k", "num_rows"), [(4, 2, 6), (3, 3, 12), (2, 1, 4)])
def test_gradients_agree_with_differences(num_tokens, k, num_rows):
    links = draw(num_tokens, k, num_rows)
    x = torch.randn(num_tokens, D, dtype=torch.float64, requires_grad=True)
    values = torch.randn(num_rows, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: copy_rows(x, links), x)
    assert torch.autograd.gradcheck(lambda values: sum_rows(values, links), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_padding_is_never_read(dtype):
    """NaN in padding rows, the first and last among them, and in their gradient, reaches nobody."""
    tokens, rows = torch.tensor([0, 0, 2, 0, 1, 1]), torch.tensor([[1, 3], [4, -1], [-1, -1]])
    padding = torch.tensor([True, False, True, False, False, True])
    links = Links(tokens, padding, rows)
    values = torch.arange(18.0).view(6, D).to(dtype).masked_fill(padding.unsqueeze(1), float("nan")).requires_grad_()
    sums = sum_rows(values, links)
    assert sums[:, 0].tolist() == [3 + 9, 12, 0]
    assert sums.isfinite().all()
    x = torch.randn(3, D, dtype=dtype, requires_grad=True)
    copies = copy_rows(x, links)
    assert torch.equal(copies, x[tokens].masked_fill(padding.unsqueeze(1), 0))
    [grad] = torch.autograd.grad(copies, x, values.detach())
    assert torch.equal(grad, sums)
    [grad] = torch.autograd.grad(sums, values, x.detach())
    assert torch.equal(grad, copies)


def test_nan_of_a_token_stays_its_own():
    links = Links(torch.tensor([1, 0, 1]), torch.tensor([False, False, True]), torch.tensor([[1], [0]]))
    x = torch.tensor([[1.0], [float("nan")]])
    assert copy_rows(x, links).isnan().flatten().tolist() == [True, False, False]
    assert sum_rows(torch.tensor([[float("nan")], [1.0], [1.0]]), links).isnan().flatten().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_are_added_up_in_float32(dtype):
    """257 ones and a three are 260; in bf16, 256 + 1 is 256."""
    links = Links(torch.zeros(258).long(), torch.zeros(258).bool(), torch.arange(258).unsqueeze(0))
    values = torch.ones(258, 1, dtype=dtype)
    values[-1] = 3
    sums = sum_rows(values, links)
    assert sums.dtype == dtype
    assert sums.item() == 260  # a sum in bf16 would stop at 256
    values = torch.randn(258, 1, dtype=dtype)
    torch.testing.assert_close(sum_rows(values, links), values.float().sum(0, keepdim=True).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_gradients_keep_their_dtype(dtype):
    links = draw(4, 2, 10)
    x, values = (torch.randn(n, D, dtype=dtype, requires_grad=True) for n in (4, 10))
    copies, sums = copy_rows(x, links), sum_rows(values, links)
    assert (copies.dtype, sums.dtype) == (dtype, dtype)
    grads = torch.autograd.grad(copies.sum(), x), torch.autograd.grad(sums.sum(), values)
    assert [grad.dtype for [grad] in grads] == [dtype, dtype]
    assert torch.equal(grads[0][0][:, 0], (links.rows >= 0).sum(1).to(dtype))
    assert torch.equal(grads[1][0][:, 0], (~links.padding).to(dtype))


def test_arguments_stay_as_they_are():
    links = draw(4, 2, 10)
    x, values = torch.randn(4, D), torch.randn(10, D)
    before = [each.clone() for each in (x, values, *links)]
    copy_rows(x, links)
    sum_rows(values, links)
    assert all(torch.equal(a, b) for a, b in zip((x, values, *links), before, strict=True))


def test_gradients_of_gradients_agree_with_differences_where_rows_are_missing() -> None:
    links = Links(
        torch.tensor([0, 1, 0]), torch.tensor([False, False, True]), torch.tensor([[0, -1], [1, -1], [-1, -1]])
    )
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: copy_rows(x, links).tanh(), x)
    assert torch.autograd.gradgradcheck(lambda values: sum_rows(values, links).tanh(), values)


def test_without_triton_cuda_tensors_take_the_plain_versions(monkeypatch) -> None:
    monkeypatch.setattr(plain, "HAS_TRITON", False)
    with FakeTensorMode(), Calls() as calls:
        rows, padding = torch.zeros(3, 2, dtype=torch.int64, device="cuda"), torch.zeros(8, device="cuda").bool()
        links = Links(torch.zeros(8, dtype=torch.int64, device="cuda"), padding, rows)
        values = plain.copied(torch.zeros(3, 4, device="cuda"), *links)
        assert plain.summed(values, rows, None).shape == (3, 4)
    assert calls.own() == []
