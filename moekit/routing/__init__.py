"""Routing: tokens to logits to a decision, with balancing losses, router states, statistics and the causality audit."""

from moekit.routing.biased_gate import BiasedGateParams, biased_gate, init_biased_gate
from moekit.routing.causality import Causality, causality
from moekit.routing.coefficients import LossForm, convert_coefficient, value_at_balance
from moekit.routing.cosine import CosineGateParams, cosine_gate, init_cosine_gate
from moekit.routing.dynamic_k import threshold, top_p
from moekit.routing.expert_choice import expert_capacity, expert_choice
from moekit.routing.fixed import fixed_table, hash_choice, hash_table, random_choice, round_robin
from moekit.routing.fused_top_k import fused_top_k, fused_top_k_and_load
from moekit.routing.gates import clean, init_linear_gate, linear_gate, noisy, score_and_pass
from moekit.routing.group_limited import group_limited
from moekit.routing.heterogeneous import heterogeneous_balance_loss
from moekit.routing.importance_losses import importance_loss, load_loss
from moekit.routing.losses import load_balance_loss, z_loss
from moekit.routing.masks import mask_tokens, random_second
from moekit.routing.moved_mass import moved_mass
from moekit.routing.noise import (
    NoisyGateParams,
    gumbel_noise,
    init_noisy_gate,
    input_jitter,
    logit_noise,
    noisy_gate,
    noisy_top_k,
)
from moekit.routing.pooled_losses import pooled_balance_loss
from moekit.routing.quantiles import quantile_balanced, quantile_bias, quantile_duals
from moekit.routing.regularizers import entropy_loss, weighted_l1_loss
from moekit.routing.relu import adaptive_l1, relu_choice
from moekit.routing.scopes import each_sequence, each_token, whole_batch
from moekit.routing.selection_bias import observe_load, selection_bias, update_bias
from moekit.routing.sequence_losses import sequence_balance_loss
from moekit.routing.simple import without_simple
from moekit.routing.sinkhorn import sinkhorn
from moekit.routing.soft import SoftGateParams, init_soft_gate, mask_soft, soft_gate, soft_slots
from moekit.routing.sparse_mixer import sparse_mixer
from moekit.routing.stats import RoutingStats, routing_stats
from moekit.routing.token_rounding import round_tokens, token_rounding
from moekit.routing.top_k import (
    sigmoid,
    sigmoid_of_top_k,
    softmax,
    softmax_of_top_k,
    softmax_over_tokens,
    sqrt_softplus,
    token_choice,
    top_k,
    weights_at,
)
from moekit.routing.topology import over_nodes, topology_limited

__all__ = [
    # gates
    "linear_gate",
    "init_linear_gate",
    "score_and_pass",
    "biased_gate",
    "init_biased_gate",
    "BiasedGateParams",
    "cosine_gate",
    "init_cosine_gate",
    "CosineGateParams",
    "soft_gate",
    "init_soft_gate",
    "SoftGateParams",
    "noisy_gate",
    "init_noisy_gate",
    "NoisyGateParams",
    "input_jitter",
    "gumbel_noise",
    "logit_noise",
    "noisy",
    "clean",
    # token choice
    "top_k",
    "softmax_of_top_k",
    "sigmoid_of_top_k",
    "fused_top_k",
    "fused_top_k_and_load",
    "noisy_top_k",
    "group_limited",
    "quantile_balanced",
    "sinkhorn",
    "sparse_mixer",
    "top_p",
    "threshold",
    "relu_choice",
    "topology_limited",
    "over_nodes",
    "softmax",
    "sigmoid",
    "sqrt_softplus",
    "softmax_over_tokens",
    "token_choice",
    "weights_at",
    # other choices
    "expert_choice",
    "expert_capacity",
    "soft_slots",
    "hash_choice",
    "hash_table",
    "random_choice",
    "round_robin",
    # edits and wrappers of a routing
    "token_rounding",
    "round_tokens",
    "moved_mass",
    "mask_tokens",
    "mask_soft",
    "random_second",
    "without_simple",
    # losses
    "load_balance_loss",
    "sequence_balance_loss",
    "pooled_balance_loss",
    "heterogeneous_balance_loss",
    "z_loss",
    "importance_loss",
    "load_loss",
    "weighted_l1_loss",
    "entropy_loss",
    "LossForm",
    "convert_coefficient",
    "value_at_balance",
    "whole_batch",
    "each_sequence",
    "each_token",
    # what a router remembers
    "selection_bias",
    "quantile_bias",
    "adaptive_l1",
    "fixed_table",
    "observe_load",
    "update_bias",
    "quantile_duals",
    # what a routing is like
    "RoutingStats",
    "routing_stats",
    "Causality",
    "causality",
]
