"""What a router remembers between optimizer steps, each kind as a value: its first tensor, what it watches, its update.

Nothing is kept here. A layer holds the tensor, a trainer adds up what ``observe`` returned over the micro-batches and
ranks of a step, and ``update`` makes the next tensor of that.
"""

from functools import partial

import torch
from torch import Tensor

from moekit.routing.fixed import hash_table
from moekit.routing.gates import clean
from moekit.routing.losses import update_bias
from moekit.routing.quantiles import quantile_duals
from moekit.segments import tokens_per_expert
from moekit.types import Logits, RouterState, Routing


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
    return RouterState("bias", _zeros, observe_load, partial(update_bias, rate=rate, center=center, limit=limit))


def quantile_bias(*, k: int) -> RouterState:
    """Make the state of quantile balancing: minus the dual variables, each moved to where an even load wants it.

    A step of several micro-batches or ranks takes the mean of theirs, each by its real tokens.

    Args:
        k: experts per token of the router.

    Returns:
        RouterState, an (E,) float32 tensor named ``bias``. It observes E sums and the number of tokens.

    Example:
        >>> state = quantile_bias(k=1)
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
        >>> state.update(state.init(2), state.observe(logits, None, state.init(2)))
        tensor([-1., -0.])

    References:
        Megatron-LM, megatron/core/transformer/moe/moe_utils.py, ``qb_dual_update``, https://github.com/NVIDIA/Megatron-LM
    """
    return RouterState("bias", _zeros, partial(_observe_duals, k=k), _mean_duals)


def fixed_table(*, vocab_size: int, k: int, seed: int = 0) -> RouterState:
    """Make the state of a hash layer: a table of k experts for each vocabulary id, which stays as it is.

    Args:
        vocab_size: V.
        k: experts per id.
        seed: of the draw.

    Returns:
        RouterState, a (V, k) int64 tensor named ``table``.

    Example:
        >>> fixed_table(vocab_size=100, k=1).init(8).shape
        torch.Size([100, 1])

    References:
        Roller et al., Hash Layers for Large Sparse Models, 2021, https://arxiv.org/abs/2106.04426
    """
    return RouterState("table", partial(_table, vocab_size=vocab_size, k=k, seed=seed))


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


def _observe_duals(
    logits: Logits, routing: Routing | None, state: Tensor, *, k: int, token_mask: Tensor | None = None
) -> Tensor:
    plain = clean(logits)
    tokens = plain.new_tensor(float(plain.shape[0])) if token_mask is None else token_mask.sum()
    duals = quantile_duals(plain, -state, k=k, token_mask=token_mask).double()
    return torch.cat([duals * tokens, tokens.double().view(1)])


def _mean_duals(bias: Tensor, sums: Tensor) -> Tensor:
    return torch.where(sums[-1] > 0, -sums[:-1] / sums[-1].clamp_min(1), bias).to(bias.dtype)


def _zeros(num_experts: int, *, device: torch.device | str | None = None) -> Tensor:
    return torch.zeros(num_experts, device=device)


def _table(num_experts: int, *, vocab_size: int, k: int, seed: int, device: torch.device | str | None = None) -> Tensor:
    return hash_table(vocab_size, num_experts, k=k, seed=seed).to(device)
