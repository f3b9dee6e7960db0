"""Model families whose routers take a softmax, each a composition of stages, without arithmetic of its own.

Those with DeepSeek's kind of router are in ``sigmoid_families.py``. Where a family's paper gives no coefficient of its
balancing loss, the one of its configuration in Hugging Face transformers is taken, with the loss in transformers' form
for one layer: K, not 1, at perfect balance. (Over several layers transformers pools all tokens first, see
``pooled_balance_loss``.)
"""

from functools import partial
from typing import Any

from moekit.dispatch import dropless
from moekit.experts import clamped_swiglu, grouped, init_biased_gated, swiglu
from moekit.recipes.expert_layers import expert_layer
from moekit.recipes.layers import Recipe
from moekit.recipes.published import mixtral, shared
from moekit.routing import biased_gate, init_biased_gate, load_balance_loss, softmax_of_top_k, sparse_mixer, top_k
from moekit.types import GroupedMatmul


def qwen2_moe(
    *,
    k: int = 8,
    normalize: bool = False,
    num_shared: int = 8,
    shared_gated: bool = True,
    matmul: GroupedMatmul = grouped,
) -> Recipe:
    """Compose Qwen2-MoE's layer: softmax, top-k not renormalised, SwiGLU, shared experts weighed by a sigmoid gate.

    Causal. Loss in transformers' form, coefficient 0.001 as its configuration; the report gives none. Qwen1.5-MoE has
    k = 4 and 4 shared experts; Qwen3-Next and Qwen3.5 normalise and have 1.

    Args:
        k: routed experts per token; Qwen2-57B-A14B has 8 of 64.
        normalize: whether a token's weights sum to one.
        num_shared: shared experts, as one of that many times the width.
        shared_gated: whether a sigmoid of the token weighs them.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> qwen2_moe().shared.gated
        True

    References:
        Yang et al., Qwen2 Technical Report, 2024, section 2.2.2, https://arxiv.org/abs/2407.10671
    """
    recipe = qwen3_moe(k=k, normalize=normalize, matmul=matmul)
    return recipe._replace(
        shared=shared(partial(swiglu, matmul=matmul), num_shared, gated=shared_gated),
    )


def qwen3_moe(*, k: int = 8, normalize: bool = True, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose Qwen3-MoE's layer: softmax, top-k renormalised, dropless SwiGLU experts, none shared.

    Causal. The report balances over the global batch: let the trainer pass ``tokens_per_expert`` of it. Loss in
    transformers' form, coefficient 0.001 as its configuration; the report gives none.

    Args:
        k: experts per token; the models have 8 of 128.
        normalize: whether a token's weights sum to one.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> qwen3_moe().coefficients
        {'load_balance': 0.001}

    References:
        Yang et al., Qwen3 Technical Report, 2025, section 2, https://arxiv.org/abs/2505.09388
    """
    return mixtral(matmul=matmul)._replace(route=partial(top_k, k=k, normalize=normalize), **_balance(0.001))


def gpt_oss(*, k: int = 4, alpha: float = 1.702, limit: float = 7.0, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose gpt-oss's layer: a gate with bias, softmax over the chosen, clamped SwiGLU experts with biases.

    Causal. Loss in transformers' form, coefficient 0.001 as its configuration; the model card tells of none.

    Args:
        k: experts per token; the models have 4 of 128 or of 32.
        alpha: see ``clamped_swiglu``.
        limit: see ``clamped_swiglu``.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> gpt_oss().init_gate.__name__
        'init_biased_gate'

    References:
        OpenAI, gpt-oss-120b & gpt-oss-20b Model Card, 2025, section 2.2, https://arxiv.org/abs/2508.10925
    """
    experts = partial(clamped_swiglu, matmul=matmul, alpha=alpha, limit=limit)
    return Recipe(
        gate=biased_gate,
        route=partial(softmax_of_top_k, k=k),
        layer=expert_layer(dispatcher=dropless(), experts=experts),
        init=init_biased_gated,
        init_gate=init_biased_gate,
        **_balance(0.001),
    )


def granite_moe(*, k: int = 8, num_shared: int = 0, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose Granite's MoE layer: softmax over the chosen, dropless SwiGLU experts; Granite 4's also shares one.

    Causal. Loss in transformers' form, coefficient 0.001 as its configuration.

    Args:
        k: experts per token; Granite 3.0 has 8 of 32 or of 40.
        num_shared: shared experts, as one of that many times the width.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> granite_moe().shared is None
        True

    References:
        Granite Team, Granite 3.0 Language Models, 2024, https://github.com/ibm-granite/granite-3.0-language-models
    """
    return mixtral(matmul=matmul)._replace(
        route=partial(softmax_of_top_k, k=k),
        shared=shared(partial(swiglu, matmul=matmul), num_shared),
        **_balance(0.001),
    )


def phi_moe(
    *,
    k: int = 2,
    eps: float = 0.01,
    training: bool = True,
    midpoint: float = 1 / 3,
    matmul: GroupedMatmul = grouped,
) -> Recipe:
    """Compose Phi-3.5-MoE's layer: SparseMixer-v2's choice, dropless SwiGLU experts.

    Causal. Draws from torch's generator while ``training``. Loss in transformers' form, coefficient 0.001 as its
    configuration.

    Args:
        k: experts per token; the paper has 2 of 16.
        eps: see ``sparse_mixer``.
        training: whether experts are drawn; evaluate with the recipe made with False.
        midpoint: see ``sparse_mixer``; transformers writes 0.3333.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> evaluating = phi_moe(training=False)

    References:
        Liu et al., GRIN: GRadient-INformed MoE, 2024, https://arxiv.org/abs/2409.12136
        Abdin et al., Phi-3 Technical Report, 2024 (Phi-3.5-MoE), https://arxiv.org/abs/2404.14219
    """
    route = partial(sparse_mixer, k=k, eps=eps, training=training, midpoint=midpoint)
    return mixtral(matmul=matmul)._replace(route=route, **_balance(0.001))


def jamba(*, k: int = 2, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose Jamba's MoE layer: softmax over all experts, top-k not renormalised, dropless SwiGLU experts.

    Causal. Loss in transformers' form, coefficient 0.001 as its configuration. That weights are not renormalised is in
    the released code; the paper does not say.

    Args:
        k: experts per token; the paper has 2 of 16.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> jamba().causal
        True

    References:
        Lieber et al., Jamba: A Hybrid Transformer-Mamba Language Model, 2024, https://arxiv.org/abs/2403.19887
    """
    return qwen3_moe(k=k, normalize=False, matmul=matmul)


def dbrx(*, k: int = 4, normalize: bool = True, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose DBRX's layer: softmax, top-k renormalised, dropless SwiGLU experts.

    Causal. Loss in transformers' form, coefficient 0.01 as its configuration (``moe_loss_weight``). Weights over a
    norm other than their sum, which that configuration allows, are left out.

    Args:
        k: experts per token; the model has 4 of 16.
        normalize: whether a token's weights sum to one.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> dbrx().coefficients
        {'load_balance': 0.01}

    References:
        Databricks, Introducing DBRX, 2024, https://www.databricks.com/blog/introducing-dbrx-new-state-art-open-llm
    """
    return qwen3_moe(k=k, normalize=normalize, matmul=matmul)._replace(**_balance(0.01))


def _balance(coefficient: float) -> dict[str, Any]:
    """Return the parts of a recipe that are transformers' balancing loss of one layer."""
    loss = partial(load_balance_loss, per_token=1.0)
    return {"losses": {"load_balance": loss}, "coefficients": {"load_balance": coefficient}}
