"""From the configuration of a Hugging Face model to the recipe of its sparse MoE blocks.

Each function takes a configuration, any object with the attributes that it reads, and refuses what the recipe does not
do. Noise that a block adds in training alone, as ``router_jitter_noise``, is left out, and so are configurations' loss
coefficients: a recipe has its own.
"""

from functools import partial
from typing import Any

from moekit.recipes import Recipe, deepseek_moe, mixtral, olmoe, switch
from moekit.recipes import families as f
from moekit.recipes import sigmoid_families as s
from moekit.routing import top_k


def of_mixtral(config: Any) -> Recipe:
    """Read ``mixtral``: Mixtral, MiniMax-Text-01."""
    expect(config, "hidden_act", ("silu", "swish"))
    return mixtral(k=config.num_experts_per_tok)


def of_olmoe(config: Any) -> Recipe:
    """Read ``olmoe``: OLMoE, FlexOlmo."""
    expect(config, "hidden_act", ("silu", "swish"))
    k = config.num_experts_per_tok
    return olmoe(k=k)._replace(route=partial(top_k, k=k, normalize=config.norm_topk_prob))


def of_qwen3(config: Any) -> Recipe:
    """Read ``qwen3_moe``: Qwen3-MoE, Mellum."""
    expect(config, "hidden_act", ("silu", "swish"))
    return f.qwen3_moe(k=config.num_experts_per_tok, normalize=config.norm_topk_prob)


def of_qwen3_vl(config: Any) -> Recipe:
    """Read ``qwen3_moe`` where there is no choice but to normalise: Qwen3-VL-MoE's text model."""
    expect(config, "hidden_act", ("silu", "swish"))
    return f.qwen3_moe(k=config.num_experts_per_tok)


def of_qwen2(config: Any) -> Recipe:
    """Read ``qwen2_moe``: Qwen2-MoE, Qwen3-Next."""
    return _qwen2(config, normalize=config.norm_topk_prob)


def of_qwen3_5(config: Any) -> Recipe:
    """Read ``qwen2_moe`` where there is no choice but to normalise: Qwen3.5-MoE's text model."""
    return _qwen2(config, normalize=True)


def _qwen2(config: Any, *, normalize: bool) -> Recipe:
    expect(config, "hidden_act", ("silu", "swish"))
    num_shared = times(config, "shared_expert_intermediate_size", "moe_intermediate_size")
    return f.qwen2_moe(k=config.num_experts_per_tok, normalize=normalize, num_shared=num_shared)


def of_hunyuan(config: Any) -> Recipe:
    """Read ``qwen2_moe`` without a gate on its shared expert: Hunyuan-A13B, one of as many layers as its lists say."""
    expect(config, "hidden_act", ("silu", "swish"))
    if not isinstance(config.moe_topk, int):
        raise ValueError(
            f"this configuration has moe_topk = {config.moe_topk}, one for each layer; expected a number. Pass a copy "
            f"with that of the layer whose block this is."
        )
    return f.qwen2_moe(k=config.moe_topk, normalize=True, num_shared=1, shared_gated=False)


def of_gpt_oss(config: Any) -> Recipe:
    """Read ``gpt_oss``."""
    return f.gpt_oss(k=config.num_experts_per_tok, alpha=config.swiglu_alpha, limit=config.swiglu_limit)


def of_granite(config: Any) -> Recipe:
    """Read ``granite_moe``: GraniteMoe, and those with a shared MLP, which belongs to the decoder layer there."""
    expect(config, "hidden_act", ("silu", "swish"))
    shared = getattr(config, "shared_intermediate_size", 0)
    num_shared = times(config, "shared_intermediate_size", "intermediate_size") if shared else 0
    return f.granite_moe(k=config.num_experts_per_tok, num_shared=num_shared)


def of_aria(config: Any) -> Recipe:
    """Read ``granite_moe`` with shared experts: Aria's text model."""
    expect(config, "hidden_act", ("silu", "swish"))
    expect(config, "mlp_bias", (False,))
    return f.granite_moe(k=config.moe_topk, num_shared=config.moe_num_shared_experts)


def of_phi(config: Any) -> Recipe:
    """Read ``phi_moe`` for evaluation; for training, make it with ``training=True``."""
    expect(config, "hidden_act", ("silu", "swish"))
    return f.phi_moe(eps=config.router_jitter_noise, training=False, midpoint=0.3333)


def of_jamba(config: Any) -> Recipe:
    """Read ``jamba``."""
    expect(config, "hidden_act", ("silu", "swish"))
    return f.jamba(k=config.num_experts_per_tok)


def of_dbrx(config: Any) -> Recipe:
    """Read ``dbrx`` from a DbrxConfig."""
    ffn = config.ffn_config
    expect(ffn, "moe_normalize_expert_weights", (1.0, None))
    expect(ffn, "ffn_act_fn", ({"name": "silu"}, {}))
    return f.dbrx(k=ffn.moe_top_k, normalize=ffn.moe_normalize_expert_weights is not None)


def of_switch(config: Any) -> Recipe:
    """Read ``switch`` without a limit: ``expert_capacity`` counts rows of one sequence, whatever its length.

    For n tokens in all, ``switch(capacity_factor=expert_capacity * num_experts / n)`` has as many rows per expert.
    transformers limits each sequence by itself; the recipe, as the paper, the whole batch.
    """
    expect(config, "dense_act_fn", ("relu",))
    expect(config, "router_bias", (False,))
    return switch(capacity_factor=0)


def of_deepseek_v2(config: Any) -> Recipe:
    """Read ``deepseek_v2``. transformers reads no ``norm_topk_prob`` there."""
    expect(config, "hidden_act", ("silu", "swish"))
    expect(config, "mlp_bias", (False,))
    expect(config, "topk_method", ("greedy", "group_limited_greedy"))
    limited = config.topk_method == "group_limited_greedy"
    return s.deepseek_v2(
        k=config.num_experts_per_tok,
        num_groups=config.n_group if limited else 1,
        groups_kept=config.topk_group if limited else 1,
        num_shared=config.n_shared_experts,
        scale=config.routed_scaling_factor,
    )


def of_deepseek_v3(config: Any) -> Recipe:
    """Read ``deepseek_v3``: DeepSeek-V3 and V3.2, GLM-4.5 and 5, dots.llm1, Ling, Solar, Kimi-Linear."""
    return _deepseek_v3(config, num_shared=config.n_shared_experts)


def of_exaone(config: Any) -> Recipe:
    """Read ``deepseek_v3`` where the shared experts are called otherwise: EXAONE-MoE."""
    return _deepseek_v3(config, num_shared=config.num_shared_experts)


def of_mimo(config: Any) -> Recipe:
    """Read ``deepseek_v3`` without shared experts, whatever the configuration says: MiMo-V2-Flash."""
    return _deepseek_v3(config, num_shared=0)


def _deepseek_v3(config: Any, *, num_shared: int) -> Recipe:
    expect(config, "hidden_act", ("silu", "swish"))
    return s.deepseek_v3(
        k=config.num_experts_per_tok,
        num_groups=config.n_group,
        groups_kept=config.topk_group,
        normalize=config.norm_topk_prob,
        num_shared=num_shared,
        scale=config.routed_scaling_factor,
    )


def of_nemotron(config: Any) -> Recipe:
    """Read ``nemotron_moe``: Nemotron-H without latent projections."""
    expect(config, "mlp_hidden_act", ("relu2",))
    expect(config, "mlp_bias", (False,))
    expect(config, "moe_latent_size", (None,))
    _expect_shared(config, "moe_shared_expert_intermediate_size")
    return s.nemotron_moe(
        k=config.num_experts_per_tok,
        num_groups=config.n_group,
        groups_kept=config.topk_group,
        normalize=config.norm_topk_prob,
        num_shared=times(config, "moe_shared_expert_intermediate_size", "moe_intermediate_size"),
        scale=config.routed_scaling_factor,
    )


def of_minimax_m2(config: Any) -> Recipe:
    """Read ``deepseek_moe`` without shared experts or scale: MiniMax-M2."""
    expect(config, "hidden_act", ("silu", "swish"))
    return deepseek_moe(k=config.num_experts_per_tok, num_shared=0, scale=1.0)


def of_lfm2(config: Any) -> Recipe:
    """Read ``deepseek_moe`` without shared experts: LFM2-MoE, which adds 1e-6 to the sum of a token's weights."""
    expect(config, "norm_topk_prob", (True,))
    rate = 0.001 if config.use_expert_bias else 0.0
    return deepseek_moe(k=config.num_experts_per_tok, num_shared=0, scale=config.routed_scaling_factor, bias_rate=rate)


def of_afmoe(config: Any) -> Recipe:
    """Read ``deepseek_moe``: AFMoE (Trinity)."""
    expect(config, "hidden_act", ("silu", "swish"))
    return deepseek_moe(k=config.num_experts_per_tok, num_shared=config.num_shared_experts, scale=config.route_scale)


def of_hy_v3(config: Any) -> Recipe:
    """Read ``deepseek_moe``: Hunyuan V3."""
    expect(config, "hidden_act", ("silu", "swish"))
    expect(config, "mlp_bias", (False,))
    _expect_shared(config, "num_shared_experts")
    return deepseek_moe(
        k=config.num_experts_per_tok, num_shared=config.num_shared_experts, scale=config.router_scaling_factor
    )


def of_llama4(config: Any) -> Recipe:
    """Read ``llama4`` from a Llama4TextConfig."""
    expect(config, "hidden_act", ("silu", "swish"))
    return s.llama4(k=config.num_experts_per_tok)


def of_ernie(config: Any) -> Recipe:
    """Read ``ernie_moe``."""
    expect(config, "hidden_act", ("silu", "swish"))
    expect(config, "use_bias", (False,))
    expect(config, "moe_norm_min", (1e-12,))
    return s.ernie_moe(k=config.moe_k, num_shared=config.moe_num_shared_experts)


def of_longcat(config: Any) -> Recipe:
    """Read ``longcat_flash``. transformers has a gate's bias if told so, and never adds it."""
    expect(config, "hidden_act", ("silu", "swish"))
    return s.longcat_flash(
        k=config.moe_topk, zero_experts=config.zero_expert_num or 0, scale=config.routed_scaling_factor
    )


def expect(config: Any, name: str, known: tuple[Any, ...]) -> None:
    """Raise a ValueError if a configuration asks for something that its family's recipe does not do."""
    value = getattr(config, name)
    if value not in known:
        raise ValueError(
            f"this configuration has {name} = {value!r}; the family's recipe does {' or '.join(map(repr, known))}. "
            f"Compose a recipe of your own, and take this one's other stages with _replace."
        )


def _expect_shared(config: Any, name: str) -> None:
    """Raise a ValueError for 0, which transformers' block takes for the width of a dense layer."""
    if not getattr(config, name):
        raise ValueError(
            f"this configuration has {name} = {getattr(config, name)!r}, by which transformers makes one shared expert "
            f"as wide as config.intermediate_size; the family's recipe has multiples of the routed width. Compose a "
            f"recipe of your own, and take this one's other stages with _replace."
        )


def times(config: Any, shared: str, routed: str) -> int:
    """Say how many routed experts wide the shared one is; a ValueError if it is no whole number."""
    wide, width = getattr(config, shared), getattr(config, routed)
    if wide % width:
        raise ValueError(
            f"this configuration has {shared} = {wide} and {routed} = {width}; expected a multiple: moekit's shared "
            f"experts are so and so many of a routed expert's width."
        )
    return int(wide // width)
