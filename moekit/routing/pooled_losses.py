"""The balancing loss over all layers at once, as Hugging Face's models have it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moekit.routing.gates import clean
from moekit.routing.losses import balance_of_pools, shares
from moekit.routing.scopes import counts_of_pools, hidden_logits, real_tokens, sums_of_pools
from moekit.routing.top_k import Score, softmax
from moekit.types import Logits, Routing


def pooled_balance_loss(
    logits: Sequence[Logits],
    routings: Sequence[Routing],
    *,
    token_mask: Tensor | None = None,
    score: Score = softmax,
    choices: int | None = None,
    per_token: float | None = 1.0,
) -> Tensor:
    """Compute Hugging Face's balancing loss, E * sum_k sum_e f_ke P_e with f and P over the tokens of all layers.

    **K at perfect balance**, where the loss of one layer is 1. It sees the sum over layers alone: expert e of layer 1
    and expert e of layer 2, which have nothing in common but their number, make up for each other. So it can be at its
    minimum while every layer has collapsed, and its gradient then asks no layer to change. It is here for comparison
    with models trained by it; ``load_balance_loss`` per layer does not have that hole. With one layer the two differ by
    the factor K.

    Not a ``Loss`` of one layer: give it what the layers of a model returned.

    No host synchronisation. Deterministic on CUDA.

    Args:
        logits: of each layer, (T, E) float32.
        routings: of each layer, over the same tokens and as many experts.
        token_mask: (T,) bool, True for real tokens.
        score: what P averages; scores that do not sum to one per token are divided by their sum.
        choices: count only the first so many choices of each token; None counts all.
        per_token: assignments per token that count as one. 1 is Hugging Face's; None makes f sum to one, and the loss 1
            at perfect balance.

    Returns:
        Scalar float32.

    Raises:
        ValueError: if there is no layer, the layers differ in tokens or experts, or logits are in half precision.

    Example:
        >>> import torch
        >>> from moekit.routing import round_robin
        >>> z = torch.zeros(8, 4)
        >>> pooled_balance_loss([z, z], [round_robin(z, k=2)] * 2)
        tensor(2.)

    References:
        Hugging Face transformers, ``load_balancing_loss_func`` of its Mixtral model
    """
    _check_layers(logits, routings)
    counts = torch.stack([counts_of_pools(routing, token_mask, choices=choices) for routing in routings]).sum(0)
    scores = [shares(hidden_logits("pooled_balance_loss", z, token_mask), score) for z in logits]
    sums = torch.stack([sums_of_pools(layer, token_mask) for layer in scores]).sum(0)  # (1, E)
    real = len(scores) * real_tokens(scores[0], token_mask)
    return balance_of_pools(counts, sums, real, per_token=per_token)


def _check_layers(logits: Sequence[Logits], routings: Sequence[Routing]) -> None:
    shapes = [tuple(clean(z).shape) for z in logits]
    routed = [(routing.num_tokens, routing.num_experts) for routing in routings]
    if not shapes or len(set(shapes)) > 1 or shapes != routed:
        raise ValueError(
            f"pooled_balance_loss: the layers' logits have shapes {shapes} and their routings (T, E) = {routed}; "
            f"expected one pair per layer, at least one, all of the same T and E. Take load_balance_loss of each layer "
            f"for layers that differ."
        )
