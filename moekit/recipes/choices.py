"""What a recipe's router chooses from, asked without a model."""

import torch

from moekit.recipes.layers import Recipe
from moekit.types import Logits


def num_choices(recipe: Recipe, num_experts: int) -> int:
    """Count the experts that a router chooses from: the networks and the simple ones.

    Args:
        recipe: the method.
        num_experts: E.

    Returns:
        How many.

    Example:
        >>> from moekit.recipes import moe_plus_plus
        >>> num_choices(moe_plus_plus(), 8)
        12
    """
    return num_experts + (0 if recipe.simple is None else recipe.simple.number)


def undecided_logits(recipe: Recipe, num_experts: int, num_tokens: int) -> Logits:
    """Return what a recipe's gate, freshly drawn, makes of tokens of zeros, on the CPU.

    Draws from torch's global generator.

    Args:
        recipe: the method.
        num_experts: E.
        num_tokens: T.

    Returns:
        Logits of T tokens, as wide as the router takes them.

    Example:
        >>> from moekit.recipes import mixtral
        >>> undecided_logits(mixtral(), 8, 3).shape
        torch.Size([3, 8])
    """
    gate = recipe.init_gate(8, num_choices(recipe, num_experts), device="cpu")
    return recipe.gate(torch.zeros(num_tokens, 8, device="cpu"), gate)
