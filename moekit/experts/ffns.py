"""Expert feed-forward networks, each written once over any grouped matmul: (rows (R, D), groups, params) -> (R, D).

Weights are stored (E, in, out), so no transpose is needed on the way into a product.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.types import GroupedMatmul, Groups


class GatedParams(NamedTuple):
    """Parameters of gated experts.

    Attributes:
        gate: (E, D, F), the projection that goes through the activation.
        up: (E, D, F), the projection that it multiplies.
        down: (E, F, D).

    Example:
        >>> params = GatedParams(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8), torch.zeros(2, 8, 4))
        >>> [w.shape for w in params] == [w.shape for w in init_gated(2, 4, 8)]
        True
    """

    gate: Tensor
    up: Tensor
    down: Tensor


class MlpParams(NamedTuple):
    """Parameters of two-matrix experts.

    Attributes:
        up: (E, D, F).
        down: (E, F, D).

    Example:
        >>> params = MlpParams(torch.zeros(2, 4, 8), torch.zeros(2, 8, 4))
        >>> [w.shape for w in params] == [w.shape for w in init_mlp(2, 4, 8)]
        True
    """

    up: Tensor
    down: Tensor


def swiglu(rows: Tensor, groups: Groups, params: GatedParams, *, matmul: GroupedMatmul) -> Tensor:
    """Apply SwiGLU experts: (silu(x W_gate) * (x W_up)) W_down.

    Args:
        rows: (R, D).
        groups: of E groups.
        params: of E experts.
        matmul: the backend.

    Returns:
        (R, D).

    Raises:
        ValueError: if the parameters have no gate, or biases; from the matmul, if shapes do not fit, or it does not
            take such groups, as ``batched`` behind a dropless plan.

    Example:
        >>> from moekit.experts import init_gated, loop
        >>> swiglu(torch.ones(3, 4), Groups(torch.tensor([1, 2]), None), init_gated(2, 4, 8), matmul=loop).shape
        torch.Size([3, 4])

    References:
        Shazeer, GLU Variants Improve Transformer, 2020, equation 6, https://arxiv.org/abs/2002.05202
    """
    check_network_params("swiglu", params, GatedParams)
    hidden = F.silu(matmul(rows, groups, params.gate)) * matmul(rows, groups, params.up)
    return matmul(hidden, groups, params.down)


def geglu(
    rows: Tensor, groups: Groups, params: GatedParams, *, matmul: GroupedMatmul, approximate: str = "none"
) -> Tensor:
    """Apply GeGLU experts: (gelu(x W_gate) * (x W_up)) W_down.

    Args:
        rows: (R, D).
        groups: of E groups.
        params: of E experts.
        matmul: the backend.
        approximate: torch's GELU form, "none" (exact) or "tanh" (Gemma).

    Returns:
        (R, D).

    Raises:
        ValueError: if the parameters have no gate, or biases; from the matmul, if shapes do not fit, or it does not
            take such groups, as ``batched`` behind a dropless plan.

    Example:
        >>> from moekit.experts import init_gated, loop
        >>> geglu(torch.ones(3, 4), Groups(torch.tensor([1, 2]), None), init_gated(2, 4, 8), matmul=loop).shape
        torch.Size([3, 4])

    References:
        Shazeer, GLU Variants Improve Transformer, 2020, equation 6, https://arxiv.org/abs/2002.05202
    """
    check_network_params("geglu", params, GatedParams)
    hidden = F.gelu(matmul(rows, groups, params.gate), approximate=approximate) * matmul(rows, groups, params.up)
    return matmul(hidden, groups, params.down)


def gelu_mlp(
    rows: Tensor, groups: Groups, params: MlpParams, *, matmul: GroupedMatmul, approximate: str = "tanh"
) -> Tensor:
    """Apply two-matrix GELU experts, gelu(x W_up) W_down; the tanh form is MegaBlocks' and OpenLM's.

    Args:
        rows: (R, D).
        groups: of E groups.
        params: of E experts.
        matmul: the backend.
        approximate: torch's GELU form, "tanh" or "none" (exact).

    Returns:
        (R, D).

    Raises:
        ValueError: if the parameters have a gate or biases; from the matmul, if shapes do not fit, or it does not take
            such groups.

    Example:
        >>> from moekit.experts import init_mlp, loop
        >>> gelu_mlp(torch.ones(3, 4), Groups(torch.tensor([1, 2]), None), init_mlp(2, 4, 8), matmul=loop).shape
        torch.Size([3, 4])

    References:
        Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, https://arxiv.org/abs/1606.08415
    """
    check_network_params("gelu_mlp", params, MlpParams)
    return matmul(F.gelu(matmul(rows, groups, params.up), approximate=approximate), groups, params.down)


def relu_mlp(rows: Tensor, groups: Groups, params: MlpParams, *, matmul: GroupedMatmul) -> Tensor:
    """Apply two-matrix ReLU experts, relu(x W_up) W_down, as in GShard and Switch.

    Args:
        rows: (R, D).
        groups: of E groups.
        params: of E experts.
        matmul: the backend.

    Returns:
        (R, D).

    Raises:
        ValueError: if the parameters have a gate or biases; from the matmul, if shapes do not fit, or it does not take
            such groups.

    Example:
        >>> from moekit.experts import init_mlp, loop
        >>> relu_mlp(torch.ones(3, 4), Groups(torch.tensor([1, 2]), None), init_mlp(2, 4, 8), matmul=loop).shape
        torch.Size([3, 4])

    References:
        Vaswani et al., Attention Is All You Need, 2017, equation 2, https://arxiv.org/abs/1706.03762
    """
    check_network_params("relu_mlp", params, MlpParams)
    return matmul(F.relu(matmul(rows, groups, params.up)), groups, params.down)


def relu2(rows: Tensor, groups: Groups, params: MlpParams, *, matmul: GroupedMatmul) -> Tensor:
    """Apply two-matrix squared-ReLU experts, relu(x W_up)^2 W_down.

    Args:
        rows: (R, D).
        groups: of E groups.
        params: of E experts.
        matmul: the backend.

    Returns:
        (R, D).

    Raises:
        ValueError: if the parameters have a gate or biases; from the matmul, if shapes do not fit, or it does not take
            such groups.

    Example:
        >>> from moekit.experts import init_mlp, loop
        >>> relu2(torch.ones(3, 4), Groups(torch.tensor([1, 2]), None), init_mlp(2, 4, 8), matmul=loop).shape
        torch.Size([3, 4])

    References:
        So et al., Primer, 2021, section 3 (squared ReLU), https://arxiv.org/abs/2109.08668
    """
    check_network_params("relu2", params, MlpParams)
    return matmul(F.relu(matmul(rows, groups, params.up)).square(), groups, params.down)


def init_gated(
    num_experts: int,
    dim: int,
    hidden: int | None = None,
    *,
    std: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GatedParams:
    """Draw gated experts from a normal distribution.

    Args:
        num_experts: E.
        dim: D.
        hidden: F; None takes 8 D / 3 rounded up to a multiple of 64, which costs what a 4 D two-matrix MLP costs.
        std: standard deviation of all three; None takes 1 / sqrt(inputs) of each.
        generator: of the draw; None takes torch's global one.
        device: as in torch.empty.
        dtype: as in torch.empty.

    Returns:
        GatedParams.

    Example:
        >>> init_gated(2, 96).up.shape
        torch.Size([2, 96, 256])
    """
    hidden = -(-8 * dim // 3 // 64) * 64 if hidden is None else hidden
    draw = _Normal(std, generator, device, dtype)
    return GatedParams(draw(num_experts, dim, hidden), draw(num_experts, dim, hidden), draw(num_experts, hidden, dim))


def init_mlp(
    num_experts: int,
    dim: int,
    hidden: int | None = None,
    *,
    std: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MlpParams:
    """Draw two-matrix experts from a normal distribution.

    Args:
        num_experts: E.
        dim: D.
        hidden: F; None takes 4 D.
        std: standard deviation of both; None takes 1 / sqrt(inputs) of each.
        generator: of the draw; None takes torch's global one.
        device: as in torch.empty.
        dtype: as in torch.empty.

    Returns:
        MlpParams.

    Example:
        >>> init_mlp(2, 16).up.shape
        torch.Size([2, 16, 64])
    """
    hidden = 4 * dim if hidden is None else hidden
    draw = _Normal(std, generator, device, dtype)
    return MlpParams(draw(num_experts, dim, hidden), draw(num_experts, hidden, dim))


_PARTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def check_network_params(name: str, params: Any, kind: type[Any]) -> None:
    """Refuse parameters that lack some that are needed, or have more: what is left out would be no error, but wrong.

    Args:
        name: of the expert network, for the message.
        params: that it was given.
        kind: the NamedTuple that it takes; anything with its fields, and no other that experts have, will do.

    Raises:
        ValueError: if a field is not there, or one is that the network does not use; if gate and up differ in width.

    Example:
        >>> check_network_params("gelu_mlp", init_gated(2, 4, 8), MlpParams)
        Traceback (most recent call last):
        ValueError: gelu_mlp: the experts' parameters are GatedParams, whose gate it would not use; expected \
MlpParams. Use swiglu or geglu for a gate, gelu_mlp, relu_mlp or relu2 without, biased_gated or biased_mlp for biases; \
or draw the parameters with init_mlp, or unpack them with unpack_gated.
    """
    found = [part for part in _PARTS if hasattr(params, part)]
    if found == [part for part in _PARTS if part in kind._fields]:
        if "gate" in found and params.gate.shape[-1] != params.up.shape[-1]:
            raise ValueError(
                f"{name}: the experts' gate is {tuple(params.gate.shape)} and their up {tuple(params.up.shape)}; "
                f"expected (E, D, F) of both. Draw them as wide as each other in the recipe's init, as init_gated does."
            )
        return
    lacking = [part for part in kind._fields if part not in found]
    unused = [part for part in found if part not in kind._fields]
    what = f"which lack {', '.join(lacking)}" if lacking else f"whose {', '.join(unused)} it would not use"
    draws = f"{'biased_' if 'up_bias' in kind._fields else ''}{'gated' if 'gate' in kind._fields else 'mlp'}"
    raise ValueError(
        f"{name}: the experts' parameters are {type(params).__name__}, {what}; expected {kind.__name__}. Use swiglu or "
        f"geglu for a gate, gelu_mlp, relu_mlp or relu2 without, biased_gated or biased_mlp for biases; or draw the "
        f"parameters with init_{draws}, or unpack them with unpack_gated."
    )


class _Normal(NamedTuple):
    std: float | None
    generator: torch.Generator | None
    device: torch.device | str | None
    dtype: torch.dtype | None

    def __call__(self, num_experts: int, inputs: int, outputs: int) -> Tensor:
        w = torch.empty(num_experts, inputs, outputs, device=self.device, dtype=self.dtype)
        return w.normal_(std=inputs**-0.5 if self.std is None else self.std, generator=self.generator)
