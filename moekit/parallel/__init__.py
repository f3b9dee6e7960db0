"""Several ranks: who they are, how they share experts and parameters, and strategies that wrap an expert layer."""

from torch.distributed import ProcessGroup

from moekit.parallel.all_gather import all_gather, plan_together, tensor_parallel
from moekit.parallel.all_to_all import all_to_all, static_all_to_all, static_routing
from moekit.parallel.chunked import chunked
from moekit.parallel.collectives import exchange
from moekit.parallel.gradients import squared_norm, sum_gradients
from moekit.parallel.grids import Grid, group_of, make_grid, shards_of_experts
from moekit.parallel.in_order import in_order, with_positions
from moekit.parallel.layouts import Layout, Part, part_of, replicated, spread_experts
from moekit.parallel.processes import (
    World,
    all_sum,
    any_true,
    one_process,
    share,
    start_processes,
    under_torchrun,
    wait,
)
from moekit.parallel.sharding import distribute_experts, gradient_sync, shard_axis, shard_experts, shard_model
from moekit.parallel.spread_tensors import fill, local, mesh_names, whole

__all__ = [
    "ProcessGroup",
    "all_gather",
    "all_to_all",
    "chunked",
    "exchange",
    "in_order",
    "plan_together",
    "static_all_to_all",
    "static_routing",
    "tensor_parallel",
    "with_positions",
    "Grid",
    "group_of",
    "make_grid",
    "shards_of_experts",
    "Layout",
    "Part",
    "part_of",
    "replicated",
    "spread_experts",
    "World",
    "all_sum",
    "any_true",
    "one_process",
    "share",
    "start_processes",
    "under_torchrun",
    "wait",
    "distribute_experts",
    "fill",
    "gradient_sync",
    "local",
    "mesh_names",
    "shard_axis",
    "shard_experts",
    "shard_model",
    "squared_norm",
    "sum_gradients",
    "whole",
]
