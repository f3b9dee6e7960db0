import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from moekit.lm.configs import load_config
from moekit.lm.feed_forward import make_feed_forward
from moekit.lm.model import Block, Embedding, LanguageModel, count_parameters, init_weights
from moekit.types import LayerOutput

TINY = load_config("moekit_tiny", vocab_size=31)


class RecordingFFN(nn.Module):
    """A feed-forward in place of an MoE layer: keeps what it was given, and returns a loss."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.full((TINY.hidden_dim,), 7.0 + index))
        self.seen: dict[str, torch.Tensor | None] = {}

    def forward(self, x, *, token_ids=None, token_mask=None):
        self.seen = {"token_ids": token_ids, "token_mask": token_mask}
        return LayerOutput(x * self.own, losses={"load_balance": self.own.sum()})


def randomize(model: nn.Module) -> None:
    """Give every parameter, norm gains and biases too, a value that a wrong formula cannot hide behind."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)


def naive_logits(state: dict[str, torch.Tensor], ids: torch.Tensor, *, n_layers: int, n_heads: int) -> torch.Tensor:
    """A decoder with layer norm, qk-norm, half-split rotary and SwiGLU from its state dict alone, for one sequence."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]

    def rotate(vector: torch.Tensor, position: int) -> torch.Tensor:
        half = len(vector) // 2
        turned = torch.empty_like(vector)
        for i in range(half):
            angle = position * 10_000.0 ** (-i / half)
            a, b = vector[i], vector[i + half]
            turned[i] = a * math.cos(angle) - b * math.sin(angle)
            turned[i + half] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    x = norm(state["tok_embeddings.weight"][ids], "post_embed_norm")  # (L, D)
    length = len(ids)
    mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
    for i in range(n_layers):
        layer = f"layers.{i}"
        projected = norm(x, f"{layer}.attention_norm") @ state[f"{layer}.attention.in_proj.weight"].T
        width = projected.shape[1] // 3
        head_dim = width // n_heads
        q = norm(projected[:, :width], f"{layer}.attention.q_norm")
        k = norm(projected[:, width : 2 * width], f"{layer}.attention.k_norm")
        v = projected[:, 2 * width :]
        heads = []
        for h in range(n_heads):
            own = slice(h * head_dim, (h + 1) * head_dim)
            qh = torch.stack([rotate(q[p, own], p) for p in range(length)])
            kh = torch.stack([rotate(k[p, own], p) for p in range(length)])
            weights = torch.softmax(torch.einsum("id,jd->ij", qh, kh) / math.sqrt(head_dim) + mask, dim=-1)
            heads.append(torch.einsum("ij,jd->id", weights, v[:, own]))
        x = x + torch.cat(heads, dim=-1) @ state[f"{layer}.attention.out_proj.weight"].T
        fused = norm(x, f"{layer}.ffn_norm") @ state[f"{layer}.feed_forward.w12.weight"].T
        gate, value = fused[:, : fused.shape[1] // 2], fused[:, fused.shape[1] // 2 :]
        x = x + (gate * torch.sigmoid(gate) * value) @ state[f"{layer}.feed_forward.w3.weight"].T
    return norm(x, "norm") @ state["output.weight"].T


def test_equals_the_naive_forward_in_float64():
    config = dataclasses.replace(
        TINY, hidden_dim=26, n_heads=3, post_embed_norm=True, model_norm="default_layer_norm"
    )  # heads of 8: attention is narrower than the model
    model = LanguageModel(config).double()
    randomize(model)
    ids = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits
    assert logits.dtype == torch.float64
    for row, expected in zip(ids, logits, strict=True):
        naive = naive_logits(model.state_dict(), row, n_layers=2, n_heads=3)
        torch.testing.assert_close(naive, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["rotary", "llama_rotary", "head_rotary", "none"])
def test_is_causal(kind):
    model = LanguageModel(dataclasses.replace(TINY, positional_embedding_type=kind))
    randomize(model)
    ids = torch.randint(31, (2, 12))
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 31
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert ((before[:, 7:] - after[:, 7:]).abs().amax(-1) > 1e-4).all()


def test_parameter_names_are_openlms():
    names = set(LanguageModel(dataclasses.replace(TINY, n_layers=1)).state_dict())
    assert names == {
        "tok_embeddings.weight",
        "layers.0.attention.in_proj.weight",
        "layers.0.attention.out_proj.weight",
        "layers.0.attention.q_norm.weight",
        "layers.0.attention.k_norm.weight",
        "layers.0.feed_forward.w12.weight",
        "layers.0.feed_forward.w3.weight",
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
        "norm.weight",
        "output.weight",
    }


def test_weight_tying_shares_one_matrix():
    untied, tied = (LanguageModel(dataclasses.replace(TINY, weight_tying=tie)) for tie in (False, True))
    assert tied.tok_embeddings.weight is tied.output.weight
    assert count_parameters(untied) - count_parameters(tied) == 31 * TINY.hidden_dim
    weights = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    for change in (
        lambda: tied.to_empty(device="cpu"),
        lambda: tied.load_state_dict(weights, assign=True),
        lambda: torch.nn.Sequential(tied).load_state_dict(
            {f"0.{name}": tensor.clone() for name, tensor in weights.items()}, assign=True
        ),
        lambda: tied.double(),
    ):
        change()
        assert tied.tok_embeddings.weight is tied.output.weight
        assert untied.tok_embeddings.weight is not untied.output.weight
    assert torch.equal(tied.output.weight, weights["output.weight"].double())
    own = {"tok_embeddings.weight": torch.full((31, TINY.hidden_dim), 7.0)}
    for assign in (False, True):
        copied = copy.copy(LanguageModel(dataclasses.replace(TINY, weight_tying=True)))
        copied.load_state_dict(own, strict=False, assign=assign)
        assert copied.tok_embeddings.weight is copied.output.weight
        assert (copied.output.weight == 7).all()
    tied.output = torch.nn.Linear(TINY.hidden_dim, 7)  # another head is no tied one
    assert tied.float().tok_embeddings.weight.shape == (31, TINY.hidden_dim)


def test_initialization_is_openlms():
    model = LanguageModel(dataclasses.replace(TINY, n_layers=8, vocab_size=200, model_norm="default_layer_norm"))
    randomize(model)
    init_weights(model, generator=torch.Generator().manual_seed(0))
    expected = {"tok_embeddings.weight": 1 / 8, "output.weight": 1 / 8}
    for i in range(8):
        depth = math.sqrt(2 * (i + 1))
        expected[f"layers.{i}.attention.in_proj.weight"] = 1 / 8
        expected[f"layers.{i}.attention.out_proj.weight"] = 1 / 8 / depth
        expected[f"layers.{i}.feed_forward.w12.weight"] = 1 / 8
        expected[f"layers.{i}.feed_forward.w3.weight"] = 1 / 16 / depth  # inner width 256
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        else:
            std = expected.pop(name)
            assert parameter.abs().max() <= 3 * std, name
            assert parameter.std().item() == pytest.approx(0.9866 * std, rel=0.06), name
    assert not expected


def test_initialization_follows_the_generator_and_spares_moe():
    models = [LanguageModel(TINY, make_ffn=RecordingFFN) for _ in range(2)]
    for model in models:
        init_weights(model, generator=torch.Generator().manual_seed(5))
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    assert models[0].layers[1].feed_forward.own.unique().item() == 8.0


def test_make_ffn_supplies_each_layer_and_outputs_come_back():
    dense = make_feed_forward("gelu")
    model = LanguageModel(TINY, make_ffn=lambda i: RecordingFFN(i) if i == 0 else dense(TINY.hidden_dim))
    ids = torch.randint(31, (2, 5))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    output = model(ids, token_mask=mask)
    assert model.layers[0].feed_forward.seen["token_ids"] is ids
    assert model.layers[0].feed_forward.seen["token_mask"] is mask
    assert [list(layer.losses) for layer in output.layers] == [["load_balance"], []]
    torch.testing.assert_close(model.output(model.norm(output.layers[-1].y)), output.logits)


def test_moe_config_without_make_ffn_is_refused():
    config = dataclasses.replace(TINY, moe_freq=2, moe_num_experts=4)
    with pytest.raises(ValueError, match=r"layers \[0\] are MoE.*moekit\.recipes\.language_model"):
        LanguageModel(config)
    LanguageModel(config, make_ffn=RecordingFFN)


def test_longer_than_seq_len_is_allowed():
    assert LanguageModel(TINY)(torch.zeros(1, TINY.seq_len + 3, dtype=torch.int64)).logits.shape[1] == TINY.seq_len + 3


@pytest.mark.parametrize("num_logits", [0, 1, 5])
def test_logits_of_the_last_positions_are_those_of_all(num_logits):
    torch.manual_seed(0)
    model = LanguageModel(load_config("moekit_tiny")).double()
    ids = torch.randint(512, (2, 5))
    everything, some = model(ids), model(ids, num_logits=num_logits)
    assert some.logits.shape == (2, num_logits, 512)
    torch.testing.assert_close(some.logits, everything.logits[:, 5 - num_logits :])
    assert torch.equal(some.layers[-1].y, everything.layers[-1].y)


@pytest.mark.parametrize("num_logits", [-1, 6])
def test_more_logits_than_positions_are_refused(num_logits):
    with pytest.raises(ValueError, match=f"num_logits is {num_logits}, expected 0 to 5"):
        LanguageModel(load_config("moekit_tiny"))(torch.randint(512, (2, 5)), num_logits=num_logits)


def test_int32_ids_give_the_same():
    model = LanguageModel(TINY)
    ids = torch.randint(31, (2, 5))
    assert torch.equal(model(ids).logits, model(ids.int()).logits)


@pytest.mark.parametrize(
    ("ids", "mask", "error", "message"),
    [
        (torch.zeros(1, 4), None, TypeError, "ids are torch.float32, expected int64 or int32"),
        (torch.zeros(4, dtype=torch.int64), None, ValueError, r"shape \(4,\), expected \(B, L\); .*ids\[None\]"),
        (torch.zeros(1, 4).long(), torch.ones(1, 3).bool(), ValueError, r"token_mask has the shape \(1, 3\).*\(1, 4\)"),
        (torch.zeros(1, 4).long(), torch.ones(1, 4), TypeError, "token_mask is torch.float32, expected bool"),
    ],
)
def test_bad_input_is_explained(ids, mask, error, message):
    with pytest.raises(error, match=message):
        LanguageModel(TINY)(ids, token_mask=mask)


@pytest.mark.parametrize("norm", ["default_layer_norm", "gain_only_lp_layer_norm", "rms_norm", "no_wb_layer_norm"])
def test_bfloat16_autocast_gives_float32_logits_and_gradients(norm):
    model = LanguageModel(dataclasses.replace(TINY, model_norm=norm))
    ids = torch.randint(31, (2, 9))
    reference = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids).logits
    assert logits.dtype == torch.float32
    assert (logits - reference).norm() < 0.03 * reference.norm()
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_compiles_to_one_graph():
    model = LanguageModel(dataclasses.replace(TINY, n_layers=1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(31, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    got, expected = compiled(ids, token_mask=mask), model(ids)
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.layers[0].y, expected.layers[0].y)


@pytest.mark.parametrize("norm", ["gain_only_lp_layer_norm", "rms_norm"])
def test_compiles_to_one_graph_under_autocast(norm):
    model = LanguageModel(dataclasses.replace(TINY, n_layers=1, model_norm=norm))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(31, (2, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_frequent_ids_in_half_precision_is_near_float64(dtype, ids_dtype, compiled):
    torch.manual_seed(0)
    ids = torch.randint(3, (4, 4096), dtype=ids_dtype)
    grad = (0.1 * torch.randn(4, 4096, 8) + 0.01).to(dtype)
    embedding = LanguageModel(dataclasses.replace(TINY, hidden_dim=8, n_heads=1, n_layers=1)).to(dtype).tok_embeddings
    exact = nn.Embedding.from_pretrained(embedding.weight.detach().double(), freeze=False)
    y = (torch.compile(embedding, fullgraph=True, backend="aot_eager") if compiled else embedding)(ids)
    assert torch.equal(y, exact(ids).to(dtype))
    y.backward(grad)
    exact(ids).backward(grad.double())
    assert embedding.weight.grad.dtype is dtype
    assert (embedding.weight.grad - exact.weight.grad).norm() < 5e-3 * exact.weight.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_id_outside_the_vocabulary_is_refused(dtype, wrong):
    with pytest.raises(IndexError, match="out of range"):
        Embedding(5, 2).to(dtype)(torch.tensor([[0, wrong]]))


def test_learns_to_copy_the_previous_token():
    torch.manual_seed(0)
    model = LanguageModel(dataclasses.replace(TINY, vocab_size=8, n_layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        ids = torch.randint(8, (16, 8))
        logits = model(ids).logits[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5  # log 8 = 2.08 at the start


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("feed_forward", [False, True])
def test_a_block_computes_again_what_it_is_told_to(attention, feed_forward):
    block = Block(TINY, make_feed_forward("swiglu")(TINY.hidden_dim)).double()
    randomize(block)
    x = torch.randn(2, 5, TINY.hidden_dim, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    expected = block(x).y
    grads = torch.autograd.grad(expected.square().sum(), leaves)
    assert (block.recompute_attention, block.recompute_feed_forward) == (False, False)
    block.recompute_attention, block.recompute_feed_forward = attention, feed_forward
    calls = []
    block.attention.register_forward_pre_hook(lambda *_: calls.append("attention"))
    block.feed_forward.register_forward_pre_hook(lambda *_: calls.append("feed_forward"))
    y = block(x).y
    assert calls == ["attention", "feed_forward"]
    assert torch.equal(y, expected)
    for grad, other in zip(grads, torch.autograd.grad(y.square().sum(), leaves), strict=True):
        assert grad.abs().max() > 0
        torch.testing.assert_close(other, grad, rtol=1e-12, atol=1e-14)
    assert calls.count("attention") == 1 + attention
    assert calls.count("feed_forward") == 1 + feed_forward


def test_a_recomputed_block_hands_on_what_its_feed_forward_was_given_and_returned():
    feed_forward = RecordingFFN(0)
    block = Block(TINY, feed_forward)
    block.recompute_feed_forward = True
    ids, mask = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
    output = block(torch.randn(2, 5, TINY.hidden_dim), token_ids=ids, token_mask=mask)
    assert feed_forward.seen["token_ids"] is ids
    assert feed_forward.seen["token_mask"] is mask
    torch.testing.assert_close(output.losses["load_balance"], feed_forward.own.sum())
    output.losses["load_balance"].backward()
    assert torch.equal(feed_forward.own.grad, torch.ones_like(feed_forward.own))


def test_flags_of_recomputing_are_no_part_of_the_state():
    block = Block(TINY, make_feed_forward("swiglu")(TINY.hidden_dim))
    before = set(block.state_dict())
    block.recompute_attention = block.recompute_feed_forward = True
    assert set(block.state_dict()) == before
