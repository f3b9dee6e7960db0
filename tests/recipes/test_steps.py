import math
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from moekit.lm.configs import load_config
from moekit.recipes import (
    deepseek_moe,
    deepseek_v2,
    deepseek_v3,
    dynamic_k,
    gshard,
    mixtral,
    olmoe,
    openlm,
    remoe,
    sparsely_gated,
    steps,
)
from moekit.recipes.language_models import language_model, moe_layers, recompute_activations
from moekit.recipes.layers import weighted_sum
from moekit.recipes.router_states import update_router_states
from moekit.recipes.steps import (
    LossRules,
    Tokens,
    count_tokens,
    split_ids,
    take_gradient,
)
from moekit.routing import load_balance_loss, selection_bias, z_loss
from moekit.segments import tokens_per_expert

RECIPES = {
    "mixtral": mixtral(),
    "olmoe": olmoe(k=2),
    "gshard": gshard(capacity_factor=0),
    "openlm": openlm(k=2, capacity_factor=2.0),  # E / K: an expert may take every token
    "deepseek_moe": deepseek_moe(k=2),
    "deepseek_v2": deepseek_v2(k=2, num_groups=2, groups_kept=2),  # whose losses are taken within sequences
    "deepseek_v3": deepseek_v3(k=2, num_groups=2, groups_kept=2),
}


# A random router draws layer by layer, so only with one MoE layer do micro-batches draw what a whole batch does.
FREQ = {name: 2 if name == "gshard" else 1 for name in RECIPES}


def make(recipe, *, freq=1, num_experts=4):
    return language_model(load_config("moekit_tiny", moe_freq=freq, moe_num_experts=num_experts), recipe)


@pytest.fixture
def batch():
    return torch.randint(512, (3, 17))


@pytest.fixture
def ragged():
    """Rows of unequal length, so that micro-batches have unequal shares of the tokens."""
    ids = torch.randint(512, (8, 17))
    for row, length in enumerate((17, 4, 9, 17, 0, 2, 13, 1)):
        ids[row, length:] = -1
    return ids


def weigh(model, coefficients):
    for _, layer in moe_layers(model):
        layer.recipe = layer.recipe._replace(coefficients=coefficients)


def enlarge(recipe, factor=20.0):
    """Make the balancing losses large enough to see in every gradient."""
    return recipe._replace(coefficients={name: factor * weight for name, weight in recipe.coefficients.items()})


def loss_and_gradients(model, batches, **options):
    """Take the gradient from nothing; a parameter that has none counts as zero."""
    model.zero_grad(set_to_none=True)
    torch.default_generator.manual_seed(3)
    loss = take_gradient(model, batches, **options)
    named = model.named_parameters()
    return loss, {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def assert_same(first, second, tolerance):
    """Compare two pairs of loss and gradients, each gradient by name and relative to its own largest entry."""
    (loss, gradients), (other_loss, others) = first, second
    assert sorted(gradients) == sorted(others)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        assert (gradient - others[name]).abs().max().item() <= tolerance * scale, name
    assert loss.routing[:, :-3].equal(other_loss.routing[:, :-3])
    numbers, others = ({k: v for k, v in each._asdict().items() if k != "backward_time"} for each in (loss, other_loss))
    torch.testing.assert_close(numbers, others, rtol=tolerance, atol=tolerance)


def test_ids_are_cut_into_what_is_read_and_what_is_predicted():
    ids = torch.tensor([[5, 6, 7, -1], [-1, -1, -1, -1], [1, -1, -1, -1]])
    inputs, targets, mask = split_ids(ids)
    assert inputs.tolist() == [[5, 6, 7], [0, 0, 0], [1, 0, 0]]
    assert targets.tolist() == [[6, 7, -100], [-100] * 3, [-100] * 3]
    assert mask.tolist() == [[True, True, True], [False] * 3, [True, False, False]]
    assert count_tokens(ids) == Tokens(inputs=4, targets=2)


def test_a_token_behind_a_hole_is_read_and_not_predicted():
    ids = torch.tensor([[5, -1, 7, 8], [-1, 4, -1, 3]])
    inputs, targets, mask = split_ids(ids)
    assert inputs.tolist() == [[5, 0, 7], [0, 4, 0]]
    assert targets.tolist() == [[-100, -100, 8], [-100] * 3]
    assert mask.tolist() == [[True, False, True], [False, True, False]]
    assert count_tokens(ids) == Tokens(inputs=3, targets=1)


def test_the_cross_entropy_is_a_mean_over_tokens_behind_tokens(batch):
    model = make(mixtral())
    batch[:, 5] = -1
    found = take_gradient(model, [batch])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(batch[:, :-1].clamp_min(0), token_mask=batch[:, :-1] >= 0).logits, -1)
    places = [t for t in range(16) if t not in (4, 5)]
    by_hand = -torch.stack([log_probs[b, t, batch[b, t + 1]] for b in range(3) for t in places]).double().mean()
    torch.testing.assert_close(found.cross_entropy, by_hand, rtol=1e-6, atol=0)


def test_the_cross_entropy_is_of_the_next_token(batch):
    model = make(mixtral())
    loss = take_gradient(model, [batch])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(batch[:, :-1]).logits.double(), dim=-1)
    by_hand = -torch.stack([log_probs[b, t, batch[b, t + 1]] for b in range(3) for t in range(16)]).mean()
    torch.testing.assert_close(loss.cross_entropy, by_hand, rtol=1e-6, atol=0)
    assert loss.routing.shape == (2, 4 + 3)


def test_the_backward_holds_no_logits(batch):
    """They are the largest tensor of a step, and cross-entropy keeps another of their size."""
    model = make(mixtral())
    logits, held = [], []
    model.register_forward_hook(lambda module, inputs, output: logits.append(weakref.ref(output.logits)))
    model.output.weight.register_hook(lambda grad: held.append(logits[0]() is not None))
    take_gradient(model, [batch])
    assert (len(logits), held) == (1, [False])


def test_no_value_of_a_loss_requires_a_gradient(batch):
    loss = take_gradient(make(mixtral()), [batch])
    tensors = [loss.total, loss.cross_entropy, loss.z, loss.logit_mean, loss.routing, *loss.balancing.values()]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_balancing_losses_are_means_over_the_moe_layers(batch):
    model = make(olmoe(k=2))
    loss = take_gradient(model, [batch])
    assert sorted(loss.balancing) == ["load_balance", "z"]
    layers = model(batch[:, :-1]).layers
    for name, value in loss.balancing.items():
        by_layer = [layer.losses[name] for layer in layers]
        assert len(by_layer) == 2
        assert by_layer[0] != by_layer[1]
        torch.testing.assert_close(value.float(), (by_layer[0] + by_layer[1]) / 2)
    expected = loss.cross_entropy + 0.01 * loss.balancing["load_balance"] + 0.001 * loss.balancing["z"]
    torch.testing.assert_close(loss.total, expected, rtol=1e-6, atol=0)


def test_balancing_losses_are_means_over_the_tokens_that_are_read(ragged):
    """Of which a row has one more than it has targets, unless it is full."""
    model = make(olmoe(k=2)).double()
    inputs, _, mask = split_ids(ragged)
    loss = take_gradient(model, [ragged])
    with torch.no_grad():
        first, second = (layer.losses for layer in model(inputs, token_mask=mask).layers)
    for name, value in loss.balancing.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2, rtol=1e-10, atol=0)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("order", [1, -1])
def test_a_loss_of_some_layers_is_a_mean_over_those(batch, pieces, order):
    """As layers of unlike recipes have losses of other names; each layer weighs what is its own."""
    model = make(mixtral()).double()
    layers = [layer for _, layer in moe_layers(model)][::order]
    layers[0].recipe = olmoe(k=2)._replace(losses={"z": z_loss}, coefficients={"z": 3.0})
    layers[1].recipe = mixtral()._replace(coefficients={"load_balance": 7.0})
    loss = take_gradient(model, batch.chunk(pieces), rules=LossRules(whole_step=pieces > 1))
    with torch.no_grad():
        losses = [each.losses for each in model(batch[:, :-1]).layers][::order]
    expected = {"load_balance": losses[1]["load_balance"], "z": losses[0]["z"]}
    torch.testing.assert_close(dict(loss.balancing), expected, rtol=1e-10, atol=0)
    total = loss.cross_entropy + (3 * expected["z"] + 7 * expected["load_balance"]) / 2
    torch.testing.assert_close(loss.total, total, rtol=1e-10, atol=0)


def test_layers_may_choose_unlike_numbers_of_experts():
    model = make(mixtral()).double()
    for (_, layer), k in zip(moe_layers(model), (1, 3), strict=True):
        layer.recipe = enlarge(mixtral(k=k))
    ids = torch.randint(512, (8, 17))
    one, two = (loss_and_gradients(model, ids.chunk(n)) for n in (1, 2))
    assert one[0].routing[:, :4].sum(1).tolist() == [8 * 16, 3 * 8 * 16]
    assert_same(one, two, 1e-12)


def test_dense_layers_do_not_thin_the_balancing_loss(batch):
    model = make(openlm(), freq=2)
    loss = take_gradient(model, [batch])
    balance = model(batch[:, :-1]).layers[0].losses["load_balance"].double()
    torch.testing.assert_close(loss.balancing["load_balance"], balance)
    torch.testing.assert_close(loss.total, loss.cross_entropy + 0.1 * balance, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pieces", [1, 2])
def test_value_and_gradient_are_linear_in_the_coefficient(pieces):
    model = make(mixtral()).double()
    batches = torch.randint(512, (4, 17)).chunk(pieces)

    def at(coefficient):
        weigh(model, {"load_balance": coefficient})
        loss, gradients = loss_and_gradients(model, batches)
        gates = [gradient for name, gradient in gradients.items() if name.endswith("gate")]
        return torch.cat([loss.total.reshape(1), *(gradient.flatten() for gradient in gates)])

    zero, one, seven = at(0.0), at(1.0), at(7.0)
    torch.testing.assert_close(seven - zero, 7 * (one - zero), rtol=1e-6, atol=1e-9)
    assert (one - zero)[1:].abs().max() > 1e-5


def test_a_loss_without_coefficient_is_reported_only(batch):
    model = make(mixtral())
    weigh(model, {})
    loss = take_gradient(model, [batch])
    assert torch.equal(loss.total, loss.cross_entropy)
    assert loss.balancing["load_balance"] >= 0.5


def test_a_dense_model_has_its_cross_entropy_alone(batch):
    loss = take_gradient(make(mixtral(), freq=0), [batch[:1], batch[1:]])
    assert torch.equal(loss.total, loss.cross_entropy)
    assert loss.balancing == {}
    assert loss.routing.shape == (0, 3)
    assert torch.isclose(loss.total.float(), torch.tensor(math.log(512)), atol=1.0)


def test_gradients_are_added_to_those_that_are_there(batch):
    model = make(mixtral()).double()
    _, once = loss_and_gradients(model, [batch])
    take_gradient(model, [batch])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-9, atol=1e-12)


# Accumulation.


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_number_of_micro_batches_changes_no_gradient_in_float64(name, padded, ragged):
    model = make(enlarge(RECIPES[name]), freq=FREQ[name]).double()
    for _, layer in moe_layers(model):
        if layer.state is not None:
            layer.bias.copy_(torch.tensor([0.2, -0.1, 0.0, -0.1]))
    ids = ragged if padded else torch.randint(512, (8, 17))
    rules = LossRules(z_coefficient=0.3, logit_mean=True)
    one, two, four = (loss_and_gradients(model, ids.chunk(n), rules=rules, masked=padded) for n in (1, 2, 4))
    assert_same(one, two, 1e-12)
    assert_same(one, four, 1e-12)
    assert one[0].routing[:, -3].abs().max() == 0, "this test is of layers that drop nothing"
    assert all(value > 0 for value in one[0].balancing.values())


@pytest.mark.parametrize("name", RECIPES)
def test_the_number_of_micro_batches_changes_gradients_by_float32_rounding_alone(name):
    model = make(enlarge(RECIPES[name]), freq=FREQ[name])
    ids, rules = torch.randint(512, (8, 17)), LossRules(z_coefficient=0.3)
    one, two, four = (loss_and_gradients(model, ids.chunk(n), rules=rules, masked=False) for n in (1, 2, 4))
    assert_same(one, two, 1e-5)
    assert_same(one, four, 1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_each_balancing_loss_reaches_the_gradients_that_are_compared(name):
    """The tests above would say nothing about a loss that is lost in rounding."""
    model = make(enlarge(RECIPES[name]), freq=FREQ[name]).double()
    ids = torch.randint(512, (8, 17))
    _, full = loss_and_gradients(model, ids.chunk(2))
    coefficients = dict(model.layers[0].feed_forward.recipe.coefficients)
    for dropped in coefficients:
        weigh(model, {key: value for key, value in coefficients.items() if key != dropped})
        _, without = loss_and_gradients(model, ids.chunk(2))
        gate = "layers.0.feed_forward.gate"
        assert (full[gate] - without[gate]).abs().max() > 1e-6 * full[gate].abs().max()


@pytest.mark.parametrize("method", [dynamic_k, partial(mixtral, k=2)], ids=["any number of choices", "two choices"])
def test_the_divisor_of_the_counts_is_of_the_step_too(method):
    """Unequal micro-batches, in which tokens have choices in unequal numbers."""
    loss = partial(load_balance_loss, per_token=1.0)
    recipe = method()._replace(losses={"load_balance": loss}, coefficients={"load_balance": 5.0})
    model = make(recipe, num_experts=8, freq=2).double()
    ids = torch.randint(512, (8, 17))
    one, three = (loss_and_gradients(model, batches, masked=False) for batches in ([ids], ids.split([3, 1, 4])))
    assert_same(one, three, 1e-12)


def test_a_coefficient_that_a_router_remembers_weighs_the_load_of_the_step(ragged):
    """Beside the coefficients of the recipe, which stay."""
    recipe = remoe()
    recipe = recipe._replace(losses={**recipe.losses, "z": z_loss}, coefficients={"z": 2.0})
    model = make(recipe, freq=2).double()
    [(_, layer)] = moe_layers(model)
    layer.state.fill_(5.0)
    for coefficients in ({"z": 2.0}, {}):
        weigh(model, coefficients)
        one, three = (loss_and_gradients(model, batches) for batches in ([ragged], ragged.split([3, 1, 4])))
        assert_same(one, three, 1e-12)
        balancing = one[0].balancing
        expected = one[0].cross_entropy + 5 * balancing["l1"] + coefficients.get("z", 0.0) * balancing["z"]
        torch.testing.assert_close(one[0].total, expected, rtol=1e-12, atol=0)


def test_micro_batches_of_their_own_scope_balance_another_load():
    model = make(enlarge(mixtral(), 50.0)).double()
    ids, own = torch.randint(512, (8, 17)), LossRules(whole_step=False)
    whole, whole_gradients = loss_and_gradients(model, ids.chunk(4))
    loss, gradients = loss_and_gradients(model, ids.chunk(4), rules=own)
    torch.testing.assert_close(loss.cross_entropy, whole.cross_entropy, rtol=1e-12, atol=0)
    assert loss.balancing["load_balance"] > whole.balancing["load_balance"] + 1e-3
    gate = "layers.0.feed_forward.gate"
    assert (gradients[gate] - whole_gradients[gate]).abs().max() > 0.01 * gradients[gate].abs().max()
    assert loss.routing[:, :-3].equal(whole.routing[:, :-3])
    by_hand = [take_gradient(model, [piece]).balancing["load_balance"] for piece in ids.chunk(4)]
    torch.testing.assert_close(loss.balancing["load_balance"], sum(by_hand) / 4, rtol=1e-12, atol=0)


def test_the_scope_does_not_matter_for_one_micro_batch(batch):
    model = make(enlarge(mixtral())).double()
    own = loss_and_gradients(model, [batch], rules=LossRules(whole_step=False))
    assert_same(own, loss_and_gradients(model, [batch]), 0.0)


def counted(model):
    """Count the forwards of a model."""
    calls = []
    model.register_forward_hook(lambda module, inputs, output: calls.append(output.logits.requires_grad))
    return calls


@pytest.mark.parametrize(
    ("coefficient", "whole_step", "pieces", "expected"),
    [
        (0.1, True, 1, [True]),
        (0.1, True, 2, [False, False, True, True]),
        (0.1, False, 2, [True, True]),
        (0.0, True, 2, [True, True]),
    ],
)
def test_the_load_is_counted_ahead_only_where_it_matters(coefficient, whole_step, pieces, expected):
    model = make(mixtral())
    weigh(model, {"load_balance": coefficient})
    calls = counted(model)
    take_gradient(model, torch.randint(512, (4, 9)).chunk(pieces), rules=LossRules(whole_step=whole_step))
    assert calls == expected


@pytest.mark.parametrize("name", ["deepseek_v2", "sparsely_gated", "remoe"])
def test_only_losses_that_use_counts_have_the_load_counted_ahead(name, ragged, monkeypatch):
    recipes = {**RECIPES, "sparsely_gated": sparsely_gated(k=2), "remoe": remoe(k=2)}
    model = make(enlarge(recipes[name]))
    calls = counted(model)
    found = loss_and_gradients(model, ragged.chunk(2))
    assert len(calls) == (4 if name == "remoe" else 2)
    monkeypatch.setattr(steps, "uses_counts", lambda loss: True)  # as if all did
    assert_same(found, loss_and_gradients(model, ragged.chunk(2)), 0.0)
    assert calls[-4:] == [False, False, True, True]


def test_the_counting_pass_computes_no_logits():
    model, lengths = make(mixtral()), []
    model.register_forward_hook(lambda module, inputs, output: lengths.append(output.logits.shape[1]))
    take_gradient(model, torch.randint(512, (4, 9)).chunk(2))
    assert lengths == [0, 0, 8, 8]


def test_a_random_router_decides_the_same_in_the_counting_pass_and_the_real_one():
    decisions = []
    recipe = gshard(capacity_factor=0)

    def route(logits, **options):
        routing = recipe.route(logits, **options)
        decisions.append(routing.expert_indices)
        return routing

    model = make(recipe._replace(route=route), freq=2)
    take_gradient(model, torch.randint(512, (8, 17)).chunk(2))
    counting, real = decisions[:2], decisions[2:]
    assert all(torch.equal(a, b) for a, b in zip(counting, real, strict=True))
    assert not torch.equal(real[0] < 0, real[1] < 0), "this router draws, or the test says nothing"


def test_the_counting_pass_leaves_the_random_state_as_if_it_had_not_been():
    model = make(gshard(capacity_factor=0))
    batches, states = torch.randint(512, (4, 17)).chunk(2), []
    for whole_step in (True, False):
        torch.default_generator.manual_seed(5)
        before = torch.get_rng_state()
        take_gradient(model, batches, rules=LossRules(whole_step=whole_step))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert not torch.equal(states[0], before), "this recipe draws, or the test says nothing"


def test_first_choices_alone_count_in_gshards_loss_over_the_step():
    """The load of all choices would give another loss."""
    ids = torch.randint(512, (8, 17))
    losses = {}
    for choices in (1, None):
        torch.default_generator.manual_seed(0)
        recipe = gshard(capacity_factor=0)
        [(name, loss)] = recipe.losses.items()
        model = make(recipe._replace(losses={name: partial(loss.func, choices=choices)}), freq=2).double()
        losses[choices] = [loss_and_gradients(model, ids.chunk(n))[0].balancing[name].item() for n in (1, 2)]
    assert losses[1][0] == pytest.approx(losses[1][1], rel=1e-12)
    assert losses[None][0] == pytest.approx(losses[None][1], rel=1e-12)
    assert abs(losses[1][0] - losses[None][0]) > 1e-3


def test_recomputed_activations_change_no_gradient(ragged):
    model = make(enlarge(openlm(capacity_factor=0.75)), freq=2).double()
    rules = LossRules(z_coefficient=0.3)
    plain = loss_and_gradients(model, ragged.chunk(2), rules=rules)
    recompute_activations(model)
    assert_same(plain, loss_and_gradients(model, ragged.chunk(2), rules=rules), 1e-14)


# Padding.


@pytest.mark.parametrize("name", RECIPES)
def test_rows_without_a_token_change_nothing(name, ragged):
    model = make(enlarge(RECIPES[name]), freq=FREQ[name]).double()
    rules = LossRules(z_coefficient=0.3, logit_mean=True)
    longer = torch.cat([ragged, torch.full((3, 17), -1)])
    plain = loss_and_gradients(model, [ragged], rules=rules)
    assert_same(plain, loss_and_gradients(model, [longer], rules=rules), 1e-13)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "openlm", "deepseek_moe"])
def test_more_padding_at_the_end_changes_nothing(name, ragged):
    """Gshard draws a number for every place, padding too, and so has no part in this."""
    model = make(enlarge(RECIPES[name]), freq=FREQ[name]).double()
    ids = torch.cat([ragged, torch.full((8, 1), -1)], dim=1)  # all 17 are read in both
    wider = torch.cat([ids, torch.full((8, 7), -1)], dim=1)
    rules = LossRules(z_coefficient=0.3, logit_mean=True)
    plain = loss_and_gradients(model, [ids], rules=rules)
    assert_same(plain, loss_and_gradients(model, [wider], rules=rules), 1e-13)


def test_padding_takes_no_capacity(ragged):
    """Behind padding, a binding capacity serves real tokens, and drops no others."""
    model = make(openlm(capacity_factor=1.0)).double()
    ragged[1:, :] = -1
    loss = take_gradient(model, [ragged])
    assert loss.routing[:, -1].tolist() == [16, 16]
    assert loss.routing[:, -3].tolist() == [0, 0]  # 16 tokens, but rows for a batch of 128
    assert loss.routing[:, :-3].sum(1).tolist() == [32, 32]


def test_a_micro_batch_without_a_token_gives_nothing_and_no_nan(ragged):
    model = make(enlarge(olmoe(k=2))).double()
    rules = LossRules(z_coefficient=0.3, logit_mean=True)
    empty = torch.full((2, 17), -1)
    plain = loss_and_gradients(model, [ragged], rules=rules)
    assert_same(plain, loss_and_gradients(model, [empty, ragged, empty], rules=rules), 1e-13)
    loss, gradients = loss_and_gradients(model, [empty], rules=rules)
    assert loss.total == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_a_state_observes_with_a_mask_as_long_as_its_logits(ragged):
    """(T,), as losses take it; each of the 8 rows of 17 ids has a last one, which is no input."""

    def observe(logits, routing, state, *, token_mask=None):
        return token_mask.double() @ torch.ones(len(logits), 1, dtype=torch.float64)

    state = selection_bias(rate=0.1)._replace(observe=observe)
    (seen,) = take_gradient(make(mixtral()._replace(state=state), freq=2), ragged.chunk(2)).observed
    assert seen.tolist() == [count_tokens(ragged).inputs]


def test_saying_that_there_is_no_padding_changes_nothing_without_padding(batch):
    model = make(enlarge(olmoe(k=2))).double()
    masked = loss_and_gradients(model, batch.chunk(3))
    assert_same(masked, loss_and_gradients(model, batch.chunk(3), masked=False), 1e-14)


# The parts of the loss.


def test_the_loss_is_over_the_tokens_of_the_global_batch(batch):
    """A rank that has a third of the tokens gives a third of the gradient."""
    model = make(enlarge(mixtral())).double()
    own, gradients = loss_and_gradients(model, [batch])
    third, thirds = loss_and_gradients(model, [batch], tokens=Tokens(3 * 48, 3 * 48))
    torch.testing.assert_close(third.total, own.total / 3, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(thirds[name], gradient / 3, rtol=1e-9, atol=1e-13)


def test_z_and_the_mean_of_the_logits_are_over_targets(ragged):
    model = make(mixtral()).double()
    inputs, targets, mask = split_ids(ragged)
    with torch.no_grad():
        logits = model(inputs, token_mask=mask).logits[targets >= 0]
    loss = take_gradient(model, ragged.chunk(2), rules=LossRules(z_coefficient=0.25, logit_mean=True))
    torch.testing.assert_close(loss.z, logits.exp().sum(-1).log().square().mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.logit_mean, logits.mean(), rtol=1e-8, atol=1e-12)
    expected = loss.cross_entropy + 0.25 * loss.z + 0.02 * loss.balancing["load_balance"]
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=0)


def test_z_has_the_gradient_of_its_formula(batch):
    model = make(mixtral(), freq=0).double()
    _, plain = loss_and_gradients(model, [batch])
    _, both = loss_and_gradients(model, batch.chunk(3), rules=LossRules(z_coefficient=0.25))
    z = model(batch[:, :-1]).logits.logsumexp(-1).square().mean()
    [gradient] = torch.autograd.grad(0.25 * z, [model.output.weight])
    torch.testing.assert_close(both["output.weight"] - plain["output.weight"], gradient, rtol=1e-8, atol=1e-12)
    assert gradient.abs().max() > 1e-3


def test_what_is_not_asked_for_is_zero(batch):
    loss = take_gradient(make(mixtral()), [batch])
    assert loss.z == 0
    assert loss.logit_mean == 0


def test_the_scale_reaches_the_gradients_and_not_the_values(batch):
    model = make(enlarge(mixtral())).double()
    plain, gradients = loss_and_gradients(model, batch.chunk(3))
    scaled, larger = loss_and_gradients(model, batch.chunk(3), rules=LossRules(scale=lambda loss: 8 * loss))
    torch.testing.assert_close(scaled.total, plain.total)
    assert all(torch.equal(larger[name], 8 * gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_precision_is_that_of_every_forward(batch, pieces):
    model = make(mixtral())
    dtypes = []
    model.output.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    rules = LossRules(precision=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    take_gradient(model, batch.chunk(pieces), rules=rules)
    assert dtypes == [torch.bfloat16] * (1 if pieces == 1 else 6)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("pieces", [1, 2])
def test_routing_without_statistics_has_the_counts_alone(ragged, pieces):
    model = make(openlm(k=2, capacity_factor=0.25))
    full, counts = (take_gradient(model, ragged.chunk(pieces), statistics=wanted).routing for wanted in (True, False))
    assert torch.equal(full[:, :4], counts[:, :4])
    assert (full[:, 4:] > 0).all()
    assert (counts[:, 4:] == 0).all()
    assert counts.shape == full.shape
    assert counts.dtype == full.dtype == torch.float64


# Selection biases.


def test_the_selection_bias_moves_against_the_load_of_the_step():
    model = make(deepseek_moe(k=2, bias_rate=0.25))
    ids = torch.randint(512, (4, 17))
    loss = take_gradient(model, ids.chunk(2))
    layers = model(ids[:, :-1]).layers
    update_router_states(model, loss.observed)
    for index, layer in moe_layers(model):
        counts = tokens_per_expert(layers[index].routing.expert_indices, 4).float()
        assert counts.sum() == 4 * 16 * 2
        expected = 0.25 * torch.sign(counts.mean() - counts)
        assert torch.equal(layer.bias, expected)
        assert expected.abs().sum() > 0
    update_router_states(model, loss.observed)
    assert torch.equal(layer.bias, 2 * expected)


def test_layers_without_a_state_are_left_alone(batch):
    model = make(mixtral())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update_router_states(model, take_gradient(model, [batch]).observed)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_loss_is_finite_for_extreme_weights(batch):
    model = make(mixtral())
    with torch.no_grad():
        model.layers[0].feed_forward.gate.mul_(1e4)
    loss = take_gradient(model, [batch], rules=LossRules(z_coefficient=0.1))
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert F.cosine_similarity(model.output.weight.grad.flatten(), model.output.weight.grad.flatten(), 0) > 0.99


def test_a_coefficient_that_names_no_loss_is_an_error(batch):
    model = make(mixtral())
    weigh(model, {"ballance": 0.1})
    with pytest.raises(ValueError, match=r"coefficients name \['ballance'\], but the losses are \['load_balance'\]"):
        take_gradient(model, batch.chunk(3))
    assert weighted_sum({}, {}) == 0
