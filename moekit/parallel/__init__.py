"""Several processes: who they are, what they agree on, and how parameters and gradients are shared among them."""

from moekit.parallel.processes import World, all_sum, any_true, one_process, share, start_processes, wait
from moekit.parallel.sharding import fill, gradient_sync, is_sharded, shard_model, shard_modules, sum_gradients, whole

__all__ = [
    "World",
    "all_sum",
    "any_true",
    "one_process",
    "share",
    "start_processes",
    "wait",
    "fill",
    "gradient_sync",
    "is_sharded",
    "shard_model",
    "shard_modules",
    "sum_gradients",
    "whole",
]
