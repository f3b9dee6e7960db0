"""Routing: tokens to logits to a decision, with balancing losses, the selection bias and statistics."""

from moekit.routing.fixed import hash_choice, hash_table, random_choice, round_robin
from moekit.routing.gates import linear_gate
from moekit.routing.losses import load_balance_loss, update_bias, z_loss
from moekit.routing.masks import mask_tokens, random_second
from moekit.routing.stats import RoutingStats, routing_stats
from moekit.routing.top_k import sigmoid, softmax, softmax_of_top_k, token_choice, top_k, weights_at

__all__ = [
    "linear_gate",
    "top_k",
    "softmax_of_top_k",
    "softmax",
    "sigmoid",
    "token_choice",
    "weights_at",
    "hash_choice",
    "hash_table",
    "random_choice",
    "round_robin",
    "mask_tokens",
    "random_second",
    "load_balance_loss",
    "z_loss",
    "update_bias",
    "RoutingStats",
    "routing_stats",
]
