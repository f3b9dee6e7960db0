"""The counting sort and its kin against the plain versions in torch; on the GPU, or under Triton's interpreter."""

import pytest
import torch
from interpreted import DEVICE, Calls, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor
from torch._subclasses import FakeTensorMode

from moekit.segments import first_of_groups, rows_of_assignments, sort_by_expert, tokens_per_expert

# assignments, experts: no assignments, one of each, blocks cut anywhere, E = 2^n, E above that of the operators of
# segments, which a plan of the fused layer may have, on the GPU many blocks
SIZES = [(0, 3), (1, 1), (7, 2), (256, 64), (257, 5), (1000, 31), (600, 1024), (600, 1500)]
SIZES += [(131072, 64), (131072, 1024), (3 * 2**20 + 5, 200)] * (DEVICE == "cuda")
sizes = pytest.mark.parametrize(("number", "num_experts"), SIZES)


@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def kernels():
    from moekit import _segments_triton

    return _segments_triton


def draw(number: int, num_experts: int) -> Tensor:
    return torch.randint(-1, num_experts, (number,))


def check(experts: Tensor, num_experts: int) -> None:
    order, sizes, rows = (each.cpu() for each in kernels().counting_sort(experts.to(DEVICE), num_experts))
    expected_order, expected_sizes = sort_by_expert(experts, num_experts)
    assert torch.equal(order, expected_order)
    assert torch.equal(sizes, expected_sizes)
    assert order.dtype == sizes.dtype == rows.dtype == torch.int64
    places = torch.where(torch.arange(len(experts)) < sizes.sum(), order, -1)
    assert torch.equal(rows, rows_of_assignments(places, len(experts)))


@runs_kernels
@pytest.mark.usefixtures("poison")
@sizes
def test_sort_is_stable_and_complete(number, num_experts) -> None:
    check(draw(number, num_experts), num_experts)


@runs_kernels
@pytest.mark.parametrize("expert", [-1, 0, 4])
def test_all_on_one_expert_or_nowhere(expert) -> None:
    check(torch.full((700,), expert), 5)


@runs_kernels
def test_gaps_in_memory_are_stepped_over() -> None:
    experts = draw(600, 7)
    order, _, _ = kernels().counting_sort(experts.to(DEVICE)[::2], 7)
    assert torch.equal(order.cpu(), sort_by_expert(experts[::2], 7)[0])


@runs_kernels
@pytest.mark.usefixtures("poison")
@sizes
def test_counts(number, num_experts) -> None:
    experts = draw(number, num_experts)
    counts = kernels().tokens_per_expert(experts.to(DEVICE), num_experts).cpu()
    assert torch.equal(counts, tokens_per_expert(experts, num_experts))


@runs_kernels
@pytest.mark.usefixtures("poison")
@sizes
def test_the_first_of_each_group(number, num_experts) -> None:
    order, sizes = sort_by_expert(draw(number, num_experts), num_experts)
    for most in (0, 3) if num_experts > 100 else (0, 1, 3, 1500):
        found = kernels().first_of_groups(order.to(DEVICE), sizes.to(DEVICE), most).cpu()
        assert torch.equal(found, first_of_groups(order, sizes, most))


@runs_kernels
def test_the_scan_carries_on_past_the_blocks_it_takes_at_once() -> None:
    experts = draw(129 * 256 + 1, 3)
    earlier, totals, _ = (each.cpu() for each in kernels().counted(experts.to(DEVICE), 3))
    keys = torch.where(experts < 0, 3, experts)
    one_hot = torch.nn.functional.one_hot(torch.cat([keys, torch.full((255,), 3)]), 4).view(130, 256, 4).sum(1)
    assert torch.equal(earlier[:, :4].long(), one_hot.cumsum(0) - one_hot)
    assert torch.equal(totals[:4].long(), one_hot.sum(0))


@runs_kernels
@pytest.mark.parametrize("number", [0, 7, 256, 700])
@pytest.mark.parametrize("num_rows", [0, 1, 256, 700, 2049])
def test_counting_fills_a_plan_of_any_length(number, num_rows) -> None:
    experts = draw(number, 5)
    around = torch.arange(num_rows + 2).to(DEVICE)  # what lies before and behind it stays
    found = kernels().counted_blocks(experts.to(DEVICE), 5, unowned=around[1:-1])
    assert around.tolist() == [0, *([-1] * num_rows), num_rows + 1]
    for each, expected in zip(found, kernels().counted(experts.to(DEVICE), 5), strict=False):
        assert torch.equal(each, expected)


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("number", [0, 700])
def test_sizes_are_written_where_they_are_wanted(number) -> None:
    experts, sizes = draw(number, 5).to(DEVICE), torch.empty(5, dtype=torch.int64, device=DEVICE)
    _, totals = kernels().counted_blocks(experts, 5, sizes=sizes)
    assert torch.equal(sizes.cpu(), tokens_per_expert(experts.cpu(), 5))
    assert torch.equal(totals[:5].long(), sizes)


def test_cuda_tensors_take_the_kernels() -> None:
    """Told from fake tensors, which need no GPU."""
    with FakeTensorMode(), Calls() as calls:
        experts = torch.zeros(12, dtype=torch.int64, device="cuda")
        order, sizes = sort_by_expert(experts, 1024)
        assert (order.shape, sizes.shape, order.device.type) == ((12,), (1024,), "cuda")
        assert tokens_per_expert(experts.view(6, 2), 5).shape == (5,)
        assert rows_of_assignments(order, 20).shape == (20,)
        assert first_of_groups(order, sizes, 3).shape == (3072,)
    assert calls.own() == ["counting_sort", "tokens_per_expert", "rows_of_assignments", "first_of_groups"]


@runs_kernels
@pytest.mark.parametrize(("num_rows", "number"), [(0, 0), (0, 4), (5, 0), (40, 33), (3000, 2500), (5, 2000)])
def test_inverse_of_a_plan(num_rows, number) -> None:
    plan = torch.randperm(max(num_rows, number))[:num_rows]
    plan = torch.where((plan < number) & (plan % 5 != 1), plan, -1)
    rows = kernels().rows_of_assignments(plan.to(DEVICE), number).cpu()
    assert torch.equal(rows, rows_of_assignments(plan, number))


@runs_kernels
def test_operators_are_well_formed() -> None:
    experts = draw(40, 3).to(DEVICE)
    kernels()  # whose import registers them
    torch.library.opcheck(torch.ops.moekit.counting_sort.default, (experts, 3))
    torch.library.opcheck(torch.ops.moekit.tokens_per_expert.default, (experts, 3))
    torch.library.opcheck(torch.ops.moekit.rows_of_assignments.default, (torch.randperm(9).to(DEVICE), 12))
    sizes = torch.tensor([4, 0, 5]).to(DEVICE)
    torch.library.opcheck(torch.ops.moekit.first_of_groups.default, (torch.randperm(9).to(DEVICE), sizes, 3))


@runs_kernels
def test_gaps_in_memory_are_stepped_over_by_counts_and_inverses() -> None:
    experts, plan = torch.randint(-1, 7, (600,)), torch.randperm(600)
    counts = kernels().tokens_per_expert(experts.to(DEVICE)[::2], 7)
    assert torch.equal(counts.cpu(), tokens_per_expert(experts[::2], 7))
    rows = kernels().rows_of_assignments(plan.to(DEVICE)[::2], 600)
    assert torch.equal(rows.cpu(), rows_of_assignments(plan[::2], 600))
