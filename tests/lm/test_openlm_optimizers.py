"""AdamW's state of a stand-in that registers its parameters as OpenLM's model does."""

import pytest
import torch
from torch import nn

from moekit.lm.checkpoints import training_tensors
from moekit.lm.configs import ModelConfig
from moekit.lm.openlm_checkpoints import from_openlm, to_openlm
from moekit.lm.openlm_optimizers import read_openlm_optimizer
from moekit.recipes import openlm
from moekit.recipes.language_models import language_model

CONFIG = ModelConfig(
    hidden_dim=12, n_layers=3, n_heads=2, seq_len=8, vocab_size=16, post_embed_norm=True, weight_tying=False,
    model_norm="gain_only_layer_norm", qk_norm=True, moe_freq=2, moe_num_experts=4,
)  # fmt: skip
BIASES = ("layers.0.feed_forward.experts.bias", "layers.2.feed_forward.experts.bias")


def make_model(config=CONFIG):
    return language_model(config, openlm(capacity_factor=0))


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def upstream(model, config=CONFIG, *, by_name=False, steps=3):
    """Return OpenLM's parameters, its optimizer's state dict and its file of weights, after training them a little."""
    sd = to_openlm(model.state_dict(), config=config)
    twins = ("inv_freq", "feed_forward.0.weight", "feed_forward.2.weight")
    twins += ("output.weight",) if config.weight_tying else ()
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in sd.items() if not name.endswith(twins)}
    optimizer = torch.optim.AdamW([{"params": []}, {"params": list(parameters.values())}], lr=0.1)
    for _ in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = None if name in BIASES and not by_name else torch.randn_like(parameter)
        optimizer.step()
    saved = optimizer.state_dict()
    if by_name:  # as FSDP.optim_state_dict returns it
        names = list(parameters)
        saved = {"state": {names[i]: entry for i, entry in saved["state"].items()}, "param_groups": []}
    return parameters, optimizer, saved


def save(tmp_path, saved, number=4):
    torch.save({"epoch": number, "name": "a", "optimizer": saved}, tmp_path / f"optimizer_{number}.pt")
    return tmp_path / f"epoch_{number}.pt"


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("variant", [{}, {"weight_tying": True}, {"ffn_type": "gelu", "model_norm": "rms_norm"}])
def test_the_next_step_is_openlms_next_step(by_name, variant, tmp_path):
    config = ModelConfig(**{**vars(CONFIG), **variant})
    model = make_model(config)
    parameters, theirs, saved = upstream(model, config, by_name=by_name)
    now = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    full = to_openlm(model.state_dict(), config=config)
    for name in full:
        twin = {"output.weight": "tok_embeddings.weight"}.get(name, name)
        twin = twin.replace("feed_forward.0.weight", "_ff_w1.weight").replace("feed_forward.2.weight", "_ff_w2.weight")
        full[name] = now.get(name, now.get(twin, full[name]))
    for bias in BIASES:
        full[bias].zero_()
    model.load_state_dict(from_openlm(full, expected=shapes(model), config=config))

    state = read_openlm_optimizer(save(tmp_path, saved), expected=shapes(model), weight_tying=config.weight_tying)
    ours = torch.optim.AdamW(model.parameters(), lr=0.1)
    live = training_tensors(model, ours)
    assert state.keys() == {name for name in live if name.startswith("optimizer.")}
    for name, tensor in state.items():
        live[name].copy_(tensor)
    assert live["optimizer.step.norm.weight"] == 3

    gradients = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    theirs.step()
    for name, parameter in model.named_parameters():
        parameter.grad = from_gradient(name, gradients)
    ours.step()
    expected = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), from_gradient(name, expected), rtol=1e-6, atol=1e-6)


def from_gradient(name, tensors):
    """Spelled out here once more, so that the test does not trust the names that it checks."""
    for ours, theirs in (("experts.up", "experts.mlp.w1"), ("experts.down", "experts.mlp.w2")):
        if name.endswith(ours):
            return tensors[name.replace(ours, theirs)]
    if name.endswith("feed_forward.gate"):
        return tensors[name.replace("gate", "router.layer.weight")].T
    for ours, theirs in (("feed_forward.w1.weight", "_ff_w1.weight"), ("feed_forward.w2.weight", "_ff_w2.weight")):
        if name.endswith(ours):
            return tensors[name.replace(ours, theirs)]
    return tensors[name]


def test_no_file_is_no_state(tmp_path):
    assert read_openlm_optimizer(tmp_path / "epoch_4.pt", expected={}) is None
    assert read_openlm_optimizer(tmp_path / "weights.pt", expected={}) is None


def test_epoch_in_the_name_of_a_folder_is_left_alone(tmp_path):
    model = make_model()
    folder = tmp_path / "epoch_runs"
    folder.mkdir()
    path = save(folder, upstream(model)[2])
    assert read_openlm_optimizer(path, expected=shapes(model)) is not None


def wrong_shape(saved):
    saved["state"][1]["exp_avg"] = torch.zeros(5, 3)


def lost(saved):
    del saved["state"][2]


def too_many(saved):
    saved["state"][400] = saved["state"][0]


def no_step(saved):
    del saved["state"][0]["step"]


def no_moment(saved):
    del saved["state"][0]["exp_avg_sq"]


def no_entry(saved):
    saved["state"][0] = 3


def no_state(saved):
    del saved["state"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (wrong_shape, r"exp_avg of tok_embeddings\.weight: found \(5, 3\), expected \(16, 12\)"),
        (lost, r"it lacks the state of layers\.0\.attention\.in_proj\.weight"),
        (too_many, r"has the state of parameters \[400\]; expected 0 to 31, or names"),
        (no_step, r"the state of post_embed_norm\.weight has the step None; expected a number"),
        (no_moment, r"exp_avg_sq of post_embed_norm\.weight: found nothing, expected \(12,\)"),
        (no_entry, r"the state of post_embed_norm\.weight has the step None"),
        (no_state, r"it holds no optimizer state"),
    ],
)
def test_a_state_that_is_not_the_models_is_refused_with_the_reason(spoil, words, tmp_path):
    model = make_model()
    saved = upstream(model)[2]
    spoil(saved)
    with pytest.raises(ValueError, match=words) as raised:
        read_openlm_optimizer(save(tmp_path, saved), expected=shapes(model))
    assert "optimizer_4.pt" in str(raised.value)
    assert "The optimizer's state is not used" in str(raised.value)


def test_names_of_another_model_are_refused(tmp_path):
    model = make_model()
    saved = upstream(model, by_name=True)[2]
    saved["state"]["layers.7.ffn_norm.weight"] = saved["state"].pop("norm.weight")
    words = r"lacks the state of norm\.weight and has the state of unknown layers\.7\.ffn_norm\.weight"
    with pytest.raises(ValueError, match=words):
        read_openlm_optimizer(save(tmp_path, saved), expected=shapes(model))


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "optimizer_4.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"optimizer_4\.pt: torch cannot read it"):
        read_openlm_optimizer(tmp_path / "epoch_4.pt", expected={})


def test_steps_may_be_plain_numbers_and_names_may_have_prefixes(tmp_path):
    model = make_model()
    saved = upstream(model, by_name=True)[2]
    for entry in saved["state"].values():
        entry["step"] = 3
    saved["state"] = {f"module.{name}": entry for name, entry in saved["state"].items()}
    state = read_openlm_optimizer(save(tmp_path, saved), expected=shapes(model))
    assert torch.equal(state["optimizer.step.norm.weight"], torch.tensor(3.0))
