"""What every layer refuses, whatever runs it: routings that do not fit, and tensors of several devices."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from moekit.checks import check_routing
from moekit.dispatch import dropless
from moekit.experts import fused_cpu, fused_layer, grouped, init_gated, loop, swiglu, triton
from moekit.experts.activations import Activation
from moekit.recipes import auto, expert_layer
from moekit.routing import expert_choice, top_k
from moekit.types import ExpertLayer, Groups, Routing, SoftRouting

LAYERS = {
    "auto": auto(),
    "fused_cpu": fused_cpu(plan=dropless().plan),
    "fused_layer": fused_layer(),
    "grouped": expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=grouped)),
    "loop": expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=loop)),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
T, D, F, E = 4, 8, 16, 8


def draw() -> tuple[Tensor, Routing]:
    return torch.randn(T, D), top_k(torch.randn(T, E), k=2)


@every_layer
def test_a_routing_that_does_not_fit_is_refused(layer: ExpertLayer) -> None:
    (x, routing), params = draw(), init_gated(E, D, F)
    with pytest.raises(ValueError, match=r"experts of torch\.int32 and tokens of torch\.int64; expected torch\.int64"):
        layer(x, routing._replace(expert_indices=routing.expert_indices.int()), params)
    for positions in (torch.arange(T), torch.arange(2 * T), torch.arange(2.0 * T).view(T, 2)):  # (T, 2) is right
        with pytest.raises(ValueError, match=r"positions \(.*\) of .*, and weights \(4, 2\); expected one shape, and"):
            layer(x, routing._replace(positions=positions), params)
    check_routing("a layer", routing._replace(positions=torch.arange(2 * T).view(T, 2)))
    with pytest.raises(ValueError, match=r"the routing has most = -1; expected None, or a number not below 0"):
        layer(x, routing._replace(most=-1), params)
    by_expert = expert_choice(torch.randn(T, E), capacity_factor=2.0)
    two_axes = by_expert._replace(**{name: getattr(by_expert, name)[0] for name in Routing._fields[:3]})
    assert two_axes.weights.shape == (E, 1)
    with pytest.raises(ValueError, match=r"has shape \(8, 1\) over 4 tokens; two axes mean \(T, K\).* Flatten"):
        layer(x, two_axes, params)
    layer_of_soft = SoftRouting(torch.ones(1, T, E, 1), torch.ones(1, T, E, 1))
    with pytest.raises(ValueError, match=r"the routing is a SoftRouting; expected a Routing"):
        layer(x, layer_of_soft, params)


@every_layer
def test_parameters_of_another_device_are_refused(layer: ExpertLayer) -> None:
    """On meta they would be read as memory that nobody wrote."""
    with torch.device("meta"):
        params = init_gated(E, D, F)
    with pytest.raises(ValueError, match=r"its tensors are on cpu and meta; expected one device"):
        layer(*draw(), params)
    with pytest.raises(ValueError, match=r"its tensors are on cpu and meta; expected one device"):
        layer(*draw(), init_gated(E, D, F)._replace(down=params.down))


@pytest.mark.parametrize("name", ["auto", "fused_layer", "grouped"])
def test_meta_tensors_have_shapes(name: str) -> None:
    with torch.device("meta"):
        (x, routing), params = draw(), init_gated(E, D, F)
        y = LAYERS[name](x.requires_grad_(), routing, params)
        y.sum().backward()
    assert (y.device.type, y.shape, x.grad.shape) == ("meta", x.shape, x.shape)


def test_auto_says_which_parameters_it_expects() -> None:
    with pytest.raises(ValueError, match=r"the parameters are tuple, .* expected GatedParams"):
        auto()(*draw(), tuple(init_gated(E, D, F)))


def test_a_clamped_activation_has_a_gate() -> None:
    with pytest.raises(ValueError, match=r"clamped_swiglu.* has no gate, and clamps one; expected gated=True"):
        fused_layer(activation=Activation("clamped_swiglu", gated=False))


@pytest.mark.parametrize("constants", [{"alpha": 1.702}, {"limit": 0.01}, {"alpha": 1.702, "limit": 0.01}], ids=str)
def test_constants_that_an_activation_would_not_use_are_refused(constants: dict[str, float]) -> None:
    activation = Activation("silu", gated=True, **constants)
    for make in (fused_layer, partial(fused_cpu, plan=dropless().plan)):
        with pytest.raises(ValueError, match=r"alpha or a limit, which silu does not use; expected .*clamped_swiglu"):
            make(activation=activation)


def test_an_unknown_activation_is_told_of_a_network_of_its_own() -> None:
    for make in (fused_layer, partial(fused_cpu, plan=dropless().plan)):
        with pytest.raises(ValueError, match=r"For any other .*`expert_layer` and an expert network of your own over"):
            make(activation=Activation("tanh", gated=True))


def test_the_kernels_refuse_cards_of_another_maker_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.1")
    message = r"are on cuda:0 of a torch for AMD cards \(ROCm 7\.1\); expected an NVIDIA card.* `grouped` for a product"
    with FakeTensorMode():
        x, params = torch.empty(T, D, device="cuda"), init_gated(E, D, F, device="cuda")
        with pytest.raises(ValueError, match=f"fused_layer: tokens and parameters {message}"):
            fused_layer()(x, top_k(torch.empty(T, E, device="cuda"), k=2), params)
        groups = Groups(torch.empty(E, dtype=torch.int32, device="cuda"), None)
        with pytest.raises(ValueError, match=f"triton: tokens and parameters {message}"):
            triton(x, groups, params.gate)
