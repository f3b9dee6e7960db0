"""Networks of every activation that the kernels know, against the formula row by row and against the fused layer."""

import doctest
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit.dispatch import dropless
from moekit.experts import (
    CLAMPED_SWIGLU,
    Activation,
    BiasedGatedParams,
    BiasedMlpParams,
    GatedParams,
    MlpParams,
    PackedGatedParams,
    batched,
    fused_cpu,
    gelu_mlp,
    grouped,
    init_biased_gated,
    init_biased_mlp,
    init_gated,
    init_mlp,
    loop,
)
from moekit.experts.activations import FUNCTIONS
from moekit.recipes import expert_layer
from moekit.recipes.backends import why_not_fused_cpu
from moekit.recipes.expert_networks import ACTIVATIONS, experts_of
from moekit.routing import top_k
from moekit.types import Groups

E, D, F = 3, 6, 10
REGLU, GATED_RELU2 = Activation("relu", gated=True), Activation("relu2", gated=True)
EXACT_GELU_MLP, SILU_MLP = Activation("gelu", gated=False), Activation("silu", gated=False)
EQUAL = Groups(torch.full((E,), 4, dtype=torch.int32), 4)
UNEQUAL = Groups(torch.tensor([5, 0, 7], dtype=torch.int32), None)
CURVES = {
    "silu": lambda h: h / (1 + (-h).exp()),
    "gelu": lambda h: h * (1 + (h / 2**0.5).erf()) / 2,
    "gelu_tanh": lambda h: h * (1 + ((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)).tanh()) / 2,
    "relu": lambda h: h.where(h > 0, 0),
    "relu2": lambda h: (h * h).where(h > 0, 0),
}
CASES = [
    (activation, kind)
    for activation in ACTIVATIONS
    for kind in (
        (GatedParams, BiasedGatedParams, PackedGatedParams) if activation.gated else (MlpParams, BiasedMlpParams)
    )
]


def draw(kind: type[Any]) -> Any:
    """Draw parameters of a type in float64, biases too."""
    matrices = {"gate": (E, D, F), "up": (E, D, F), "gate_up": (E, 2 * F, D), "down": (E, F, D)}
    if kind is PackedGatedParams:
        matrices["down"] = (E, D, F)
    biases = {"gate_bias": (E, 1, F), "up_bias": (E, 1, F), "down_bias": (E, 1, D)}
    shapes = {**matrices, **biases}
    return kind(*(torch.randn(shapes[each], dtype=torch.float64).requires_grad_() for each in kind._fields))


def by_hand(x: Tensor, params: Any, e: int, activation: Activation) -> Tensor:
    parts = params._asdict()
    if isinstance(params, PackedGatedParams):
        parts = {"gate": params.gate_up[:, :F].mT, "up": params.gate_up[:, F:].mT, "down": params.down.mT}

    def affine(rows: Tensor, name: str) -> Tensor:
        bias = parts.get(f"{name}_bias")
        return rows @ parts[name][e] + (0 if bias is None else bias[e, 0])

    curve = CURVES[activation.function]
    hidden = curve(affine(x, "gate")) * affine(x, "up") if activation.gated else curve(affine(x, "up"))
    return affine(hidden, "down")


def compare(found: Tensor, expected: Tensor, leaves: dict[str, Tensor]) -> None:
    """Compare outputs and every gradient, by name."""
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found)
    grads = [torch.autograd.grad(y, list(leaves.values()), cotangent) for y in (found, expected)]
    for name, one, other in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def test_every_activation_of_the_kernels_has_networks() -> None:
    assert {activation.function for activation in (*ACTIVATIONS, CLAMPED_SWIGLU)} == set(FUNCTIONS)
    assert {REGLU, GATED_RELU2, EXACT_GELU_MLP, SILU_MLP} < set(ACTIVATIONS)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("groups", "matmul"), [(EQUAL, batched), (UNEQUAL, loop), (UNEQUAL, grouped)])
@pytest.mark.parametrize(("activation", "kind"), CASES)
def test_a_network_computes_the_formula_of_its_activation(activation, kind, groups, matmul) -> None:
    params, owners = draw(kind), torch.arange(E).repeat_interleave(groups.sizes).tolist()
    rows = torch.randn(len(owners), D, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([by_hand(x, params, e, activation) for x, e in zip(rows, owners, strict=True)])
    found = experts_of(activation, kind)(rows, groups, params, matmul=matmul)
    compare(found, expected, {"rows": rows, **params._asdict()})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_composed_layer_is_the_fused_one(activation: Activation) -> None:
    kind = GatedParams if activation.gated else MlpParams
    x, params = torch.randn(9, D, dtype=torch.float64, requires_grad=True), draw(kind)
    routing = top_k(torch.randn(9, E, dtype=torch.float64), k=2)
    composed = expert_layer(dispatcher=dropless(), experts=partial(experts_of(activation), matmul=loop))
    fused = fused_cpu(plan=dropless().plan, activation=activation)
    compare(composed(x, routing, params), fused(x, routing, params), {"x": x, **params._asdict()})


@pytest.mark.parametrize("activation", [REGLU, SILU_MLP])
def test_composed_networks_compile_to_one_graph(activation: Activation) -> None:
    params, rows = draw(GatedParams if activation.gated else MlpParams), torch.randn(12, D, dtype=torch.float64)

    def run(rows, params):
        return experts_of(activation, type(params))(rows, EQUAL, params, matmul=batched)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows, params), run(rows, params))


@pytest.mark.parametrize(
    ("activation", "given", "expected"),
    [
        (REGLU, init_mlp(E, D, F), "MlpParams, and .*'relu'.*; expected GatedParams"),
        (REGLU, init_biased_gated(E, D, F), "BiasedGatedParams, and .*'relu'.*; expected GatedParams"),
        (SILU_MLP, init_gated(E, D, F), "GatedParams, and .*'silu'.*; expected MlpParams"),
        (SILU_MLP, init_biased_mlp(E, D, F), "BiasedMlpParams, and .*'silu'.*; expected MlpParams"),
        (SILU_MLP, torch.ones(E, D, F), "Tensor, and .*'silu'.*; expected MlpParams"),
    ],
)
def test_composed_networks_leave_out_nothing_in_silence(activation, given, expected) -> None:
    words = (
        rf"^experts_of: the parameters are {expected}\. Pass the activation of these experts, or other parameters\.$"
    )
    with pytest.raises(ValueError, match=words):
        experts_of(activation)(torch.ones(12, D), EQUAL, given, matmul=loop)


def test_networks_that_have_a_name_are_those() -> None:
    exact = experts_of(EXACT_GELU_MLP)
    assert (exact.func, exact.keywords) == (gelu_mlp, {"approximate": "none"})
    assert experts_of(REGLU, PackedGatedParams).keywords["network"].keywords == {"activation": REGLU}


@pytest.mark.parametrize("wrong", ["silu", Activation("tanh", gated=True), CLAMPED_SWIGLU._replace(gated=False)])
def test_what_no_kernel_knows_has_no_network(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^experts_of: .*; expected (an Activation, .* of silu, gelu, |gated=True)"):
        experts_of(wrong)


CONTRIBUTING = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = CONTRIBUTING.partition("\n## Adding an expert network\n")[2].partition("\n## ")[0]


def test_a_network_of_ones_own_runs_as_contributing_shows_it() -> None:
    (block,) = re.findall(r"```pycon\n(.*?)```", SECTION, flags=re.DOTALL)
    examples = doctest.DocTestParser().get_doctest(block, {}, "CONTRIBUTING.md", "CONTRIBUTING.md", 0)
    assert len(examples.examples) >= 5
    said: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(examples, out=said.append).failed == 0, "".join(said)


def test_contributing_names_the_places_of_an_activation_that_there_are() -> None:
    root, paths = Path(__file__).parents[2], re.findall(r"`([\w/]+/\w+\.py)`", SECTION)
    assert len(paths) >= 9
    assert [path for path in paths if not (root / path).exists()] == []


def test_kernels_of_the_cpu_know_what_the_networks_do() -> None:
    for activation in ACTIVATIONS:
        assert why_not_fused_cpu(activation, None) == ""
        assert fused_cpu(plan=dropless().plan, activation=activation).keywords["activation"] == activation
