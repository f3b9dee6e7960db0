"""The fused layer on parameters in any order of memory, packed, and with biases, against the loop in float64."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fused_cases import TOLERANCE, compare, draw, fused, reference, run
from interpreted import DEVICE, Calls, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor

from moekit.experts import (
    GatedParams,
    MlpParams,
    clamped_swiglu,
    init_biased_gated,
    init_gated,
    init_mlp,
    relu2,
    swiglu,
)
from moekit.experts.activations import CLAMPED_SWIGLU, GELU_MLP, RELU2, SWIGLU, Activation
from moekit.experts.biased import BiasedGatedParams, BiasedMlpParams, biased_gated, biased_mlp, init_biased_mlp
from moekit.experts.fused import fused_layer
from moekit.experts.keep import INPUTS, PREACTIVATION, Keep
from moekit.experts.packed import PackedGatedParams, pack_gated, unpack_gated
from moekit.types import ExpertLayer, Routing

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"  # rows that nobody reads are garbage
)

# T, D, F, E, K: for descriptors; for pointers alone; descriptors in one order of memory alone; a width of one
SHAPES = {
    "usual": (7, 20, 36, 2, 2),
    "by pointers": (5, 19, 23, 2, 2),
    "dim by descriptors": (5, 20, 22, 2, 2),
    "hidden by descriptors": (5, 22, 20, 2, 2),
    "one dim": (5, 1, 20, 2, 2),
    "one hidden": (5, 20, 1, 2, 2),
}


@pytest.mark.slow
@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def turned(w: Tensor) -> Tensor:
    """Return the same matrices, stored the other way."""
    return w.transpose(1, 2).contiguous().transpose(1, 2)


class Interleaved(NamedTuple):
    gate_up: Tensor
    down: Tensor


class Form(NamedTuple):
    """How parameters are stored, how the layer gets them, and how the loop does."""

    leaves: Callable[[GatedParams], Any]
    params: Callable[[Any], Any]
    plain: Callable[[Any], GatedParams]


def same(leaves: Any) -> Any:
    return leaves


def interleaved(params: GatedParams) -> Interleaved:
    return Interleaved(torch.stack([params.gate, params.up], -1).flatten(-2), params.down)


def every_other(leaves: Interleaved) -> GatedParams:
    return GatedParams(leaves.gate_up[..., 0::2], leaves.gate_up[..., 1::2], leaves.down)


def gate_in_a_wider_tensor(params: GatedParams) -> GatedParams:
    return params._replace(gate=torch.cat([params.gate, params.up], 2))


def without_the_rest(leaves: GatedParams) -> GatedParams:
    return leaves._replace(gate=leaves.gate[..., : leaves.up.shape[2]])


FORMS = {
    "transposed": Form(lambda p: GatedParams(*map(turned, p)), same, same),
    "gate and up transposed": Form(lambda p: GatedParams(turned(p.gate), turned(p.up), p.down), same, same),
    "down transposed": Form(lambda p: p._replace(down=turned(p.down)), same, same),
    "gate alone transposed": Form(lambda p: p._replace(gate=turned(p.gate)), same, same),
    "interleaved views": Form(interleaved, every_other, every_other),
    "gate in a wider tensor": Form(gate_in_a_wider_tensor, without_the_rest, without_the_rest),
    "views of packed": Form(pack_gated, unpack_gated, unpack_gated),
    "packed": Form(pack_gated, same, unpack_gated),
    "packed, turned": Form(lambda p: PackedGatedParams(*map(turned, pack_gated(p))), same, unpack_gated),
}
EXACT = ["transposed", "packed", "packed, turned"]  # nothing is copied


def of(layer: ExpertLayer, params: Callable[[Any], Any]) -> ExpertLayer:
    return lambda x, routing, leaves: layer(x, routing, params(leaves))


def check_form(form: Form, shape: str, dtype: torch.dtype = torch.float32, keep: Keep = PREACTIVATION) -> None:
    x, routing, params = draw(SHAPES[shape], SWIGLU, dtype)
    case = x, routing, form.leaves(params)
    found = run(of(fused(keep=keep), form.params), case, device=DEVICE)
    compare(found, run(of(reference(swiglu), form.plain), case, torch.float64), TOLERANCE[dtype])


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("form", FORMS)
def test_any_order_of_memory_equals_the_loop(form: str) -> None:
    check_form(FORMS[form], "usual")


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("form", "shape"),
    [
        *(("transposed", shape) for shape in ("by pointers", "dim by descriptors", "hidden by descriptors", "one dim")),
        *(("packed", shape) for shape in ("by pointers", "dim by descriptors", "one hidden")),
    ],
)
def test_other_widths_equal_the_loop(form: str, shape: str) -> None:
    check_form(FORMS[form], shape)


@runs_kernels
@pytest.mark.usefixtures("poison")
def test_gate_and_up_of_different_strides_by_pointers() -> None:
    check_form(FORMS["gate in a wider tensor"], "by pointers")


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("form", ["transposed", "packed"])
def test_float16_and_nothing_kept(form: str) -> None:
    check_form(FORMS[form], "usual", torch.float16, INPUTS)


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", ["by pointers", "dim by descriptors"])
def test_two_matrices_in_the_other_order(shape: str) -> None:
    x, routing, params = draw(SHAPES[shape], RELU2)
    case = x, routing, MlpParams(*map(turned, params))
    found = run(fused(activation=RELU2), case, device=DEVICE)
    compare(found, run(reference(relu2), case, torch.float64), 2e-6)


@runs_kernels
@pytest.mark.parametrize("form", EXACT)
def test_gradients_lie_as_their_parameters_and_nothing_is_copied(form: str) -> None:
    x, routing, params = draw(SHAPES["usual"], SWIGLU)
    leaves = FORMS[form].leaves(params)
    leaves = type(leaves)(*(p.to(DEVICE).requires_grad_() for p in leaves))
    routing = routing._replace(
        **{name: getattr(routing, name).to(DEVICE) for name in ("expert_indices", "token_indices", "weights")}
    )
    with Calls() as calls:
        fused()(x.to(DEVICE), routing, leaves).sum().backward()
    assert [name for name in calls.names if name.split(".")[0] in COPIES] == []
    for name, leaf in zip(leaves._fields, leaves, strict=True):
        assert leaf.grad.stride() == leaf.stride(), name


COPIES = {
    "aten::clone",
    "aten::copy_",
    "aten::contiguous",
    "aten::slice_backward",
    "aten::cat",
    "aten::new_empty_strided",
}


@runs_kernels
@pytest.mark.parametrize("form", [*EXACT, "down transposed", "views of packed"])
def test_kernels_read_parameters_where_they_are(form: str) -> None:
    leaves = FORMS[form].leaves(draw(SHAPES["usual"], SWIGLU)[2])
    expected = [p.data_ptr() for p in FORMS[form].plain(leaves)]
    assert addresses(FORMS[form].params(leaves)) == expected


def addresses(params: Any) -> list[int]:
    """Say where the kernels read gate, up and down."""
    from moekit.experts._fused_operators import _experts
    from moekit.experts.fused import _in_memory

    experts = _experts(*_in_memory(params))
    return [w.data_ptr() for w in (*experts.ups, experts.down)]


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


CLAMPED = Activation("clamped_swiglu", gated=True, alpha=1.3, limit=0.5)
BIASED = {
    "swiglu": (SWIGLU, biased_gated),
    "clamped": (CLAMPED, partial(clamped_swiglu, alpha=1.3, limit=0.5)),
    "gelu": (GELU_MLP, biased_mlp),
    "relu2": (RELU2, partial(biased_mlp, activation=squared_relu)),
}
BIASED_SHAPES = SHAPES | {
    "few rows": (3, 16, 16, 5, 1),
    "one expert": (40, 16, 8, 1, 1),
    "no tokens": (0, 16, 24, 3, 2),
}


def draw_biased(shape: str, activation: Activation, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    x, routing, params = draw(BIASED_SHAPES[shape], activation, dtype)
    num_experts, dim, hidden = params.up.shape
    kind = BiasedGatedParams if activation.gated else BiasedMlpParams
    widths = [hidden] * (len(params) - 1) + [dim]
    return x, routing, kind(*params, *(torch.randn(num_experts, 1, width).to(dtype) for width in widths))


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", BIASED)
def test_biased_experts_equal_the_loop(name: str) -> None:
    activation, experts = BIASED[name]
    case = draw_biased("usual", activation)
    found = run(fused(activation=activation), case, device=DEVICE)
    compare(found, run(reference(experts), case, torch.float64), TOLERANCE[torch.float32])


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("name", "shape"),
    [("clamped", "by pointers"), ("clamped", "few rows"), ("relu2", "one expert"), ("relu2", "one dim")],
)
def test_biases_at_awkward_sizes(name: str, shape: str) -> None:
    activation, experts = BIASED[name]
    case = draw_biased(shape, activation)
    found = run(fused(activation=activation, keep=INPUTS), case, device=DEVICE)
    compare(found, run(reference(experts), case, torch.float64), 2 * TOLERANCE[torch.float32])  # sums cancel


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("keep", [PREACTIVATION, INPUTS], ids=str)
@pytest.mark.parametrize("kind", ["plain", "packed", "biased"])
def test_gradients_of_frozen_experts_are_not_computed(kind: str, keep: Keep) -> None:
    x, routing, params = draw_biased("usual", SWIGLU) if kind == "biased" else draw(SHAPES["usual"], SWIGLU)
    params = pack_gated(params) if kind == "packed" else params
    layer = fused(keep=keep)
    expected = run(layer, (x, routing, params), device=DEVICE)
    x, weights = (t.to(DEVICE, copy=True).requires_grad_() for t in (x, routing.weights))
    params = type(params)(*(p.to(DEVICE) for p in params))
    indices = (t.to(DEVICE) for t in (routing.token_indices, routing.expert_indices))
    routing = Routing(*indices, weights, *routing[3:])
    layers = [layer, torch.compile(layer, fullgraph=True, backend="aot_eager")]
    for each in layers if kind == "plain" else layers[:1]:
        y = each(x, routing, params)
        with Calls() as calls:
            grads = torch.autograd.grad(y, (x, weights), torch.linspace(-1, 1, y.numel()).reshape(y.shape).sin().to(y))
        for name, found in zip(("x", "routing.weights"), grads, strict=True):
            assert torch.equal(found, expected[name]), name
        [args] = [args for function, args in calls.calls if function.name() == "moekit::fused_experts_backward"]
        torch.library.opcheck(
            torch.ops.moekit.fused_experts_backward.default, args, test_utils=("test_schema", "test_faketensor")
        )
        assert len(torch.ops.moekit.fused_experts_backward(*args)) == 2


@runs_kernels
@pytest.mark.usefixtures("poison")
def test_biases_in_float16_with_transposed_matrices() -> None:
    x, routing, params = draw_biased("usual", SWIGLU, torch.float16)
    case = x, routing, BiasedGatedParams(*map(turned, params[:3]), *params[3:])
    found = run(fused(), case, device=DEVICE)
    compare(found, run(reference(biased_gated), case, torch.float64), TOLERANCE[torch.float16])


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", ["clamped", "gelu"])
def test_no_tokens_give_biases_gradients_of_zero(name: str) -> None:
    activation, _ = BIASED[name]
    found = run(fused(activation=activation), draw_biased("no tokens", activation), device=DEVICE)
    assert all((value == 0).all() for value in found.values())


@runs_kernels
def test_a_clamp_passes_the_gradient_on_the_limit_and_none_past_it() -> None:
    x, routing, params = draw_biased("few rows", CLAMPED)
    gates, ups = (
        each.expand(5, 1, 16) for each in (torch.tensor([0.5, 0.75, -3.0, 0.25] * 4), torch.arange(-8, 8) / 8)
    )
    case = torch.zeros_like(x), routing, params._replace(gate_bias=gates, up_bias=ups)  # they are the pre-activations
    found = run(fused(activation=CLAMPED), case, device=DEVICE)
    compare(found, run(reference(BIASED["clamped"][1]), case, torch.float64), TOLERANCE[torch.float32])
    for name, passes in (("gate_bias", gates[0] <= 0.5), ("up_bias", ups[0].abs() <= 0.5)):
        assert torch.equal((found[name].cpu() != 0).any(0), passes), name


def test_the_clamped_activation_has_the_constants_of_gpt_oss() -> None:
    assert clamped_swiglu.__kwdefaults__ == {"alpha": CLAMPED_SWIGLU.alpha, "limit": CLAMPED_SWIGLU.limit}


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("weighted", [False, True])
def test_a_group_of_many_tiles_is_added_up(weighted: bool) -> None:
    from moekit.experts.kernels._biases_triton import Weighing, bias_gradient
    from moekit.experts.kernels._tiles_triton import make_schedule

    sizes, parts, width = torch.tensor([3, 0, 1100, 16], dtype=torch.int32), 2, 5
    used, owners = int(sizes.sum()), torch.arange(4).repeat_interleave(sizes)
    grads = torch.randn(used + 7, width if weighted else parts * width)
    grads[used:] = torch.nan
    assignments = torch.randperm(used + 7)  # of each row; one of padding inside a group is nobody's
    weights, bias, before = torch.rand(used + 7), torch.randn(4, 1, width), torch.randn(used + 7)
    products = before.to(DEVICE, copy=True)
    assignments[[2, 900]] = -1
    nobodys = assignments[:used] < 0
    if weighted:
        grads[:used][nobodys] = torch.nan
    weighing = Weighing(*(t.to(DEVICE) for t in (weights, bias)), products, assignments.to(DEVICE))
    weighing = weighing if weighted else None
    plan = make_schedule(sizes.to(DEVICE), used + 7, 16)
    found = bias_gradient(grads.to(DEVICE), plan, height=16, parts=1 if weighted else parts, weighing=weighing).cpu()
    rows = grads[:used].double()
    if weighted:
        rows = rows.masked_fill(nobodys[:, None], 0.0)
        inner = (rows * bias.double()[owners, 0]).sum(1)
        before.index_add_(0, assignments[:used][~nobodys], inner[~nobodys].float())
        rows = rows * weights[assignments[:used], None]
    wanted = torch.zeros(4, rows.shape[1]).double().index_add_(0, owners, rows)
    wanted = wanted.unflatten(1, (-1, width)).transpose(0, 1).unsqueeze(2)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products.cpu(), before, rtol=1e-5, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("form", ["packed", "biased"])
def test_it_compiles_whole(form: str) -> None:
    case = draw_biased("usual", CLAMPED) if form == "biased" else draw(SHAPES["usual"], SWIGLU)
    case = case if form == "biased" else (*case[:2], pack_gated(case[2]))
    layer = fused(activation=CLAMPED if form == "biased" else SWIGLU)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, expected = run(compiled, case, device=DEVICE), run(layer, case, device=DEVICE)
    compare(found, {name: value.detach().cpu().double() for name, value in expected.items()}, 1e-6)


@runs_kernels
def test_autocast_reads_packed_and_biased_parameters() -> None:
    x, routing, params = draw(SHAPES["usual"], SWIGLU)
    for case, layer, plain in (
        ((x, routing, pack_gated(params)), fused(), of(reference(swiglu), unpack_gated)),
        (draw_biased("usual", SWIGLU), fused(), reference(biased_gated)),
    ):
        with torch.autocast(DEVICE, dtype=torch.float16):
            found = run(layer, case, device=DEVICE)
        assert found["down"].dtype == torch.float32
        compare(found, run(plain, case, torch.float64), 2e-2)


@runs_kernels
@pytest.mark.parametrize(("part", "described"), [(6, False), (8, True)])
@pytest.mark.parametrize("tall", [False, True])
def test_a_part_is_described_only_if_it_begins_at_whole_16_bytes(
    part: int, described: bool, tall: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moekit.experts.kernels import _gemms_triton
    from moekit.experts.kernels._tiles_triton import make_schedule
    from moekit.experts.tiles import Tile

    chosen: list[bool] = []
    spied = _gemms_triton.matrix
    monkeypatch.setattr(_gemms_triton, "matrix", lambda t, block, tma: (chosen.append(tma), spied(t, block, tma))[1])
    _gemms_triton._rows_launch.cache_clear()
    _gemms_triton._weight_launch.cache_clear()
    plan = make_schedule(torch.tensor([3, 2], dtype=torch.int32, device=DEVICE), 5, 16)
    tile = Tile(m=16, n=16, k=16, warps=4, stages=2)
    wide, narrow = torch.ones(5, 2 * part, device=DEVICE), torch.ones(5, 12, device=DEVICE)
    left, right = (wide, narrow) if tall else (narrow, wide)
    _gemms_triton.grouped_weight(left, plan, right, parts=2, tall=tall, tile=tile)
    w = torch.ones(2, 12, part, device=DEVICE).transpose(1, 2)  # whose own rows are of whole 16 bytes
    _gemms_triton.grouped_rows(wide, plan, (w, w), tile=tile)
    assert set(chosen) == {described}


def test_packing_and_unpacking_undo_each_other() -> None:
    params = draw(SHAPES["usual"], SWIGLU)[2]
    packed = pack_gated(params)
    assert all(p.is_contiguous() for p in packed)
    views = unpack_gated(packed)
    assert all(torch.equal(one, other) for one, other in zip(views, params, strict=True))
    assert views.gate.data_ptr() == packed.gate_up.data_ptr()
    torch.testing.assert_close(packed.gate_up[1, 36:], params.up[1].T)


def test_errors_say_what_was_given_and_expected() -> None:
    x, routing, params = draw((5, 4, 8, 3, 2), SWIGLU)
    packed = pack_gated(params)
    with pytest.raises(
        ValueError, match=r"BiasedMlpParams.*expected GatedParams, BiasedGatedParams or PackedGatedParams"
    ):
        fused()(x, routing, init_biased_mlp(3, 4, 8))
    with pytest.raises(ValueError, match=r"are PackedGatedParams.*expected MlpParams or BiasedMlpParams"):
        fused(activation=RELU2)(x, routing, packed)
    with pytest.raises(
        ValueError, match=r"\(3, 4, 16\).*gate_up \(E, 2F, D\), down \(E, D, F\): .*\(3, 16, 4\).*rows of gate, then"
    ):
        fused()(x, routing, packed._replace(gate_up=packed.gate_up.transpose(1, 2)))
    biased = init_biased_gated(3, 4, 8)
    with pytest.raises(ValueError, match=r"\(3, 8\).*gate_bias \(E, 1, F\).*down_bias \(E, 1, D\)"):
        fused()(x, routing, biased._replace(gate_bias=biased.gate_bias.squeeze(1)))
    assert fused_layer(activation=CLAMPED_SWIGLU).keywords["activation"].limit == 7.0


@pytest.mark.parametrize(
    ("activation", "init", "stored"),
    [
        (SWIGLU, init_gated, "GatedParams are stored (E, in, out)"),
        (SWIGLU, init_biased_gated, "BiasedGatedParams are stored (E, in, out)"),
        (SWIGLU, lambda *sizes: pack_gated(init_gated(*sizes)), "PackedGatedParams are stored (E, out, in)"),
        (RELU2, init_mlp, "MlpParams are stored (E, in, out)"),
        (RELU2, init_biased_mlp, "BiasedMlpParams are stored (E, in, out)"),
    ],
    ids=["gated", "biased gated", "packed", "mlp", "biased mlp"],
)
def test_matrices_of_the_other_order_are_refused_with_a_word_on_how_to_turn_them(
    activation: Activation, init: Callable[..., Any], stored: str
) -> None:
    (x, routing, _), params = draw((5, 4, 8, 3, 2), activation), init(3, 4, 8)
    others = params._make(w if "bias" in name else w.mT for name, w in params._asdict().items())
    shapes = [tuple(w.shape) for w in params]
    message = f"{shapes}. Matrices of {stored}, and these fit the other way round: pass w.mT of each, a view"
    with pytest.raises(ValueError, match=re.escape(message)):
        fused(activation=activation)(x, routing, others)
    with pytest.raises(ValueError, match=r"do not fit a routing(?!.*other way round)"):
        fused(activation=activation)(x, routing, others._replace(down=params.down))


@runs_kernels
def test_a_parameter_that_alone_wants_a_gradient_gets_it() -> None:
    x, routing, params = draw_biased("usual", SWIGLU)
    expected = run(fused(), (x, routing, params), device=DEVICE)
    routing = Routing(*(part.to(DEVICE) for part in routing[:3]), *routing[3:])
    for alone in params._fields:
        leaves = type(params)(*(p.to(DEVICE, copy=True) for p in params))
        leaf = getattr(leaves, alone).requires_grad_()
        y = fused()(x.to(DEVICE), routing, leaves)
        [found] = torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel()).reshape(y.shape).sin().to(y))
        assert torch.equal(found, expected[alone]), alone


def spread(t: Tensor) -> Tensor:
    """Return the same numbers, each with a NaN behind it in memory."""
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


@runs_kernels
def test_tokens_weights_and_biases_of_any_strides_equal_the_loop() -> None:
    x, routing, params = draw_biased("usual", SWIGLU)
    expected = run(reference(biased_gated), (x, routing, params), torch.float64)

    def layer(x: Tensor, routing: Routing, params: BiasedGatedParams) -> Tensor:
        biases = map(spread, params[3:])
        return spread(
            fused()(spread(x), routing._replace(weights=spread(routing.weights)), type(params)(*params[:3], *biases))
        )

    compare(run(layer, (x, routing, params), device=DEVICE), expected, TOLERANCE[torch.float32])


@runs_kernels
def test_a_matrix_that_all_experts_share_is_copied_for_each() -> None:
    from moekit.experts._fused_operators import _readable

    shared = torch.randn(1, 4, 6).expand(3, 4, 6)
    assert _readable(shared).is_contiguous()
    assert torch.equal(_readable(shared), shared)


def test_matrices_whose_rows_are_too_far_apart_for_32_bits_are_copied() -> None:
    from moekit.experts._fused_operators import _readable

    with torch.device("meta"):
        near, far = (torch.empty_strided((4, 9, 6), (6, step, 1)) for step in (2**28 - 1, 2**28))
    assert _readable(near) is near
    assert _readable(far).is_contiguous()
