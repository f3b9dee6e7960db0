import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moekit.parallel import (
    Layout,
    Part,
    World,
    group_of,
    make_grid,
    one_process,
    replicated,
    shards_of_experts,
    spread_experts,
)
from moekit.parallel import grids as module


class _Mesh:
    """Stands in for a mesh, and writes down how it was asked for."""

    def __init__(self, device, shape, *, mesh_dim_names):
        self.made = device, dict(zip(mesh_dim_names, shape, strict=True))


@pytest.fixture
def meshes(monkeypatch):
    monkeypatch.setattr(module, "init_device_mesh", _Mesh)


def grid_of(layout: Layout, rank: int = 0, **options):
    return make_grid(World(rank, layout.world_size, torch.device("cpu")), layout, **options)


def axes(mesh) -> dict[str, int] | None:
    return None if mesh is None else mesh.made[1]


def test_one_process_has_no_meshes():
    layout = replicated(1, 8)
    grid = make_grid(one_process(), layout)
    assert grid == (one_process(), layout, None, None, None, None, {})
    assert grid.part == Part()
    assert not dist.is_initialized()


@pytest.mark.usefixtures("meshes")
def test_the_axes_of_a_grid():
    layout = Layout(8, replicas=2, hidden=2, nodes=2, experts=4)
    grid = grid_of(layout)
    assert axes(grid.dense) == {"copies": 1, "shards": 32}
    assert axes(grid.experts) == {"copies": 1, "shards": 2, "hidden": 2, "blocks": 8}
    assert axes(grid.tokens) == {"replicas": 2, "together": 16}
    assert axes(grid.exchange) == {"others": 4, "nodes": 2, "experts": 4}
    assert list(axes(grid.experts)) == ["copies", "shards", "hidden", "blocks"]
    assert grid.returns == {}
    assert grid.dense.made[0] == "cpu"


@pytest.mark.usefixtures("meshes")
def test_hybrid_sharding_replicates_over_nodes():
    layout = Layout(8, replicas=4, experts=4)
    grid = grid_of(layout, ranks_per_shard=8)
    assert axes(grid.dense) == {"copies": 2, "shards": 8}
    assert axes(grid.experts) == {"copies": 2, "shards": 2, "hidden": 1, "blocks": 4}


@pytest.mark.usefixtures("meshes")
def test_experts_that_span_nodes_are_not_sharded_by_hybrid_sharding():
    grid = grid_of(Layout(8, replicas=2, experts=8), ranks_per_shard=4)
    assert axes(grid.dense) == {"copies": 4, "shards": 4}
    assert axes(grid.experts) == {"copies": 2, "shards": 1, "hidden": 1, "blocks": 8}


@pytest.mark.usefixtures("meshes")
def test_where_no_tokens_travel_there_are_no_meshes_for_them():
    grid = grid_of(replicated(4, 8))
    assert axes(grid.dense) == {"copies": 1, "shards": 4}
    assert axes(grid.experts) == {"copies": 1, "shards": 4, "hidden": 1, "blocks": 1}
    assert grid.tokens is grid.exchange is None
    assert grid.returns == {}


@pytest.mark.usefixtures("meshes")
def test_a_grid_knows_this_rank_s_part():
    assert grid_of(Layout(8, replicas=2, hidden=2, experts=4), rank=13).part == Part(1, 4, 1, 2)


def test_a_layout_of_another_number_of_ranks_is_refused():
    with pytest.raises(ValueError, match="the layout is of 4 ranks, and there are 1"):
        make_grid(one_process(), replicated(4, 8))


@pytest.mark.usefixtures("meshes")
def test_shards_that_do_not_divide_the_ranks_are_refused():
    message = "hybrid sharding over 3 ranks; expected a divisor of the 8 ranks"
    with pytest.raises(ValueError, match=message):
        grid_of(replicated(8, 8), ranks_per_shard=3)


def test_shards_that_do_not_divide_the_replicas_are_refused():
    message = (
        "hybrid sharding over 9 ranks leaves 4 of the 9 replicas of the experts to a shard, which does not divide "
        "them; expected nodes with a whole number of replicas each"
    )
    with pytest.raises(ValueError, match=message):
        shards_of_experts(Layout(2, replicas=9, experts=2), 9)


@pytest.mark.parametrize(
    ("layout", "shards", "expected"),
    [
        (replicated(8, 4), 8, 8),
        (replicated(8, 4), 4, 4),
        (replicated(8, 4), 1, 1),
        (spread_experts(8, 4, 64), 8, 1),  # nobody else holds the same
        (Layout(4, replicas=8, experts=2), 16, 8),
        (Layout(4, replicas=8, experts=2), 4, 2),
        (Layout(4, replicas=8, experts=2), 2, 1),
        (Layout(4, replicas=8, experts=2), 1, 1),
        (Layout(4, replicas=2, hidden=2, experts=4), 16, 2),
    ],
)
def test_experts_are_sharded_over_the_replicas_within_a_shard(layout, shards, expected):
    assert shards_of_experts(layout, shards) == expected


def test_the_group_along_an_axis(group):
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("nodes", "experts"))
    assert group_of(mesh, "nodes") is mesh.get_group("nodes")
    assert group_of(mesh, "experts") is mesh.get_group("experts")


def test_a_group_where_no_tokens_travel_is_refused():
    with pytest.raises(ValueError, match="there is no group of ranks along 'experts': no tokens travel in this layout"):
        group_of(None, "experts")
