import math
from functools import partial

import pytest
import reference
import torch

from moekit.experts import (
    batched,
    biased_gated,
    biased_mlp,
    clamped_swiglu,
    geglu,
    gelu_mlp,
    grouped,
    init_biased_gated,
    init_biased_mlp,
    init_gated,
    init_mlp,
    loop,
    pack_gated,
    relu2,
    relu_mlp,
    swiglu,
)
from moekit.types import Groups

D, F = 5, 7
FFNS = {
    "swiglu": (swiglu, init_gated, reference.swiglu),
    "geglu": (geglu, init_gated, reference.geglu),
    "gelu_mlp": (gelu_mlp, init_mlp, reference.gelu_mlp),
    "relu_mlp": (relu_mlp, init_mlp, reference.relu_mlp),
    "relu2": (relu2, init_mlp, reference.relu2),
}
every_ffn = pytest.mark.parametrize(("ffn", "init", "row_ffn"), FFNS.values(), ids=FFNS)


@pytest.mark.usefixtures("poison")
@every_ffn
@pytest.mark.parametrize(
    ("matmul", "sizes"),
    [(matmul, sizes) for sizes in ([3, 3, 3], [0, 0, 0]) for matmul in (loop, batched, grouped)]
    + [(matmul, [1, 0, 5]) for matmul in (loop, grouped)],
)
def test_equals_the_formula_row_by_row(ffn, init, row_ffn, matmul, sizes: list[int]) -> None:
    equal = len(set(sizes)) == 1
    groups = Groups(torch.tensor(sizes, dtype=torch.int32), sizes[0] if equal else None)
    rows = torch.randn(sum(sizes), D, dtype=torch.float64, requires_grad=True)
    params = type(init(1, 1, 1))(*(w.requires_grad_() for w in init(3, D, F, dtype=torch.float64)))
    out = ffn(rows, groups, params, matmul=matmul)
    owners = [e for e, size in enumerate(sizes) for _ in range(size)]
    if not owners:
        assert out.shape == (0, D)
        assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), params))
        return
    expected = torch.stack([row_ffn(row, *(w[e] for w in params)) for row, e in zip(rows, owners, strict=True)])
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn(out.shape, dtype=torch.float64)
    grads = torch.autograd.grad(out, (rows, *params), cotangent)
    for name, grad, wanted in zip(
        ("rows", *params._fields), grads, torch.autograd.grad(expected, (rows, *params), cotangent), strict=True
    ):
        torch.testing.assert_close(grad, wanted, msg=lambda text: f"{name}\n{text}")  # noqa: B023


@every_ffn
def test_backends_agree_inside_autocast(ffn, init, row_ffn) -> None:
    groups = Groups(torch.tensor([8, 8], dtype=torch.int32), 8)
    rows, params = torch.randn(16, 32), init(2, 32, 48)
    exact = ffn(rows, groups, params, matmul=loop)
    for matmul in (loop, batched, grouped):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = ffn(rows, groups, params, matmul=matmul)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize(("ffn", "init"), [(geglu, init_gated), (gelu_mlp, init_mlp)])
def test_both_forms_of_gelu_can_be_had_and_differ(ffn, init) -> None:
    groups = Groups(torch.tensor([4], dtype=torch.int32), 4)
    rows, params = torch.randn(4, D, dtype=torch.float64), init(1, D, F, dtype=torch.float64)
    exact = ffn(rows, groups, params, matmul=loop, approximate="none")
    tanh = ffn(rows, groups, params, matmul=loop, approximate="tanh")
    assert 1e-7 < (exact - tanh).abs().max() < 1e-2
    default = ffn(rows, groups, params, matmul=loop)
    assert torch.equal(default, exact if ffn is geglu else tanh)


@pytest.mark.parametrize(("dim", "hidden"), [(96, 256), (64, 192), (24, 64), (512, 1408), (4096, 10944)])
def test_default_width_of_gated_experts(dim: int, hidden: int) -> None:
    params = init_gated(1, dim, device="meta")
    assert params.gate.shape == params.up.shape == (1, dim, hidden)
    assert params.down.shape == (1, hidden, dim)
    assert hidden % 64 == 0
    assert 8 * dim / 3 <= hidden < 8 * dim / 3 + 64


def test_default_width_of_two_matrices() -> None:
    params = init_mlp(3, 16)
    assert (params.up.shape, params.down.shape) == ((3, 16, 64), (3, 64, 16))


@pytest.mark.parametrize("init", [init_gated, init_mlp])
def test_initial_scale(init) -> None:
    for w in init(4, 64, 256):
        assert w.std().item() == pytest.approx(1 / math.sqrt(w.shape[1]), rel=0.02)
    for w in init(4, 64, 256, std=0.02):
        assert w.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("init", [init_gated, init_mlp])
def test_init_takes_generator_and_dtype(init) -> None:
    draw = partial(init, 2, D, F, dtype=torch.bfloat16)
    state = torch.get_rng_state()
    first, second, other = (draw(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    for a, b, c in zip(first, second, other, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@pytest.mark.parametrize("ffn", [gelu_mlp, relu_mlp, relu2])
def test_experts_without_a_gate_refuse_parameters_with_one(ffn) -> None:
    for init, words in (
        (init_gated, "GatedParams, whose gate it would not use; expected MlpParams"),
        (init_biased_mlp, "BiasedMlpParams, whose up_bias, down_bias it would not use; expected MlpParams"),
    ):
        with pytest.raises(ValueError, match=rf"the experts' parameters are {words}"):
            ffn(torch.ones(3, 4), Groups(torch.tensor([1, 2]), None), init(2, 4, 8), matmul=loop)


def test_a_gate_of_another_width_is_refused_in_words() -> None:
    groups, params = Groups(torch.tensor([1, 2]), None), init_gated(2, 4, 8)
    with pytest.raises(ValueError, match=r"gate is \(2, 4, 6\) and their up \(2, 4, 8\); expected .* recipe's init"):
        swiglu(torch.ones(3, 4), groups, params._replace(gate=params.gate[..., :6]), matmul=loop)


@pytest.mark.parametrize("ffn", [swiglu, geglu])
def test_experts_with_a_gate_refuse_parameters_without_one(ffn) -> None:
    params, packed = init_mlp(2, 4, 8), pack_gated(init_gated(2, 4, 8))
    for given, words in (
        (params, "MlpParams, which lack gate; expected GatedParams"),
        (packed, "PackedGatedParams, which lack gate, up; expected GatedParams.*unpack them with unpack_gated"),
        (init_biased_gated(2, 4, 8), "BiasedGatedParams, whose gate_bias, up_bias, down_bias it would not use"),
    ):
        with pytest.raises(ValueError, match=rf"the experts' parameters are {words}"):
            ffn(torch.ones(3, 4), Groups(torch.tensor([1, 2]), None), given, matmul=loop)


@pytest.mark.parametrize(
    ("ffn", "init", "words"),
    [
        (
            biased_mlp,
            init_biased_gated,
            "BiasedGatedParams, whose gate, gate_bias it would not use; expected BiasedMlp",
        ),
        (biased_mlp, init_mlp, "MlpParams, which lack up_bias, down_bias; expected .*init_biased_mlp"),
        (biased_gated, init_gated, "GatedParams, which lack gate_bias, up_bias, down_bias; .*init_biased_gated"),
        (clamped_swiglu, init_biased_mlp, "BiasedMlpParams, which lack gate, gate_bias; expected BiasedGatedParams"),
    ],
)
def test_experts_with_biases_refuse_parameters_of_another_kind(ffn, init, words: str) -> None:
    with pytest.raises(ValueError, match=rf"{ffn.__name__}: the experts' parameters are {words}"):
        ffn(torch.ones(3, 4), Groups(torch.tensor([1, 2]), None), init(2, 4, 8), matmul=loop)
