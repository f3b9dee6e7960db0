from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moekit.experts import GatedParams, MlpParams, init_gated, init_mlp, pack_gated
from moekit.parallel import Part
from moekit.recipes import MoE, deepseek_moe, mixtral
from moekit.recipes.expert_parameters import RoutedExperts, draw_experts, hidden_axes, hidden_size

E, D, F = 12, 6, 24
INITS = {"gated": init_gated, "mlp": init_mlp}
HIDDEN = {"gate": 2, "up": 2, "down": 1}
every_init = pytest.mark.parametrize("init", INITS.values(), ids=INITS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cut(tensor: Tensor, axis: int, part: Part) -> Tensor:
    """Slice a parameter of all experts as a part of them says."""
    experts, width = E // part.blocks, F // part.slices
    block = tensor[part.block * experts : (part.block + 1) * experts]
    return block.narrow(axis, part.hidden * width, width)


@every_init
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("slices", [1, 2, 3, 8, 24])
def test_any_part_is_the_slice_of_the_whole(init, blocks, slices):
    whole = draw_experts(init, E, D, F, generator=seeded())._asdict()
    for block in {0, blocks // 2, blocks - 1}:
        for hidden in {0, slices // 2, slices - 1}:
            part = Part(block, blocks, hidden, slices)
            drawn = draw_experts(init, E, D, F, part=part, generator=seeded())
            for name, tensor in drawn._asdict().items():
                assert torch.equal(tensor, cut(whole[name], HIDDEN[name], part)), (name, part)


@pytest.mark.parametrize(("init", "kind"), [(init_gated, GatedParams), (init_mlp, MlpParams)])
def test_shapes_and_types_are_those_of_the_init(init, kind):
    drawn = draw_experts(init, E, D, F, part=Part(1, 3, 1, 2), generator=seeded())
    assert type(drawn) is kind
    assert {name: tuple(tensor.shape) for name, tensor in drawn._asdict().items()} == {
        name: (4, D, F // 2) if HIDDEN[name] == 2 else (4, F // 2, D) for name in kind._fields
    }
    assert all(tensor.is_contiguous() for tensor in drawn)


@every_init
def test_the_distribution_is_that_of_the_init(init):
    drawn = draw_experts(init, 64, 16, 64, generator=seeded())
    for tensor, theirs in zip(drawn, init(64, 16, 64, generator=seeded(1)), strict=True):
        assert tensor.shape == theirs.shape
        assert tensor.std() == pytest.approx(theirs.std().item(), rel=0.02)
        assert abs(tensor.mean()) < 0.01
        assert tensor.flatten(1).unique(dim=0).shape[0] == 64  # no two experts alike


def test_the_standard_deviation_is_of_the_whole_expert_and_not_of_the_slice():
    """1 / sqrt(inputs): the inputs of ``down`` are all hidden units."""
    down = draw_experts(init_mlp, 8, 16, 256, part=Part(0, 1, 1, 4), generator=seeded()).down
    assert down.shape == (8, 64, 16)
    assert down.std() == pytest.approx(256**-0.5, rel=0.05)


@every_init
def test_seeds_choose_the_values(init):
    first, again, other = (draw_experts(init, E, D, F, generator=seeded(seed)) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert (a != c).float().mean() > 0.99


def test_one_number_of_the_generator_is_used_whichever_the_part():
    """What is drawn next is the same on all ranks; two layers of one generator differ."""
    states, second = [], []
    for part in (Part(), Part(3, 12), Part(0, 2, 1, 2)):
        generator = seeded(7)
        first = draw_experts(init_gated, E, D, F, part=part, generator=generator)
        states.append(generator.get_state())
        second.append(torch.rand(1, generator=generator))
        assert not torch.equal(first.up, draw_experts(init_gated, E, D, F, part=part, generator=generator).up)
    assert all(torch.equal(state, states[0]) for state in states)
    assert second[0] == second[1] == second[2]


def test_torch_s_own_generator_is_the_default():
    torch.default_generator.manual_seed(5)
    first = draw_experts(init_mlp, 2, D, F)
    torch.default_generator.manual_seed(5)
    assert torch.equal(first.up, draw_experts(init_mlp, 2, D, F).up)
    assert not torch.equal(first.up, draw_experts(init_mlp, 2, D, F).up)


def test_experts_do_not_depend_on_how_many_there_are():
    few, many = (draw_experts(init_gated, number, D, F, generator=seeded()) for number in (3, 9))
    assert torch.equal(few.up, many.up[:3])


@every_init
def test_the_meta_device_draws_nothing(init):
    part = Part(1, 3, 1, 2)
    drawn = draw_experts(init, E, D, F, part=part, device="meta")
    real = draw_experts(init, E, D, F, part=part)
    assert all(tensor.is_meta for tensor in drawn)
    assert [tensor.shape for tensor in drawn] == [tensor.shape for tensor in real]
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in draw_experts(init, E, D, F))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_kept(dtype):
    whole = draw_experts(init_gated, E, D, F, dtype=dtype, generator=seeded())
    assert {tensor.dtype for tensor in whole} == {dtype}
    part = draw_experts(init_gated, E, D, F, dtype=dtype, part=Part(1, 2, 0, 2), generator=seeded())
    assert torch.equal(part.down, cut(whole.down, 1, Part(1, 2, 0, 2)))


def test_only_what_is_owned_is_made():
    """One expert at a time, and no other rank's."""
    asked = []

    def init(num_experts, dim, hidden, *, generator=None, device=None, dtype=None):
        asked.append(num_experts)
        return init_mlp(num_experts, dim, hidden, generator=generator, device=device, dtype=dtype)

    draw_experts(init, E, D, F, part=Part(1, 4), generator=seeded())
    assert asked == [1, 1, 1]


@pytest.mark.parametrize("blocks", [5, 24])
def test_blocks_that_do_not_divide_the_experts_are_refused(blocks):
    with pytest.raises(ValueError, match=f"12 experts cannot be cut into {blocks} equal blocks; expected a divisor"):
        draw_experts(init_gated, E, D, F, part=Part(0, blocks))


def test_slices_that_do_not_divide_the_hidden_dimension_are_refused():
    message = "a hidden dimension of 24 cannot be cut into 5 equal slices; expected a divisor"
    with pytest.raises(ValueError, match=message):
        draw_experts(init_gated, E, D, F, part=Part(0, 1, 0, 5))


@pytest.mark.parametrize(("dim", "hidden"), [(8, 8), (8, 16), (16, 8), (8, None), (1, 1)])
def test_hidden_axes_are_found_where_the_sizes_are_equal_too(dim, hidden):
    assert hidden_axes(init_gated, dim, hidden) == HIDDEN
    assert hidden_axes(init_mlp, dim, hidden) == {"up": 2, "down": 1}


def test_slices_are_cut_along_the_hidden_axis_where_the_sizes_are_equal_too():
    whole = draw_experts(init_mlp, 2, 8, 8, generator=seeded())
    part = draw_experts(init_mlp, 2, 8, 8, part=Part(0, 1, 1, 2), generator=seeded())
    assert torch.equal(part.up, whole.up[:, :, 4:])
    assert torch.equal(part.down, whole.down[:, 4:])


class _Strange(NamedTuple):
    up: Tensor
    odd: Tensor


def _strange(num_experts, dim, hidden, *, shape, **options):
    hidden = dim if hidden is None else hidden
    sizes = {"none": (dim, dim), "both": (hidden, hidden)}[shape]
    return _Strange(torch.empty(num_experts, dim, hidden, **options), torch.empty(num_experts, *sizes, **options))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("none", r"experts' parameter 'odd' has shape \(1, 4, 4\) for hidden = 6 and \(1, 4, 4\) for 12; expected"),
        ("both", r"experts' parameter 'odd' has shape \(1, 6, 6\) for hidden = 6 and \(1, 12, 12\) for 12; expected"),
        ("none", "expected exactly one axis to follow the hidden dimension, which ranks can share"),
    ],
)
def test_parameters_that_ranks_cannot_share_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        hidden_axes(partial(_strange, shape=shape), 4, 6)


def test_packed_parameters_are_not_cut():
    """Half of the rows of gate_up is all of gate."""

    def init(num_experts, dim, hidden, **options):
        return pack_gated(init_gated(num_experts, dim, hidden, **options))

    for hidden in (4, 6, None):
        with pytest.raises(ValueError, match=r"gate_up \d+, down \d+; expected one size.* keep parts apart"):
            hidden_axes(init, 4, hidden)
    assert draw_experts(init, 4, 4, 6, part=Part(1, 2)).gate_up.shape == (2, 12, 4)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part(block=5, blocks=2), r"Part\(block=5, blocks=2, .*\): block = 5 of blocks = 2; expected 0 to 1"),
        (Part(block=-1, blocks=2), r"block = -1 of blocks = 2; expected 0 to 1"),
        (Part(blocks=0), r"blocks = 0; expected a positive integer"),
        (Part(hidden=3, slices=2), r"hidden = 3 of slices = 2; expected 0 to 1"),
        (Part(hidden=-1, slices=2), r"hidden = -1 of slices = 2; expected 0 to 1"),
        (Part(slices=0), r"slices = 0; expected a positive integer"),
    ],
)
def test_a_part_outside_its_grid_is_refused(part, message):
    for draw in (lambda: draw_experts(init_gated, 8, 4, 6, part=part), lambda: MoE(4, 8, mixtral(), part=part)):
        with pytest.raises(ValueError, match=message):
            draw()


def test_parameters_that_ranks_cannot_share_need_no_axis_as_long_as_they_are_not_shared():
    def init(num_experts, dim, hidden, *, generator=None, **options):
        return _strange(num_experts, dim, hidden, shape="none", **options)

    assert draw_experts(init, 4, 4, 6, part=Part(1, 2)).odd.shape == (2, 4, 4)


@pytest.mark.parametrize(("init", "expected"), [(init_gated, 64), (init_mlp, 32), (partial(init_mlp), 32)])
def test_the_hidden_size_is_the_init_s_unless_it_is_given(init, expected):
    assert hidden_size(init, 8, None) == expected
    assert hidden_size(init, 8, 5) == 5


def test_routed_experts_hand_the_layer_what_they_hold():
    experts = RoutedExperts(init_gated(2, D, F))
    assert isinstance(experts.params(), GatedParams)
    assert experts.params().up is experts.up
    seen = []
    x, routing = torch.ones(3, D), object()
    assert experts(lambda *given: seen.append(given) or "y", x, routing) == "y"
    [(tokens, decision, params)] = seen
    assert tokens is x
    assert decision is routing
    assert type(params) is GatedParams
    experts.compute_dtype = torch.bfloat16
    assert {tensor.dtype for tensor in experts.params()} == {torch.bfloat16}
    assert experts.up.dtype == torch.float32
    assert f"gate=(2, {D}, {F}), up=(2, {D}, {F}), down=(2, {F}, {D})" in repr(experts)


class Turned(NamedTuple):
    """Parameters of which the first does not end with the hidden dimension."""

    scale: Tensor
    down: Tensor
    up: Tensor


def turned(num_experts, dim, hidden=None, **options):
    hidden = 4 * dim if hidden is None else hidden
    drawn = init_mlp(num_experts, dim, hidden, **{"generator": None, **options})
    return Turned(drawn.up.new_ones(num_experts, 1), drawn.down, drawn.up)


def test_the_hidden_size_is_that_of_any_order_of_parameters():
    assert hidden_size(turned, 8, None) == 32
    assert hidden_size(lambda *given, **options: pack_gated(init_gated(*given, **options)), 24, None) == 64
    assert hidden_size(lambda e, dim, hidden=None, **options: init_mlp(e, dim, hidden or 40, **options), 8, None) == 40
    moe = MoE(8, 2, deepseek_moe(num_shared=3)._replace(init=turned))
    assert moe.shared["up"].shape == (1, 8, 3 * 32)


class Odd(NamedTuple):
    """Parameters with something else among them."""

    up: Tensor
    other: object


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (None, r"returned Odd with other = NoneType; expected a tensor of floating point numbers for each field"),
        (init_mlp(1, 2), r"returned Odd with other = MlpParams; expected a tensor of floating point"),
        (torch.ones(1, 2, dtype=torch.int64), r"returned Odd with other = torch.int64; expected a tensor of floating"),
        (torch.tensor(1.0), r"with other = a tensor \(\) for one expert; expected \(1, ...\), experts first"),
        (torch.ones(3, 2), r"with other = a tensor \(3, 2\) for one expert; expected \(1, ...\), experts first"),
    ],
)
def test_parameters_that_a_module_cannot_hold_are_named(other, message):
    with pytest.raises(ValueError, match=message):
        draw_experts(lambda *_, **__: Odd(torch.ones(1, 2, 3), other), 2, 2, 3)


@pytest.mark.parametrize("name", ["type", "params", "compute_dtype", "training"])
def test_names_that_a_module_has_are_refused(name):
    kind = NamedTuple("Named", [(name, Tensor)])
    with pytest.raises(ValueError, match=f"the experts' parameters cannot be called '{name}', as a module has it"):
        draw_experts(lambda *_, **__: kind(torch.ones(1, 2, 3)), 2, 2, 3)
