"""The process groups of a run: meshes for the experts, for all else, and for tokens, made from a layout."""

from collections.abc import Mapping
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moekit.parallel.layouts import Layout, Part, part_of
from moekit.parallel.processes import World


class Grid(NamedTuple):
    """The ranks of a run, arranged. On one process there are no meshes.

    Attributes:
        world: all ranks.
        layout: where experts live.
        dense: (copies, shards), for parameters outside experts: FSDP shards over ``shards`` and replicates over
            ``copies``, of which there is one unless sharding is hybrid.
        experts: (copies, shards, hidden, blocks), for the parameters of experts, in the layout's order: replicas are
            copies * shards.
        tokens: (replicas, together): ``together`` are the hidden * blocks ranks that exchange tokens.
        exchange: (others, nodes, experts), ``blocks`` split into those of a node and those across.
        returns: "nodes" and "experts" to the same ranks as in ``exchange``, with a communicator of their own for what
            travels back; empty unless asked for.

    Example:
        >>> from moekit.parallel import one_process, replicated
        >>> grid = make_grid(one_process(), replicated(1, 8))
        >>> list(grid.part.experts(8)), grid.dense is None
        ([0, 1, 2, 3, 4, 5, 6, 7], True)
    """

    world: World
    layout: Layout
    dense: DeviceMesh | None = None
    experts: DeviceMesh | None = None
    tokens: DeviceMesh | None = None
    exchange: DeviceMesh | None = None
    returns: Mapping[str, ProcessGroup] = {}

    @property
    def part(self) -> Part:
        """The part of the experts that this rank owns."""
        return part_of(self.layout, self.world.rank)


def make_grid(world: World, layout: Layout, *, ranks_per_shard: int | None = None, returning: bool = False) -> Grid:
    """Make the meshes of a layout. All ranks call it together.

    Args:
        world: all ranks.
        layout: of as many.
        ranks_per_shard: hybrid sharding: parameters are sharded over so many neighbouring ranks, usually a node, and
            replicated over the rest. None shards over all.
        returning: make second communicators for what travels back, see ``chunked``.

    Returns:
        Grid.

    Raises:
        ValueError: if the layout is of another number of ranks, or ``ranks_per_shard`` does not divide it.

    Example:
        >>> from moekit.parallel import one_process, replicated
        >>> make_grid(one_process(), replicated(1, 8)).dense is None
        True
    """
    if layout.world_size != world.size:
        raise ValueError(f"the layout is of {layout.world_size} ranks, and there are {world.size}")
    if world.size == 1:
        return Grid(world, layout)
    shards = world.size if ranks_per_shard is None else ranks_per_shard
    device, together = world.device.type, layout.hidden * layout.expert_ranks
    inner = shards_of_experts(layout, shards)
    exchange = (world.size // layout.expert_ranks, layout.nodes, layout.experts)
    names = ("others", "nodes", "experts")
    grid = Grid(
        world,
        layout,
        dense=init_device_mesh(device, (world.size // shards, shards), mesh_dim_names=("copies", "shards")),
        experts=init_device_mesh(
            device,
            (layout.replicas // inner, inner, layout.hidden, layout.expert_ranks),
            mesh_dim_names=("copies", "shards", "hidden", "blocks"),
        ),
    )
    if not layout.exchanges:
        return grid
    mesh = init_device_mesh(device, exchange, mesh_dim_names=names)
    return grid._replace(
        tokens=init_device_mesh(device, (layout.replicas, together), mesh_dim_names=("replicas", "together")),
        exchange=mesh,
        returns={name: _second_group(mesh, axis) for axis, name in ((1, "nodes"), (2, "experts"))} if returning else {},
    )


def _second_group(mesh: DeviceMesh, axis: int) -> ProcessGroup:
    """Make one more group of the ranks along an axis; a mesh would take the group of all ranks again where it can."""
    ranks = mesh.mesh.movedim(axis, -1).reshape(-1, mesh.size(axis)).tolist()
    group, _ = dist.new_subgroups_by_enumeration(ranks)
    assert group is not None
    return group


def group_of(mesh: DeviceMesh | None, name: str) -> ProcessGroup:
    """Return this rank's group along an axis of a mesh.

    Args:
        mesh: of a grid.
        name: of the axis.

    Returns:
        The process group.

    Raises:
        ValueError: if the grid has no such mesh, on one process or where no tokens travel.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> group_of(init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "together")), "together").size()
        1
        >>> dist.destroy_process_group()
    """
    if mesh is None:
        raise ValueError(f"there is no group of ranks along {name!r}: no tokens travel in this layout")
    return mesh[name].get_group()


def shards_of_experts(layout: Layout, shards: int) -> int:
    """Say over how many of the ranks that hold the same experts FSDP shards them.

    Args:
        layout: where experts live.
        shards: over how many neighbouring ranks it shards all else.

    Returns:
        A divisor of ``layout.replicas``.

    Raises:
        ValueError: if neither number divides.

    Example:
        >>> from moekit.parallel import spread_experts
        >>> layout = spread_experts(16, 4, 64, hidden_ranks=1)  # four replicas of four blocks
        >>> shards_of_experts(layout, 16), shards_of_experts(layout, 8)
        (4, 2)
    """
    if layout.world_size % shards:
        raise ValueError(f"hybrid sharding over {shards} ranks; expected a divisor of the {layout.world_size} ranks")
    inner = max(1, shards // (layout.hidden * layout.expert_ranks))
    if layout.replicas % inner:
        raise ValueError(
            f"hybrid sharding over {shards} ranks leaves {inner} of the {layout.replicas} replicas of the experts to a "
            "shard, which does not divide them; expected nodes with a whole number of replicas each"
        )
    return inner
