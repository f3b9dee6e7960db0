import json
from functools import partial

import pytest
import torch

from moekit.recipes import mixtral, openlm, qwen3_moe
from moekit.recipes.forms import bound, form_of, is_same, method_of
from moekit.recipes.names import RECIPES
from moekit.routing import load_balance_loss, top_k
from moekit.types import Ratio

FACTOR = Ratio(5, 4)


def of_two(x, /, y=3, *, z=None, w=FACTOR):
    return x, y, z, w


class Router:
    def __call__(self, logits, *, bias=None):
        return top_k(logits, k=1)


@pytest.mark.parametrize(
    ("function", "form"),
    [
        (of_two, "of_two(y=3, w=1.25)"),
        (partial(partial(of_two, 7, y=4), y=5), "of_two(y=5, w=1.25, 0=7)"),
        (partial(of_two, z=partial(of_two, w=None)), "of_two(y=3, z=of_two(y=3), w=1.25)"),
        (partial(of_two, z=torch.zeros(3)), "of_two(y=3, z=tensor([0., 0., 0.]), w=1.25)"),
        (Router(), "Router"),
        (torch.relu, "relu"),
    ],
)
def test_a_form_is_the_call_that_a_function_is_bound_to(function, form):
    assert form_of(function) == form


def test_what_is_bound_last_wins():
    assert bound(partial(partial(of_two, y=4), y=5)) == (of_two, {"y": 5, "z": None, "w": FACTOR})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (of_two, partial(of_two, y=3), True),
        (of_two, partial(of_two, y=4), False),
        (partial(of_two, w=1.25), of_two, True),
        (partial(of_two, w=1.3), of_two, False),
        (partial(of_two, z="a"), partial(of_two, z="a"), True),
        (partial(of_two, z="1"), partial(of_two, z=1), False),
        (partial(of_two, z=float("inf")), partial(of_two, z=float("inf")), True),
        (partial(of_two, z=(1, partial(of_two))), partial(of_two, z=(1, of_two)), True),
        (partial(of_two, z=(torch.ones(2),)), partial(of_two, z=(torch.ones(2),)), False),
        (partial(of_two, z=(1,)), partial(of_two, z=None), False),
        (partial(of_two, 7), partial(of_two, 7, z=None), True),
        (torch.nn.functional.gelu, partial(torch.nn.functional.gelu), True),
        (torch.nn.functional.gelu, torch.nn.functional.silu, False),
        (Router(), Router(), False),
    ],
)
def test_functions_bound_to_the_same_are_known(one, other, same):
    assert is_same(one, other) is is_same(other, one) is same


def test_the_forms_of_one_loss_are_told_apart():
    forms = [method_of(recipe)["losses"]["load_balance"]["form"] for recipe in (mixtral(), qwen3_moe())]
    assert forms == ["load_balance_loss(score=softmax)", "load_balance_loss(score=softmax, per_token=1.0)"]
    reported = mixtral()._replace(losses={"first": partial(load_balance_loss, choices=1)}, coefficients={})
    assert method_of(reported)["losses"] == {
        "first": {"form": "load_balance_loss(score=softmax, choices=1)", "coefficient": None}
    }


def test_coefficients_are_numbers_of_any_kind_and_evaluation_has_forms_of_its_own():
    given = {"load_balance": torch.tensor(0.5)}
    method = method_of(openlm()._replace(coefficients=given), evaluation=openlm(capacity_factor=0))
    assert json.loads(json.dumps(method))["losses"]["load_balance"]["coefficient"] == 0.5
    assert method["plan"] == "padded_plan(priority=by_position, capacity_factor=1.25)"
    assert method["evaluation"]["plan"] == "dropless_plan"


@pytest.mark.parametrize("name", RECIPES)
def test_every_method_can_be_written_down(name):
    recipe = RECIPES[name]()
    method = json.loads(json.dumps(method_of(recipe, evaluation=recipe, loss_scope="step")))
    assert method["evaluation"] == {"route": method["route"], "plan": method["plan"]}
    assert method["losses"].keys() == recipe.losses.keys()
    assert " at 0x" not in str(method)
