"""moekit: composable functional primitives for Mixture-of-Experts language models.

Every stage of an MoE layer is a small pure function; a recipe glues stages together; each can be swapped, measured and
ablated alone. Start with ``moekit.recipes`` for whole layers, or with ``moekit.types`` for the shapes of the seams.
"""

from moekit.recipes import MoE, Recipe, expert_layer, moe_layer
from moekit.types import DispatchPlan, Groups, LayerOutput, Routing, SoftRouting

__all__ = [
    "MoE",
    "Recipe",
    "expert_layer",
    "moe_layer",
    "Routing",
    "SoftRouting",
    "Groups",
    "DispatchPlan",
    "LayerOutput",
]
__version__ = "0.1.0"
