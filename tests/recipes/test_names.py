import functools
import pickle
from functools import partial

import pytest
import torch

from moekit.recipes import MoE, Recipe, mixtral, moe_layer, moe_plus_plus, names
from moekit.recipes.audits import audit
from moekit.recipes.choices import experts_per_token
from moekit.recipes.names import RECIPES, find_recipe, recipe_options
from moekit.recipes.recipe_checks import check_calls
from moekit.routing import top_k
from moekit.types import Routing

FILE = """
from functools import partial
from moekit.recipes import mixtral, olmoe, openlm
from moekit.routing import top_k

VALUE = mixtral(k=3)
NUMBER = 7

def function(*, k=1, capacity_factor=1.0):
    return mixtral(k=k)._replace(coefficients={"load_balance": capacity_factor})

def no_recipe():
    return 7

def no_defaults(dim):
    return mixtral()

def any_option(**options):
    return mixtral()

router = partial(top_k, k=2)

def plain_router(logits, *, bias=None):
    return top_k(logits, k=2)

def blind(logits):
    return top_k(logits, k=2)

BLIND = mixtral()._replace(route=blind, needs=("token_ids",))
OTHER_PLAN = mixtral()._replace(layer=openlm().layer)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_file_runs_once_until_it_changes(tmp_path):
    """Who trains and who scores get the same classes, and what was drawn at random."""
    path = tmp_path / "drawn.py"
    text = "from moekit.recipes import mixtral\ndef mine(): return mixtral()\n"
    path.write_text(text)
    first, second = (names._maker(f"{path}:mine") for _ in range(2))
    assert first is second
    assert pickle.loads(pickle.dumps(first)) is first
    other = tmp_path / "other" / "drawn.py"
    other.parent.mkdir()
    other.write_text(text)
    assert names._maker(f"{other}:mine") is not first
    assert pickle.loads(pickle.dumps(first)) is first
    path.write_text(text + "\n")
    assert names._maker(f"{path}:mine") is not first


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_found_by_its_name(name):
    recipe = find_recipe(name)
    assert isinstance(recipe, Recipe)
    # Rooms of tokens whose number of experts varies; and a slot for each expert and sequence.
    expected = {"switch": 1, "dynamic_k": 64, "remoe": 64, "soft_moe": 64 / 256}.get(name, 2)
    assert experts_per_token(recipe, 64, sequence_length=256) == expected
    if name not in ("soft_moe", "expert_choice"):  # however few or many tokens it is asked about
        assert {experts_per_token(recipe, 64, sequence_length=length) for length in (16, 64, 320)} == {expected}


def test_options_reach_the_recipe():
    assert experts_per_token(find_recipe("olmoe", k=5), 8) == 5
    assert experts_per_token(find_recipe("olmoe", default_k=3), 8) == 3
    logits = torch.randn(64, 8)
    rows = {
        factor: (recipe.plan(recipe.route(logits)).assignments >= 0).sum().item()
        for factor in (0.0, 0.5)
        for recipe in [find_recipe("openlm", k=1, capacity_factor=factor)]
    }
    assert rows[0.0] == 64 > rows[0.5]


@pytest.mark.parametrize(
    ("name", "near"), [("mixtrall", "mixtral"), ("deepseek_mo", "deepseek_moe"), ("Switch", "switch")]
)
def test_an_unknown_name_gets_a_hint(name, near):
    with pytest.raises(ValueError, match=f"unknown recipe '{name}'; did you mean '{near}'.*Known: .*openlm"):
        find_recipe(name)


def test_an_unknown_name_near_nothing_lists_all():
    with pytest.raises(ValueError, match=f"Known: {', '.join(sorted(RECIPES))}"):
        find_recipe("zzz")


@pytest.mark.parametrize(
    ("name", "option", "takes"),
    [
        ("switch", {"k": 2}, "capacity_factor"),
        ("gshard", {"k": 2}, "capacity_factor"),
        ("mixtral", {"capacity_factor": 1.5}, "k"),
    ],
)
def test_an_option_that_the_recipe_does_not_take_is_an_error(name, option, takes):
    [(key, value)] = option.items()
    with pytest.raises(
        ValueError, match=rf"recipe {name} takes no {key} \(it was given as {value}, by --moe-.*takes {takes}"
    ):
        find_recipe(name, **option)


def test_a_file_can_define_a_recipe_as_a_value(file):
    recipe = find_recipe(f"{file}:VALUE")
    assert experts_per_token(recipe, 8) == 3
    with pytest.raises(ValueError, match=r"takes no k .*it takes no options"):
        find_recipe(f"{file}:VALUE", k=2)


def test_a_file_can_define_a_recipe_as_a_function(file):
    recipe = find_recipe(f"{file}:function", k=4, capacity_factor=0.5)
    assert experts_per_token(recipe, 8) == 4
    assert recipe.coefficients == {"load_balance": 0.5}
    assert experts_per_token(find_recipe(f"{file}:function"), 8) == 2
    assert isinstance(find_recipe(f"{file}:any_option"), Recipe)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.py.*current folder"):
        find_recipe(f"{tmp_path}/absent.py:mine")


@pytest.mark.parametrize("name", ["mine.py", "mine.txt:recipe", "mine:recipe", "mine.py:"])
def test_a_reference_of_the_wrong_form(name):
    with pytest.raises(ValueError, match=r"expected path/to/file\.py:name"):
        find_recipe(name)


def test_a_name_that_the_file_does_not_define_lists_those_it_does(file):
    with pytest.raises(ValueError, match=r"mine\.py defines no recipe 'functoin'; it defines .*VALUE.*function"):
        find_recipe(f"{file}:functoin")


def test_what_is_no_recipe_is_refused(file):
    with pytest.raises(ValueError, match="defines no recipe 'NUMBER'"):
        find_recipe(f"{file}:NUMBER")
    with pytest.raises(ValueError, match=r"no_recipe: expected a moekit\.Recipe or a function that returns one, got 7"):
        find_recipe(f"{file}:no_recipe")


@pytest.mark.parametrize(
    ("name", "argument"), [("no_defaults", "dim"), ("router", "logits"), ("plain_router", "logits")]
)
def test_a_function_with_arguments_that_nobody_gives_is_refused(file, name, argument):
    with pytest.raises(ValueError, match=f"{name} needs {argument}.*A router alone is no recipe"):
        find_recipe(f"{file}:{name}")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("openlm", {"k", "capacity_factor", "matmul"}),
        ("gshard", {"capacity_factor", "training", "matmul"}),
        ("mixtral", {"k", "matmul"}),
    ],
)
def test_options_of_a_recipe(name, options):
    assert set(recipe_options(name)) == options


def test_options_of_a_recipe_in_a_file(file):
    assert set(recipe_options(f"{file}:function")) == {"k", "capacity_factor"}
    assert recipe_options(f"{file}:no_recipe") == {}
    assert recipe_options(f"{file}:VALUE") == {}


def test_options_of_an_unknown_recipe():
    with pytest.raises(ValueError, match="unknown recipe 'mixtrall'; did you mean 'mixtral'"):
        recipe_options("mixtrall")


@pytest.mark.parametrize("chosen", [-2, 8])
def test_a_router_that_chooses_experts_that_there_are_not_is_refused(chosen):
    def past_the_end(logits, *, bias=None):
        routing = top_k(logits, k=2)
        return routing._replace(expert_indices=routing.expert_indices.fill_(0).index_fill(0, torch.tensor([3]), chosen))

    message = r"past_the_end of .*test_names\.py chose experts from -?\d to \d of 8; expected 0 to 7, or -1 for none"
    with pytest.raises(ValueError, match=message):
        experts_per_token(mixtral()._replace(route=past_the_end), 8)


def test_a_router_that_counts_experts_from_one_is_refused():
    """Of tokens that leave it undecided it chooses the first ones, which there are."""

    def from_one(logits, *, bias=None):
        routing = top_k(logits, k=2)
        return routing._replace(expert_indices=routing.expert_indices + 1)

    with pytest.raises(ValueError, match=r"from_one of .* chose experts from 1 to 8 of 8; expected 0 to 7"):
        experts_per_token(mixtral()._replace(route=from_one), 8)


def test_a_router_must_take_what_a_layer_gives_it(file):
    with pytest.raises(
        ValueError, match=r"blind of .*takes no bias and no token_ids; expected route\(logits, bias=None,"
    ):
        find_recipe(f"{file}:BLIND")


def test_a_plan_must_be_that_of_the_layer(file):
    with pytest.raises(ValueError, match=r"plans by padded_plan\(.*, and recipe\.plan is dropless_plan, by"):
        find_recipe(f"{file}:OTHER_PLAN")


def by_confidence(logits, *, bias=None):
    routing = top_k(logits, k=2, bias=bias)
    order = routing.weights[:, 0].argsort(descending=True)
    return routing._replace(**{name: getattr(routing, name)[order] for name in Routing._fields[:3]})


@pytest.mark.parametrize("ask", [experts_per_token, audit])
def test_rows_in_another_order_than_tokens_are_refused(ask):
    recipe, state = mixtral()._replace(route=by_confidence), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"by_confidence of .* rows in another order than the \d+ tokens'; expected"):
        ask(recipe, 8)
    assert torch.equal(state, torch.get_rng_state())
    cut = recipe._replace(route=lambda logits, *, bias=None: top_k(logits[1:], k=2)._replace(num_tokens=len(logits)))
    with pytest.raises(ValueError, match="rows in another order than the"):
        ask(cut, 8)


@pytest.mark.parametrize("ask", [experts_per_token, audit])
def test_lists_and_what_fills_up_rows_may_name_any_token(ask):
    def listed(logits, *, bias=None):
        routing = by_confidence(logits)
        return routing._replace(**{name: getattr(routing, name).flatten() for name in Routing._fields[:3]})

    def filled(logits, *, bias=None):
        routing = top_k(logits, k=2)
        gone = torch.arange(2) == 1
        return routing._replace(
            token_indices=routing.token_indices.masked_fill(gone, 0),
            expert_indices=routing.expert_indices.masked_fill(gone, -1),
        )

    for route in (listed, filled):
        ask(mixtral()._replace(route=route), 8)


def test_routers_that_take_what_they_are_given_somehow_are_taken():
    def plain(logits):
        return top_k(logits, k=2)

    @functools.wraps(plain)
    def wrapped(logits, **options):
        return plain(logits)

    for route in (wrapped, partial(wrapped), lambda logits, **options: plain(logits), max):
        check_calls(mixtral()._replace(route=route, needs=("token_mask",)))
    for route in (plain, lambda logits, bias, /: plain(logits)):
        with pytest.raises(ValueError, match="takes no bias; expected"):
            check_calls(mixtral()._replace(route=route))


def test_simple_experts_and_empty_lists_are_choices():
    def last(logits, *, bias=None):
        routing = top_k(logits, k=2)
        return routing._replace(expert_indices=torch.full_like(routing.expert_indices, logits.shape[1] - 1))

    assert experts_per_token(moe_plus_plus()._replace(route=last), 8) == 2
    nobody = Routing(*[torch.zeros(0, dtype=torch.int64)] * 2, torch.zeros(0), 1024, 8, 0)
    assert experts_per_token(mixtral()._replace(route=lambda logits, bias=None: nobody), 8) == 0


def test_experts_per_token_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    assert experts_per_token(find_recipe("gshard"), 8) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_experts_per_token_of_a_router_that_reads_token_ids():
    def by_token(logits, *, token_ids, bias=None):
        assert token_ids.dtype == torch.int64
        return mixtral(k=1).route(logits)

    assert experts_per_token(mixtral()._replace(route=by_token, needs=("token_ids",)), 4) == 1


def test_experts_per_token_works_under_the_meta_device():
    with torch.device("meta"):
        assert experts_per_token(find_recipe("deepseek_moe", k=3), 8) == 3


def test_more_experts_per_token_than_experts_is_an_error():
    with pytest.raises(ValueError, match=r"k = 9 .* E = 8 experts; expected 1 <= k <= E.*--moe-top-k"):
        experts_per_token(find_recipe("mixtral", k=9), 8)


def test_a_found_recipe_runs():
    recipe = find_recipe("deepseek_moe")
    moe = MoE(8, 4, recipe, hidden=8)
    x = torch.randn(5, 8)
    assert torch.equal(moe(x).y, moe_layer(x, moe.params(), recipe, state=moe.state).y)
