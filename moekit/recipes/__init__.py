"""Recipes: stages glued into layers, published methods, and the programs built on them."""

from moekit.recipes.backends import auto, choose_backend
from moekit.recipes.expert_layers import expert_layer, limited, recompute
from moekit.recipes.families import dbrx, gpt_oss, granite_moe, jamba, phi_moe, qwen2_moe, qwen3_moe
from moekit.recipes.layers import MoEParams, Recipe, moe_layer, shared_experts, weighted_sum
from moekit.recipes.modules import MoE
from moekit.recipes.published import deepseek_moe, gshard, mixtral, olmoe, openlm, switch
from moekit.recipes.published_routers import (
    base_sinkhorn,
    dynamic_k,
    expert_choice,
    hash_layer,
    moe_plus_plus,
    quantile_moe,
    remoe,
    soft_moe,
    sonic_token_rounding,
    sparsely_gated,
    st_moe,
    xmoe,
)
from moekit.recipes.sigmoid_families import deepseek_v2, deepseek_v3, ernie_moe, llama4, longcat_flash, nemotron_moe

__all__ = [
    "MoE",
    "MoEParams",
    "Recipe",
    "expert_layer",
    "moe_layer",
    "limited",
    "recompute",
    "shared_experts",
    "weighted_sum",
    "auto",
    "choose_backend",
    # published methods, oldest first
    "sparsely_gated",
    "gshard",
    "switch",
    "base_sinkhorn",
    "hash_layer",
    "openlm",
    "st_moe",
    "expert_choice",
    "xmoe",
    "soft_moe",
    "mixtral",
    "dynamic_k",
    "dbrx",
    "jamba",
    "qwen2_moe",
    "granite_moe",
    "phi_moe",
    "olmoe",
    "moe_plus_plus",
    "remoe",
    "deepseek_moe",
    "deepseek_v2",
    "deepseek_v3",
    "llama4",
    "qwen3_moe",
    "ernie_moe",
    "gpt_oss",
    "longcat_flash",
    "nemotron_moe",
    "quantile_moe",
    "sonic_token_rounding",
]
