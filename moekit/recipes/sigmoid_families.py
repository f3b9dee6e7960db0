"""Model families with DeepSeek's kind of router or a sigmoid: groups, selection bias, scale, shared or simple experts.

Each is a composition of stages, without arithmetic of its own.
"""

from functools import partial

from moekit.dispatch import dropless, weigh_inputs
from moekit.experts import grouped, init_mlp, relu2, simple, swiglu
from moekit.recipes.expert_layers import expert_layer
from moekit.recipes.families import qwen3_moe
from moekit.recipes.layers import Recipe
from moekit.recipes.published import deepseek_moe, mixtral, shared
from moekit.routing import (
    group_limited,
    selection_bias,
    sequence_balance_loss,
    sigmoid,
    sigmoid_of_top_k,
    top_k,
)
from moekit.types import GroupedMatmul


def deepseek_v2(
    *,
    k: int = 6,
    num_groups: int = 8,
    groups_kept: int = 3,
    num_shared: int = 2,
    scale: float = 16.0,
    matmul: GroupedMatmul = grouped,
) -> Recipe:
    """Compose DeepSeek-V2's layer: softmax scores, top-k within the best groups, not renormalised but scaled, shared.

    A group is worth its best expert. Of the paper's three balancing losses it has the expert-level one, within each
    sequence, coefficient 0.003; those over devices and communication need to know where experts are, and are left out.

    Causal.

    Args:
        k: routed experts per token; the paper has 6 of 160.
        num_groups: groups of experts, in the paper the devices; 1 does not limit.
        groups_kept: groups that a token may use.
        num_shared: shared experts.
        scale: the routed scaling factor.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> deepseek_v2().state is None
        True

    References:
        DeepSeek-AI, DeepSeek-V2, 2024, https://arxiv.org/abs/2405.04434
    """
    route = partial(
        group_limited, k=k, num_groups=num_groups, groups_kept=groups_kept, group_top=1, masked=0.0, scale=scale
    )
    return deepseek_moe(num_shared=num_shared, bias_rate=0.0, matmul=matmul)._replace(
        route=route, losses={"load_balance": sequence_balance_loss}, coefficients={"load_balance": 0.003}
    )


def deepseek_v3(
    *,
    k: int = 8,
    num_groups: int = 8,
    groups_kept: int = 4,
    normalize: bool = True,
    num_shared: int = 1,
    scale: float = 2.5,
    bias_rate: float = 0.001,
    matmul: GroupedMatmul = grouped,
) -> Recipe:
    """Compose DeepSeek-V3's layer: sigmoid, selection bias, top-k within the best groups by two experts, shared.

    Balance comes from the bias; the loss within each sequence has the coefficient 0.0001.

    Causal.

    Args:
        k: routed experts per token; the paper has 8 of 256.
        num_groups: groups of experts, in the paper the nodes; 1 does not limit.
        groups_kept: groups that a token may use.
        normalize: whether a token's weights sum to ``scale``.
        num_shared: shared experts.
        scale: the routed scaling factor.
        bias_rate: step of the selection bias per optimizer step.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> deepseek_v3().state.name
        'bias'

    References:
        DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, section 2.1.2, https://arxiv.org/abs/2412.19437
    """
    limited = partial(group_limited, k=k, num_groups=num_groups, groups_kept=groups_kept, group_top=2)
    return deepseek_moe(num_shared=num_shared, bias_rate=bias_rate, matmul=matmul)._replace(
        route=partial(limited, score=sigmoid, normalize=normalize, scale=scale),
        losses={"load_balance": partial(sequence_balance_loss, score=sigmoid)},
        coefficients={"load_balance": 0.0001},
    )


def llama4(*, k: int = 1, num_shared: int = 1, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose Llama 4's layer: sigmoid of the best logit, which multiplies what goes into the expert, and a shared one.

    Causal. There is no paper. Loss in transformers' form, coefficient 0.001 as its configuration, whose model code does
    not use it.

    Args:
        k: routed experts per token; Scout has 1 of 16, Maverick 1 of 128.
        num_shared: shared experts.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> llama4().shared.number
        1

    References:
        Meta, Llama 4, 2025, https://ai.meta.com/blog/llama-4-multimodal-intelligence; its released code,
            ``models/llama4/moe.py`` of https://github.com/meta-llama/llama-models
    """
    experts = partial(swiglu, matmul=matmul)
    return qwen3_moe(matmul=matmul)._replace(
        route=partial(sigmoid_of_top_k, k=k),
        layer=expert_layer(dispatcher=weigh_inputs(dropless()), experts=experts),
        shared=shared(experts, num_shared),
    )


def ernie_moe(*, k: int = 6, num_shared: int = 2, bias_rate: float = 0.001, matmul: GroupedMatmul = grouped) -> Recipe:
    """Compose ERNIE 4.5's layer for text: softmax, selection bias, top-k renormalised, shared experts.

    Causal. Balance comes from the bias. The report's loss that makes the gate's columns orthogonal is left out, and
    with it its experts for images.

    Args:
        k: routed experts per token; ERNIE 4.5 21B-A3B has 6 of 64.
        num_shared: shared experts.
        bias_rate: step of the selection bias per optimizer step.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> ernie_moe().state.name
        'bias'

    References:
        Baidu ERNIE Team, ERNIE 4.5 Technical Report, 2025,
            https://yiyan.baidu.com/blog/publication/ERNIE_Technical_Report.pdf
    """
    return mixtral(k=k, matmul=matmul)._replace(
        shared=shared(partial(swiglu, matmul=matmul), num_shared),
        state=selection_bias(rate=bias_rate) if bias_rate else None,
        coefficients={},
    )


def longcat_flash(
    *,
    k: int = 12,
    zero_experts: int = 256,
    scale: float = 6.0,
    bias_rate: float = 0.001,
    matmul: GroupedMatmul = grouped,
) -> Recipe:
    """Compose LongCat-Flash's layer: softmax, selection bias, top-k scaled, and experts that return the token itself.

    Causal. The paper steers the bias so that the mean number of real experts per token comes out as wanted; here it
    moves towards equal loads, of zero experts too. Its balancing loss over devices is left out.

    Args:
        k: experts per token, zero experts counted; the paper has 12 of 512 + 256.
        zero_experts: experts that cost nothing.
        scale: the routed scaling factor.
        bias_rate: step of the selection bias per optimizer step.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> longcat_flash().simple.number
        256

    References:
        Meituan, LongCat-Flash Technical Report, 2025, section 2.1, https://arxiv.org/abs/2509.01322
    """
    return mixtral(matmul=matmul)._replace(
        route=partial(top_k, k=k, scale=scale),
        simple=simple(null=0, copy=zero_experts, constants=0) if zero_experts else None,
        state=selection_bias(rate=bias_rate) if bias_rate else None,
        coefficients={},
    )


def nemotron_moe(
    *,
    k: int = 6,
    num_groups: int = 1,
    groups_kept: int = 1,
    normalize: bool = True,
    num_shared: int = 2,
    scale: float = 2.5,
    bias_rate: float = 0.001,
    matmul: GroupedMatmul = grouped,
) -> Recipe:
    """Compose the MoE layer of Nemotron 3 Nano: DeepSeek-V3's router over squared-ReLU experts.

    Causal. The projections to a narrower width around the experts, which larger models have, are left out.

    Args:
        k: routed experts per token; the model has 6 of 128.
        num_groups: see ``deepseek_v3``.
        groups_kept: see ``deepseek_v3``.
        normalize: whether a token's weights sum to ``scale``.
        num_shared: shared experts, as one of that many times the width.
        scale: the routed scaling factor.
        bias_rate: step of the selection bias per optimizer step.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe.

    Example:
        >>> nemotron_moe().init.__name__
        'init_mlp'

    References:
        NVIDIA, Nemotron 3 Nano, 2025; Hugging Face transformers, ``nemotron_h``
    """
    recipe = deepseek_v3(
        k=k,
        num_groups=num_groups,
        groups_kept=groups_kept,
        normalize=normalize,
        num_shared=num_shared,
        scale=scale,
        bias_rate=bias_rate,
    )
    experts = partial(relu2, matmul=matmul)
    return recipe._replace(
        layer=expert_layer(dispatcher=dropless(), experts=experts),
        shared=shared(experts, num_shared),
        init=init_mlp,
    )
