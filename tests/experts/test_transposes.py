"""Matrices in the other order of memory, and the products of float32 that read copies of them."""

import pytest
import torch
from interpreted import DEVICE, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor

from moekit.experts.tiles import Tile

TILE = Tile(m=16, n=32, k=16, warps=4, stages=2)


@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(3, 70, 5), (2, 64, 128), (1, 1, 1), (2, 1, 130), (65, 129), (1, 7), (0, 4, 3), (2, 0, 3)]
)
def test_a_copy_is_transposed(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from moekit.experts.kernels._transposes_triton import transposed

    values = torch.randn(shape).to(dtype).to(DEVICE)
    wider = torch.cat([values, values], -1)
    for given in (values, wider[..., shape[-1] :], wider[..., : shape[-1]]):
        found = transposed(given)
        assert found.is_contiguous()
        assert torch.equal(found, given.transpose(-2, -1))


@runs_kernels
@pytest.mark.parametrize(
    ("dtype", "precision", "rows", "copied"),
    [
        (torch.float32, "ieee", 16, "transposed"),
        (torch.float32, "ieee", 15, None),
        (torch.float32, "tf32", 128, "plain"),
        (torch.float32, "tf32", 127, None),
        (torch.bfloat16, "ieee", 4096, None),
    ],
)
def test_matrices_are_copied_where_their_order_of_memory_makes_products_slow(dtype, precision, rows, copied) -> None:
    from moekit.experts.kernels._transposes_triton import straightened

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).to(DEVICE)

    plain, halves, turned = draw(3, 8, 5), draw(3, 8, 10).chunk(2, 2), draw(3, 5, 8).transpose(1, 2)
    for kind, weights in (("plain", (plain,)), ("plain", halves), ("transposed", (turned, turned))):
        found = straightened(weights, 3 * rows, precision)
        assert all(map(torch.equal, found, weights))
        assert all(new is old for new, old in zip(found, weights, strict=True)) == (kind != copied)
        assert all((w.stride(2) == 1) == ((kind == "plain") != (kind == copied)) for w in found)


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("height", "width"), [(40, 36), (5, 33), (1, 1)])
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_matrices_by_tf32_are_those_of_copies(height: int, width: int, tall: bool, parts: int) -> None:
    from moekit.experts.kernels._gemms_triton import grouped_weight
    from moekit.experts.kernels._tiles_triton import make_schedule

    sizes = torch.tensor([32, 0, 16, 48], dtype=torch.int32)
    used = int(sizes.sum())
    left = torch.randn(used + 16, height * (parts if tall else 1))
    right = torch.randn(used + 16, width * (1 if tall else parts))
    left[used:], right[used:] = torch.nan, torch.inf  # rows of nobody
    schedule = make_schedule(sizes.to(DEVICE), used + 16, 16)
    found = grouped_weight(
        left.to(DEVICE), schedule, right.to(DEVICE), parts=parts, tall=tall, aligned=True, precision="tf32", tile=TILE
    )
    ends = sizes.cumsum(0).tolist()
    for group, (size, end) in enumerate(zip(sizes.tolist(), ends, strict=True)):
        a, b = left[end - size : end].double(), right[end - size : end].double()
        pieces = [(each, b) for each in a.chunk(parts, 1)] if tall else [(a, each) for each in b.chunk(parts, 1)]
        expected = torch.stack([one.T @ other for one, other in pieces])
        torch.testing.assert_close(found[:, group].cpu().double(), expected, rtol=2e-3, atol=2e-2)


@runs_kernels
@pytest.mark.parametrize(
    ("dtype", "precision", "aligned", "across"),
    [
        (torch.float32, "tf32", True, True),
        (torch.float32, "tf32", False, False),
        (torch.float32, "ieee", True, False),
        (torch.float16, "tf32", True, False),
    ],
)
def test_both_operands_are_copied_for_aligned_tf32_alone(dtype, precision, aligned, across, monkeypatch) -> None:
    from moekit.experts.kernels import _gemms_triton
    from moekit.experts.kernels._tiles_triton import make_schedule

    copied, kernel = [], _gemms_triton.transposed
    monkeypatch.setattr(_gemms_triton, "transposed", lambda t: (copied.append(tuple(t.shape)), kernel(t))[1])
    schedule = make_schedule(torch.tensor([16, 16], dtype=torch.int32, device=DEVICE), 32, 16)
    rows, grad = torch.ones(32, 24, device=DEVICE, dtype=dtype), torch.ones(32, 8, device=DEVICE, dtype=dtype)
    found = _gemms_triton.grouped_weight(rows, schedule, grad, aligned=aligned, precision=precision, tile=TILE)
    assert torch.equal(found, torch.full_like(found, 16.0))
    described = DEVICE != "cuda" or torch.cuda.get_device_capability()[0] >= 9
    assert copied == ([(32, 24), (32, 8)] if across and described else [])
    copied.clear()
    monkeypatch.setattr(_gemms_triton, "has_tma", lambda device: False)
    _gemms_triton._weight_launch.cache_clear()
    found = _gemms_triton.grouped_weight(rows, schedule, grad, aligned=aligned, precision=precision, tile=TILE)
    _gemms_triton._weight_launch.cache_clear()
    assert torch.equal(found, torch.full_like(found, 16.0))
    assert copied == []


@runs_kernels
@pytest.mark.parametrize(("width", "stored"), [(8, True), (6, False)])
def test_copies_are_read_by_descriptors_wherever_their_operands_began(width: int, stored: bool) -> None:
    from moekit.experts.kernels._gemms_triton import _weight_launch

    described = DEVICE != "cuda" or torch.cuda.get_device_capability()[0] >= 9
    if not described:
        pytest.skip("needs a card with descriptors")
    launch = _weight_launch(
        torch.device(DEVICE), torch.float32, (32, 6), (32, width), 2, 1, False, True, True, False, "tf32", TILE
    )
    assert launch.constants["ACROSS"]
    assert launch.constants["TMA_STORE"] is stored


@runs_kernels
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float16, "ieee")]
)
def test_gate_and_up_are_multiplied_apart_in_exact_float32_alone(dtype, precision, gated: bool) -> None:
    from moekit.experts.activations import GELU_MLP, SWIGLU
    from moekit.experts.kernels._hidden_triton import _up_launch
    from moekit.experts.kernels._tiles_triton import Matrices

    launch = _up_launch(
        torch.device(DEVICE), dtype, (32, 8), Matrices((2, 8, 16), (128, 16, 1)), SWIGLU if gated else GELU_MLP,
        False, True, True, True, precision, TILE,
    )  # fmt: skip
    assert launch.constants["APART"] is (gated and dtype == torch.float32 and precision == "ieee")


@runs_kernels
@pytest.mark.parametrize("capability", [8, 9])
def test_a_product_alone_has_the_tile_of_its_card(capability: int, monkeypatch) -> None:
    from moekit.experts.kernels import _gemms_triton

    asked = []
    monkeypatch.setattr(_gemms_triton, "capability_of", lambda device: capability)
    monkeypatch.setattr(_gemms_triton, "row_tile", lambda *_, **card: (asked.append(card), TILE)[1])
    sizes = torch.tensor([16, 16], dtype=torch.int32, device=DEVICE)
    _gemms_triton.multiply(torch.ones(32, 8, device=DEVICE), sizes, torch.ones(2, 8, 4, device=DEVICE), False, "tf32")
    assert [(card["capability"], card["precision"]) for card in asked] == [(capability, "tf32")]


@runs_kernels
@pytest.mark.parametrize(("precision", "turned"), [("ieee", False), ("tf32", True)])
def test_products_read_matrices_in_the_order_that_is_fast(precision: str, turned: bool, monkeypatch) -> None:
    from moekit._operators_triton import Launch
    from moekit.experts.activations import SWIGLU
    from moekit.experts.kernels._gemms_triton import grouped_rows
    from moekit.experts.kernels._hidden_triton import up
    from moekit.experts.kernels._tiles_triton import make_schedule

    read, run = [], Launch.__call__

    def watched(launch: Launch, *tensors: Tensor) -> None:
        if launch.kernel.__name__ in ("_up_kernel", "_rows_kernel"):
            read.extend(each.stride() for each in tensors if each.shape == (2, 8, 4))
        run(launch, *tensors)

    schedule = make_schedule(torch.tensor([128, 128], dtype=torch.int32, device=DEVICE), 256, 16)
    rows = torch.ones(256, 8, device=DEVICE)
    plain, other = torch.ones(2, 8, 4, device=DEVICE), torch.ones(2, 4, 8, device=DEVICE).transpose(1, 2)
    monkeypatch.setattr(Launch, "__call__", watched)
    for w in (plain, other):
        up(rows, schedule, (w, w), activation=SWIGLU, precision=precision, tile=TILE)
        grouped_rows(rows, schedule, (w,), precision=precision, tile=TILE)
    assert read == [(32, 1, 8) if turned else (32, 4, 1)] * 6
