"""Experts: grouped matrix products, and the feed-forward networks written over any of them."""

from moekit.experts.biased import BiasedGatedParams, clamped_swiglu, init_biased_gated
from moekit.experts.ffns import (
    GatedParams,
    MlpParams,
    geglu,
    gelu_mlp,
    init_gated,
    init_mlp,
    relu2,
    relu_mlp,
    swiglu,
)
from moekit.experts.fused import EVERYTHING, INPUTS, PREACTIVATION, SWIGLU, Activation, Keep, fused_layer
from moekit.experts.fused_cpu import fused_cpu
from moekit.experts.matmuls import batched, grouped, loop
from moekit.experts.simple import init_simple, simple, simple_experts
from moekit.experts.triton_matmul import triton

__all__ = [
    "loop",
    "batched",
    "grouped",
    "triton",
    "fused_layer",
    "fused_cpu",
    "Activation",
    "SWIGLU",
    "Keep",
    "EVERYTHING",
    "PREACTIVATION",
    "INPUTS",
    "swiglu",
    "geglu",
    "gelu_mlp",
    "relu_mlp",
    "relu2",
    "clamped_swiglu",
    "GatedParams",
    "MlpParams",
    "init_gated",
    "init_mlp",
    "BiasedGatedParams",
    "init_biased_gated",
    "simple",
    "simple_experts",
    "init_simple",
]
