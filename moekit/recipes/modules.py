"""The one ``nn.Module`` that users need: parameters and state around ``moe_layer``."""

from typing import Any

import torch
from torch import Tensor, nn

from moekit.parallel import Part
from moekit.recipes.expert_parameters import RoutedExperts, draw_experts, hidden_size
from moekit.recipes.layers import MoEParams, Recipe, moe_layer
from moekit.routing import update_bias
from moekit.types import LayerOutput, Routing


class MoE(nn.Module):
    """A Mixture-of-Experts feed-forward layer, (..., D) -> (..., D), that runs a recipe.

    Args:
        dim: D, the model dimension.
        num_experts: E.
        recipe: the method; ``moe.recipe = moe.recipe._replace(...)`` swaps a stage.
        hidden: F of each expert; None takes what the recipe's ``init`` takes.
        part: the part of the routed experts that this rank owns, where the recipe's layer is wrapped in a strategy that
            spreads them over ranks.
        generator: of the initial weights; None takes torch's global one.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        gate: (D, E) parameter.
        experts: module with the parameters of the routed experts, each (E, ., .).
        shared: parameters of the shared experts, if the recipe has any.
        bias: (E,) float32 buffer, the selection bias, if the recipe has one. Its update is the trainer's job, once per
            optimizer step: see ``update_selection_bias``.

    Raises:
        ValueError: if a size is not positive.

    Example:
        >>> from moekit.recipes import mixtral
        >>> moe = MoE(16, 4, mixtral(k=2), hidden=32)
        >>> output = moe(torch.randn(2, 5, 16))
        >>> output.y.shape, output.routing.expert_indices.shape
        (torch.Size([2, 5, 16]), torch.Size([10, 2]))
    """

    bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        recipe: Recipe,
        *,
        hidden: int | None = None,
        part: Part = Part(),  # noqa: B008, an immutable tuple
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("num_experts", num_experts), ("hidden", 1 if hidden is None else hidden)):
            if size < 1:
                raise ValueError(f"MoE: {name} = {size}; expected a positive integer.")
        options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        std = dim**-0.5 if recipe.gate_std is None else recipe.gate_std
        gate = torch.empty(dim, num_experts, device=device, dtype=dtype).normal_(std=std, generator=generator)
        self.recipe = recipe
        self.num_experts = num_experts
        self.gate = nn.Parameter(gate)
        self.experts = RoutedExperts(draw_experts(recipe.init, num_experts, dim, hidden, part=part, **options))
        self.shared = nn.ParameterDict()
        if recipe.shared is not None:
            shared = recipe.init(1, dim, hidden_size(recipe.init, dim, hidden) * recipe.num_shared, **options)
            self.shared, self._shared_type = _parameters(shared), type(shared)
        bias = torch.zeros(num_experts, device=device) if recipe.bias_rate else None
        self.register_buffer("bias", bias)

    def params(self) -> MoEParams:
        """Return the parameters as the NamedTuple that ``moe_layer`` takes."""
        return MoEParams(self.gate, self.experts.params(), self._shared())

    def _shared(self) -> Any:
        if self.recipe.shared is None:
            return None
        return self._shared_type(*(self.shared[name] for name in self._shared_type._fields))

    def _routed(self, x: Tensor, routing: Routing, _: Any) -> Tensor:
        return self.experts(self.recipe.layer, x, routing)

    def forward(self, x: Tensor, *, token_ids: Tensor | None = None, token_mask: Tensor | None = None) -> LayerOutput:
        """Apply the layer; see ``moe_layer`` for arguments and result."""
        params = MoEParams(self.gate, None, self._shared())
        options = {"bias": self.bias, "token_ids": token_ids, "token_mask": token_mask}
        return moe_layer(x, params, self.recipe, layer=self._routed, **options)

    @torch.no_grad()
    def update_selection_bias(self, tokens_per_expert: Tensor) -> None:
        """Move the selection bias one step, from counts (E,) over the whole optimizer step; nothing without a bias."""
        if self.bias is not None:
            self.bias.copy_(update_bias(self.bias, tokens_per_expert, rate=self.recipe.bias_rate))

    def extra_repr(self) -> str:
        """Describe the sizes in ``print(moe)``."""
        return f"dim={self.gate.shape[0]}, num_experts={self.num_experts}"


def _parameters(tensors: Any) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in tensors._asdict().items()})
