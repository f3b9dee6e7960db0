"""Sparse MoE blocks of Hugging Face transformers as moekit recipes: their weights, there and back.

>>> import torch
>>> from types import SimpleNamespace
>>> from moekit.recipes import moe_layer
>>> config = SimpleNamespace(num_experts_per_tok=2, hidden_act="silu")
>>> state_dict = {
...     "gate.weight": torch.randn(4, 8),
...     "experts.gate_up_proj": torch.randn(4, 32, 8),
...     "experts.down_proj": torch.randn(4, 8, 16),
... }
>>> family = FAMILIES["mixtral"]
>>> block = family.to_params(state_dict, config)
>>> moe_layer(torch.randn(2, 3, 8), block.params, family.recipe(config), state=block.state).y.shape
torch.Size([2, 3, 8])
>>> back = family.from_params(block, config)
>>> all(torch.equal(back[name], state_dict[name]) for name in state_dict)
True

Nothing here imports transformers: a state dict is a mapping of tensors, a configuration any object with its attributes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from moekit.integrations import blocks_layouts as at
from moekit.integrations import blocks_recipes as read
from moekit.integrations.blocks_layouts import Piece
from moekit.recipes import Recipe
from moekit.recipes.layers import MoEParams


class Block(NamedTuple):
    """The tensors of a sparse MoE block.

    Attributes:
        params: what ``moe_layer`` takes.
        state: what the router remembers, as a selection bias (E,); None if it has nothing.

    Example:
        >>> import torch
        >>> from moekit.experts import init_gated
        >>> Block(MoEParams(torch.zeros(8, 4), init_gated(4, 8, 16))).state is None
        True
    """

    params: MoEParams
    state: Tensor | None = None


class Family(NamedTuple):
    """A model family of transformers.

    Attributes:
        recipe: configuration -> Recipe. A ValueError says what a configuration asks for that the recipe does not do.
        to_params: (state dict of the block, configuration) -> Block. A ValueError names entries that are missing, or
            that the family does not know.
        from_params: (Block, configuration) -> state dict of the block; the inverse, exactly, but for rows that
            transformers holds and never uses (LongCat-Flash's of zero experts), which are zero.

    Neither shares memory with what it was given, and gradients go through both.

    Example:
        >>> from types import SimpleNamespace
        >>> FAMILIES["mixtral"].recipe(SimpleNamespace(num_experts_per_tok=2, hidden_act="silu")).route.keywords["k"]
        2
    """

    recipe: Callable[[Any], Recipe]
    to_params: Callable[[Mapping[str, Tensor], Any], Block]
    from_params: Callable[[Block, Any], dict[str, Tensor]]


class Layout(NamedTuple):
    """Where the tensors of a block are in its state dict; None is what the family does not have."""

    gate: Piece
    experts: Piece
    shared: Piece | None = None
    shared_gate: Piece | None = None
    state: Piece | None = None


def family(recipe: Callable[[Any], Recipe], layout: Layout) -> Family:
    """Make a family of its recipe and the layout of its state dict.

    Args:
        recipe: configuration -> Recipe.
        layout: of the state dict.

    Returns:
        Family.

    Example:
        >>> mine = family(read.of_mixtral, Layout(at.linear("router.weight"), at.halves("gate_up", "down")))
    """
    return Family(recipe, partial(_to_block, layout=layout), partial(_from_block, layout=layout))


def _to_block(state_dict: Mapping[str, Tensor], config: Any, *, layout: Layout) -> Block:
    left = dict(state_dict)
    gate, experts, shared, shared_gate, state = (
        None if piece is None else piece.read(left, config) for piece in layout
    )
    if left:
        raise ValueError(
            f"the state dict has {sorted(left)}, which this family does not know. Pass the state dict of the sparse "
            f"MoE block alone; if it is, then the block has a part that the recipe lacks."
        )
    return _apart(Block(MoEParams(gate, experts, shared, shared_gate), state), _places(state_dict))


def _from_block(block: Block, config: Any, *, layout: Layout) -> dict[str, Tensor]:
    params = block.params
    values = (params.gate, params.experts, params.shared, params.shared_gate, block.state)
    state_dict: dict[str, Tensor] = {}
    for name, piece, value in zip(Layout._fields, layout, values, strict=True):
        if piece is None and value is not None:
            raise ValueError(f"the block has {name}, and its family has no place for it; expected None.")
        if piece is not None:
            state_dict |= piece.write(value, config)
    places = _places(block)
    return {name: _apart(tensor, places) for name, tensor in state_dict.items()}


def _places(tensors: Any) -> set[int]:
    """Say where in memory the tensors of a mapping or a nested tuple lie."""
    if isinstance(tensors, Tensor):
        return {tensors.untyped_storage().data_ptr()}
    each = tensors.values() if isinstance(tensors, Mapping) else tensors or ()
    return set().union(*map(_places, each))


def _apart(tensors: Any, places: set[int]) -> Any:
    """Copy what lies in one of the places, for some layouts are read as views, and most are not."""
    if isinstance(tensors, Tensor):
        return tensors.clone() if _places(tensors) & places else tensors
    return None if tensors is None else type(tensors)(*(_apart(each, places) for each in tensors))


_HALVES = at.halves("experts.gate_up_proj", "experts.down_proj")
_GATED = Layout(at.linear("gate.weight"), _HALVES)
_ROUTED = Layout(at.linear("router.weight"), _HALVES)
_QWEN2 = _GATED._replace(shared=at.gated_mlp("shared_expert"), shared_gate=at.linear("shared_expert_gate.weight"))
_DEEPSEEK = _GATED._replace(shared=at.gated_mlp("shared_experts"))
_DEEPSEEK_V3 = _DEEPSEEK._replace(state=at.vector("gate.e_score_correction_bias"))
_GRANITE_SHARED = Layout(
    at.linear("block_sparse_moe.router.weight"),
    at.halves("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
    shared=at.optional(
        at.halves_mlp("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"),
        "shared_mlp.input_linear.weight",
    ),
)

_FAMILIES = {
    "afmoe": family(
        read.of_afmoe,
        Layout(
            at.linear("router.gate.weight"),
            _HALVES,
            shared=at.gated_mlp("shared_experts"),
            state=at.vector("expert_bias"),
        ),
    ),
    "aria": family(
        read.of_aria,
        Layout(
            at.linear("router.weight"),
            at.halves_in_out("experts.gate_up_proj", "experts.down_proj"),
            shared=at.gated_mlp("shared_experts"),
        ),
    ),
    "bailing_hybrid": family(read.of_deepseek_v3, _DEEPSEEK_V3),
    "dbrx": family(
        read.of_dbrx,
        Layout(
            at.linear("router.layer.weight"),
            at.rows_of_experts("experts.mlp", lambda config: config.ffn_config.moe_num_experts),
        ),
    ),
    "deepseek_v2": family(read.of_deepseek_v2, _DEEPSEEK),
    "deepseek_v3": family(read.of_deepseek_v3, _DEEPSEEK_V3),
    "deepseek_v32": family(read.of_deepseek_v3, _DEEPSEEK_V3),
    "dots1": family(read.of_deepseek_v3, _DEEPSEEK_V3),
    "ernie4_5_moe": family(
        read.of_ernie,
        _DEEPSEEK._replace(
            shared=at.optional(at.gated_mlp("shared_experts"), "shared_experts.gate_proj.weight"),
            state=at.row("gate.moe_statics.e_score_correction_bias"),
        ),
    ),
    "exaone_moe": family(read.of_exaone, _DEEPSEEK_V3),
    "flex_olmo": family(read.of_olmoe, _GATED),
    "glm4_moe": family(read.of_deepseek_v3, _DEEPSEEK_V3),
    "glm4_moe_lite": family(read.of_deepseek_v3, _DEEPSEEK_V3),
    "glm4v_moe": family(read.of_deepseek_v3, _DEEPSEEK_V3),
    "glm_moe_dsa": family(read.of_deepseek_v3, _DEEPSEEK_V3),
    "gpt_oss": family(
        read.of_gpt_oss,
        Layout(at.biased_linear("router.weight", "router.bias"), at.interleaved_biased("experts")),
    ),
    "granitemoe": family(read.of_granite, _ROUTED),
    "granitemoehybrid": family(read.of_granite, _GRANITE_SHARED),
    "granitemoeshared": family(read.of_granite, _GRANITE_SHARED),
    "hunyuan_v1_moe": family(
        read.of_hunyuan, Layout(at.linear("gate.wg.weight"), _HALVES, shared=at.gated_mlp("shared_mlp"))
    ),
    "hy_v3": family(read.of_hy_v3, _DEEPSEEK._replace(state=at.vector("e_score_correction_bias"))),
    "jamba": family(read.of_jamba, _ROUTED),
    "kimi_linear": family(read.of_deepseek_v3, _DEEPSEEK_V3),
    "lfm2_moe": family(read.of_lfm2, _GATED._replace(state=at.optional(at.vector("expert_bias"), "expert_bias"))),
    "llama4": family(
        read.of_llama4,
        Layout(
            at.linear("router.weight"),
            at.halves_in_out("experts.gate_up_proj", "experts.down_proj"),
            shared=at.gated_mlp("shared_expert"),
        ),
    ),
    "longcat_flash": family(
        read.of_longcat,
        Layout(
            at.linear("router.classifier.weight"),
            at.halves_with_unused(
                "experts.gate_up_proj", "experts.down_proj", lambda config: config.zero_expert_num or 0
            ),
            state=at.vector("router.e_score_correction_bias"),
        ),
    ),
    "mellum": family(read.of_qwen3, _GATED),
    "mimo_v2_flash": family(read.of_mimo, _GATED._replace(state=at.vector("gate.e_score_correction_bias"))),
    "minimax": family(read.of_mixtral, _GATED),
    "minimax_m2": family(read.of_minimax_m2, _GATED._replace(state=at.vector("e_score_correction_bias"))),
    "mixtral": family(read.of_mixtral, _GATED),
    "nemotron_h": family(
        read.of_nemotron,
        Layout(
            at.linear("gate.weight"),
            at.ungated("experts.up_proj", "experts.down_proj"),
            shared=at.mlp("shared_experts"),
            state=at.vector("gate.e_score_correction_bias"),
        ),
    ),
    "olmoe": family(read.of_olmoe, _GATED),
    "phimoe": family(read.of_phi, _ROUTED),
    "qwen2_moe": family(read.of_qwen2, _QWEN2),
    "qwen3_5_moe": family(read.of_qwen3_5, _QWEN2),
    "qwen3_moe": family(read.of_qwen3, _GATED),
    "qwen3_next": family(read.of_qwen2, _QWEN2),
    "qwen3_vl_moe": family(read.of_qwen3_vl, _GATED),
    "solar_open": family(read.of_deepseek_v3, _DEEPSEEK_V3),
    "switch_transformers": family(
        read.of_switch,
        Layout(
            at.linear("router.classifier.weight"),
            at.listed_ungated("experts.expert_{}.wi.weight", "experts.expert_{}.wo.weight"),
        ),
    ),
}
_WITH_TEXT = ("aria", "glm4v_moe", "llama4", "qwen3_5_moe", "qwen3_vl_moe")  # the text part has a model_type of its own

FAMILIES: Mapping[str, Family] = _FAMILIES | {f"{name}_text": _FAMILIES[name] for name in _WITH_TEXT}
"""Families by the ``model_type`` of transformers' configuration, of the whole model and of its text part."""
