"""Routing: tokens to logits to a decision, with balancing losses, the selection bias and statistics."""

from moekit.routing.fixed import hash_choice, hash_table, random_choice, round_robin
from moekit.routing.gates import clean, init_linear_gate, linear_gate, noisy
from moekit.routing.losses import load_balance_loss, update_bias, z_loss
from moekit.routing.masks import mask_tokens, random_second
from moekit.routing.states import fixed_table, observe_load, selection_bias
from moekit.routing.stats import RoutingStats, routing_stats
from moekit.routing.top_k import sigmoid, softmax, softmax_of_top_k, sqrt_softplus, token_choice, top_k, weights_at

__all__ = [
    "linear_gate",
    "init_linear_gate",
    "noisy",
    "clean",
    "top_k",
    "softmax_of_top_k",
    "softmax",
    "sigmoid",
    "sqrt_softplus",
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
    "selection_bias",
    "fixed_table",
    "observe_load",
    "RoutingStats",
    "routing_stats",
]
