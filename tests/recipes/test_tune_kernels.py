"""Tuning with the real kernels, on tiny layers: what is run is what the layer runs, and what fails is left out."""

from typing import Any

import pytest
import torch
from interpreted import DEVICE, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor

from moekit.experts.tiles import LayerSize, LayerTiles, Tile, ruled_tiles
from moekit.recipes.bench.devices import on_device
from moekit.recipes.tuning import tune as module
from moekit.recipes.tuning.compiling import Job, compiling, try_job
from moekit.recipes.tuning.products import (
    Operands,
    ProductRun,
    draw_operands,
    miniature,
    schedule_of,
)
from moekit.recipes.tuning.tune import tune

SMALL = Tile(m=16, n=16, k=16, warps=4, stages=2)
SIZE = LayerSize(torch.float32, 20, 3, 16, 24, gated=True)
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"  # rows that nobody reads are garbage
)


@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def expected_product(product: str, o: Operands) -> Tensor:
    """Compute a product in float64, group by group."""
    groups = [slice(int(end - size), int(end)) for end, size in zip(o.sizes.cumsum(0), o.sizes, strict=True)]
    rows, hidden, grad_rows, grad_pre = (t.double() for t in (o.rows, o.hidden, o.grad_rows, o.grad_pre))
    ups, down = torch.stack(o.ups).double(), o.down.double()
    if product == "up":
        return torch.cat([
            torch.nn.functional.silu(rows[g] @ ups[0, e]) * (rows[g] @ ups[1, e]) for e, g in enumerate(groups)
        ])  # fmt: skip
    if product == "down":
        return torch.cat([hidden[g] @ down[e] for e, g in enumerate(groups)])
    if product == "grad_hidden":
        weights = torch.cat([o.weights, o.weights.new_zeros(1)]).double()[o.assignments[: o.total]].unsqueeze(1)
        of_hidden = weights * torch.cat([grad_rows[g] @ down[e].T for e, g in enumerate(groups)])
        pre = grad_pre[: o.total].requires_grad_()  # which stands for itself
        gate, up = pre.chunk(2, 1)
        return torch.autograd.grad(torch.nn.functional.silu(gate) * up, pre, of_hidden)[0]
    if product == "grad_rows":
        return torch.cat([grad_pre[g] @ torch.cat(list(ups[:, e]), 1).T for e, g in enumerate(groups)])
    if product == "grad_down":
        return torch.stack([hidden[g].T @ grad_rows[g] for g in groups])
    halves = grad_pre.chunk(2, 1)
    return torch.stack([torch.stack([rows[g].T @ half[g] for g in groups]) for half in halves])


@runs_kernels
@pytest.mark.parametrize("product", LayerTiles._fields)
def test_a_product_is_that_of_the_layer(product: str) -> None:
    operands = draw_operands(SIZE, align=16, device=torch.device(DEVICE))
    found = ProductRun(product, SMALL, operands, schedule_of(operands, 16), "ieee")()
    expected = expected_product(product, operands).to(found.device)
    found = found[: operands.total] if product in LayerTiles._fields[:4] else found.view(expected.shape)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@runs_kernels
def test_operands_are_rows_of_aligned_groups() -> None:
    operands = draw_operands(SIZE._replace(assignments=50), align=16, device=CPU)
    assert (operands.sizes % 16 == 0).all()
    assert operands.total == operands.sizes.sum() >= 50
    assert operands.rows.shape == (96, 16)  # 50 rows, and 15 more for each of 3 experts, in whole sixteens
    assert (operands.rows.any(1) == operands.hidden.any(1)).all()
    assert operands.rows.any(1).sum() == 50
    again = draw_operands(SIZE._replace(assignments=50), align=32, device=CPU, like=operands)
    assert again.down is operands.down
    torch.testing.assert_close(again.rows[again.rows.any(1)], operands.rows[operands.rows.any(1)])


@runs_kernels
def test_the_fastest_tile_that_is_right_is_chosen(monkeypatch) -> None:
    right, wrong, failing = SMALL, SMALL._replace(n=32), SMALL._replace(stages=7)
    call, seen, told = ProductRun.__call__, [], []

    def fake_call(self: ProductRun) -> Tensor:
        if self.tile.stages == 7:
            raise MemoryError("out of resource: shared memory\nReducing block sizes may help")
        return call(self) + (self.tile.n == 32 and self.product == "down")

    def timer(runs: dict[Tile, Any], rounds: int) -> dict[Tile, float]:
        seen.append((runs, rounds))
        return {tile: 1e-3 * tile.stages / (1 + (tile.n == 32)) / (1 + (tile.band == 8)) for tile in runs}

    monkeypatch.setattr(ProductRun, "__call__", fake_call)
    monkeypatch.setattr(module, "ruled_tiles", lambda size: RULED)
    monkeypatch.setattr("moekit.recipes.tuning.candidates.ruled_tiles", lambda size: RULED)
    monkeypatch.setattr("moekit.recipes.tuning.candidates.BANDS", (8,))
    tried = {**dict.fromkeys(LayerTiles._fields, ()), "down": (right, wrong, failing)}
    (tuned,) = tune(
        [SIZE], device=DEVICE, candidates=lambda size: tried, rounds=2, precision="tf32", workers=0, timer=timer,
        tell=told.append,
    )  # fmt: skip
    assert tuned.entry.tiles.down == right._replace(band=8)
    assert tuned.entry.tiles.up == RULED.up._replace(band=8)
    assert tuned.entry[1:8] == (4, 16, 24, 3, 6, True, "tf32")
    row = tuned.comparisons[1]
    assert (row.product, row.ruled, row.tile) == ("down", RULED.down, right._replace(band=8))
    assert row.ruled_seconds == pytest.approx(3 * row.seconds)
    assert all(failing not in runs for runs, _ in seen)
    assert [rounds for _, rounds in seen] == [3] * 6 + [2] * 6
    skipped = [line for line in tuned.skipped if line.startswith("down ")]
    assert skipped[0] == "down 16x16x16 warps 4 stages 7 band 16: MemoryError: out of resource: shared memory"
    assert all("16x32x16" in line and "its output is wrong: off by 1" in line for line in skipped[1:])
    assert len(tuned.skipped) == len(skipped) == 3
    assert told[0] == "compiling 9 candidates"
    assert "3.00x" in told[1].splitlines()[2]


RULED = LayerTiles(*[SMALL._replace(stages=3)] * 6)


@runs_kernels
def test_a_process_beside_this_one_compiles_and_reports() -> None:
    good, bad = (Job(SIZE, product, SMALL, DEVICE) for product in ("grad_down", "sideways"))
    with compiling(1) as compile_jobs:
        assert compile_jobs([good, bad, good]) == {good: "", bad: "KeyError: 'sideways'"}


def kind(value: Any, name: str = "") -> Any:
    """Return what of an argument enters a kernel's code: of a constant, which is in capitals, or a setting, all."""
    if name.isupper() or name.startswith("num_w") or name == "num_stages":
        return value
    if isinstance(value, int):
        return value == 1, value % 16 == 0, value < 2**31
    return getattr(value, "block", value)  # of a descriptor


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "widths", [(16, 768, 512), (18, 520, 520), (17, 17, 522), (1, 524, 64), (32, 528, 768)], ids=str
)
def test_a_miniature_runs_the_same_code(monkeypatch, dtype, widths) -> None:
    from moekit._operators_triton import Launch

    def record(launch: Launch, *tensors: Tensor) -> None:
        """Remember how Triton would specialise a launch, and run nothing."""
        of_tensors = [(each.dtype, each.data_ptr() % 16 == 0) for each in tensors]
        constants = {name: kind(value, name) for name, value in launch.constants.items()}
        kernels[-1].append((launch.kernel, [*map(kind, launch.arguments)], of_tensors, constants))

    experts, dim, hidden = widths
    size = LayerSize(dtype, 80, experts, dim, hidden, gated=True)
    assert miniature(size) != size
    kernels: list[list[Any]] = []
    for each in (size, miniature(size)):
        kernels.append([])
        operands = draw_operands(each, align=64, device=torch.device(DEVICE))
        for product, tile in ruled_tiles(each)._asdict().items():
            run = ProductRun(product, tile, operands, schedule_of(operands, tile.m), "ieee")
            with monkeypatch.context() as patch:
                patch.setattr(Launch, "__call__", record)
                run()
    # Where the gradient of hidden rows goes on in a kernel of its own, its block may be smaller in a miniature; and
    # whether float32 matrices are copied is asked of the number of rows, not of tiles.
    others = "_back_kernel", "_transpose_kernel"
    found, small = ([launch for launch in each if launch[0].__name__ not in others] for each in kernels)
    assert len(found) == 6
    assert found == small


@runs_kernels
def test_the_rule_runs_on_a_miniature() -> None:
    size = LayerSize(torch.float16, 16, 2, 16, 16, gated=False)
    assert try_job(Job(size, "up", ruled_tiles(size).up._replace(n=32, m=16), DEVICE)) == ""
    with on_device(CPU):
        assert "AttributeError" in try_job(Job(size, "up", None, DEVICE))  # type: ignore[arg-type]


@runs_kernels
@pytest.mark.parametrize("product", LayerTiles._fields)
def test_what_is_compiled_and_measured_has_the_precision_of_the_layer(product, monkeypatch) -> None:
    from moekit.experts.kernels import _back_triton, _gemms_triton, _hidden_triton

    asked, size = [], SIZE._replace(precision="tf32")
    places = {"back_through": _back_triton, "up": _hidden_triton}
    places |= dict.fromkeys(("grouped_rows", "grouped_weight"), _gemms_triton)

    def watched(kernel):
        return lambda *given, **options: (asked.append(options.get("precision")), kernel(*given, **options))[1]

    for name, place in places.items():
        monkeypatch.setattr(place, name, watched(getattr(place, name)))
    module._runs_of(size, torch.device(DEVICE))(product, SMALL)()
    assert try_job(Job(size, product, SMALL, DEVICE)) == ""
    assert set(asked) == {"tf32"}
