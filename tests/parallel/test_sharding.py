import copy
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moekit.parallel import (
    Grid,
    Layout,
    World,
    distribute_experts,
    fill,
    gradient_sync,
    local,
    make_grid,
    mesh_names,
    one_process,
    replicated,
    shard_experts,
    shard_model,
    squared_norm,
    sum_gradients,
    whole,
)

ALONE = make_grid(one_process(), replicated(1, 1))


@pytest.fixture
def mesh(group):
    """Return a mesh of this process alone."""
    return init_device_mesh("cpu", (1,))


@pytest.fixture
def grid(group):
    """Return a grid of this process alone, taken for two ranks."""
    names = ("copies", "shards", "hidden", "blocks")
    experts = init_device_mesh("cpu", (1, 1, 1, 1), mesh_dim_names=names)
    dense = init_device_mesh("cpu", (1, 1), mesh_dim_names=("copies", "shards"))
    return Grid(World(0, 2, torch.device("cpu")), Layout(2, experts=2), dense, experts)


def test_one_process_shards_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = dict(model.named_parameters())
    shard_model(model, [model[0]], ALONE, experts=[model[1]], reduce_dtype=torch.float32)
    shard_experts([model[1]], ALONE)
    distribute_experts(model[1], ALONE, {})
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_one_process_sums_nothing():
    layer = nn.Linear(2, 1)
    gradient = layer.weight.grad = torch.ones(1, 2)
    sum_gradients(layer.parameters(), ALONE)
    assert layer.weight.grad is gradient
    assert layer.bias.grad is None


def test_gradients_are_summed_in_one_exchange_per_dtype(grid, monkeypatch):
    """The other rank's share is as large: the sum is twice this one's, and no gradient counts as zero."""
    exchanges = []

    def all_reduce(flat, group=None):
        exchanges.append((flat.dtype, flat.numel()))
        flat.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    first, second, third = nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(1, 1).to(torch.bfloat16)
    third.bias.requires_grad_(False)
    for parameter in (*first.parameters(), second.weight, third.weight):
        parameter.grad = torch.randn_like(parameter)
    parameters = [*first.parameters(), *second.parameters(), *third.parameters()]
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    sum_gradients(iter(parameters), grid)
    assert sorted(exchanges, key=str) == [(torch.bfloat16, 1), (torch.float32, 6 + 3 + 3 + 1)]
    assert third.bias.grad is None
    for parameter, gradient in zip(parameters[:-1], before[:-1], strict=True):
        expected = torch.zeros_like(parameter) if gradient is None else 2 * gradient
        assert parameter.grad.shape == parameter.shape
        assert torch.equal(parameter.grad, expected)


def test_parts_of_experts_that_no_other_rank_has_are_not_summed(grid, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: pytest.fail("nothing to add up"))
    layer = nn.Module()
    layer.up = nn.Parameter(torch.randn(1, 3, 4))
    distribute_experts(layer, grid, {"up": 2})
    assert mesh_names(layer.up) == ("hidden 1", "blocks 1")
    (local(layer.up) * 3).sum().backward()
    sum_gradients(layer.parameters(), grid)
    assert (local(layer.up.grad) == 3).all()


class Along(NamedTuple):
    """An axis of a mesh, as far as sums ask for it."""

    name: str
    ranks: int

    def size(self) -> int:
        return self.ranks

    def get_group(self) -> str:
        return self.name


@pytest.mark.parametrize(("copies", "shards"), [(2, 1), (1, 2), (2, 2)])
def test_parts_of_experts_are_summed_over_all_ranks_that_hold_them_and_sharded_ones_are_not(
    grid, monkeypatch, copies, shards
):
    """Every other rank's share is as large. What FSDP shards has been reduced by it."""
    sums = []

    def all_reduce(flat, group=None):
        sums.append((group, flat.numel()))
        flat.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    module = nn.Module()
    module.up = nn.Parameter(torch.randn(1, 3, 4))
    distribute_experts(module, grid, {"up": 2})
    sharded = nn.Parameter(distribute_tensor(torch.zeros(2), init_device_mesh("cpu", (1,), mesh_dim_names=("shards",))))
    for parameter in (module.up, sharded):
        local(parameter).sum().backward()
    axes = {"copies": Along("copies", copies), "shards": Along("shards", shards)}
    sum_gradients([module.up, sharded], grid._replace(experts=axes))
    assert sums == [(name, 12) for name, size in (("copies", copies), ("shards", shards)) if size > 1]
    assert (local(module.up.grad) == copies * shards).all()
    assert (local(sharded.grad) == 1).all()


def test_the_axes_of_a_mesh_without_names_are_numbered(mesh):
    """As ``fully_shard`` makes one that is given none."""
    assert mesh_names(distribute_tensor(torch.zeros(4), mesh, [Shard(0)])) == ("axis 0 1",)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)])
def test_the_norm_of_gradients_of_several_dtypes_is_in_the_widest(dtypes):
    parameters = [torch.zeros(2, dtype=dtype, requires_grad=True) for dtype in dtypes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-100 if parameter.dtype == torch.float64 else 0.0)
    assert squared_norm(parameters, one_process()).item() == pytest.approx(2e-200)  # zero in float32


def test_the_norm_of_large_gradients_does_not_depend_on_how_they_are_cut():
    """A CPU adds the squares of a tensor up one after the other: of so many in float32 it loses 8e-5 of the norm."""
    gradient = torch.randn(2048, 2048)
    expected = gradient.double().square().sum().item()
    for parts in ([gradient], gradient.split(512)):
        parameters = [torch.zeros_like(part, requires_grad=True) for part in parts]
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part
        assert squared_norm(parameters, one_process()).item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("shape", [(2_000_001,), (2, 1_000_001)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_norm_of_gradients_of_long_rows_is_exact(shape, transposed):
    x = torch.zeros(shape[::-1] if transposed else shape, requires_grad=True)
    x.grad = torch.randn(x.shape)
    rows = x.t().detach().requires_grad_() if transposed else x
    rows.grad = x.grad.t() if transposed else x.grad
    expected = x.grad.double().square().sum().item()
    assert squared_norm([rows], one_process()).item() == pytest.approx(expected, rel=1e-6)


def test_whole_tensors_stay_as_they_are():
    tensor = torch.randn(2)
    assert whole(tensor) is tensor
    assert local(tensor) is tensor


def test_fill_copies_values_into_whole_tensors():
    parameter = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    value = torch.arange(6.0).view(2, 3)
    fill(parameter, value)
    assert torch.equal(parameter.detach().float(), value)
    assert parameter.requires_grad


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_sharded_tensors_are_gathered_and_filled(mesh, placement):
    sharded = distribute_tensor(torch.zeros(4, 3), mesh, [placement])
    value = torch.arange(12.0, dtype=torch.float64).view(4, 3)
    fill(sharded, value)
    assert isinstance(sharded, DTensor)
    gathered = whole(sharded)
    assert not isinstance(gathered, DTensor)
    assert gathered.dtype == torch.float32
    assert torch.equal(gathered.double(), value)


def test_gradients_of_sharded_modules_are_held_back_until_the_last_micro_batch(mesh):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    fully_shard(model[0], mesh=mesh)
    asked = []
    model[0].set_requires_gradient_sync = lambda last, recurse: asked.append((last, recurse))
    gradient_sync(model, last=False)
    gradient_sync(model, last=True)
    assert asked == [(False, False), (True, False)]


@pytest.mark.parametrize("keep_gathered", [False, True])
def test_gathered_parameters_are_freed_after_the_forward_unless_they_are_to_be_kept(grid, monkeypatch, keep_gathered):
    asked = []

    def shard(module, *, reshard_after_forward, **given):
        asked.append(reshard_after_forward)
        return fully_shard(module, reshard_after_forward=reshard_after_forward, **given)

    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", shard)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    shard_model(model, [model[0]], grid, keep_gathered=keep_gathered)
    assert asked == [not keep_gathered] * 2


def test_whole_modules_have_nothing_to_hold_back():
    gradient_sync(nn.Linear(2, 2), last=False)


class Block(nn.Module):
    """A linear map, and experts (E, ., .) of a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.experts = nn.Linear(4, 4), nn.Module()
        self.experts.up = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x):
        return self.dense(x) @ self.experts.up.sum(0)


def blocks() -> nn.Sequential:
    return nn.Sequential(*[Block() for _ in range(3)])


def test_experts_are_gathered_with_their_block_where_no_token_travels(grid):
    model = blocks()
    expected, x = copy.deepcopy(model), torch.randn(2, 4)
    together = grid._replace(layout=replicated(2, 3))
    shard_model(model, model, together, experts=[block.experts for block in model])
    assert [isinstance(block.experts, FSDPModule) for block in model] == [False] * 3
    assert all(isinstance(module, FSDPModule) for module in (model, *model))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("replicas", [1, 2])
def test_where_tokens_travel_experts_are_gathered_by_themselves_if_others_hold_them(grid, replicas):
    model = blocks()
    layout = Layout(3, replicas=replicas, experts=2)
    shard_model(model, model, grid._replace(layout=layout), experts=[block.experts for block in model])
    assert [isinstance(block.experts, FSDPModule) for block in model] == [replicas > 1] * 3
    assert all(isinstance(module, FSDPModule) for module in (model, *model))
    assert [isinstance(block.experts.up, DTensor) for block in model] == [replicas > 1] * 3
