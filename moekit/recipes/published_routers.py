"""Published methods whose point is another way to route, each a composition of stages, without arithmetic of its own.

Where a paper trains with noise, sampling or a constraint on the batch and evaluates without, ``training=False`` is the
layer that it evaluates.
"""

from functools import partial

from moekit.dispatch import by_choice, dropless, padded
from moekit.experts import geglu, gelu_mlp, grouped, init_gated, init_mlp, relu_mlp, simple, swiglu
from moekit.ratios import ratio_of
from moekit.recipes.layers import Recipe
from moekit.recipes.published import compose, gshard
from moekit.routing import (
    adaptive_l1,
    cosine_gate,
    each_token,
    entropy_loss,
    fixed_table,
    hash_choice,
    heterogeneous_balance_loss,
    importance_loss,
    init_cosine_gate,
    init_noisy_gate,
    init_soft_gate,
    load_balance_loss,
    load_loss,
    noisy_gate,
    noisy_top_k,
    quantile_balanced,
    quantile_bias,
    relu_choice,
    sinkhorn,
    soft_gate,
    soft_slots,
    token_rounding,
    top_k,
    top_p,
    weighted_l1_loss,
    z_loss,
)
from moekit.routing import expert_choice as choose_tokens
from moekit.types import GroupedMatmul


def sparsely_gated(*, k: int = 4, training: bool = True, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose Shazeer's sparsely-gated layer: top-k of logits with learned noise, importance and load losses.

    Causal. The paper has k = 4 and layers of one hidden ReLU layer, without a capacity limit.

    Args:
        k: experts per token.
        training: draw the noise.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> sorted(sparsely_gated().losses)
        ['importance', 'load']

    References:
        Shazeer et al., Outrageously Large Neural Networks, 2017, https://arxiv.org/abs/1701.06538
    """
    return compose(
        partial(noisy_top_k, k=k),
        dropless(),
        partial(relu_mlp, matmul=matmul),
        gate=partial(noisy_gate, training=training),
        init_gate=init_noisy_gate,
        init=init_mlp,
        losses={"importance": importance_loss, "load": load_loss},
        coefficients={"importance": 0.1, "load": 0.1},
    )


def st_moe(*, capacity_factor: float = 1.25, training: bool = True, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose ST-MoE's layer: GShard's routing, GeGLU experts, a z-loss of the router beside the balancing loss.

    Not causal with a capacity limit: first choices are served before any second. The dense layers that the paper puts
    around sparse ones are a matter of the model.

    Args:
        capacity_factor: rows per expert relative to a balanced load of both choices; 0 drops nothing. The paper
            evaluates at 2.
        training: draw second experts; else both are kept.
        matmul: the backend.

    Returns:
        Recipe.

    Raises:
        ValueError: if the capacity factor is negative or not finite.

    Example:
        >>> st_moe().coefficients
        {'load_balance': 0.01, 'z': 0.001}

    References:
        Zoph et al., ST-MoE, 2022, https://arxiv.org/abs/2202.08906
    """
    experts = partial(geglu, matmul=matmul)
    recipe = gshard(capacity_factor=capacity_factor, training=training, matmul=matmul)
    dispatcher = padded(capacity_factor=capacity_factor, priority=by_choice)
    return compose(
        recipe.route,
        dispatcher,
        experts,
        init=init_gated,
        losses={**recipe.losses, "z": z_loss},
        coefficients={**recipe.coefficients, "z": 0.001},
        causal=recipe.causal,
    )


def expert_choice(*, k: float = 2, per_sequence: bool = False, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose the expert-choice layer: every expert takes its best tokens, so that loads are even without a loss.

    Not causal: whether a token is taken depends on later ones, so the loss of a language model with it is no loss of
    a model that could generate.

    Args:
        k: experts per token in the mean, which the paper calls its capacity factor.
        per_sequence: let the tokens of a sequence compete, not those of the batch.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> expert_choice().causal
        False

    References:
        Zhou et al., Mixture-of-Experts with Expert Choice Routing, 2022, https://arxiv.org/abs/2202.09368
    """
    return compose(
        partial(choose_tokens, capacity_factor=ratio_of(k)),
        dropless(),
        partial(gelu_mlp, matmul=matmul),
        init=init_mlp,
        needs=("token_mask", "sequence_length") if per_sequence else ("token_mask",),
        causal=False,
    )


def base_sinkhorn(*, k: int = 1, training: bool = True, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose S-BASE's layer: a balanced assignment of the batch by Sinkhorn's iterations, weighed by a sigmoid.

    Not causal in training: the assignment balances the whole batch. Evaluation takes the largest scores, and is.
    BASE itself solves the assignment exactly; Clark et al. found that this does as well.

    Args:
        k: experts per token; the papers have 1.
        training: balance the batch.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> base_sinkhorn().losses
        {}

    References:
        Lewis et al., BASE Layers, 2021, https://arxiv.org/abs/2103.16716
        Clark et al., Unified Scaling Laws for Routed Language Models, 2022, appendix B, https://arxiv.org/abs/2202.01169
    """
    return compose(
        partial(sinkhorn, k=k, balanced=training),
        dropless(),
        partial(relu_mlp, matmul=matmul),
        init=init_mlp,
        needs=("token_mask",),
        causal=not training,
    )


def hash_layer(*, k: int = 1, vocab_size: int = 50_432, seed: int = 0, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose a hash layer: a random but fixed expert for each vocabulary id, with weight one.

    Causal. With k = 1 its gate has no effect and gets no gradient. The table is part of a checkpoint.

    Args:
        k: experts per token; the weights of several are their shares of the softmax.
        vocab_size: rows of the table; the training program gives the model's.
        seed: of the table.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> hash_layer(vocab_size=100).state.init(8).shape
        torch.Size([100, 1])

    References:
        Roller et al., Hash Layers for Large Sparse Models, 2021, https://arxiv.org/abs/2106.04426
    """
    return compose(
        partial(hash_choice, normalize=True),
        dropless(),
        partial(relu_mlp, matmul=matmul),
        init=init_mlp,
        state=fixed_table(vocab_size=vocab_size, k=k, seed=seed),
        needs=("token_ids", "table"),
    )


def remoe(*, k: int = 2, max_k: int | None = None, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose ReMoE's layer: weights relu(z), and an L1 loss whose coefficient steers the mean number of experts to k.

    Causal. Every layer has a coefficient of its own; the paper has one. All E experts have room for every token until
    the loss has made them sparse.

    Args:
        k: active experts per token to aim at.
        max_k: room for so many experts of a token, the largest; None gives room for all.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> remoe().state.scales
        'l1'

    References:
        Wang et al., ReMoE, 2024, https://arxiv.org/abs/2412.14711
    """
    return compose(
        partial(relu_choice, max_k=max_k),
        dropless(),
        partial(swiglu, matmul=matmul),
        losses={"l1": partial(weighted_l1_loss, k=k)},
        state=adaptive_l1(k=k, loss="l1"),
    )


def soft_moe(*, slots: int = 1, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose Soft MoE's layer: every slot of every expert is a mix of all tokens of a sequence, and back.

    Not causal. The paper is about images; a language model with it sees its targets.

    Args:
        slots: per expert and sequence. The paper found 1 best, with as many experts as compute allows.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> soft_moe().needs
        ('token_mask', 'sequence_length')

    References:
        Puigcerver et al., From Sparse to Soft Mixtures of Experts, 2023, https://arxiv.org/abs/2308.00951
    """
    return compose(
        partial(soft_slots, slots=slots),
        dropless(),
        partial(gelu_mlp, matmul=matmul),
        gate=soft_gate,
        init_gate=partial(init_soft_gate, slots=slots),
        init=init_mlp,
        needs=("token_mask", "sequence_length"),
        causal=False,
    )


def moe_plus_plus(
    *,
    k: int = 2,
    tau: float = 0.75,
    null: int = 1,
    copy: int = 1,
    constants: int = 2,
    matmul: GroupedMatmul = grouped,
) -> Recipe:
    """Compose MoE++'s layer: beside the networks, experts that return nothing, the token, or a learned constant.

    Causal. The residual that the paper hands from one layer's router to the next is left out, and so are its capacity
    limit of 1.1 and, of the authors' code, the gate of two layers and the factor of k on what experts read. Weights are
    probabilities as they are, as in the paper's equations; the authors' code (``gating`` in ``moe_plus_plus_layer.py``)
    sets the weight of a null expert to 0 and then divides a token's two by their sum.

    Args:
        k: experts per token, simple ones included.
        tau: weight of simple experts in the balancing loss, so that they take more or less of the tokens.
        null: experts that return zero.
        copy: experts that return the token.
        constants: experts that mix the token with a learned vector.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> moe_plus_plus().simple.number
        4

    References:
        Jin et al., MoE++, 2024, https://arxiv.org/abs/2410.07348
        SkyworkAI, MoE++/moe_plus_plus_layer.py, https://github.com/SkyworkAI/MoE-plus-plus
    """
    others = simple(null=null, copy=copy, constants=constants)
    return compose(
        partial(top_k, k=k),
        dropless(),
        partial(swiglu, matmul=matmul),
        simple=others,
        losses={"load_balance": partial(heterogeneous_balance_loss, num_simple=others.number, tau=tau)},
        coefficients={"load_balance": 0.01},
    )


def xmoe(*, k: int = 1, capacity_factor: float = 0.0, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose X-MoE's layer: routing by the cosine to expert directions in a small space, with a learned temperature.

    Causal.

    Args:
        k: experts per token; the paper has 1.
        capacity_factor: rows per expert relative to a balanced load; 0 drops nothing.
        matmul: the backend; without a capacity limit it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> xmoe().coefficients
        {'load_balance': 0.01}

    References:
        Chi et al., On the Representation Collapse of Sparse Mixture of Experts, 2022, https://arxiv.org/abs/2204.09179
    """
    return compose(
        partial(top_k, k=k),
        padded(capacity_factor=capacity_factor),
        partial(gelu_mlp, matmul=matmul),
        gate=cosine_gate,
        init_gate=init_cosine_gate,
        init=init_mlp,
        losses={"load_balance": load_balance_loss},
        coefficients={"load_balance": 0.01},
    )


def sonic_token_rounding(
    *, k: int = 8, tile: int = 128, training: bool = True, matmul: GroupedMatmul = grouped
) -> Recipe:
    """Compose SonicMoE's layer with token rounding: the load of every expert is a multiple of a tile of the product.

    Not causal in training: who is left out, or taken besides, depends on the batch. Evaluation is plain top-k, and is.
    A load below half a tile is rounded to none: with fewer than 64 rows an expert most tokens reach no expert.

    Args:
        k: experts per token.
        tile: rows of a tile.
        training: round loads.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> sonic_token_rounding(training=False).causal
        True

    References:
        Guo et al., SonicMoE, 2025, https://arxiv.org/abs/2512.14080
    """
    route = partial(top_k, k=k, normalize=True)
    return compose(
        token_rounding(route, tile=tile) if training else route,
        dropless(),
        partial(swiglu, matmul=matmul),
        losses={"load_balance": load_balance_loss},
        coefficients={"load_balance": 0.01},
        causal=not training,
    )


def quantile_moe(*, k: int = 2, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose a layer balanced by quantiles: a shift for each expert, set each step to where an even load wants it.

    Causal: the shift comes from earlier steps.

    Args:
        k: experts per token.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> quantile_moe().state.name
        'bias'

    References:
        Megatron-LM, megatron/core/transformer/moe/moe_utils.py, ``qb_dual_update``, https://github.com/NVIDIA/Megatron-LM
    """
    return compose(
        partial(quantile_balanced, k=k, normalize=True),
        dropless(),
        partial(swiglu, matmul=matmul),
        state=quantile_bias(k=k),
    )


def dynamic_k(*, p: float = 0.4, max_k: int | None = None, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose a layer of variable k: a token takes its best experts until their probabilities add up to p.

    Causal. The loss of token entropy is a negative one, which its negative coefficient turns: tokens are to be decided.

    Args:
        p: the sum to reach; the paper has 0.4.
        max_k: at most so many experts per token; None allows all.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> dynamic_k().coefficients
        {'load_balance': 0.01, 'token_entropy': -0.0001}

    References:
        Huang et al., Harder Tasks Need More Experts, 2024, https://arxiv.org/abs/2403.07652
    """
    return compose(
        partial(top_p, p=p, max_k=max_k),
        dropless(),
        partial(swiglu, matmul=matmul),
        losses={"load_balance": load_balance_loss, "token_entropy": partial(entropy_loss, scope=each_token)},
        coefficients={"load_balance": 0.01, "token_entropy": -0.0001},
    )
