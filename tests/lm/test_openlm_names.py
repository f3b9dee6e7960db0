import random

import pytest

from moekit.lm.openlm_names import openlm_name, openlm_order, our_name, plain_name

IN_ORDER = [  # as OpenLM's modules are constructed, with every optional part
    "post_embed_norm.weight",
    "post_embed_norm.bias",
    "tok_embeddings.weight",
    *("layers.0.attention.in_proj.weight", "layers.0.attention.out_proj.weight"),
    *("layers.0.attention.pos_embed.inv_freq",),
    *("layers.0.attention.q_norm.weight", "layers.0.attention.q_norm.bias", "layers.0.attention.k_norm.weight"),
    *("layers.0.feed_forward.router.layer.weight", "layers.0.feed_forward.experts.bias"),
    *("layers.0.feed_forward.experts.mlp.w1", "layers.0.feed_forward.experts.mlp.w2"),
    *("layers.0.attention_norm.weight", "layers.0.attention_norm.bias", "layers.0.ffn_norm.weight"),
    *("layers.2._ff_w1.weight", "layers.2._ff_w2.weight", "layers.2.feed_forward.0.weight"),
    *("layers.9.feed_forward.w12.weight", "layers.9.feed_forward.w3.weight", "layers.9.ffn_norm.weight"),
    "layers.10.attention.in_proj.weight",
    "norm.weight",
    "norm.bias",
    "output.weight",
]


def test_order_is_that_of_openlms_modules():
    shuffled = random.Random(0).sample(IN_ORDER, len(IN_ORDER))
    assert shuffled != IN_ORDER
    assert openlm_order(shuffled) == IN_ORDER


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("layers.11.feed_forward.gate", "layers.11.feed_forward.router.layer.weight"),
        ("layers.0.feed_forward.experts.up", "layers.0.feed_forward.experts.mlp.w1"),
        ("layers.0.feed_forward.experts.down", "layers.0.feed_forward.experts.mlp.w2"),
        ("layers.3.feed_forward.w2.weight", "layers.3._ff_w2.weight"),
        ("layers.3.feed_forward.w12.weight", "layers.3.feed_forward.w12.weight"),
        ("feed_forward.gate", "feed_forward.gate"),  # outside of a block it is something else
        ("norm.weight", "norm.weight"),
    ],
)
def test_names_there_and_back(ours, theirs):
    assert openlm_name(ours) == theirs
    assert our_name(theirs) == ours


def test_only_whole_parts_of_a_name_are_prefixes():
    assert plain_name("module.modules.layers.0.ffn_norm.weight") == "modules.layers.0.ffn_norm.weight"
