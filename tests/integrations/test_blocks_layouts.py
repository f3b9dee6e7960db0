"""Converters on tensors written out by hand, without transformers: order of halves, columns, axes; and refusals."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import moekit
from moekit.integrations import blocks_layouts as at
from moekit.integrations.blocks import FAMILIES, Block, Layout, family
from moekit.integrations.blocks_recipes import of_mixtral
from moekit.recipes.layers import MoEParams

D, F, E = 2, 3, 2
CONFIG = SimpleNamespace(num_experts_per_tok=2, hidden_act="silu")


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def read(piece: at.Piece, entries: dict[str, Tensor], config: Any = None) -> Any:
    """Read, and check that writing gives the entries back and that nothing is left."""
    left = dict(entries)
    value = piece.read(left, config)
    assert not left
    back = piece.write(value, config)
    assert set(back) == set(entries)
    assert all(torch.equal(back[name], entries[name]) for name in entries)
    return value


def test_first_half_is_the_gate() -> None:
    gate_up, down = numbered(E, 2 * F, D), numbered(E, D, F)
    params = read(at.halves("gate_up", "down"), {"gate_up": gate_up, "down": down})
    for e in range(E):
        for d in range(D):
            for f in range(F):
                assert params.gate[e, d, f] == gate_up[e, f, d]
                assert params.up[e, d, f] == gate_up[e, F + f, d]
                assert params.down[e, f, d] == down[e, d, f]


def test_halves_stored_as_they_are_multiplied() -> None:
    gate_up, down = numbered(E, D, 2 * F), numbered(E, F, D)
    params = read(at.halves_in_out("gate_up", "down"), {"gate_up": gate_up, "down": down})
    assert torch.equal(params.gate, gate_up[:, :, :F])
    assert torch.equal(params.up, gate_up[:, :, F:])
    assert torch.equal(params.down, down)


def test_gpt_oss_interleaves_gate_in_even_columns_and_up_in_odd_ones() -> None:
    entries = {
        "experts.gate_up_proj": numbered(E, D, 2 * F),
        "experts.gate_up_proj_bias": numbered(E, 2 * F),
        "experts.down_proj": numbered(E, F, D),
        "experts.down_proj_bias": numbered(E, D),
    }
    params = read(at.interleaved_biased("experts"), entries)
    assert params.gate[0].tolist() == [[0, 2, 4], [6, 8, 10]]
    assert params.up[0].tolist() == [[1, 3, 5], [7, 9, 11]]
    assert params.gate_bias[1].tolist() == [[6, 8, 10]]
    assert params.up_bias[1].tolist() == [[7, 9, 11]]
    assert params.down_bias.tolist() == [[[0, 1]], [[2, 3]]]


def test_rows_of_dbrx() -> None:
    entries = {f"mlp.{name}": numbered(E * F, D) + 100 * i for i, name in enumerate(("w1", "v1", "w2"))}
    params = read(at.rows_of_experts("mlp", lambda config: E), entries)
    assert params.gate[1, 0].tolist() == [6, 8, 10]
    assert params.up[1, 0].tolist() == [106, 108, 110]
    assert params.down[1, 0].tolist() == [206, 207]


def test_a_list_of_linears() -> None:
    entries = {f"e{e}.up": numbered(F, D) + 10 * e for e in range(11)}
    entries |= {f"e{e}.down": numbered(D, F) + 10 * e for e in range(11)}
    params = read(at.listed_ungated("e{}.up", "e{}.down"), entries)
    assert params.up.shape == (11, D, F)
    assert params.up[10, 0].tolist() == [100, 102, 104], "expert 10 comes after 9, not after 1"


def test_a_shared_network_has_one_expert() -> None:
    names = [f"shared.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    entries = dict(zip(names, (numbered(F, D), 10 + numbered(F, D), numbered(D, F)), strict=True))
    params = read(at.gated_mlp("shared"), entries)
    assert [tuple(p.shape) for p in params] == [(1, D, F), (1, D, F), (1, F, D)]
    assert params.up[0, 1].tolist() == [11, 13, 15]


def test_gradients_flow_there_and_back() -> None:
    gate_up, down = numbered(E, 2 * F, D).requires_grad_(), numbered(E, D, F).requires_grad_()
    piece = at.halves("gate_up", "down")
    back = piece.write(piece.read({"gate_up": gate_up, "down": down}, None), None)
    (back["gate_up"].square().sum() + back["down"].sum()).backward()
    assert torch.equal(gate_up.grad, 2 * gate_up.detach())
    assert torch.equal(down.grad, torch.ones(E, D, F))


def mixtral_entries() -> dict[str, Tensor]:
    return {
        "gate.weight": numbered(E, D),
        "experts.gate_up_proj": numbered(E, 2 * F, D),
        "experts.down_proj": numbered(E, D, F),
    }


def test_the_callers_state_dict_stays_as_it_is() -> None:
    entries = mixtral_entries()
    FAMILIES["mixtral"].to_params(entries, CONFIG)
    assert len(entries) == 3


def test_params_share_no_memory_with_the_state_dict_where_axes_turn() -> None:
    entries = mixtral_entries()
    block = FAMILIES["mixtral"].to_params(entries, CONFIG)
    assert all(p.is_contiguous() for p in block.params.experts)
    assert block.params.gate.is_contiguous()


def test_a_missing_entry_is_named() -> None:
    entries = {f"model.layers.0.mlp.{name}": tensor for name, tensor in mixtral_entries().items()}
    with pytest.raises(
        ValueError, match=r"lacks 'gate.weight'; it has \['model.layers.0.*Pass the state dict of the MoE"
    ):
        FAMILIES["mixtral"].to_params(entries, CONFIG)


def test_an_entry_that_the_family_does_not_know_is_named() -> None:
    entries = mixtral_entries() | {"shared_expert.up_proj.weight": numbered(F, D)}
    with pytest.raises(ValueError, match=r"has \['shared_expert.up_proj.weight'\], which this family does not know"):
        FAMILIES["mixtral"].to_params(entries, CONFIG)


def test_longcats_bias_that_transformers_never_adds_is_refused() -> None:
    entries = {
        "router.classifier.weight": numbered(E + 1, D),
        "router.classifier.bias": numbered(E + 1),
        "router.e_score_correction_bias": numbered(E + 1),
        "experts.gate_up_proj": numbered(E + 1, 2 * F, D),
        "experts.down_proj": numbered(E, D, F),
    }
    config = SimpleNamespace(zero_expert_num=1)
    with pytest.raises(ValueError, match=r"has \['router.classifier.bias'\], which this family does not know"):
        FAMILIES["longcat_flash"].to_params(entries, config)


def test_parts_without_a_place_are_refused() -> None:
    block = FAMILIES["mixtral"].to_params(mixtral_entries(), CONFIG)
    with pytest.raises(ValueError, match="the block has state, and its family has no place for it"):
        FAMILIES["mixtral"].from_params(block._replace(state=torch.zeros(E)), CONFIG)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"hidden_act": "gelu"}, r"hidden_act = 'gelu'; the family's recipe does 'silu' or 'swish'"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2]}, r"moe_topk = \[1, 2\], one for each layer; expected a number"),
        ("nemotron_h", {"moe_latent_size": 8}, "moe_latent_size = 8; the family's recipe does None"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 20}, "_size = 20 and moe_intermediate_size = 13; expected a"),
        ("dbrx", {"ffn_config": SimpleNamespace(moe_normalize_expert_weights=2.0)}, "_weights = 2.0; the family's"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias = True; the family's recipe does False"),
        (
            "ernie4_5_moe",
            {"use_bias": False, "moe_norm_min": 0.9},
            "moe_norm_min = 0.9; the family's recipe does 1e-12",
        ),
        (
            "hy_v3",
            {"num_shared_experts": 0},
            "num_shared_experts = 0, by which transformers makes one shared expert as",
        ),
        (
            "nemotron_h",
            {"moe_latent_size": None, "moe_shared_expert_intermediate_size": 0},
            "moe_shared_expert_intermediate_size = 0, by which transformers makes one shared expert",
        ),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'; the family's recipe does 'greedy'"),
        ("lfm2_moe", {"norm_topk_prob": False}, "norm_topk_prob = False; the family's recipe does True"),
    ],
)
def test_what_a_recipe_does_not_do_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    known = {
        "hidden_act": "silu",
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "moe_intermediate_size": 13,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
    }
    with pytest.raises(ValueError, match=message):
        FAMILIES[name].recipe(SimpleNamespace(**{**known, **changes}))


def test_deepseek_v2_without_groups_does_not_limit() -> None:
    config = SimpleNamespace(
        hidden_act="silu",
        mlp_bias=False,
        topk_method="greedy",
        n_group=None,
        topk_group=None,
        num_experts_per_tok=2,
        n_shared_experts=1,
        routed_scaling_factor=1.0,
    )
    route = FAMILIES["deepseek_v2"].recipe(config).route
    assert route(torch.tensor([[3.0, 0.0, 1.0, 2.0]])).expert_indices.tolist() == [[0, 3]]


def test_a_family_of_ones_own() -> None:
    mine = family(of_mixtral, Layout(at.linear("w"), at.halves("gate_up", "down")))
    entries = {"w": numbered(E, D), "gate_up": numbered(E, 2 * F, D), "down": numbered(E, D, F)}
    block = mine.to_params(entries, CONFIG)
    assert isinstance(block, Block)
    assert isinstance(block.params, MoEParams)
    assert all(torch.equal(mine.from_params(block, CONFIG)[name], entries[name]) for name in entries)


def test_no_file_of_the_blocks_imports_transformers() -> None:
    for file in (Path(moekit.__file__).parent / "integrations").glob("blocks*.py"):
        nodes = ast.walk(ast.parse(file.read_text()))
        names = [n for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for n in names_of(node)]
        assert not [name for name in names if name.split(".")[0] == "transformers"], file
        assert not [name for name in names if name == "moekit.integrations.transformers"], file


def names_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
