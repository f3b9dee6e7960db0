"""Published methods, each a composition of stages, without arithmetic of its own."""

from functools import partial

from torch import Tensor

from moekit.dispatch import by_choice, dropless, padded
from moekit.experts import gelu_mlp, grouped, init_gated, init_mlp, relu_mlp, swiglu
from moekit.recipes.expert_layers import expert_layer
from moekit.recipes.layers import Recipe
from moekit.routing import (
    init_linear_gate,
    linear_gate,
    load_balance_loss,
    random_second,
    selection_bias,
    sigmoid,
    top_k,
    z_loss,
)
from moekit.types import Dispatcher, Experts, GroupedMatmul, Logits, Routing, SharedExperts


def openlm(*, k: int = 2, capacity_factor: float = 1.25, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose OpenLM's MoE layer, which is MegaBlocks' with its defaults.

    Softmax over all experts, top-k, not renormalised; capacity by position, or dropless at factor 0; two-matrix
    tanh-GELU experts of width 4 D; everything drawn from N(0, 0.02); balancing loss with coefficient 0.1. The expert
    bias that upstream allocates and never uses is left out.

    Causal, also when assignments are dropped: earlier positions of the batch keep their place. Padding counts in T of
    the capacity, 1.25 k T / E, so that more of it drops fewer tokens.

    Args:
        k: experts per token.
        capacity_factor: rows per expert relative to a balanced load; 0 drops nothing.
        matmul: the backend.

    Returns:
        Recipe.

    Raises:
        ValueError: if the capacity factor is negative or not finite.

    Example:
        >>> sorted(openlm().losses)
        ['load_balance']

    References:
        Gururangan et al., open_lm, 2023, MOE.md, https://github.com/mlfoundations/open_lm
        Gale et al., MegaBlocks, 2022, https://arxiv.org/abs/2211.15841
    """
    return compose(
        partial(top_k, k=k),
        padded(capacity_factor=capacity_factor),
        partial(gelu_mlp, matmul=matmul),
        losses={"load_balance": load_balance_loss},
        coefficients={"load_balance": 0.1},
        init=partial(init_mlp, std=0.02),
        init_gate=partial(init_linear_gate, std=0.02),
    )


def switch(*, capacity_factor: float = 1.25, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose the Switch Transformer's layer: top-1 weighted by its probability, capacity, ReLU experts.

    Causal. The paper's input jitter is left out.

    Args:
        capacity_factor: rows per expert relative to a balanced load; 0 drops nothing.
        matmul: the backend.

    Returns:
        Recipe.

    Raises:
        ValueError: if the capacity factor is negative or not finite.

    Example:
        >>> switch().coefficients["load_balance"]
        0.01

    References:
        Fedus et al., Switch Transformers, 2021, https://arxiv.org/abs/2101.03961
    """
    return compose(
        partial(top_k, k=1),
        padded(capacity_factor=capacity_factor),
        partial(relu_mlp, matmul=matmul),
        losses={"load_balance": load_balance_loss},
        coefficients={"load_balance": 0.01},
        init=init_mlp,
    )


def gshard(*, capacity_factor: float = 1.0, training: bool = True, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose GShard's layer: top-2 normalised, second expert at random by its weight, first choices served first.

    Capacity is 2 T / E at factor 1, as the paper's. The balancing loss counts first choices alone.

    Not causal: a later token's first choice can push out an earlier token's second. Draws from torch's generator.

    Args:
        capacity_factor: rows per expert relative to a balanced load of both choices; 0 drops nothing.
        training: draw second experts; else both are kept.
        matmul: the backend.

    Returns:
        Recipe.

    Raises:
        ValueError: if the capacity factor is negative or not finite.

    Example:
        >>> gshard().causal
        False

    References:
        Lepikhin et al., GShard, 2020, Algorithm 1, https://arxiv.org/abs/2006.16668
    """
    return compose(
        gshard_route if training else partial(top_k, k=2, normalize=True),
        padded(capacity_factor=capacity_factor, priority=by_choice),
        partial(relu_mlp, matmul=matmul),
        losses={"load_balance": partial(load_balance_loss, choices=1)},
        coefficients={"load_balance": 0.01},
        init=init_mlp,
    )._replace(causal=capacity_factor == 0)


def mixtral(*, k: int = 2, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose Mixtral's layer: top-k of a softmax, renormalised, dropless SwiGLU experts.

    Causal. The paper names no balancing loss; 0.02 is the number of its configuration in Hugging Face transformers,
    whose loss is k times larger than the one here and pools all layers (``convert_coefficient``).

    Args:
        k: experts per token.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> sorted(mixtral().losses)
        ['load_balance']

    References:
        Jiang et al., Mixtral of Experts, 2024, https://arxiv.org/abs/2401.04088
    """
    return compose(
        partial(top_k, k=k, normalize=True),
        dropless(),
        partial(swiglu, matmul=matmul),
        losses={"load_balance": load_balance_loss},
        coefficients={"load_balance": 0.02},
    )


def olmoe(*, k: int = 8, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose OLMoE's layer: softmax, top-k not renormalised, dropless SwiGLU experts, balancing loss and z-loss.

    Causal.

    Args:
        k: experts per token; the paper has 8 of 64.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> olmoe().coefficients
        {'load_balance': 0.01, 'z': 0.001}

    References:
        Muennighoff et al., OLMoE, 2024, https://arxiv.org/abs/2409.02060
    """
    return compose(
        partial(top_k, k=k),
        dropless(),
        partial(swiglu, matmul=matmul),
        losses={"load_balance": load_balance_loss, "z": z_loss},
        coefficients={"load_balance": 0.01, "z": 0.001},
    )


def deepseek_moe(
    *,
    k: int = 8,
    num_shared: int = 1,
    scale: float = 2.5,
    bias_rate: float = 0.001,
    matmul: GroupedMatmul = grouped,
) -> Recipe:
    """Compose DeepSeek-V3's layer without its group limit: sigmoid scores, selection bias, shared experts, SwiGLU.

    Balance comes from the bias; the small balancing loss averages over the batch, where the paper takes sequences.

    Causal.

    Args:
        k: routed experts per token; the paper has 8 of 256.
        num_shared: shared experts; the paper has 1.
        scale: the routed scaling factor.
        bias_rate: step of the selection bias per optimizer step.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> deepseek_moe().state.name
        'bias'

    References:
        Dai et al., DeepSeekMoE, 2024, https://arxiv.org/abs/2401.06066
        DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, section 2.1.2, https://arxiv.org/abs/2412.19437
    """
    experts = partial(swiglu, matmul=matmul)
    return compose(
        partial(top_k, k=k, score=sigmoid, normalize=True, scale=scale),
        dropless(),
        experts,
        losses={"load_balance": partial(load_balance_loss, score=sigmoid)},
        coefficients={"load_balance": 0.0001},
        shared=shared(experts, num_shared),
        state=selection_bias(rate=bias_rate) if bias_rate else None,
    )


def gshard_route(logits: Logits, *, bias: Tensor | None = None) -> Routing:
    """Route as GShard: the two best experts, weights normalised, the second kept with probability min(1, 2 g_2)."""
    return random_second(top_k(logits, k=2, normalize=True, bias=bias))


def shared(network: Experts, number: int, *, gated: bool = False) -> SharedExperts | None:
    """Share so many experts, or none."""
    return SharedExperts(network, number, gated) if number else None


def compose(route, dispatcher: Dispatcher, experts: Experts, **rest) -> Recipe:  # type: ignore[no-untyped-def]
    """Put a router, a dispatcher and experts together, behind a linear gate unless ``rest`` says otherwise."""
    layer = expert_layer(dispatcher=dispatcher, experts=experts)
    return Recipe(**{"gate": linear_gate, "init": init_gated, **rest}, route=route, layer=layer, plan=dispatcher.plan)
