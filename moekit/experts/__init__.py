"""Experts: grouped matrix products, and the feed-forward networks written over any of them."""

from moekit.experts.activations import (
    CLAMPED_SWIGLU,
    GEGLU,
    GEGLU_TANH,
    GELU_MLP,
    RELU2,
    RELU_MLP,
    SWIGLU,
    Activation,
)
from moekit.experts.biased import (
    BiasedGatedParams,
    BiasedMlpParams,
    biased_gated,
    biased_mlp,
    clamped_swiglu,
    init_biased_gated,
    init_biased_mlp,
)
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
from moekit.experts.fused import fused_layer
from moekit.experts.fused_cpu import fused_cpu
from moekit.experts.keep import EVERYTHING, INPUTS, PREACTIVATION, Keep
from moekit.experts.matmuls import batched, grouped, loop
from moekit.experts.packed import PackedGatedParams, pack_gated, unpack_gated
from moekit.experts.simple import init_simple, simple, simple_experts
from moekit.experts.tile_files import layer_tiles, read_tiles
from moekit.experts.tile_tables import from_table
from moekit.experts.tiles import LayerSize, LayerTiles, Tile, ruled_tiles
from moekit.experts.triton_matmul import triton

__all__ = [
    # grouped products
    "loop",
    "batched",
    "grouped",
    "triton",
    # whole layers
    "fused_layer",
    "fused_cpu",
    "Activation",
    "SWIGLU",
    "GEGLU",
    "GEGLU_TANH",
    "CLAMPED_SWIGLU",
    "GELU_MLP",
    "RELU_MLP",
    "RELU2",
    "Keep",
    "EVERYTHING",
    "PREACTIVATION",
    "INPUTS",
    "Tile",
    "LayerTiles",
    "LayerSize",
    "layer_tiles",
    "ruled_tiles",
    "from_table",
    "read_tiles",
    # expert networks, and their parameters
    "swiglu",
    "geglu",
    "gelu_mlp",
    "relu_mlp",
    "relu2",
    "clamped_swiglu",
    "biased_gated",
    "biased_mlp",
    "GatedParams",
    "MlpParams",
    "BiasedGatedParams",
    "BiasedMlpParams",
    "PackedGatedParams",
    "pack_gated",
    "unpack_gated",
    "init_gated",
    "init_mlp",
    "init_biased_gated",
    "init_biased_mlp",
    "simple",
    "simple_experts",
    "init_simple",
]
