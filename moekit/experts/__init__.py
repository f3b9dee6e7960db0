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
from moekit.experts.matmuls import batched, grouped, loop
from moekit.experts.simple import init_simple, simple, simple_experts

__all__ = [
    "loop",
    "batched",
    "grouped",
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
