"""Tiny random models of every transformers family whose experts carry the experts interface, built without a download.

As a program it prints the table of docs/transformers.md: ``python tests/hf_families.py``.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from moekit.integrations.transformers import register

DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
MODELS = Path(transformers.__file__).parent / "models"
BATCH, LENGTH, VOCABULARY = 2, 9, 48

# Sizes by the name of the configuration's field, for whichever fields a family has.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    "first_k_dense_replace": 0,
    "mlp_layer_types": ["sparse", "sparse"],
    "mlp_only_layers": [],
    "num_dense_layers": 0,
    "sliding_window": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(*mrope_section: int, **more: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(mrope_section), **more}


# What a family needs beside: MoE blocks switched on, axes that belong together, and large sizes with their own names.
CHANGES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"], "o_lora_rank": 8, "o_groups": 2},
    "diffusion_gemma": {"global_head_dim": 8},
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [16, 12], "rope_parameters": _rope(1, 1, 2)},
    "gemma4": {
        "enable_moe_block": True,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "glm4v_moe": {"rope_parameters": _rope(1, 1, 0, partial_rotary_factor=0.5)},
    "glm5_next": {"qk_rope_head_dim": 0, "index_kpool": 2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    },
    "hy_v4_vl": {"rope_parameters": _rope(2, 1, 1)},
    "inkling": {"rel_extent": 16},
    "inkling2": {"rel_extent": 16, "unpadded_vocab_size": VOCABULARY},
    "inkling2_loop": {"rel_extent": 16, "unpadded_vocab_size": VOCABULARY},
    "jamba": {"expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "minimax_m3_vl": {"dense_intermediate_size": 24},
    "muse_spark": {"moe_hidden_size": 24},
    "nemotron_h": {
        "layers_block_type": ["moe", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
    "qwen3_omni_moe": {"shared_expert_intermediate_size": 16},  # the talker reads it, its configuration lacks it
    "qwen4_exp": {"hc_lowrank": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
# Experts that are reached through another class than a causal language model or its text model.
MODEL_CLASSES = {"Qwen3OmniMoeTalkerTextExperts": "Qwen3OmniMoeTalkerModel"}
# What a model is called with, beside or in place of token ids: a mix of modalities, and embeddings.
INPUTS = {
    "Ernie4_5_VLMoeMoeExperts": {
        "input_ids": torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) + 3,
        "moe_mm_token_type_ids": torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 3 == 0,
    },
    "Qwen3OmniMoeTalkerTextExperts": {
        "inputs_embeds": torch.linspace(0, 900, BATCH * LENGTH * 32).sin().view(BATCH, LENGTH, 32)
    },
}


class Family(NamedTuple):
    """One experts class: the folder and module of its modeling file, and its name."""

    name: str
    module: str
    experts: str


def families() -> list[Family]:
    """Find every experts class with the interface in the modeling files of the installed transformers."""
    return [
        Family(file.parent.name, f"transformers.models.{file.parent.name}.{file.stem}", experts)
        for file in sorted(MODELS.glob("*/modeling_*.py"))
        for experts in DECORATED.findall(file.read_text())
    ]


def model_class(family: Family) -> type:
    """Return the smallest model with these experts: text alone, with a language-model head where there is one."""
    namespace = vars(importlib.import_module(family.module))
    if family.experts in MODEL_CLASSES:
        return namespace[MODEL_CLASSES[family.experts]]
    classes = [c for c in namespace.values() if inspect.isclass(c) and issubclass(c, transformers.PreTrainedModel)]
    own = [c for c in classes if c.__module__ == family.module and not c.__name__.endswith("PreTrainedModel")]
    endings = ("ForCausalLM", "TextModel", "Model")
    return next(c for ending in endings for c in own if c.__name__.endswith(ending))


def tiny_model(family: Family) -> nn.Module:
    """Build a model in float32 with every parameter random, biases and norms too."""
    model = model_class(family)
    names = {field.name for field in dataclasses.fields(model.config_class)}
    sizes = {name: size for name, size in SIZES.items() if name in names}
    torch.default_generator.manual_seed(0)
    built = model(model.config_class(**{**sizes, **CHANGES.get(family.name, {})})).eval()
    with torch.no_grad():
        for module in experts_of(built, family).values():
            for parameter in module.parameters():
                parameter.zero_()  # the talker of qwen3_omni_moe leaves its experts as torch.empty made them
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in built.named_buffers():
            if name.endswith("tid2eid"):  # a hash router's table, which a checkpoint would bring
                buffer.copy_(torch.rand(VOCABULARY, 4).topk(buffer.shape[1]).indices)
    return built


def experts_of(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ == family.experts}


def run(model: nn.Module, family: Family, implementation: str) -> dict[str, Tensor]:
    """Return the output, and the gradient of every parameter that has one, with an experts implementation."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    output = model(**INPUTS.get(family.experts, {"input_ids": ids}))
    output = output.logits if "logits" in output else output.last_hidden_state
    (output * torch.linspace(0.5, 1.5, output.numel()).view_as(output)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **grads}


def deviations(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest difference of each tensor, relative to its largest entry; infinity where one has NaN."""
    assert actual.keys() == expected.keys()
    return {name: _deviation(actual[name], value) for name, value in expected.items()}


def _deviation(actual: Tensor, expected: Tensor) -> float:
    difference = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return difference.nan_to_num(nan=torch.inf).item()


def _row(family: Family) -> str:
    model = tiny_model(family)
    experts: Any = next(iter(experts_of(model, family).values()))
    own_gate = type(experts)._apply_gate.__name__ != "_default_apply_gate"
    form = {
        "(E, in, out)": experts.is_transposed,
        "biases": experts.has_bias,
        "no gate": not experts.has_gate,
        "own gate function": own_gate,
        "norm on outputs": experts.has_post_expert_norm,
    }
    eager = run(model, family, "eager")
    ours, theirs = (max(deviations(run(model, family, name), eager).values()) for name in ("moekit", "batched_mm"))
    words = ", ".join(word for word, holds in form.items() if holds)
    return f"| {family.name} | {type(model).__name__} | {words} | {ours:.0e} | {theirs:.0e} |"


if __name__ == "__main__":
    register()
    transformers.logging.set_verbosity_error()
    print("| family | tiny model | form of the experts | moekit | batched_mm |\n| --- | --- | --- | --- | --- |")
    print("\n".join(_row(family) for family in families()))
