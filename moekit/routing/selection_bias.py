"""The selection bias of loss-free balancing: a step of it, and the state that a router remembers it by.

Other states are beside their routers: ``adaptive_l1`` in `relu`, ``quantile_bias`` in `quantiles`, ``fixed_table`` in
`fixed`. This one is for every router that takes a bias. Nothing is kept here: a layer holds the tensor, a trainer adds
up what ``observe`` returned over the micro-batches and ranks of a step, and ``update`` makes the next tensor of that.
"""

from functools import partial

import torch
from torch import Tensor

from moekit.segments import tokens_per_expert
from moekit.types import Logits, RouterState, Routing

ZEROS = partial(torch.zeros, dtype=torch.float32)  # to begin with; float32 whatever torch's default is


def update_bias(
    bias: Tensor, tokens_per_expert: Tensor, *, rate: float, center: bool = False, limit: float | None = None
) -> Tensor:
    """Move the selection bias one step toward balance: b_e + rate * sign(mean(c) - c_e).

    Call it once per optimizer step, with counts summed over all micro-batches and ranks. Without more arguments this is
    DeepSeek-V3's rule. Subtracting the mean is a shift that all experts share: it keeps the bias from drifting and
    changes no top-k. A limit does change the selection, once it binds.

    No host synchronisation. Deterministic on CUDA.

    Args:
        bias: (E,) float32.
        tokens_per_expert: (E,) counts.
        rate: step size (DeepSeek-V3: 0.001).
        center: subtract the mean of the new bias, as TorchTitan and nmoe do.
        limit: clamp the new bias to [-limit, limit], after it was centred; nmoe has 16.

    Returns:
        (E,) the new bias; the argument is unchanged.

    Raises:
        ValueError: if the shapes differ, or the limit is not positive.

    Example:
        >>> update_bias(torch.zeros(3), torch.tensor([4, 1, 1]), rate=0.5)
        tensor([-0.5000,  0.5000,  0.5000])

    References:
        Wang et al., Auxiliary-Loss-Free Load Balancing, 2024, Algorithm 1, https://arxiv.org/abs/2408.15664
    """
    if bias.shape != tokens_per_expert.shape:
        raise ValueError(
            f"update_bias: bias has shape {tuple(bias.shape)} and tokens_per_expert {tuple(tokens_per_expert.shape)}; "
            f"expected one number per expert in both."
        )
    if limit is not None and not limit > 0:
        raise ValueError(f"update_bias: limit = {limit}; expected a positive number, or None for no limit.")
    counts = tokens_per_expert.double()  # float32 knows whole numbers up to 2^24 alone
    bias = bias + rate * torch.sign(counts.mean() - counts).to(bias.dtype)
    if center:
        bias = bias - bias.mean()
    return bias if limit is None else bias.clamp(-limit, limit)


def selection_bias(*, rate: float, center: bool = False, limit: float | None = None) -> RouterState:
    """Make the state of loss-free balancing: a bias on the selection, moved by the load of each step.

    Args:
        rate: step of the bias, see ``update_bias``.
        center: subtract the mean of the new bias, as TorchTitan and nmoe do.
        limit: clamp the new bias to [-limit, limit], after it was centred; nmoe has 16.

    Returns:
        RouterState, an (E,) float32 tensor named ``bias``.

    Example:
        >>> state = selection_bias(rate=0.5)
        >>> state.update(state.init(3), torch.tensor([4, 1, 1]))
        tensor([-0.5000,  0.5000,  0.5000])

    References:
        Wang et al., Auxiliary-Loss-Free Load Balancing, 2024, https://arxiv.org/abs/2408.15664
    """
    return RouterState("bias", ZEROS, observe_load, partial(update_bias, rate=rate, center=center, limit=limit))


def observe_load(logits: Logits, routing: Routing, state: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """Count the assignments of each expert, before any drop.

    Args:
        logits: not used.
        routing: the decision, padding tokens already taken out.
        state: not used.
        token_mask: not used.

    Returns:
        (E,) float64.

    Example:
        >>> from moekit.routing import round_robin
        >>> observe_load(torch.zeros(4, 2), round_robin(torch.zeros(4, 2), k=1), torch.zeros(2))
        tensor([2., 2.], dtype=torch.float64)
    """
    return tokens_per_expert(routing.expert_indices, routing.num_experts).double()
