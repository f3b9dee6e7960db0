"""Experts: grouped matrix products, and the feed-forward networks written over any of them."""

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

__all__ = [
    "loop",
    "batched",
    "grouped",
    "swiglu",
    "geglu",
    "gelu_mlp",
    "relu_mlp",
    "relu2",
    "GatedParams",
    "MlpParams",
    "init_gated",
    "init_mlp",
]
