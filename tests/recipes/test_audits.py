"""What recipes declare about causality is what interventions find, and the trainer warns before its first step."""

from functools import partial

import pytest
import torch

from moekit.dispatch import by_weight, padded, padded_plan
from moekit.experts import batched, fused_cpu, fused_layer, swiglu
from moekit.recipes import auto, expert_layer, limited, mixtral, openlm
from moekit.recipes.audits import audit
from moekit.recipes.configuration import parse_settings
from moekit.recipes.expert_layers import recompute
from moekit.recipes.names import RECIPES, find_recipe, recipe_options
from moekit.recipes.train import _causality_notes
from moekit.routing import top_k

E = 16
LEAKS = {"gshard", "st_moe", "expert_choice", "base_sinkhorn", "soft_moe", "sonic_token_rounding"}
LEAKS_IN_EVALUATION = {"expert_choice", "soft_moe"}


@pytest.mark.parametrize("name", RECIPES)
def test_the_declared_flag_is_what_interventions_find(name):
    assert find_recipe(name, vocab_size=64).causal == (name not in LEAKS)
    assert audit(find_recipe(name, vocab_size=64), E).leaks == (name in LEAKS)


def test_a_layer_with_another_plan_is_refused():
    """The plan alone is looked at: by it the recipe would drop nobody, and its layer drops by weight."""
    tight = padded(capacity_factor=0.5, priority=by_weight)
    layer = expert_layer(dispatcher=tight, experts=partial(swiglu, matmul=batched))
    for other in (mixtral()._replace(layer=layer), openlm()._replace(layer=auto())):
        with pytest.raises(
            ValueError, match=r"layer plans by .*, and recipe\.plan is .*Replace both: recipe\._replace"
        ):
            audit(other, E)
    assert audit(mixtral()._replace(layer=layer, plan=tight.plan), E).leaks
    for plan in (padded(capacity_factor=0.5).plan, padded(capacity_factor=1.25, priority=by_weight).plan):
        with pytest.raises(ValueError, match="layer plans by padded_plan"):
            audit(openlm()._replace(plan=plan), E)
    with pytest.raises(ValueError, match="layer plans by padded_plan"):
        audit(mixtral()._replace(layer=fused_cpu(plan=tight.plan)), E)
    with pytest.raises(ValueError, match="layer plans by padded_plan"):
        audit(mixtral()._replace(layer=recompute(layer)), E)
    with pytest.raises(ValueError, match="layer plans by dropless_plan"):
        audit(openlm()._replace(layer=fused_layer()), E)
    with pytest.raises(ValueError, match="layer plans by padded_plan"):
        audit(mixtral()._replace(layer=limited(fused_layer(), plan=tight.plan)), E)
    assert audit(mixtral()._replace(layer=limited(fused_layer(), plan=tight.plan), plan=tight.plan), E).leaks
    assert not audit(openlm()._replace(plan=partial(padded_plan, capacity_factor=1.25)), E).leaks, "as a float"
    whole = openlm(capacity_factor=1.0)
    assert not audit(whole._replace(plan=partial(padded_plan, capacity_factor=1)), E).leaks, "as a whole number"
    assert not audit(mixtral()._replace(layer=partial(layer, dispatcher="sorted")), E).leaks, "none of moekit's"
    same = padded(capacity_factor=1.25)
    assert not audit(openlm()._replace(plan=same.plan), E).leaks, "equal, though made by another call"


@pytest.mark.parametrize("name", sorted(LEAKS))
def test_methods_that_evaluate_otherwise_are_causal_then(name):
    factor = {"capacity_factor": 0.0} if "capacity_factor" in recipe_options(name) else {}
    recipe = find_recipe(name, vocab_size=64, training=False, **factor)
    assert recipe.causal == (name not in LEAKS_IN_EVALUATION)
    assert audit(recipe, E).leaks == (name in LEAKS_IN_EVALUATION)


def test_a_capacity_limit_by_position_depends_on_earlier_sequences_alone():
    found = audit(find_recipe("openlm", capacity_factor=1.0), E)
    assert not found.leaks
    assert found.earlier_sequence is not None
    assert found.later_sequence is None


def test_a_leak_of_the_users_own_is_found():
    def route(logits, *, bias=None):
        return mixtral().route(logits, bias=-logits.mean(0))  # shifted by what the batch prefers

    assert audit(mixtral()._replace(route=route), E).leaks


def test_an_audit_leaves_no_trace():
    def broken(logits, *, bias=None):
        if len(logits) > 1:  # in the audit, that is, on one thread
            assert torch.get_num_threads() == 1
            raise RuntimeError("no such luck")
        return mixtral().route(logits, bias=bias)

    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        audit(find_recipe("gshard"), E)
        with pytest.raises(RuntimeError, match="no such luck"):
            audit(mixtral()._replace(route=broken), E)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.random.get_rng_state(), state)


def notes(*words):
    return _causality_notes(parse_settings(["--model", "moekit_tiny", *words], prog="test"))


def test_the_trainer_warns_of_a_leak():
    warning, witness = notes("--recipe", "expert_choice")
    assert "--recipe expert_choice" in warning
    assert "depends on later tokens" in warning
    assert "changed by" in witness
    assert notes("--recipe", "openlm") == []
    assert notes("--recipe", "expert_choice", "--moe-freq", "0") == []


def test_a_plan_that_carries_an_assignment_out_twice_is_refused():
    """As by an argsort of each token's weights: places within a row, not in the list."""
    tight = padded(capacity_factor=4.0, priority=lambda routing: routing.weights.detach().argsort().flatten())
    layer = expert_layer(dispatcher=tight, experts=partial(swiglu, matmul=batched))
    with pytest.raises(ValueError, match="the recipe's plan carries an assignment out more than once; expected each"):
        audit(mixtral()._replace(layer=layer, plan=tight.plan), E)


def test_a_router_that_wants_the_mask_gets_none():
    def route(logits, *, token_mask, bias=None):
        assert token_mask is None
        return top_k(logits, k=2)

    assert not audit(mixtral()._replace(route=route, needs=("token_mask",)), E).leaks
