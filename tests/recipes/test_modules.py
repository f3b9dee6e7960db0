import copy
import threading
from functools import partial, wraps
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moekit.dispatch import by_position, dropless, padded
from moekit.experts import batched, grouped, init_gated, swiglu
from moekit.parallel import Part
from moekit.recipes import (
    MoE,
    Recipe,
    deepseek_moe,
    expert_layer,
    gshard,
    llama4,
    mixtral,
    moe_layer,
    olmoe,
    openlm,
    remoe,
    sparsely_gated,
    switch,
)
from moekit.routing import load_balance_loss, sequence_balance_loss, top_k
from moekit.segments import tokens_per_expert
from moekit.types import RouterState, SharedExperts

D, E = 16, 4
RECIPES = {
    "openlm": openlm(),
    "switch": switch(),
    "gshard": gshard(),
    "mixtral": mixtral(),
    "olmoe": olmoe(k=3),
    "deepseek_moe": deepseek_moe(k=2, num_shared=2),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@every_recipe
def test_module_is_the_function_with_its_parameters(recipe) -> None:
    moe, x = MoE(D, E, recipe, hidden=8), torch.randn(2, 5, D)
    torch.manual_seed(1)
    output = moe(x)
    torch.manual_seed(1)
    expected = moe_layer(x, moe.params(), recipe, state=moe.state)
    assert torch.equal(output.y, expected.y)
    assert output.losses == expected.losses


@every_recipe
def test_every_parameter_gets_a_gradient(recipe) -> None:
    moe = MoE(D, E, recipe, hidden=8)
    output = moe(torch.randn(64, D))
    output.y.square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


@every_recipe
def test_state_dict_round_trip(recipe) -> None:
    source, target = MoE(D, E, recipe, hidden=8), MoE(D, E, recipe, hidden=8)
    source.update_state(torch.tensor([5, 1, 0, 2]))
    x = torch.randn(6, D)
    target.load_state_dict(source.state_dict())
    torch.manual_seed(1)
    expected = source(x).y
    torch.manual_seed(1)
    assert torch.equal(target(x).y, expected)


def test_names_and_shapes_of_the_state() -> None:
    moe = MoE(D, E, deepseek_moe(k=2, num_shared=3), hidden=8)
    assert {name: tuple(tensor.shape) for name, tensor in moe.state_dict().items()} == {
        "gate": (D, E),
        "experts.gate": (E, D, 8),
        "experts.up": (E, D, 8),
        "experts.down": (E, 8, D),
        "shared.gate": (1, D, 24),
        "shared.up": (1, D, 24),
        "shared.down": (1, 24, D),
        "bias": (E,),
    }
    assert set(MoE(D, E, openlm()).state_dict()) == {"gate", "experts.up", "experts.down"}


def test_no_shared_experts() -> None:
    moe = MoE(D, E, deepseek_moe(k=2, num_shared=0), hidden=8)
    assert not moe.shared
    assert moe(torch.randn(3, D)).y.shape == (3, D)


@pytest.mark.parametrize("shared", [partial(swiglu, matmul=grouped), SharedExperts(partial(swiglu, matmul=grouped), 0)])
def test_shared_experts_are_one_value_with_a_positive_number(shared) -> None:
    with pytest.raises(
        ValueError, match=r"the recipe's shared experts are .*; expected None, or SharedExperts\(network"
    ):
        MoE(D, E, mixtral()._replace(shared=shared), hidden=8)


def test_a_module_holds_as_many_shared_experts_as_it_was_made_with() -> None:
    moe = MoE(8, 4, deepseek_moe(num_shared=2))
    other = moe.recipe.shared._replace(number=3)
    with pytest.raises(ValueError, match=r"has 3 shared experts, and the module was made with 2.*_replace\(number=2\)"):
        moe.recipe = moe.recipe._replace(shared=other)
    moe.recipe = moe.recipe._replace(shared=None)  # which leaves them out
    moe.recipe = deepseek_moe(num_shared=2)


def test_shared_experts_can_be_added_to_any_method() -> None:
    shared = SharedExperts(partial(swiglu, matmul=grouped), gated=True)
    moe = MoE(D, E, mixtral()._replace(shared=shared), hidden=8)
    assert moe.shared["up"].shape == (1, D, 8)
    assert moe.shared_gate is not None


@every_recipe
def test_initial_weights_follow_the_generator(recipe) -> None:
    state = torch.get_rng_state()
    first, second, other = (MoE(D, E, recipe, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


@every_recipe
def test_a_module_of_the_meta_device_is_drawn_as_a_new_one(recipe) -> None:
    expected = MoE(D, E, recipe, hidden=8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.device("meta"):
        moe = MoE(D, E, recipe, hidden=8, dtype=torch.float64)
    moe.to_empty(device="cpu")
    for tensor in moe.state_dict().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 7)
    kept = dict(moe.named_parameters())
    moe.reset_parameters(generator=torch.Generator().manual_seed(1))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(moe.state_dict()[name], tensor), name
    assert all(parameter is kept[name] for name, parameter in moe.named_parameters())
    assert all(parameter.requires_grad for parameter in moe.parameters())


def test_a_parametrized_module_is_not_drawn_anew() -> None:
    moe = MoE(D, E, mixtral(), hidden=8)
    torch.nn.utils.parametrizations.weight_norm(moe.experts, "up", dim=0)
    with pytest.raises(ValueError, match=r"the module has experts\.parametrizations\.up\.original0, .* before param"):
        moe.reset_parameters()


def test_shapes_alone_can_be_asked_for() -> None:
    """As programs do that estimate memory."""
    with FakeTensorMode():
        moe = MoE(D, E, mixtral(), hidden=8)
        output = moe(torch.empty(2, 3, D))
    assert output.y.shape == (2, 3, D)
    assert isinstance(moe.gate, FakeTensor)


def test_shards_are_drawn_as_the_whole() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            moe = MoE(D, E, mixtral(), hidden=8, part=Part(1, 2))
        fully_shard(moe, mesh=init_device_mesh("cpu", (1,)))
        moe.to_empty(device="cpu")
        moe.reset_parameters(generator=torch.Generator().manual_seed(1))
        expected = MoE(D, E, mixtral(), hidden=8, part=Part(1, 2), generator=torch.Generator().manual_seed(1))
        for name, tensor in expected.state_dict().items():
            assert torch.equal(moe.state_dict()[name].full_tensor(), tensor), name
    finally:
        dist.destroy_process_group()


class _Other(NamedTuple):
    weight: Any
    bias: Any


class _Odd(NamedTuple):
    weight: Any
    keys: Any


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda *_, **given: _Other(torch.ones(8, 4), None),
            "parameters are a _Other with bias = None; expected",
        ),
        (lambda *_, **given: (torch.ones(8, 4),), "parameters are a tuple; expected a tensor, a NamedTuple of tensors"),
        (lambda *_, **given: _Odd(torch.ones(8, 4), torch.ones(3)), "parameters cannot be called 'keys'"),
    ],
)
def test_parameters_that_a_module_cannot_hold_are_named(made, message) -> None:
    with pytest.raises(ValueError, match=message):
        MoE(4, 8, mixtral()._replace(init_gate=made))


def test_scale_of_the_gate() -> None:
    assert MoE(256, 64, mixtral(), hidden=8).gate.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert MoE(256, 64, openlm(), hidden=8).gate.std().item() == pytest.approx(0.02, rel=0.05)


def test_default_width_is_the_recipe_s() -> None:
    assert MoE(D, E, openlm()).experts.up.shape == (E, D, 4 * D)
    assert MoE(96, E, mixtral()).experts.up.shape == (E, 96, 256)


def test_dtype_and_device() -> None:
    moe = MoE(D, E, deepseek_moe(k=2), hidden=8, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.bfloat16}
    assert moe.bias.dtype == torch.float32
    assert all(tensor.is_meta for tensor in MoE(D, E, deepseek_moe(k=2), device="meta").state_dict().values())


def test_bias_moves_against_the_load_and_steers_the_choice() -> None:
    moe = MoE(D, E, deepseek_moe(k=1, bias_rate=0.5), hidden=8)
    moe.update_state(torch.tensor([9, 3, 0, 0]))
    torch.testing.assert_close(moe.bias, torch.tensor([-0.5, 0.0, 0.5, 0.5]) * 1.0)
    for _ in range(20):
        moe.update_state(torch.tensor([9, 9, 9, 0]))
    output = moe(torch.randn(10, D))
    assert tokens_per_expert(output.routing.expert_indices, E).tolist() == [0, 0, 0, 10]
    assert not moe.bias.requires_grad


def test_a_recipe_without_bias_ignores_the_update() -> None:
    moe = MoE(D, E, mixtral(), hidden=8)
    moe.update_state(torch.tensor([9, 3, 0, 0]))
    assert moe.state is None


def _remembering(state: RouterState) -> Recipe:
    """A recipe whose router is handed a state under its name, and does nothing with it."""
    return mixtral()._replace(
        route=lambda logits, *, bias=None, **_: top_k(logits, k=2), state=state, needs=(state.name,)
    )


def _rows(num_experts: int, *, device=None, dtype=torch.float32) -> torch.Tensor:
    return torch.arange(3 * num_experts, device=device, dtype=dtype).view(3, num_experts)


@pytest.mark.parametrize(
    ("update", "found"),
    [
        (lambda state, sums: state[0] + 1, r"\(4,\) float32; expected \(3, 4\) float32"),
        (lambda state, sums: torch.tensor(5.0), r"\(\) float32; expected \(3, 4\) float32"),
        (lambda state, sums: state.flatten(), r"\(12,\) float32; expected \(3, 4\) float32"),
        (lambda state, sums: None, r"None; expected \(3, 4\) float32"),
    ],
)
def test_an_update_of_another_shape_is_refused(update, found: str) -> None:
    moe = MoE(D, E, _remembering(RouterState("memory", _rows, update=update)), hidden=8)
    before = moe.state.clone()
    message = rf"MoE: the update of the state 'memory' returned {found}, as the state is"
    with pytest.raises(ValueError, match=message):
        moe.update_state(torch.zeros(E))
    assert torch.equal(moe.state, before)


def test_an_update_of_integers_returns_integers() -> None:
    """A step of 0.1 would be cut off, whatever was observed."""
    state = RouterState("memory", partial(_rows, dtype=torch.int64), update=lambda state, sums: state + 0.1)
    moe = MoE(D, E, _remembering(state), hidden=8)
    with pytest.raises(ValueError, match=r"returned \(3, 4\) float32; expected \(3, 4\) int64, as the state is"):
        moe.update_state(torch.zeros(E))
    moe.recipe = _remembering(state._replace(update=lambda state, sums: state + sums.int()))
    moe.update_state(torch.ones(E))
    assert torch.equal(moe.state, _rows(E, dtype=torch.int64) + 1)


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (lambda state, sums: state[0].expand(3, -1), _rows(4)[0].expand(3, -1)),
        (lambda state, sums: state[[2, 1, 0]], _rows(4).flip(0)),
        (lambda state, sums: state.roll(1, 0)[1:2].expand(3, -1), _rows(4)[0].expand(3, -1)),
        (lambda state, sums: state, _rows(4)),
        (lambda state, sums: state.double() + 1, _rows(4) + 1),
        (lambda state, sums: state.flatten().unfold(0, 4, 4), _rows(4)),
    ],
)
def test_an_update_may_return_a_view_of_the_state_or_another_precision(update, expected) -> None:
    moe = MoE(D, E, _remembering(RouterState("memory", _rows, update=update)), hidden=8)
    moe.update_state(torch.zeros(E))
    assert moe.state.dtype == torch.float32
    assert torch.equal(moe.state, expected)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *(
            (name, "a name that the module has")
            for name in ("gate", "experts", "recipe", "params", "state", "training")
        ),
        *((name, "what a layer tells routers") for name in ("token_ids", "token_mask", "sequence_length")),
        *((name, "no name that an argument can have") for name in ("my.memory", "", "a b", 3)),
    ],
)
def test_a_state_is_called_by_a_name_of_its_own(name, why: str) -> None:
    recipe = _remembering(RouterState("memory", _rows))
    with pytest.raises(ValueError, match=rf"the recipe's state is called {name!r}, {why}; expected .*such as 'memory'"):
        MoE(D, E, recipe._replace(state=recipe.state._replace(name=name), needs=()), hidden=8)


def _two(x, params):
    return x @ params


def _wants(logits, *, memory, bias=None):
    return top_k(logits, k=2, bias=bias)


def _wants_more(logits, *, memory, momentum, bias=None):
    return top_k(logits, k=2, bias=bias)


def _remembers(logits, routing, *, memory, token_mask=None, sequence_length=None):
    return logits.mean()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"needs": ("memry",)}, r"recipe\.needs names 'memry', which no layer knows; known: memory, seq.*_mask"),
        ({"needs": "memory"}, r"recipe\.needs = 'memory'; expected a tuple of names: \('memory',\)"),
        (
            {"needs": ()},
            r"the router _wants of .* needs 'memory', what the recipe's state is called.*recipe\.needs lists",
        ),
        ({"layer": dropless()}, r"recipe\.layer is a Dispatcher; expected a function.*expert_layer\(dispatcher=.*"),
        ({"plan": dropless()}, r"recipe\.plan is a Dispatcher; expected a function.* its plan, dispatcher\.plan"),
        ({"route": "top_k"}, r"recipe\.route is a str; expected a function"),
        ({"losses": [len]}, r"recipe\.losses is a list; expected a mapping"),
        ({"state": RouterState}, r"recipe\.state is a type; expected RouterState, or None"),
        ({"coefficients": 0.1}, r"recipe\.coefficients is a float; expected a mapping"),
        ({"simple": 2}, r"recipe\.simple is a int; expected SimpleExperts, or None"),
        (
            {"gate": torch.nn.Linear(D, E)},
            r"the gate the module Linear does not take two arguments; expected gate\(x, params",
        ),
        ({"gate": lambda x: x}, r"the gate <lambda> of .* does not take two arguments"),
        ({"losses": {"a": 0.1}}, r"the loss 'a' of the recipe is 0\.1; expected a function"),
        ({"losses": {"a": torch.nn.Identity()}}, r"the loss 'a', the module Identity, takes no token_mask and no sequ"),
        ({"gate": wraps(_two)(lambda x: x)}, r"the gate .* does not take two arguments"),
        (
            {"losses": {"a": lambda logits, routing: logits.sum()}},
            r"the loss 'a', .* takes no token_mask and no sequence_length; expected loss\(logits, routing, token_mask=",
        ),
        (
            {"losses": {"a": _remembers}},
            r"the loss 'a', _remembers of .*, wants memory, which no layer gives it: losses see logits and",
        ),
        (
            {"route": _wants_more},
            r"the router _wants_more of .* wants momentum, which no layer gives it; bind it by partial, or name it in",
        ),
        (
            {"losses": {"a": partial(load_balance_loss, token_mask=torch.ones(3, dtype=torch.bool))}},
            r"the loss load_balance_loss of .* is bound to token_mask, which a layer hands it in every call",
        ),
        (
            {"losses": {"a": partial(sequence_balance_loss, sequence_length=8)}},
            r"the loss sequence_balance_loss of .* is bound to sequence_length, which .* x as \(B, L, D\) for",
        ),
        (
            {"route": partial(_wants, bias=torch.zeros(E))},
            r"the router _wants of .* is bound to bias, which a layer hands it .* state= for a bias or",
        ),
        (
            {"plan": padded(capacity_factor=1.0).plan},
            r"the recipe's layer plans by dropless_plan, and recipe\.plan is padded_plan\(.* Replace both",
        ),
    ],
)
def test_stages_that_are_none_are_refused(given, words: str) -> None:
    recipe = mixtral()._replace(route=_wants, needs=("memory",), state=RouterState("memory", _rows))
    moe = MoE(D, E, recipe, hidden=8)
    with pytest.raises(ValueError, match=words):
        MoE(D, E, recipe._replace(**given), hidden=8)
    with pytest.raises(ValueError, match=words):
        moe.recipe = recipe._replace(**given)
    assert moe.recipe is recipe


def test_layers_of_ones_own_plan_as_they_like_and_gates_wrap_what_they_like() -> None:
    def dropping(x, routing, params, *, layer, plan):
        return layer(x, routing, params)

    tight = padded(capacity_factor=0.5)
    own = partial(dropping, layer=mixtral().layer, dispatcher=tight, plan=tight.plan)
    MoE(D, E, mixtral()._replace(layer=own), hidden=8)  # whatever it does with them
    layer = partial(dropping, layer=mixtral().layer, plan=tight.plan)
    gate = wraps(lambda x: x)(_two)
    moe = MoE(np.int64(D), np.int32(E), mixtral()._replace(layer=layer, plan=tight.plan, gate=gate), hidden=np.int8(8))
    assert moe(torch.randn(3, D)).y.shape == (3, D)
    one, other = (padded(capacity_factor=1.0, priority=lambda routing: by_position(routing)) for _ in range(2))
    apart = expert_layer(dispatcher=one, experts=partial(swiglu, matmul=batched))
    MoE(D, E, mixtral()._replace(layer=apart, plan=one.plan), hidden=8)
    with pytest.raises(ValueError, match=r"recipe\.plan is padded_plan\(.*\), made by itself, by which"):
        MoE(D, E, mixtral()._replace(layer=apart, plan=other.plan), hidden=8)
    for size in (0, 8.0, "8"):
        with pytest.raises(ValueError, match=rf"MoE: hidden = {size!r}; expected a positive integer"):
            MoE(D, E, mixtral(), hidden=size)


def test_shared_experts_without_parameters_are_named() -> None:
    moe = MoE(D, E, mixtral(), hidden=8)
    moe.recipe = llama4()
    with pytest.raises(ValueError, match=r"the recipe has shared experts, and the parameters none\. .* new MoE of"):
        moe(torch.randn(3, D))


def test_what_init_returns_has_names() -> None:
    def init(*sizes, **options):
        return tuple(init_gated(*sizes, **options))

    with pytest.raises(
        ValueError, match=r"the experts' init returned a tuple; expected a NamedTuple of tensors, such as"
    ):
        MoE(D, E, mixtral()._replace(init=init), hidden=8)


def test_a_stage_can_be_swapped_on_a_built_module() -> None:
    moe, x = MoE(D, E, mixtral(k=2), hidden=8), torch.randn(5, D)
    moe.recipe = moe.recipe._replace(route=mixtral(k=1).route)
    assert moe(x).routing.expert_indices.shape == (5, 1)


def test_token_mask_passes_through() -> None:
    moe, x = MoE(D, E, mixtral(), hidden=8), torch.randn(2, 3, D)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert torch.equal(moe(x, token_mask=mask).routing.expert_indices[:, 0] >= 0, mask.flatten())


def test_print_shows_the_sizes() -> None:
    assert "dim=16, num_experts=4" in repr(MoE(D, E, mixtral(), hidden=8))


@pytest.mark.parametrize(("dim", "num_experts", "hidden"), [(0, 4, 8), (16, 0, 8), (16, 4, 0), (-1, 4, None)])
def test_sizes_must_be_positive(dim: int, num_experts: int, hidden: int | None) -> None:
    with pytest.raises(ValueError, match=r"MoE: (dim|num_experts|hidden) = -?\d; expected a positive integer"):
        MoE(dim, num_experts, mixtral(), hidden=hidden)


def test_more_choices_than_experts_say_so() -> None:
    with pytest.raises(ValueError, match="top_k: k = 8 experts per token were asked of E = 4"):
        MoE(D, E, olmoe(k=8), hidden=8)(torch.randn(3, D))


@pytest.mark.parametrize(
    "cast", [lambda moe: moe.bfloat16(), lambda moe: moe.half(), lambda moe: moe.to(torch.float64)]
)
def test_a_cast_module_keeps_what_its_router_remembers(cast) -> None:
    for recipe in (deepseek_moe(k=2), remoe()):
        moe = MoE(D, E, recipe, hidden=8)
        moe.state.add_(1e-8)
        before = moe.state.clone()
        assert cast(moe) is moe
        assert moe.gate.dtype != torch.float32
        assert torch.equal(moe.state, before)
        assert torch.equal(moe.state_dict()[recipe.state.name], before)
        assert moe.to("meta").state.is_meta
        assert moe.half().state.dtype == torch.float32


def test_a_recipe_with_a_state_cannot_be_put_into_a_module_without() -> None:
    moe = MoE(D, E, mixtral(), hidden=8)
    moe.recipe = deepseek_moe(k=2)
    with pytest.raises(RuntimeError, match="its recipe remembers 'bias', and the one that it was made of did not"):
        moe(torch.randn(3, D))
    moe = MoE(D, E, deepseek_moe(k=2), hidden=8)
    moe.recipe = _remembering(RouterState("memory", _rows))
    with pytest.raises(
        RuntimeError, match="remembers 'memory', and the one that it was made of remembered 'bias'; make"
    ):
        moe(torch.randn(3, D))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            mixtral(),
            sparsely_gated(k=2),
            "noisy_gate: the gate's parameters are Parameter, which lack w, noise; expected",
        ),
        (sparsely_gated(k=2), mixtral(), "linear_gate: the gate's parameters are NoisyGateParams; expected a tensor"),
        (
            mixtral(),
            switch(),
            "relu_mlp: the experts' parameters are GatedParams, whose gate it would not use; expected",
        ),
        (switch(), mixtral(), "swiglu: the experts' parameters are MlpParams, which lack gate; expected GatedParams"),
    ],
)
def test_a_recipe_with_other_parameters_cannot_be_put_into_a_module(first, second, message: str) -> None:
    moe, x = MoE(D, E, first, hidden=8), torch.randn(3, D)
    moe.recipe = second
    with pytest.raises(ValueError, match=message):
        moe(x)
    moe.recipe = first
    moe(x)


def test_a_method_that_is_not_called_is_no_recipe() -> None:
    with pytest.raises(TypeError, match=r"expected a Recipe. A method is called: mixtral\(\), not mixtral"):
        MoE(D, E, mixtral)
    moe, x = MoE(D, E, mixtral()), torch.randn(3, D)
    with pytest.raises(TypeError, match=r"expected a Recipe. A method is called: mixtral\(\), not mixtral"):
        moe.recipe = mixtral
    moe(x)  # as it was
    with pytest.raises(TypeError, match=r"moe_layer: recipe = <function mixtral .*A method is called: mixtral\(\)"):
        moe_layer(x, moe.params(), mixtral)
    with pytest.raises(TypeError, match=r"moe_layer: params are a tuple; expected MoEParams, as MoEParams\(gate"):
        moe_layer(x, (moe.gate, moe.experts.params()), mixtral())


def test_a_copy_shares_what_cannot_be_copied() -> None:
    """As the groups of ranks in a recipe whose experts are spread over them."""
    lock = threading.Lock()
    recipe = mixtral()._replace(layer=lambda x, routing, params, lock=lock: mixtral().layer(x, routing, params))
    moe, x = MoE(D, E, recipe._replace(layer=partial(recipe.layer, lock=lock)), hidden=8), torch.randn(5, D)
    copied = copy.deepcopy(moe)
    assert torch.equal(copied(x).y, moe(x).y)
    assert copied.gate is not moe.gate


def test_a_state_keeps_its_dtype_whatever_the_recipe_is_meanwhile() -> None:
    moe = MoE(D, E, deepseek_moe(k=2), hidden=8)
    recipe = moe.recipe
    moe.recipe = recipe._replace(state=None)
    moe.bfloat16()
    moe.recipe = recipe
    assert moe.state.dtype == torch.float32
    assert moe.gate.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gate_in_half_precision_is_refused(dtype: torch.dtype) -> None:
    """Its logits would be compared, exponentiated and summed in it: a z-loss in float16 is infinite at 2,048 tokens."""
    recipe = olmoe(k=2)
    moe, x = MoE(D, E, recipe._replace(gate=lambda x, w: x @ w), hidden=8), torch.randn(5, D)
    torch.testing.assert_close(moe(x).y, moe_layer(x, moe.params(), recipe).y)
    with (
        torch.autocast("cpu", dtype=dtype),
        pytest.raises(ValueError, match=rf"are in {dtype}; expected float32"),
    ):
        moe(x)


def test_a_router_that_remembers_is_not_asked_without_its_state() -> None:
    moe, x = MoE(D, E, deepseek_moe(k=2), hidden=8), torch.randn(3, D)
    with pytest.raises(ValueError, match=r"remembers 'bias' between steps, and no state is given; hand on state="):
        moe_layer(x, moe.params(), moe.recipe)
    forgetful = moe_layer(x, moe.params(), moe.recipe._replace(state=None))
    assert torch.equal(forgetful.y, moe(x).y), "its bias is zero to begin with"


@pytest.mark.parametrize("name", ["token_mask", "token_ids"])
def test_what_is_given_of_tokens_has_their_shape(name: str) -> None:
    moe, x = MoE(D, E, mixtral(), hidden=8), torch.randn(2, 5, D)
    dtype = torch.bool if name == "token_mask" else torch.int64
    moe(x, **{name: torch.ones(2, 5, dtype=dtype)})
    for shape in ((5, 2), (10,), (2, 5, 1)):
        with pytest.raises(ValueError, match=rf"{name} has the shape .*; expected \(2, 5\), one for each token of x"):
            moe(x, **{name: torch.ones(shape, dtype=dtype)})
