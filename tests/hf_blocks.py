"""A tiny sparse MoE block of transformers for every family of ``moekit.integrations.blocks``, built without a download.

Sizes are awkward: D = 20, F = 13, E = 5 or 6, T = 21.
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

B, S, D, F, E = 3, 7, 20, 13, 5
T = B * S
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
QWEN = {"hidden_size": D, "moe_intermediate_size": F, "num_experts_per_tok": 3, "num_experts": E, **HEADS}
OLMO = {"hidden_size": D, "intermediate_size": F, "num_experts_per_tok": 3, "num_experts": E, **HEADS}
MIXTRAL = {"hidden_size": D, "intermediate_size": F, "num_experts_per_tok": 3, "num_local_experts": E, **HEADS}
DEEPSEEK = {
    "hidden_size": D,
    "moe_intermediate_size": F,
    "num_experts_per_tok": 3,
    "num_local_experts": 6,
    "n_group": 3,
    "topk_group": 2,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    **HEADS,
}


class Case(NamedTuple):
    """A family's block in transformers.

    Attributes:
        block: the class, in ``modeling_FAMILY``; several are put side by side under the names of a decoder layer.
        config: the class, in ``configuration_FAMILY``, and its arguments.
        router: where the module is that returns logits.
        logits: which of what it returns they are.
        rtol: on every value, relative to the largest of its tensor.
    """

    block: str
    config: tuple[str, dict[str, Any]]
    router: str = "gate"
    logits: int | None = 0
    rtol: float = 2e-6


CASES = {
    "afmoe": Case(
        "AfmoeSparseMoeBlock",
        ("AfmoeConfig", {**QWEN, "num_shared_experts": 2, "route_scale": 1.7}),
        "router",
    ),
    "aria": Case(
        "AriaTextMoELayer",
        (
            "AriaTextConfig",
            {"hidden_size": D, "intermediate_size": F, "moe_num_experts": E, "moe_topk": 3, **HEADS},
        ),
        "router",
    ),
    "bailing_hybrid": Case("BailingHybridMoE", ("BailingHybridConfig", DEEPSEEK)),
    "dbrx": Case(
        "DbrxFFN",
        (
            "DbrxConfig",
            {"d_model": D, "n_heads": 2, "ffn_config": {"ffn_hidden_size": F, "moe_num_experts": E, "moe_top_k": 3}},
        ),
        "router",
        None,
    ),
    "deepseek_v2": Case(
        "DeepseekV2Moe",
        (
            "DeepseekV2Config",
            {**DEEPSEEK, "n_routed_experts": 6, "topk_method": "group_limited_greedy", "norm_topk_prob": False},
        ),
    ),
    "deepseek_v3": Case("DeepseekV3MoE", ("DeepseekV3Config", DEEPSEEK)),
    "deepseek_v32": Case("DeepseekV32MoE", ("DeepseekV32Config", DEEPSEEK)),
    "dots1": Case("Dots1MoE", ("Dots1Config", DEEPSEEK)),
    "ernie4_5_moe": Case(
        "Ernie4_5_MoeSparseMoeBlock",
        (
            "Ernie4_5_MoeConfig",
            {"hidden_size": D, "moe_intermediate_size": F, "moe_num_experts": E, "moe_k": 3, **HEADS},
        ),
    ),
    "exaone_moe": Case(
        "ExaoneMoeSparseMoEBlock",
        ("ExaoneMoeConfig", {**DEEPSEEK, "num_experts": 6, "num_shared_experts": 2}),
    ),
    "flex_olmo": Case("FlexOlmoSparseMoeBlock", ("FlexOlmoConfig", {**OLMO, "norm_topk_prob": True})),
    "glm4_moe": Case("Glm4MoeMoE", ("Glm4MoeConfig", DEEPSEEK)),
    "glm4_moe_lite": Case("Glm4MoeLiteMoE", ("Glm4MoeLiteConfig", DEEPSEEK)),
    "glm4v_moe": Case("Glm4vMoeTextMoE", ("Glm4vMoeTextConfig", DEEPSEEK)),
    "glm_moe_dsa": Case("GlmMoeDsaMoE", ("GlmMoeDsaConfig", DEEPSEEK)),
    "gpt_oss": Case("GptOssMLP", ("GptOssConfig", {**MIXTRAL, "swiglu_limit": 0.7}), "router"),
    "granitemoe": Case("GraniteMoeMoE", ("GraniteMoeConfig", MIXTRAL), "router"),
    "granitemoehybrid": Case(
        "GraniteMoeHybridMoE GraniteMoeHybridMLP",
        ("GraniteMoeHybridConfig", {**MIXTRAL, "shared_intermediate_size": 2 * F, "mamba_n_heads": 2}),
        "block_sparse_moe.router",
    ),
    "granitemoeshared": Case(
        "GraniteMoeSharedMoE GraniteMoeSharedMLP",
        ("GraniteMoeSharedConfig", {**MIXTRAL, "shared_intermediate_size": 2 * F}),
        "block_sparse_moe.router",
    ),
    "hunyuan_v1_moe": Case(
        "HunYuanMoEV1Moe",
        ("HunYuanMoEV1Config", {"hidden_size": D, "intermediate_size": F, "num_experts": E, "moe_topk": 3, **HEADS}),
    ),
    "hy_v3": Case("HYV3MoE", ("HYV3Config", {**QWEN, "num_shared_experts": 2, "router_scaling_factor": 1.7})),
    "jamba": Case("JambaSparseMoeBlock", ("JambaConfig", OLMO), "router"),
    "kimi_linear": Case("KimiLinearMoE", ("KimiLinearConfig", DEEPSEEK)),
    "lfm2_moe": Case(
        "Lfm2MoeSparseMoeBlock",
        ("Lfm2MoeConfig", {**QWEN, "routed_scaling_factor": 1.7}),
        rtol=1e-5,  # transformers divides by sum + 1e-6, as no paper says; weights sum up to less by that share
    ),
    "llama4": Case("Llama4TextMoe", ("Llama4TextConfig", {**MIXTRAL, "num_experts_per_tok": 1}), "router", 1),
    "longcat_flash": Case(
        "LongcatFlashMoE",
        (
            "LongcatFlashConfig",
            {
                "hidden_size": D,
                "expert_ffn_hidden_size": F,
                "n_routed_experts": E,
                "zero_expert_num": 4,
                "moe_topk": 3,
                "num_attention_heads": 2,
            },
        ),
        "router",
    ),
    "mellum": Case("MellumSparseMoeBlock", ("MellumConfig", QWEN)),
    "mimo_v2_flash": Case("MiMoV2FlashMoE", ("MiMoV2FlashConfig", DEEPSEEK)),
    "minimax": Case("MiniMaxSparseMoeBlock", ("MiniMaxConfig", MIXTRAL)),
    "minimax_m2": Case("MiniMaxM2SparseMoeBlock", ("MiniMaxM2Config", MIXTRAL)),
    "mixtral": Case("MixtralSparseMoeBlock", ("MixtralConfig", MIXTRAL)),
    "nemotron_h": Case("NemotronHMoE", ("NemotronHConfig", {**DEEPSEEK, "moe_shared_expert_intermediate_size": 2 * F})),
    "olmoe": Case("OlmoeSparseMoeBlock", ("OlmoeConfig", OLMO)),
    "phimoe": Case(
        "PhimoeSparseMoeBlock",
        ("PhimoeConfig", {**MIXTRAL, "num_experts_per_tok": 2, "router_jitter_noise": 0.3}),
        "router",
    ),
    "qwen2_moe": Case("Qwen2MoeSparseMoeBlock", ("Qwen2MoeConfig", {**QWEN, "shared_expert_intermediate_size": 2 * F})),
    "qwen3_5_moe": Case(
        "Qwen3_5MoeSparseMoeBlock", ("Qwen3_5MoeTextConfig", {**QWEN, "shared_expert_intermediate_size": F})
    ),
    "qwen3_moe": Case("Qwen3MoeSparseMoeBlock", ("Qwen3MoeConfig", {**QWEN, "norm_topk_prob": True})),
    "qwen3_next": Case("Qwen3NextSparseMoeBlock", ("Qwen3NextConfig", {**QWEN, "shared_expert_intermediate_size": F})),
    "qwen3_vl_moe": Case("Qwen3VLMoeTextSparseMoeBlock", ("Qwen3VLMoeTextConfig", QWEN)),
    "solar_open": Case("SolarOpenMoE", ("SolarOpenConfig", DEEPSEEK)),
    "switch_transformers": Case(
        "SwitchTransformersSparseMLP",
        ("SwitchTransformersConfig", {"d_model": D, "d_ff": F, "num_experts": E, "expert_capacity": T}),
        "router",
        2,
    ),
}


class SideBySide(nn.Module):
    """A decoder layer's two ways through its feed-forward networks, as GraniteMoeShared's adds them up."""

    def __init__(self, block_sparse_moe: nn.Module, shared_mlp: nn.Module) -> None:
        super().__init__()
        self.block_sparse_moe, self.shared_mlp = block_sparse_moe, shared_mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.block_sparse_moe(x) + self.shared_mlp(x)


def build(case: Case, name: str) -> tuple[nn.Module, Any]:
    """Build the block in transformers with every number random, selection biases too, in eager mode."""
    modeling, configuration = (
        importlib.import_module(f"transformers.models.{name}.{kind}_{name}") for kind in ("modeling", "configuration")
    )
    config = getattr(configuration, case.config[0])(**case.config[1])
    config._experts_implementation = "eager"
    blocks = [getattr(modeling, block)(config) for block in case.block.split()]
    block = blocks[0] if len(blocks) == 1 else SideBySide(*blocks)
    with torch.no_grad():
        for tensor in block.state_dict().values():
            tensor.normal_(std=0.5)
        for tensor in block.get_submodule(case.router).state_dict().values():
            tensor.normal_(std=0.15)  # so that no expert is left out
        for name, tensor in block.state_dict().items():
            if name.endswith(("correction_bias", "expert_bias")):
                tensor.normal_(std=0.05)
    return block.eval(), config
