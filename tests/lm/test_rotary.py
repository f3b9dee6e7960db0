import pytest
import torch

from moekit.lm.rotary import (
    ROTARIES,
    half_split_rotary,
    head_rotary,
    interleaved_rotary,
    make_rotary,
    no_rotary,
    rotary_angles,
)

BY_POSITION = [half_split_rotary, interleaved_rotary]


@pytest.mark.parametrize("rotate", BY_POSITION)
def test_scores_depend_on_the_distance_alone(rotate):
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    length = 12
    rotated_q = rotate(q.expand(1, length, 1, 8))[0, :, 0]
    rotated_k = rotate(k.expand(1, length, 1, 8))[0, :, 0]
    scores = rotated_q @ rotated_k.T  # (L, L)
    for distance in range(1 - length, length):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[0].std() > 0.1  # and they do depend on it


@pytest.mark.parametrize("rotate", ROTARIES.values())
def test_norms_are_kept(rotate):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 10)
    torch.testing.assert_close(rotate(x).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("rotate", BY_POSITION)
def test_position_zero_stays_and_others_turn(rotate):
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(rotate(x)[:, 0], x[:, 0])
    assert not torch.allclose(rotate(x)[:, 1:], x[:, 1:])


def test_half_split_is_interleaved_up_to_a_permutation():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, 8, dtype=torch.float64)
    permutation = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # pairs (i, i + 4) become neighbours
    torch.testing.assert_close(half_split_rotary(x)[..., permutation], interleaved_rotary(x[..., permutation]))


def test_interleaved_equals_complex_multiplication():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 8, dtype=torch.float64)
    expected = torch.empty_like(x)
    for position in range(6):
        for pair in range(4):
            turn = torch.polar(torch.ones((), dtype=x.dtype), torch.tensor(position * 10_000.0 ** (-pair / 4)).double())
            z = torch.complex(x[:, position, :, 2 * pair], x[:, position, :, 2 * pair + 1]) * turn
            expected[:, position, :, 2 * pair], expected[:, position, :, 2 * pair + 1] = z.real, z.imag
    torch.testing.assert_close(interleaved_rotary(x), expected, rtol=1e-6, atol=1e-6)


def test_head_rotary_turns_by_head_and_not_by_position():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 4, 6).expand(1, 5, 4, 6)
    rotated = head_rotary(x)
    assert torch.equal(rotated, rotated[:, :1].expand_as(rotated))
    torch.testing.assert_close(rotated[:, 0], half_split_rotary(x[:, 0, :, None])[:, :, 0])


def test_no_rotary_changes_nothing():
    x = torch.randn(1, 2, 3, 4)
    assert no_rotary(x) is x


@pytest.mark.parametrize("rotate", BY_POSITION)
def test_angles_stay_float32_under_bfloat16(rotate):
    """With frequencies rounded to bf16 the angle at position 2000 would be wrong by about a radian."""
    torch.manual_seed(0)
    x = torch.randn(1, 2001, 1, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rotated = rotate(x)
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(rotated[:, -1].double(), rotate(x.double())[:, -1], rtol=0.01, atol=0.01)


def test_angles_are_as_the_paper_says():
    angles = rotary_angles(torch.arange(5.0, dtype=torch.float64), 4)
    torch.testing.assert_close(angles[3], torch.tensor([3.0, 0.03], dtype=torch.float64))


@pytest.mark.parametrize("rotate", BY_POSITION)
def test_compiled_code_reads_sines_and_does_not_compute_them_for_every_number(rotate):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    grad = torch.randn(2, 5, 3, 8)
    for run in (torch.compile(rotate, fullgraph=True, backend=backend), torch.compile(rotate, backend="aot_eager")):
        rotated = run(x)
        assert torch.equal(rotated, rotate(x))
        assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (rotated, rotate(x))))
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert "moekit.rotary_cos_and_sin.default" in called
    assert not [
        name for name in called if "moekit." not in name and any(each in name for each in ("sin", "cos", "pow"))
    ]


@pytest.mark.parametrize("strict", [True, False])
def test_exported_code_needs_no_operator_of_ours(strict):
    class Rotated(torch.nn.Module):
        def forward(self, x):
            return half_split_rotary(x)

    x = torch.randn(2, 5, 3, 8)
    exported = torch.export.export(Rotated(), (x,), strict=strict)
    assert not [node for node in exported.graph.nodes if "moekit" in str(node.target)]
    assert torch.equal(exported.module()(x), half_split_rotary(x))


def test_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="head_dim must be even, but it is 5"):
        half_split_rotary(torch.zeros(1, 2, 1, 5))


def test_unknown_name_lists_all():
    with pytest.raises(ValueError, match=r"'rotari'.*did you mean 'rotary'.*head_rotary, llama_rotary, none, rotary"):
        make_rotary("rotari")
