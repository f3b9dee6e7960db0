"""OpenLM's files against a re-implementation of OpenLM's forward that reads its state dict and nothing of moekit."""

import pickle
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moekit.lm.configs import ModelConfig
from moekit.lm.openlm_checkpoints import from_openlm, read_openlm, to_openlm, write_openlm
from moekit.recipes import openlm
from moekit.recipes.language_models import language_model

D, HEADS, LAYERS, VOCAB, EXPERTS = 20, 3, 3, 32, 4  # heads of 6, so attention is 18 wide in a model of 20
HEAD_DIM = D // HEADS
WIDTH = HEADS * HEAD_DIM
NORMS = {
    "default_layer_norm": ("weight", "bias"),
    "gain_only_layer_norm": ("weight",),
    "no_wb_layer_norm": (),
    "lp_layer_norm": ("weight", "bias"),
    "gain_only_lp_layer_norm": ("weight",),
    "rms_norm": ("weight",),
}


def make_config(**changes):
    shape = {"hidden_dim": D, "n_layers": LAYERS, "n_heads": HEADS, "seq_len": 16, "vocab_size": VOCAB}
    flags = {"post_embed_norm": False, "weight_tying": False, "model_norm": "gain_only_layer_norm"}
    return ModelConfig(**{**shape, **flags, "moe_freq": 2, "moe_num_experts": EXPERTS, **changes})


def make_model(config):
    return language_model(config, openlm(capacity_factor=0))  # a capacity so large that nothing is dropped


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def upstream_state(config):
    """Draw a state dict with the names, shapes and order of OpenLM's model."""
    sd = {}

    def norm(prefix, width):
        for part in NORMS[config.model_norm]:
            sd[f"{prefix}.{part}"] = torch.randn(width) + (part == "weight")

    if config.post_embed_norm:
        norm("post_embed_norm", D)
    sd["tok_embeddings.weight"] = torch.randn(VOCAB, D)
    for i in range(config.n_layers):
        p = f"layers.{i}."
        sd[p + "attention.in_proj.weight"] = torch.randn(3 * WIDTH, D) / D**0.5
        sd[p + "attention.out_proj.weight"] = torch.randn(D, WIDTH) / D**0.5
        if config.positional_embedding_type in ("rotary", "head_rotary"):
            steps = torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM
            sd[p + "attention.pos_embed.inv_freq"] = 1.0 / (10000**steps)
        if config.qk_norm:
            norm(p + "attention.q_norm", WIDTH)
            norm(p + "attention.k_norm", WIDTH)
        if config.moe_freq and i % config.moe_freq == 0:
            sd[p + "feed_forward.router.layer.weight"] = torch.randn(EXPERTS, D)
            sd[p + "feed_forward.experts.bias"] = torch.zeros(D)
            sd[p + "feed_forward.experts.mlp.w1"] = torch.randn(EXPERTS, D, 4 * D) / D**0.5
            sd[p + "feed_forward.experts.mlp.w2"] = torch.randn(EXPERTS, 4 * D, D) / D**0.5
        elif config.ffn_type == "gelu":
            sd[p + "_ff_w1.weight"] = sd[p + "feed_forward.0.weight"] = torch.randn(4 * D, D) / D**0.5
            sd[p + "_ff_w2.weight"] = sd[p + "feed_forward.2.weight"] = torch.randn(D, 4 * D) / D**0.5
        else:
            sd[p + "feed_forward.w12.weight"] = torch.randn(2 * 256, D) / D**0.5
            sd[p + "feed_forward.w3.weight"] = torch.randn(D, 256) / 16
        norm(p + "attention_norm", D)
        norm(p + "ffn_norm", D)
    norm("norm", D)
    sd["output.weight"] = sd["tok_embeddings.weight"] if config.weight_tying else torch.randn(VOCAB, D)
    return sd


def upstream_norm(sd, prefix, x, kind):
    center = 0 if kind == "rms_norm" else x.mean(-1, keepdim=True)
    y = (x - center) / ((x - center).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return y * sd.get(prefix + ".weight", 1) + sd.get(prefix + ".bias", 0)


def upstream_rotate(x, sd, prefix, kind):
    """Rotate x (L, H, Dh); OpenLM keeps the frequencies twice over, for both halves of a head."""
    if kind == "none":
        return x
    if kind == "llama_rotary":
        angles = torch.outer(torch.arange(len(x)).float(), 1 / 10000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(()), angles)[:, None]
        return torch.view_as_real(turned).flatten(-2)
    places = torch.arange(x.shape[1])[None, :, None] if kind == "head_rotary" else torch.arange(len(x))[:, None, None]
    angles = places * sd[prefix + "pos_embed.inv_freq"].repeat(2)
    a, b = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-b, a], dim=-1) * angles.sin()


def upstream_attention(sd, prefix, x, config):
    q, k, v = (x @ sd[prefix + "in_proj.weight"].T).split(WIDTH, dim=-1)
    if config.qk_norm:
        q, k = (upstream_norm(sd, f"{prefix}{n}_norm", t, config.model_norm) for n, t in (("q", q), ("k", k)))
    q, k, v = (t.reshape(len(x), HEADS, HEAD_DIM) for t in (q, k, v))
    q, k = (upstream_rotate(t, sd, prefix, config.positional_embedding_type) for t in (q, k))
    scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    return y @ sd[prefix + "out_proj.weight"].T


def upstream_ffn(sd, prefix, x):
    if prefix + "feed_forward.w12.weight" in sd:
        both = x @ sd[prefix + "feed_forward.w12.weight"].T
        gate, value = both[:, :256], both[:, 256:]
        return (gate * gate.sigmoid() * value) @ sd[prefix + "feed_forward.w3.weight"].T
    if prefix + "_ff_w1.weight" in sd:
        return F.gelu(x @ sd[prefix + "_ff_w1.weight"].T) @ sd[prefix + "_ff_w2.weight"].T
    prefix += "feed_forward."
    y = torch.zeros_like(x)
    for t, probabilities in enumerate((x @ sd[prefix + "router.layer.weight"].T).softmax(-1)):
        for e in probabilities.argsort(descending=True)[:2]:
            hidden = F.gelu(x[t] @ sd[prefix + "experts.mlp.w1"][e], approximate="tanh")
            y[t] += probabilities[e] * (hidden @ sd[prefix + "experts.mlp.w2"][e])
    return y


def upstream_logits(sd, ids, config):
    """Run OpenLM's forward on one sequence."""
    x = sd["tok_embeddings.weight"][ids]
    if config.post_embed_norm:
        x = upstream_norm(sd, "post_embed_norm", x, config.model_norm)
    for i in range(config.n_layers):
        p = f"layers.{i}."
        x = x + upstream_attention(
            sd, p + "attention.", upstream_norm(sd, p + "attention_norm", x, config.model_norm), config
        )
        x = x + upstream_ffn(sd, p, upstream_norm(sd, p + "ffn_norm", x, config.model_norm))
    return upstream_norm(sd, "norm", x, config.model_norm) @ sd["output.weight"].T


VARIANTS = [
    *({"model_norm": norm, "qk_norm": qk} for norm in NORMS for qk in (False, True)),
    {"post_embed_norm": True, "qk_norm": True},
    {"weight_tying": True},
    {"positional_embedding_type": "head_rotary"},
    {"positional_embedding_type": "llama_rotary"},
    {"positional_embedding_type": "none"},
    {"ffn_type": "gelu"},
    {"moe_freq": 0, "moe_num_experts": None},
    {"moe_freq": 1},
]


def quiet_from_openlm(sd, model, config):
    with warnings.catch_warnings():
        if config.positional_embedding_type not in ("rotary", "head_rotary"):
            warnings.simplefilter("error")
        return from_openlm(sd, expected=shapes(model), config=config)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_model_from_an_openlm_file_computes_what_openlm_computes(variant, tmp_path):
    config = make_config(**variant)
    sd, model = upstream_state(config), make_model(config)
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "name": "a", "state_dict": {f"module.{k}": t for k, t in sd.items()}, "step": 8}, path)
    model.load_state_dict(quiet_from_openlm(read_openlm(path).state_dict, model, config))
    ids = torch.randint(VOCAB, (2, 7))
    expected = torch.stack([upstream_logits(sd, row, config) for row in ids])
    torch.testing.assert_close(model(ids).logits, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_there_and_back_is_bit_for_bit_the_same_in_the_same_order(variant):
    config = make_config(**variant)
    sd = upstream_state(config)
    back = to_openlm(quiet_from_openlm(sd, make_model(config), config), config=config)
    names = [name for name in sd if not name.endswith(("feed_forward.0.weight", "feed_forward.2.weight"))]
    assert [name for name in back if name in names] == names
    assert back.keys() == sd.keys()
    for name, tensor in sd.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].is_contiguous()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_prefixes_of_wrappers_are_cut_off(prefix, tmp_path):
    torch.save({"epoch": 3, "state_dict": {prefix + "norm.weight": torch.ones(2)}}, tmp_path / "epoch_3.pt")
    assert list(read_openlm(tmp_path / "epoch_3.pt").state_dict) == ["norm.weight"]


def test_prefixes_inside_a_name_are_cut_off(tmp_path):
    torch.save({"layers.0._orig_mod.ffn_norm._fsdp_wrapped_module.weight": torch.ones(2)}, tmp_path / "a.pt")
    assert list(read_openlm(tmp_path / "a.pt").state_dict) == ["layers.0.ffn_norm.weight"]


def test_two_names_that_become_one_are_refused(tmp_path):
    torch.save({"norm.weight": torch.ones(2), "module.norm.weight": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"two tensors are named norm\.weight once the prefixes"):
        read_openlm(tmp_path / "a.pt")


def test_the_fields_of_both_generations_are_read(tmp_path):
    fields = {"evaluation_loss": 2.5, "next_chunk": 4, "samples_seen": 640}
    torch.save({"epoch": 2, "name": "run", "state_dict": {"w": torch.ones(1)}, "step": 90, **fields}, tmp_path / "a.pt")
    found = read_openlm(tmp_path / "a.pt")
    assert (found.epoch, found.step, found.name, found.others) == (2, 90, "run", fields)
    torch.save({"w": torch.ones(1)}, tmp_path / "bare.pt")
    assert read_openlm(tmp_path / "bare.pt")._replace(state_dict={}) == ({}, None, None, None, {})


def test_files_from_before_the_zip_format_are_read(tmp_path):
    sd = upstream_state(make_config())
    torch.save({"epoch": 1, "state_dict": sd}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    found = read_openlm(tmp_path / "a.pt").state_dict
    assert all(torch.equal(found[name], tensor) for name, tensor in sd.items())


class _Code:
    def __reduce__(self):
        return print, ("this must never be printed",)


W = {"w": torch.ones(1)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": W, "extra": _Code()}, r"holds (\S+\.)?print, and loading that could run code, so it was not"),
        ({"state_dict": W, "loss": np.float64(2.0)}, r"holds numpy\S*\.scalar, .*torch\.save\(\{'epoch'"),
        ({"state_dict": W, "args": SimpleNamespace(lr=1)}, r"holds types\.SimpleNamespace"),
        ([torch.ones(1)], "holds a list; expected a dict"),
        ({}, "the state dict is dict of nothing"),
        ({"state_dict": {}}, "the state dict is dict of nothing"),
        ({"state_dict": 3}, "the state dict is int of nothing"),
        ({"w": torch.ones(1), "lr": 0.1}, "'lr' is a float; expected names of dense tensors and nothing else"),
        ({3: torch.ones(1)}, "3 is a Tensor; expected names"),
        ({"w": torch.ones(2, 2).to_sparse()}, "'w' is a Tensor; expected names of dense"),
        ({"epoch": 1, "optimizer": {"state": {}}}, r"optimizer's state and no weights; expected the epoch_N\.pt"),
        ({"epoch": "one", "state_dict": {"w": torch.ones(1)}}, "epoch is 'one'; expected int"),
        ({"epoch": 1, "step": True, "state_dict": {"w": torch.ones(1)}}, "step is True; expected int"),
        ({"epoch": 1, "step": -1, "state_dict": {"w": torch.ones(1)}}, "step is -1; expected at least 0"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_refused_by_name(content, words, tmp_path, capsys):
    torch.save(content, tmp_path / "epoch_1.pt")
    with pytest.raises(ValueError, match=words) as raised:
        read_openlm(tmp_path / "epoch_1.pt")
    assert "epoch_1.pt" in str(raised.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not torch", b"\x80\x02}q\x00.", b"\x00" * 100])
def test_a_file_that_is_not_torchs_is_refused(content, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt: torch cannot read it|the state dict is dict of nothing"):
        read_openlm(tmp_path / "a.pt")


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder; expected a file that torch\.save wrote"):
        read_openlm(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*epoch_7\.pt; expected"):
        read_openlm(tmp_path / "epoch_7.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_end_in_a_value_error_and_in_nothing_else(zipped, tmp_path):
    sd = {f"layers.{i}.ffn_norm.weight": torch.randn(7) for i in range(3)}
    torch.save({"epoch": 1, "state_dict": sd}, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    whole, draw, refused = (tmp_path / "whole.pt").read_bytes(), random.Random(0), 0
    for i in range(150):
        content = bytearray(whole[: draw.randrange(len(whole))] if i % 2 else whole)
        for _ in range(0 if i % 2 else draw.choice([1, 4, 40])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / "damaged.pt").write_bytes(content)
        try:
            for tensor in read_openlm(tmp_path / "damaged.pt").state_dict.values():
                tensor.clone()
        except ValueError as error:
            assert "damaged.pt" in str(error)  # noqa: PT017 - a flip in a number is not seen, so not all raise
            refused += 1
    assert refused >= 75  # every file that was cut short, at least


def test_a_bias_that_openlm_never_used_is_dropped_with_a_warning():
    config = make_config()
    sd, model = upstream_state(config), make_model(config)
    sd["layers.2.feed_forward.experts.bias"][3] = 0.5
    with pytest.warns(UserWarning, match=r"dropping layers\.2\.feed_forward\.experts\.bias, not zero") as caught:
        ours = from_openlm(sd, expected=shapes(model), config=config)
    assert len(caught) == 1
    assert ours.keys() == model.state_dict().keys()


@pytest.mark.parametrize(("experts", "hidden"), [(1, 4 * D), (2, 4 * D), (EXPERTS, 2 * D)])
def test_one_ranks_experts_are_refused_with_the_reason(experts, hidden):
    config = make_config()
    sd, model = upstream_state(config), make_model(config)
    for i in (0, 2):
        sd[f"layers.{i}.feed_forward.experts.mlp.w1"] = torch.zeros(experts, D, hidden)
        sd[f"layers.{i}.feed_forward.experts.mlp.w2"] = torch.zeros(experts, hidden, D)
    words = (
        rf"router for 4 experts, but its experts are \({experts}, 20, {hidden}\); expected \(4, 20, 80\).*one rank only"
    )
    with pytest.raises(ValueError, match=words):
        from_openlm(sd, expected=shapes(model), config=config)


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ({"moe_num_experts": 8}, r"router\.layer\.weight: found \(4, 20\), expected \(8, 20\)\. .* --moe-num-experts"),
        ({"vocab_size": 40}, r"tok_embeddings\.weight: found \(32, 20\), expected \(40, 20\)\. It depends on --model"),
        ({"model_norm": "default_layer_norm"}, r"file lacks layers\.0\.attention_norm\.bias, .* --model --model-norm$"),
        ({"model_norm": "no_wb_layer_norm"}, r"has no layers\.0\.attention_norm\.weight, .* --model --model-norm$"),
        ({"qk_norm": True}, r"lacks layers\.0\.attention\.q_norm\.weight, layers\.0\.att.* --model --qk-norm$"),
        ({"moe_freq": 1}, r"lacks layers\.1\.feed_forward\.router\.layer\.weight, layers\.1\.feed_forward\.experts"),
        ({"moe_freq": 1}, r"; the model has no layers\.1\.feed_forward\.w12\.weight, .* --ffn-type --model --moe-fr"),
        ({"n_layers": 4}, r"the file lacks layers\.3\.attention\.in_proj\.weight"),
        ({"n_layers": 2}, r"the model has no layers\.2\.attention\.in_proj\.weight"),
        ({"post_embed_norm": True}, r"the file lacks post_embed_norm\.weight\."),
        ({"weight_tying": True}, r"ties tok_embeddings\.weight and output\.weight, but in the file they differ"),
        ({"n_heads": 9}, r"has 3 frequencies from .*; expected those of heads of width 2: 1 from"),
        ({"positional_embedding_type": "none"}, r"rotary or head_rotary, but the model's is none\. .* --positional"),
        ({"ffn_type": "gelu"}, r"file lacks layers\.1\._ff_w1\.weight, .*model has no layers\.1\.feed_forward\.w12"),
    ],
)  # fmt: skip
def test_another_models_file_is_refused_with_the_flag(variant, words):
    config = make_config(**variant)
    with pytest.raises(ValueError, match=words):
        from_openlm(upstream_state(make_config()), expected=shapes(make_model(config)), config=config)


def test_a_lost_expert_tensor_is_noticed():
    config = make_config()
    sd, model = upstream_state(config), make_model(config)
    del sd["layers.2.feed_forward.experts.mlp.w2"]
    with pytest.raises(ValueError, match=r"the file lacks layers\.2\.feed_forward\.experts\.mlp\.w2\. "):
        from_openlm(sd, expected=shapes(model), config=config)


def test_integers_are_no_weights():
    config = make_config()
    sd, model = upstream_state(config), make_model(config)
    sd["norm.weight"] = sd["norm.weight"].long()
    with pytest.raises(ValueError, match=r"norm\.weight is torch\.int64; expected floating-point"):
        from_openlm(sd, expected=shapes(model), config=config)


def test_frequencies_of_another_base_are_refused_and_bf16_ones_are_not():
    config = make_config()
    sd, model = upstream_state(config), make_model(config)
    name = "layers.0.attention.pos_embed.inv_freq"
    sd[name] = sd[name].bfloat16()
    from_openlm(sd, expected=shapes(model), config=config)
    sd[name] = 1 / 500_000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.pos_embed\.inv_freq has 3 frequencies"):
        from_openlm(sd, expected=shapes(model), config=config)


def test_a_file_without_frequencies_loads_with_a_warning():
    config = make_config()
    sd = {name: tensor for name, tensor in upstream_state(config).items() if not name.endswith("inv_freq")}
    with pytest.warns(UserWarning, match="does not show its position embedding; it is taken for rotary"):
        from_openlm(sd, expected=shapes(make_model(config)), config=config)


def test_the_two_names_of_a_dense_gelu_matrix_must_agree():
    config = make_config(ffn_type="gelu")
    sd, model = upstream_state(config), make_model(config)
    sd["layers.1.feed_forward.2.weight"] = torch.zeros(D, 4 * D)
    with pytest.raises(ValueError, match=r"layers\.1\._ff_w2\.weight and layers\.1\.feed_forward\.2\.weight differ"):
        from_openlm(sd, expected=shapes(model), config=config)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.feed_forward.experts.gate", (EXPERTS, D, 64)),
        ("layers.0.feed_forward.shared.up", (1, D, 64)),
        ("layers.0.feed_forward.bias", (EXPERTS,)),
        ("layers.0.feed_forward.experts.up", (EXPERTS, D, 2 * D)),
    ],
)
def test_what_openlm_cannot_hold_is_refused(name, shape):
    config = make_config()
    state = {**make_model(config).state_dict(), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"OpenLM has no layout for {name}: .*safetensors file can hold"):
        to_openlm(state, config=config)


def test_geglu_would_be_read_as_swiglu_and_is_refused():
    config = make_config(ffn_type="geglu")
    with pytest.raises(ValueError, match=r"OpenLM has no layout for layers\.1\.feed_forward\.w12\.weight"):
        to_openlm(make_model(config).state_dict(), config=config)
    every_layer = make_config(ffn_type="geglu", moe_freq=1)
    to_openlm(make_model(every_layer).state_dict(), config=every_layer)


def test_a_written_file_has_openlms_fields_and_keeps_tied_weights_tied(tmp_path):
    config = make_config(weight_tying=True, ffn_type="gelu")
    sd = to_openlm(make_model(config).state_dict(), config=config)
    path = write_openlm(tmp_path / "epoch_2.pt", sd, epoch=2, step=9, name="run")
    raw = torch.load(path, weights_only=True)
    assert (raw["epoch"], raw["step"], raw["name"]) == (2, 9, "run")
    assert list(raw["state_dict"]) == list(sd)
    assert raw["state_dict"]["tok_embeddings.weight"].data_ptr() == raw["state_dict"]["output.weight"].data_ptr()
    assert not any(tensor.requires_grad for tensor in raw["state_dict"].values())
    assert [each.name for each in tmp_path.iterdir()] == ["epoch_2.pt"]
    assert read_openlm(path).others == {}


def test_a_part_of_a_large_tensor_is_written_alone(tmp_path):
    path = write_openlm(tmp_path / "epoch_1.pt", {"norm.weight": torch.ones(100_000)[:2]}, epoch=1)
    assert path.stat().st_size < 10_000


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = write_openlm(tmp_path / "epoch_1.pt", {"norm.weight": torch.ones(2)}, epoch=1)
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
        write_openlm(path, {"norm.weight": torch.ones(2)}, epoch=1, name=lambda: None)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
