"""The fused layer against the loop over experts in float64: output and every gradient by name."""

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_cases import ACTIVATIONS, LOW, TOLERANCE, compare, draw, fused, reference, run
from interpreted import DEVICE, Calls, run_interpreted, runs_kernels, starts_interpreter

from moekit.experts import _fused_plan, init_mlp, pack_gated, swiglu
from moekit.experts._fused_plan import check_num_experts
from moekit.experts.activations import RELU2, SWIGLU, Activation
from moekit.experts.fused import fused_layer
from moekit.experts.keep import EVERYTHING, INPUTS, PREACTIVATION, Keep
from moekit.experts.tile_files import layer_tiles
from moekit.experts.tile_tables import entry_of
from moekit.experts.tiles import LayerSize
from moekit.routing import expert_choice
from moekit.types import ExpertLayer, Routing

NAN = float("nan")
# T, D, F, E, K: several tiles; widths for pointers alone, and for both; groups of 0 and 1 row; every expert chosen
SHAPES = {
    "usual": (19, 24, 32, 2, 2),
    "by pointers": (13, 21, 35, 3, 3),
    "no whole tile of gate": (13, 16, 24, 3, 2),
    "one expert": (40, 16, 16, 1, 1),
    "few rows": (3, 16, 16, 5, 1),
    "all experts": (3, 16, 16, 8, 8),
    "one token": (1, 16, 16, 4, 2),
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"  # rows that nobody reads are garbage
)


@pytest.mark.slow
@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_equals_the_loop(shape: str) -> None:
    case = draw(SHAPES[shape], SWIGLU)
    found = run(fused(), case, device=DEVICE)
    compare(found, run(reference(swiglu), case, torch.float64), TOLERANCE[torch.float32])


@runs_kernels
def test_a_gradient_of_gradients_is_refused_when_it_is_asked_for() -> None:
    x, routing, params = draw(SHAPES["usual"], SWIGLU)
    x, params = x.to(DEVICE).requires_grad_(), type(params)(*(w.to(DEVICE) for w in params))
    routing = Routing(*(part.to(DEVICE) for part in routing[:3]), *routing[3:])
    (once,) = torch.autograd.grad(fused()(x, routing, params).sum(), x)
    (grad,) = torch.autograd.grad(fused()(x, routing, params).sum(), x, create_graph=True)
    assert torch.equal(grad, once)
    refused = partial(
        pytest.raises, RuntimeError, match=r"fused_layer: its gradient has no gradient.*`expert_layer` on"
    )
    with refused():
        grad.square().sum().backward()
    layer = lambda x: fused()(x, routing, params).square().sum()  # noqa: E731
    (grad,) = torch.autograd.grad(layer(x), x, create_graph=True)
    with refused():
        torch.autograd.grad(grad.square().sum(), x)
    with refused():
        torch.autograd.functional.vhp(layer, x, torch.ones_like(x))
    params = type(params)(*(w.requires_grad_() for w in params))
    of_params = torch.autograd.grad(layer(x.detach()), list(params), create_graph=True)
    with refused():
        torch.autograd.grad([grad.sum() for grad in of_params], list(params), allow_unused=True)


@runs_kernels
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays_nan(name: str) -> None:
    """In what it touches, and nowhere else: a diverging run must be seen."""
    activation, experts = ACTIVATIONS[name]
    x, routing, params = draw(SHAPES["usual"], activation)
    x[3] = NAN
    found, expected = (
        run(layer, (x, routing, params), device=DEVICE) for layer in (fused(activation=activation), reference(experts))
    )
    for part, want in expected.items():
        assert torch.equal(found[part].isnan(), want.isnan()), part
    assert expected["y"][3].isnan().all()


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", ["swiglu", "relu2"])
@pytest.mark.parametrize("shape", [SHAPES["usual"], SHAPES["by pointers"], (130, 16, 24, 2, 2)], ids=str)
def test_products_of_tf32_are_near_those_of_float32(shape: tuple[int, ...], name: str) -> None:
    """In the last shape experts have rows enough for a copy of their matrices, the other way round."""
    activation, experts = ACTIVATIONS[name]
    case = draw(shape, activation)
    expected = run(reference(experts), case, torch.float64)
    compare(run(fused(activation=activation, precision="tf32"), case, device=DEVICE), expected, 1e-2)  # of ten bits
    compare(run(fused(activation=activation), case, device=DEVICE), expected, TOLERANCE[torch.float32])


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("keep", [INPUTS, EVERYTHING, Keep(rows=True, preactivation=False)], ids=str)
def test_whatever_is_kept_gives_the_same(keep: Keep) -> None:
    case = draw(SHAPES["no whole tile of gate"], SWIGLU)
    found = run(fused(keep=keep), case, device=DEVICE)
    compare(found, run(reference(swiglu), case, torch.float64), TOLERANCE[torch.float32])


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_equals_the_loop(name: str) -> None:
    activation, experts = ACTIVATIONS[name]
    case = draw((9, 16, 24, 3, 2), activation)
    found = run(fused(activation=activation), case, device=DEVICE)
    compare(found, run(reference(experts), case, torch.float64), TOLERANCE[torch.float32])


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", ["usual", "by pointers"])
def test_float16_equals_the_loop(shape: str) -> None:
    case = draw(SHAPES[shape], SWIGLU, torch.float16)
    found = run(fused(), case, device=DEVICE)
    assert {value.dtype for name, value in found.items() if name != "routing.weights"} == {torch.float16}
    compare(found, run(reference(swiglu), case, torch.float64), TOLERANCE[torch.float16])


@runs_kernels
def test_it_compiles_whole_with_tiles_of_the_shipped_table(ship: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(SHAPES["usual"], SWIGLU)
    size = LayerSize(torch.float32, case[1].expert_indices.numel(), 2, 24, 32, gated=True, capability=9)
    ship(entry_of(size, LOW, origin="a test"))
    monkeypatch.setattr(sys.modules["moekit.experts.fused"], "capability_of", lambda device: 9)
    assert layer_tiles(size) == LOW
    compiled = torch.compile(fused_layer(), fullgraph=True, backend="aot_eager")
    found, expected = run(compiled, case, device=DEVICE), run(fused(), case, device=DEVICE)
    compare(found, {name: value.detach().cpu().double() for name, value in expected.items()}, 1e-6)


@runs_kernels
@pytest.mark.usefixtures("poison")
def test_expert_choice_equals_the_loop() -> None:
    x, _, params = draw((20, 16, 24, 4, 1), SWIGLU)
    routing = expert_choice(torch.randn(20, 4), capacity_factor=1.5)
    assert routing.expert_indices.ndim == 3
    case = x, routing, params
    compare(run(fused(), case, device=DEVICE), run(reference(swiglu), case, torch.float64), 2e-6)


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("keep", [PREACTIVATION, INPUTS], ids=str)
def test_any_list_of_assignments_equals_the_loop(keep: Keep) -> None:
    x, _, params = draw((9, 21, 24, 4, 1), SWIGLU)
    tokens = torch.randint(7, (30,))  # two tokens have no assignment
    tokens[10:20] = 3  # and one has many
    experts, weights = torch.randint(-1, 4, (30,)), torch.rand(30)
    case = x, Routing(tokens, experts, weights.masked_fill(experts < 0, 0.0), 9, 4, 30), params
    found = run(fused(keep=keep), case, device=DEVICE)
    compare(found, run(reference(swiglu), case, torch.float64), 2e-6)
    assert (found["y"][7:] == 0).all()


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("choices", [True, False], ids=["of tokens", "a list"])
@pytest.mark.parametrize("real", [0, 1, 7, 60])
def test_assignments_that_the_host_knows_not_to_exist_take_no_memory(real: int, choices: bool) -> None:
    """As behind an exchange, where most choices are other ranks'."""
    x, routing, params = draw((20, 16, 24, 4, 3), SWIGLU)
    experts = torch.full_like(routing.expert_indices, -1)
    there = torch.randperm(60)[:real]
    experts.view(-1)[there] = routing.expert_indices.flatten()[there].clamp_min(0)
    routing = routing._replace(expert_indices=experts)
    if not choices:
        routing = Routing(*(part.flatten() for part in routing[:3]), *routing[3:])
    expected = run(reference(swiglu), (x, routing, params), torch.float64)
    tight = routing._replace(most=real)
    compare(run(reference(swiglu), (x, tight, params), torch.float64), expected, 1e-12)
    for keep in (PREACTIVATION, INPUTS):
        compare(run(fused(keep=keep), (x, tight, params), device=DEVICE), expected, TOLERANCE[torch.float32])
    rows = []
    for given in (routing, tight):
        on = Routing(*(part.to(DEVICE) for part in given[:3]), *given[3:])
        with Calls() as seen:
            fused(keep=EVERYTHING)(x.to(DEVICE), on, type(params)(*(w.to(DEVICE).requires_grad_() for w in params)))
        [args] = [args for function, args in seen.calls if function.name() == "moekit::fused_experts"]
        rows.append(args[2][1].shape[0])  # of the plan
    least = max(real, 1)
    assert rows[1] - least <= 5 * LOW.grad_up.k  # rows of nobody, in each of four groups and behind them
    assert rows[0] >= 60


@runs_kernels
@pytest.mark.usefixtures("poison")
def test_an_empty_list_of_assignments_gives_zero() -> None:
    x, _, params = draw((3, 16, 24, 4, 1), SWIGLU)
    for size, missing in ((0, 0), (5, -1)):
        none = torch.full((size,), missing)
        case = x, Routing(none.clamp_min(0), none, torch.ones(size), 3, 4, size), params
        assert all((value == 0).all() for value in run(fused(), case, device=DEVICE).values())


@runs_kernels
@pytest.mark.usefixtures("poison")
def test_a_group_s_rows_of_nobody_are_zero_and_those_past_all_groups_are_not_written() -> None:
    from moekit.experts.kernels._fused_triton import Plan, dispatched
    from moekit.experts.kernels._lists_triton import TokenLists
    from moekit.experts.kernels._tiles_triton import Schedule

    x, tokens = torch.randn(3, 21, device=DEVICE), torch.tensor([2, 0, 1], device=DEVICE)
    assignments = torch.tensor([2, -1, 0, 1, -1, -1], device=DEVICE)
    firsts_and_sizes = torch.tensor([0, 2, 2, 2, 0, 3], dtype=torch.int32, device=DEVICE)
    schedule = Schedule(firsts_and_sizes, 3)
    expected = x[tokens[assignments]] * (assignments >= 0)[:, None]
    by_token = torch.tensor([[3], [0], [2]], device=DEVICE)  # the rows of the tokens, each of which has one
    lists = TokenLists(torch.tensor([1, 2, 0], device=DEVICE), torch.arange(4, device=DEVICE))
    rows = torch.tensor([2, 3, 0], device=DEVICE)
    for plan in (Plan(by_token, assignments, schedule), Plan(rows, assignments, schedule, lists)):
        found = dispatched(x, plan)
        assert torch.equal(found[:5], expected[:5])
        assert found[5].isnan().all()


@runs_kernels
def test_rows_of_a_token_are_added_in_their_order() -> None:
    from moekit.experts._fused_plan import _lists_of_tokens
    from moekit.experts.kernels._lists_triton import TokenLists, summed

    tokens, experts = torch.tensor([1, 0, 1, 1, 0, 1]), torch.tensor([0, 0, 1, -1, 0, 0])
    lists = TokenLists(*_lists_of_tokens(experts, tokens, 3))
    assert lists.order[:5].tolist() == [1, 4, 0, 2, 5]
    assert lists.starts.tolist() == [0, 2, 5, 5]
    values = torch.tensor([1.0, 1e8, 3.0, torch.nan, 4.0, -1e8]).unsqueeze(1)  # 1 + 1e8 forgets the 1
    lists = TokenLists(*(each.to(DEVICE) for each in lists))
    rows = torch.tensor([0, 2, 1, -1, 4, 5], device=DEVICE)
    found = summed(values.to(DEVICE), rows, lists, weights=None)
    assert found.flatten().tolist() == [7.0, 0.0, 0.0]


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("activation", [SWIGLU, RELU2])
def test_no_tokens_give_gradients_of_zero(activation: Activation) -> None:
    found = run(fused(activation=activation), draw((0, 16, 24, 3, 2), activation), device=DEVICE)
    assert found["y"].shape == (0, 16)
    assert all((found[name] == 0).all() for name in found)


@runs_kernels
@pytest.mark.usefixtures("poison")
def test_a_layer_without_any_assignment_gives_zero() -> None:
    x, routing, params = draw(SHAPES["usual"], SWIGLU)
    case = x, routing._replace(expert_indices=torch.full_like(routing.expert_indices, -1)), params
    found = run(fused(), case, device=DEVICE)
    assert all((found[name] == 0).all() for name in found)


@runs_kernels
def test_what_is_kept_is_what_was_asked_for() -> None:
    case = draw(SHAPES["usual"], SWIGLU)
    kept = {keep: held(fused(keep=keep), case) for keep in (INPUTS, PREACTIVATION, EVERYTHING)}
    rows = 80  # 19 * 2 assignments and 15 more for each of 2 experts, in whole sixteens
    assert kept[PREACTIVATION] - kept[INPUTS] == rows * 2 * 32
    assert kept[EVERYTHING] - kept[PREACTIVATION] == rows * 24


def held(layer: ExpertLayer, case: tuple[Any, ...]) -> int:
    """Count the floating-point numbers that autograd saves."""
    sizes: list[int] = []
    count = lambda t: (sizes.append(t.numel() if t.is_floating_point() else 0), t)[1]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        run(layer, case, device=DEVICE)
    return sum(sizes)


@runs_kernels
def test_autocast_computes_in_its_dtype() -> None:
    x, routing, params = draw(SHAPES["usual"], SWIGLU)
    with torch.autocast(DEVICE, dtype=torch.float16):
        found = run(fused(), (x, routing, params), device=DEVICE)
    assert found["y"].dtype == torch.float16
    assert found["x"].dtype == found["down"].dtype == torch.float32
    compare(found, run(reference(swiglu), (x, routing, params), torch.float64), 2e-2)


@runs_kernels
def test_it_compiles_whole() -> None:
    case = draw(SHAPES["usual"], SWIGLU)
    compiled = torch.compile(fused(), fullgraph=True, backend="aot_eager")
    found, expected = run(compiled, case, device=DEVICE), run(fused(), case, device=DEVICE)
    compare(found, {name: value.detach().cpu().double() for name, value in expected.items()}, 1e-6)


@runs_kernels
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_it_compiles_whole_without_gradients(name: str) -> None:
    torch.compiler.reset()
    x, routing, params = draw(SHAPES["usual"], ACTIVATIONS[name][0])
    layer = fused(activation=ACTIVATIONS[name][0])
    x, params = x.to(DEVICE), type(params)(*(p.to(DEVICE) for p in params))
    routing = routing._replace(**{name: getattr(routing, name).to(DEVICE) for name in routing._fields[:3]})
    with torch.no_grad():  # Dynamo of torch 2.11 counts arguments there
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, routing, params)
        torch.testing.assert_close(found, layer(x, routing, params))


@runs_kernels
@pytest.mark.parametrize(
    ("name", "keep", "turned"),
    [("swiglu", EVERYTHING, False), ("swiglu", INPUTS, True), ("relu2", EVERYTHING, True), ("relu2", INPUTS, False)],
    ids=str,
)
def test_the_operators_are_well_formed(name: str, keep: Keep, turned: bool) -> None:
    x, routing, params = draw(SHAPES["usual"], ACTIVATIONS[name][0])
    if turned:  # (K, T) in memory
        parts = {part: getattr(routing, part).T.contiguous().T for part in ("expert_indices", "weights")}
        routing = routing._replace(**parts)
    case = x, routing, params
    with Calls() as seen:
        run(fused(activation=ACTIVATIONS[name][0], keep=keep), case, device=DEVICE)
    assert seen.own() == ["fused_plan", "fused_experts", "fused_experts_backward"]
    for function, args in seen.calls:
        if function.namespace == "moekit":
            torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor"))


@runs_kernels
def test_no_operator_is_dispatched_where_nobody_looks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    call, called = torch._ops.OpOverload.__call__, []

    def record(self: Any, *args: Any, **options: Any) -> Any:
        called.append(self.name())
        return call(self, *args, **options)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", record)
    case = draw(SHAPES["usual"], SWIGLU)
    alone = run(fused(), case, device=DEVICE)
    assert not [name for name in called if name.startswith("moekit::")]
    with Calls():
        looked_at = run(fused(), case, device=DEVICE)
    assert {name for name in called if name.startswith("moekit::")} == {
        "moekit::fused_plan", "moekit::fused_experts", "moekit::fused_experts_backward",
    }  # fmt: skip
    assert all(torch.equal(alone[name], looked_at[name]) for name in alone)


@runs_kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_where_gradients_are_off(mode: Any) -> None:
    x, routing, params = draw(SHAPES["usual"], SWIGLU)
    x, params = x.to(DEVICE), type(params)(*(w.to(DEVICE).requires_grad_() for w in params))
    routing, layer = Routing(*(part.to(DEVICE) for part in routing[:3]), *routing[3:]), fused(keep=EVERYTHING)
    with Calls() as on:
        expected = layer(x, routing, params)
    with mode(), Calls() as off:
        y = layer(x, routing, params)
    for calls, kept in ((on, [True, True]), (off, [False, False])):
        [args] = [args for function, args in calls.calls if function.name() == "moekit::fused_experts"]
        assert list(args[-2:]) == kept
    assert torch.equal(y, expected)
    assert not y.requires_grad


def test_errors_say_what_was_given_and_expected() -> None:
    x, routing, params = draw((5, 4, 8, 3, 2), SWIGLU)
    layer = fused()
    with pytest.raises(ValueError, match=r"are MlpParams, and the activation .*silu.*; expected GatedParams"):
        layer(x, routing, init_mlp(3, 4, 8))
    with pytest.raises(
        ValueError, match=r"x \(5, 4\) and parameters .* do not fit a routing of 5 tokens and 3 experts"
    ):
        layer(x, routing, params._replace(down=params.up))
    with pytest.raises(ValueError, match=r"x \(1, 5, 4\) and parameters .*\]\. Flatten the tokens\.$"):
        layer(x[None], routing, params)
    with pytest.raises(
        ValueError, match=r"float64.*expected one dtype of torch.float32, torch.bfloat16, torch.float16 for all"
    ):
        layer(x.double(), routing, params)
    for short in ({"weights": routing.weights[:, :1]}, {"token_indices": routing.token_indices[:, :1]}):
        with pytest.raises(ValueError, match=r"the routing has weights .*\(5, 1\).*; expected one shape\. Give every"):
            layer(x, routing._replace(**short), params)
    for wrong in (Activation("my gelu", gated=True), "swiglu"):
        with pytest.raises(ValueError, match=r"activation = .*'(my gelu|swiglu)'.*; expected an .* function of silu, "):
            fused_layer(activation=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep = 'inputs'; expected EVERYTHING, PREACTIVATION, INPUTS or another Keep"):
        fused_layer(keep="inputs")  # type: ignore[arg-type]
    for wrong in ("tiles.json", LOW):
        with pytest.raises(ValueError, match=r"tiles = .*(json|Tile).*; expected .*from_table\(read_tiles\("):
            fused_layer(tiles=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision = 'fp8'; expected 'ieee' or 'tf32'"):
        fused(precision="fp8")
    with pytest.raises(ValueError, match=r"parameters \[.*\(32,\)\] do not fit .* down \(E, F, D\)\.$"):
        layer(x, routing, params._replace(down=params.down[0].flatten()))


@runs_kernels
@pytest.mark.skipif(DEVICE != "cpu", reason="is of Triton's interpreter")
def test_bfloat16_is_refused_where_the_interpreter_would_multiply_it() -> None:
    x, routing, params = draw(SHAPES["usual"], SWIGLU)
    message = r"fused_layer: .* torch\.bfloat16 on the CPU, .* multiplies bfloat16 wrongly; expected .*float16"
    with pytest.raises(ValueError, match=message):
        fused()(x.bfloat16(), routing, type(params)(*(w.bfloat16() for w in params)))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=message):
        fused()(x, routing, params)
    with torch.device("meta"):
        x, routing, params = draw(SHAPES["usual"], SWIGLU, torch.bfloat16)
        assert fused()(x, routing, params).dtype == torch.bfloat16


def test_tiles_that_do_not_fit_are_refused() -> None:
    unfit = LOW._replace(up=LOW.up._replace(m=64), grad_up=LOW.grad_up._replace(k=32))
    with pytest.raises(ValueError, match=r"m = \[32, 64\].*k = \[16, 32\].*Take the same m"):
        fused_layer(tiles=lambda size: unfit)(*draw(SHAPES["usual"], SWIGLU))


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("num_experts", "num_assignments", "align", "height"),
    [(5, 700, 16, 32), (3, 1, 16, 16), (40, 300, 64, 128), (1, 1000, 64, 64), (7, 90, 32, 32), (1000, 8, 64, 128)],
)
def test_a_plan_is_a_stable_sort_into_aligned_groups(
    num_experts: int, num_assignments: int, align: int, height: int
) -> None:
    from moekit.experts.kernels._plan_triton import make_plan

    experts = torch.randint(-1, num_experts, (num_assignments,), device=DEVICE)
    experts[::3] = min(2, num_experts - 1)
    rows, assignments, schedule = make_plan(experts, num_experts, height=height, align=align, most=experts.numel())
    lengths = [num_experts, num_experts, num_experts + 1]
    starts, sizes, firsts, owners = schedule.table.split([*lengths, len(schedule.table) - sum(lengths)])
    assert torch.equal(schedule.sizes, sizes)
    begin, tile = 0, 0
    for expert in range(num_experts):
        own = (experts == expert).nonzero().flatten()
        size = -(-len(own) // align) * align
        assert torch.equal(rows[own], begin + torch.arange(len(own), device=DEVICE))
        assert torch.equal(assignments[begin : begin + len(own)], own)
        assert (assignments[begin + len(own) : begin + size] == -1).all()
        assert [int(each[expert]) for each in (starts, sizes, firsts)] == [begin, size, tile]
        tiles = -(-size // height)
        assert (owners[tile : tile + tiles] == expert).all()
        begin, tile = begin + size, tile + tiles
    assert int(firsts[-1]) == tile <= len(owners) == schedule.most_tiles
    assert (rows[experts < 0] == -1).all()
    assert (assignments[begin:] == -1).all()


@runs_kernels
def test_tiles_are_chosen_by_the_size_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekit.experts.fused.capability_of", lambda device: 8)
    monkeypatch.setattr("moekit.experts.fused.is_narrow", lambda device: True)
    asked: list[LayerSize] = []
    choose = lambda size: (asked.append(size), LOW)[1]  # noqa: E731
    x, routing, params = draw((7, 20, 36, 2, 2), SWIGLU)
    routing = Routing(*(part.to(DEVICE) for part in routing[:3]), *routing[3:])
    for given in (params, pack_gated(params)):
        fused_layer(tiles=choose, precision="tf32")(x.to(DEVICE), routing, type(given)(*(p.to(DEVICE) for p in given)))
    gated = LayerSize(torch.float32, 14, 2, 20, 36, True, capability=8, narrow=True, precision="tf32")
    assert asked == [gated, gated]
    mlp = draw((7, 20, 36, 2, 2), RELU2)[2]
    fused_layer(tiles=choose, activation=RELU2)(x.to(DEVICE), routing, type(mlp)(*(p.to(DEVICE) for p in mlp)))
    assert asked[2] == gated._replace(gated=False, precision="ieee")


@runs_kernels
def test_a_gradient_of_gradients_by_the_routers_weights_is_refused() -> None:
    x, routing, params = draw((19, 24, 32, 2, 2), SWIGLU)
    x, params = x.to(DEVICE), type(params)(*(w.to(DEVICE) for w in params))
    routing = Routing(*(part.to(DEVICE) for part in routing[:3]), *routing[3:])
    weights = routing.weights.clone().requires_grad_()
    y = fused()(x, routing._replace(weights=weights), params).square().sum()
    [grad] = torch.autograd.grad(y, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_layer: its gradient has no gradient"):
        torch.autograd.grad(grad.square().sum(), weights)
    x.requires_grad_()
    y = fused()(x, routing, params)
    ones = torch.ones_like(y, requires_grad=True)
    [grad] = torch.autograd.grad(y, x, ones, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_layer: its gradient has no gradient"):
        torch.autograd.grad(grad.sum(), ones)
    y = fused()(x, routing._replace(weights=weights), params).sum()
    [grad] = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_layer: its gradient has no gradient"):
        torch.autograd.grad(grad.sum(), weights)


@pytest.mark.parametrize(("kibibytes", "most"), [(64, 16_383), (99, 16_383), (163, 32_767), (227, 32_767)])
def test_more_experts_are_refused_than_shared_memory_has_counts_for(
    kibibytes: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(shared_memory_per_block_optin=1024 * kibibytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(_fused_plan, "_most_experts", _fused_plan._most_experts.__wrapped__)  # remember no false card
    device = torch.device("cuda", 0)
    check_num_experts(most, device)
    message = (
        rf"fused_layer: E = {most + 1} experts; expected at most {most} on cuda:0, .* loop, which takes any number"
    )
    with pytest.raises(ValueError, match=message):
        check_num_experts(most + 1, device)
    check_num_experts(2**20, torch.device("cpu"))  # the interpreter's memory is the host's


def test_a_plan_is_refused_before_a_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fused_plan, "_most_experts", lambda device: 2**14 - 1)
    x, routing, params = draw((5, 16, 16, 3, 2), SWIGLU)
    routing = routing._replace(num_experts=2**14)
    params = type(params)(*(w[:1].expand(2**14, -1, -1) for w in params))
    with pytest.raises(ValueError, match="fused_layer: E = 16384 experts; expected at most 16383 on cpu"):
        fused_layer()(x, routing, params)
