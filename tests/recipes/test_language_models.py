from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moekit.dispatch import dropless, dropless_plan
from moekit.experts import grouped, swiglu
from moekit.integrations.flop_counter import register
from moekit.lm.configs import load_config
from moekit.lm.model import count_parameters
from moekit.recipes import (
    deepseek_moe,
    dynamic_k,
    expert_choice,
    expert_layer,
    gshard,
    mixtral,
    moe_plus_plus,
    olmoe,
    openlm,
    recompute,
    remoe,
    sonic_token_rounding,
    switch,
)
from moekit.recipes.language_models import (
    active_words,
    flops_per_token,
    has_bound,
    language_model,
    moe_layers,
    parameter_table,
    recompute_activations,
)
from moekit.recipes.modules import MoE
from moekit.recipes.report import describe

# OpenLM's own counts, with an expert bias of D in each of 6 MoE blocks that it allocates and never uses.
TOTAL = {
    ("open_lm_41m", 8): 68_884_704,
    ("open_lm_41m", 32): 164_477_664,
    ("open_lm_41m", 64): 291_934_944,
    ("aphid_neox", 8): 165_443_224,
    ("aphid_neox", 32): 439_855_384,
    ("aphid_neox", 64): 805_738_264,
    ("open_lm_160m", 8): 360_639_744,
    ("open_lm_160m", 32): 1_040_227_584,
    ("open_lm_160m", 64): 1_946_344_704,
}
ACTIVE = {"open_lm_41m": 44_996_832, "aphid_neox": 96_857_752, "open_lm_160m": 190_770_432}
WIDTH = {"open_lm_41m": 288, "aphid_neox": 488, "open_lm_160m": 768}


def meta_model(preset, recipe, **options):
    with torch.device("meta"):
        return language_model(load_config(preset, model_norm="gain_only_layer_norm", **options), recipe)


def tiny(recipe, **options):
    return language_model(load_config("moekit_tiny", **options), recipe)


@pytest.mark.parametrize(("preset", "num_experts"), TOTAL)
def test_parameter_counts_are_openlms_less_the_unused_bias(preset, num_experts):
    model = meta_model(preset, openlm(), moe_freq=2, moe_num_experts=num_experts)
    *parts, total = parameter_table(model)
    assert total.total == count_parameters(model) == TOTAL[preset, num_experts] - 6 * WIDTH[preset]
    assert sum(part.total for part in parts) == total.total
    assert sum(part.active for part in parts) == total.active
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("preset", ACTIVE)
def test_active_counts_are_openlms_less_the_unused_bias(preset):
    model = meta_model(preset, openlm(k=2), moe_freq=2, moe_num_experts=8)
    assert parameter_table(model)[-1].active == ACTIVE[preset] - 6 * WIDTH[preset]


def test_active_parameters_follow_k():
    by_k = {k: parameter_table(tiny(olmoe(k=k), moe_freq=1, moe_num_experts=8)) for k in (1, 2, 8)}
    experts = {k: {row.part: row for row in table}["experts"] for k, table in by_k.items()}
    assert experts[1].active * 8 == experts[2].active * 4 == experts[8].active == experts[8].total
    assert by_k[8][-1].active == by_k[8][-1].total


@pytest.mark.parametrize(
    ("recipe", "bound"),
    [
        (mixtral(), False), (openlm(), False), (expert_choice(), False), (sonic_token_rounding(), False),
        (remoe(), True), (dynamic_k(), True), (moe_plus_plus(), True), (gshard(), True),
        (gshard(training=False), False),
    ],
)  # fmt: skip
def test_where_a_router_chooses_how_many_active_parameters_are_a_bound(recipe, bound):
    model = tiny(recipe, moe_freq=1, moe_num_experts=8)
    assert active_words(model, 1234) == ("at most 1,234" if bound else "1,234")
    assert [column.header for column in describe(model).columns][2].endswith("at most") is bound


def test_what_blocks_share_is_counted_once():
    one = {row.part: row for row in parameter_table(tiny(mixtral(), moe_freq=1, moe_num_experts=8, n_layers=1))}
    model = tiny(mixtral(), moe_freq=1, moe_num_experts=8, n_layers=2)
    model.layers[1].feed_forward = model.layers[0].feed_forward
    model.layers[1].attention = model.layers[0].attention
    table = {row.part: row for row in parameter_table(model)}
    for part in ("attention", "routers and shared experts"):
        assert table[part] == one[part]
    assert table["experts"] == one["experts"]._replace(active=2 * one["experts"].active)  # two of eight in each block
    assert table["all"].total == count_parameters(model)
    assert has_bound(model)  # they may be the same


def test_shared_experts_and_routers_are_active_for_every_token():
    table = {row.part: row for row in parameter_table(tiny(deepseek_moe(k=2), moe_freq=1, moe_num_experts=4))}
    row = table["routers and shared experts"]
    one_expert = table["experts"].total // (2 * 4)
    assert row.total == row.active == 2 * (one_expert + 64 * 4)


def test_a_tied_head_is_counted_once():
    tied, untied = (
        parameter_table(tiny(mixtral(), moe_freq=2, moe_num_experts=4, weight_tying=tying)) for tying in (True, False)
    )
    assert untied[-1].total - tied[-1].total == 512 * 64
    assert {row.part: row.total for row in tied}["output head"] == 0


@pytest.mark.parametrize("tying", [True, False])
@pytest.mark.parametrize("recipe", [mixtral(), deepseek_moe(k=2)])
def test_flops_are_those_of_the_products_that_a_step_computes(recipe, tying):
    model = tiny(recipe, moe_freq=2, moe_num_experts=4, weight_tying=tying)
    ids = torch.randint(512, (3, 64))
    register()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        total_loss(model, ids, None).backward()
    gains = sum(each.numel() for each in model.parameters() if each.ndim == 1)  # they multiply, but no matrix
    assert counter.get_total_flops() == ids.numel() * (flops_per_token(model) - 6 * gains)


def test_a_dense_model_has_no_experts():
    model = tiny(mixtral())
    assert list(moe_layers(model)) == []
    table = {row.part: row for row in parameter_table(model)}
    assert table["experts"].total == 0
    assert table["all"].total == table["all"].active == count_parameters(model)


@pytest.mark.parametrize(("freq", "expected"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_moe_freq_chooses_the_layers(freq, expected):
    model = tiny(switch(), n_layers=5, moe_freq=freq, moe_num_experts=4)
    layers = dict(moe_layers(model))
    assert list(layers) == expected
    for index, block in enumerate(model.layers):
        assert isinstance(block.feed_forward, MoE) == (index in expected)
    assert all(layer.num_experts == 4 for layer in layers.values())


def test_the_experts_are_as_wide_as_asked():
    model = language_model(load_config("moekit_tiny", moe_freq=2, moe_num_experts=4), mixtral(), expert_hidden=24)
    assert model.layers[0].feed_forward.experts.up.shape == (4, 64, 24)


def test_the_model_is_causal_with_a_causal_recipe():
    model = tiny(mixtral(), moe_freq=1, moe_num_experts=4).double()
    ids = torch.randint(512, (2, 12))
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 512
    with torch.no_grad():
        before, after = model(ids).logits, model(other).logits
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


# Computing activations again.


def total_loss(model, ids, mask):
    output = model(ids, token_mask=mask)
    losses = [loss for layer in output.layers for loss in layer.losses.values()]
    return output.logits.logsumexp(-1).square().mean() + sum(losses)


@pytest.mark.parametrize(
    "recipe", [openlm(capacity_factor=0.75), gshard(), deepseek_moe(k=2)], ids=["openlm", "gshard", "deepseek"]
)
def test_recomputed_activations_change_no_output_and_no_gradient(recipe):
    model = tiny(recipe, moe_freq=2, moe_num_experts=4, qk_norm=True).double()
    ids, mask = torch.randint(512, (3, 9)), torch.arange(9).expand(3, 9) < 7
    results = []
    for _ in range(2):
        torch.default_generator.manual_seed(1)  # GShard draws
        total = total_loss(model, ids, mask)
        results.append((total, torch.autograd.grad(total, list(model.parameters()))))
        recompute_activations(model)
    (total, grads), (again, others) = results
    assert torch.equal(total, again)
    for (name, _), grad, other in zip(model.named_parameters(), grads, others, strict=True):
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(other, grad, rtol=1e-12, atol=1e-15, msg=name)


def _unlucky(routing):
    kept = torch.rand(routing.expert_indices.shape) < 0.5
    return dropless_plan(routing._replace(expert_indices=routing.expert_indices.where(kept, -1)))


def test_a_plan_that_draws_is_recomputed_as_it_was():
    layer = expert_layer(dispatcher=dropless()._replace(plan=_unlucky), experts=partial(swiglu, matmul=grouped))
    moe = MoE(8, 4, mixtral(k=2)._replace(layer=layer, plan=_unlucky), hidden=16, dtype=torch.float64)
    x, results = torch.randn(64, 8, dtype=torch.float64, requires_grad=True), []
    for each in (layer, recompute(layer)):
        moe.recipe = moe.recipe._replace(layer=each)
        torch.default_generator.manual_seed(1)
        y = moe(x).y
        torch.rand(3)  # what is drawn behind the layer
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *moe.parameters()])))
        after = torch.rand(2)
        results[-1] += (after,)
    for before, again in zip(*results, strict=True):
        assert torch.equal(before, again)


def test_a_recomputed_router_decides_once_and_draws_once():
    calls, recipe = [], gshard()

    def route(logits, **options):
        calls.append(torch.get_rng_state())
        return recipe.route(logits, **options)

    model = tiny(recipe._replace(route=route), moe_freq=1, moe_num_experts=4)
    recompute_activations(model)
    total = total_loss(model, torch.randint(512, (2, 9)), None)
    state = torch.get_rng_state()
    total.backward()
    assert len(calls) == 2  # one per layer
    assert not torch.equal(*calls), "this router draws, or the test says nothing"
    assert torch.equal(torch.get_rng_state(), state)


def held(model, ids):
    """Count the bytes that a model keeps between forward and backward, parameters apart."""
    kept, own = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(ids)
    assert output.logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


@pytest.mark.parametrize("freq", [0, 1, 2])
def test_recomputed_activations_hold_less_memory(freq):
    model = tiny(mixtral(), moe_freq=freq, moe_num_experts=4)
    ids = torch.randint(512, (8, 64))
    plain = held(model, ids)
    recompute_activations(model)
    saving = held(model, ids)
    stream = 4 * 8 * 64 * 64  # a residual stream
    assert plain > 35 * stream
    assert saving < 15 * stream
    assert saving < 0.4 * plain


def test_only_dense_feed_forwards_run_again_whole():
    model = tiny(openlm(), moe_freq=2, moe_num_experts=4)
    calls = []
    for index, block in enumerate(model.layers):
        for name in ("attention", "feed_forward"):
            getattr(block, name).register_forward_pre_hook(
                lambda *_, index=index, name=name: calls.append((index, name))
            )
    recompute_activations(model)
    total_loss(model, torch.randint(512, (1, 5)), None).backward()
    counts = {call: calls.count(call) for call in calls}
    assert counts == {(0, "attention"): 2, (0, "feed_forward"): 1, (1, "attention"): 2, (1, "feed_forward"): 2}


def test_a_model_with_recomputed_activations_compiles_whole():
    torch._dynamo.reset()
    model = tiny(openlm(), moe_freq=2, moe_num_experts=4)
    recompute_activations(model)
    ids = torch.randint(512, (2, 9))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [total_loss(each, ids, None) for each in (model, compiled)]
    grads = [torch.autograd.grad(total, list(model.parameters())) for total in results]
    torch.testing.assert_close(*results)
    for (name, _), grad, other in zip(model.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(other, grad, rtol=1e-4, atol=1e-6, msg=name)
