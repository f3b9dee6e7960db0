"""Recipes: stages glued into layers, published methods, and the programs built on them."""

from moekit.recipes.layers import MoEParams, Recipe, expert_layer, moe_layer, recompute, shared_experts, weighted_sum
from moekit.recipes.modules import MoE
from moekit.recipes.published import deepseek_moe, gshard, mixtral, olmoe, openlm, switch

__all__ = [
    "MoE",
    "MoEParams",
    "Recipe",
    "expert_layer",
    "moe_layer",
    "recompute",
    "shared_experts",
    "weighted_sum",
    "openlm",
    "switch",
    "gshard",
    "mixtral",
    "olmoe",
    "deepseek_moe",
]
