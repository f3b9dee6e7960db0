"""Transformers experts modules on the fused layer: which are, and that they compute what the composed layer does."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_cases import LOW
from hf_families import Family, experts_of, families, tiny_model
from interpreted import DEVICE, Calls, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor, nn

from moekit.experts import CLAMPED_SWIGLU, GEGLU_TANH, RELU2, SWIGLU, Activation, loop
from moekit.integrations.hf_experts import experts_forward, module_layer, module_params
from moekit.integrations.hf_fused import _fused_params, auto_module_layer, fused_module_layer, why_not_fused
from moekit.recipes import backends
from moekit.types import ExpertLayer

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"  # rows that nobody reads are garbage
)
FAMILIES = {family.experts: family for family in families()}
UNKNOWN = "its kernels do not know the activation of these experts"
NORMED = "its kernels do not normalise the outputs of experts"
# Every family with the interface that is not here is fused.
NOT_FUSED = {
    "DeepseekV4Experts": UNKNOWN,  # clamped, without gpt-oss's u + 1
    "Glm5NextTextExperts": UNKNOWN,
    "GptOssExperts": UNKNOWN,  # gate and up are every other column
    "HYV4Experts": UNKNOWN,
    "HYV4VLExperts": UNKNOWN,
    "Inkling2Experts": UNKNOWN,  # soft caps
    "Inkling2LoopExperts": UNKNOWN,
    "MuseSparkExperts": NORMED,
}
KNOWN = {
    "DiffusionGemmaTextExperts": GEGLU_TANH,
    "Gemma4TextExperts": GEGLU_TANH,
    "NemotronHExperts": RELU2,
    "MiniMaxM3VLExperts": CLAMPED_SWIGLU,
    "OpenAIPrivacyFilterExperts": CLAMPED_SWIGLU,
}
# (E, out, in); (E, in, out); with biases and a clamp; clamped; of one projection
FORMS = ["OlmoeExperts", "AriaExperts", "OpenAIPrivacyFilterExperts", "MiniMaxM3VLExperts", "NemotronHExperts"]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch find a GPU of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@cache
def of_family(name: str) -> dict[str, nn.Module]:
    return experts_of(tiny_model(FAMILIES[name]), FAMILIES[name])


def module(name: str) -> Any:
    return next(iter(of_family(name).values())).to(DEVICE)


@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@starts_interpreter
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_which_families_are_fused(family: Family) -> None:
    modules = of_family(family.experts)
    for each in modules.values():
        assert why_not_fused(each, device="cuda") == {"": NOT_FUSED.get(family.experts, "")}
        params = module_params(each)
        if params.known is not None:
            assert params.known == KNOWN.get(family.experts, SWIGLU)
            hidden = torch.linspace(-30, 30, 200 * params.up.shape[2]).double().view(params.up.shape[2], 200).T
            wanted = formula(params.known, hidden)
            torch.testing.assert_close(params.activation(hidden), wanted, rtol=1e-6, atol=1e-6)  # beam's is in float32


def formula(activation: Activation, hidden: Tensor) -> Tensor:
    """Compute an activation of two halves, or of all columns."""
    name, gated, alpha, limit = activation
    curve: Callable[[Tensor], Tensor] = {
        "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
        "relu": F.relu, "relu2": lambda h: F.relu(h) ** 2, "clamped_swiglu": lambda h: h * (alpha * h).sigmoid(),
    }[name]  # fmt: skip
    if not gated:
        return curve(hidden)
    gate, up = hidden.chunk(2, -1)
    return (
        curve(gate) * up if name != "clamped_swiglu" else curve(gate.clamp(max=limit)) * (up.clamp(-limit, limit) + 1)
    )


def inputs(experts: Any, tokens: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens, choices of which some are of other ranks, and weights."""
    params = module_params(experts)
    num_experts, dim = params.up.shape[:2]
    index = torch.rand(tokens, num_experts).topk(2).indices
    index[1::3, 1] = num_experts
    x, weights = torch.randn(tokens, dim, dtype=dtype), torch.rand(tokens, 2)
    return x.to(DEVICE).requires_grad_(), index.to(DEVICE), weights.to(DEVICE).requires_grad_()


def gradients(experts: Any, given: tuple[Tensor, Tensor, Tensor], layer: ExpertLayer) -> dict[str, Tensor]:
    leaves = {"x": given[0], "weights": given[2], **dict(experts.named_parameters())}
    y = experts_forward(experts, *given, layer=layer)
    cotangent = torch.linspace(-1, 1, y.numel(), device=y.device).sin().view_as(y).to(y.dtype)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), cotangent), strict=True))}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 5e-6) -> None:
    for name, want in expected.items():
        assert (found[name].dtype, found[name].shape) == (want.dtype, want.shape), name
        assert (found[name] - want).abs().max() <= tolerance * want.abs().max(), name


@runs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", FORMS)
def test_every_form_equals_the_composed_layer(name: str) -> None:
    experts = module(name)
    given = inputs(experts)
    expected = gradients(experts, given, module_layer(matmul=loop))
    compare(gradients(experts, given, fused_module_layer(tiles=lambda size: LOW)), expected)


@runs_kernels
@pytest.mark.parametrize("name", ["OlmoeExperts", "AriaExperts"])
def test_gradients_are_written_where_they_belong(name: str) -> None:
    experts = module(name)
    given = inputs(experts)
    params = _fused_params(module_params(experts))
    assert params.gate_up.data_ptr() == experts.gate_up_proj.data_ptr()
    assert params.down.data_ptr() == experts.down_proj.data_ptr()
    experts.zero_grad()
    with Calls() as calls:
        y = experts_forward(experts, *given, layer=fused_module_layer(tiles=lambda size: LOW))
        forward = len(calls.names)
        y.backward(torch.ones_like(y))
    copies = {"aten::clone", "aten::copy_", "aten::cat", "aten::slice_backward", "aten::new_empty_strided"}
    assert [each for each in calls.names[forward:] if each.split(".")[0] in copies] == []
    for parameter in (experts.gate_up_proj, experts.down_proj):
        assert parameter.grad.stride() == parameter.stride()
    large = experts.gate_up_proj.numel()
    assert experts.gate_up_proj.grad.untyped_storage().size() == 4 * large  # a tensor of its own, not a part of one


@runs_kernels
def test_tokens_of_a_wider_dtype_than_the_experts() -> None:
    experts = module("OlmoeExperts")
    given = inputs(experts)
    expected = gradients(experts, given, module_layer(matmul=loop))
    experts.half()
    try:
        found = gradients(experts, given, fused_module_layer(tiles=lambda size: LOW))
    finally:
        experts.float()
    assert (found["y"].dtype, found["x"].dtype, found["gate_up_proj"].dtype) == (
        torch.float32,
        torch.float32,
        torch.half,
    )
    compare({name: value.float() for name, value in found.items()}, expected, 2e-2)


@runs_kernels
@pytest.mark.parametrize("name", ["OlmoeExperts", "OpenAIPrivacyFilterExperts"])
def test_it_compiles_to_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(backends, "why_not_fused", lambda device, dtype: "")
    torch._dynamo.reset()
    experts, layer = module(name), auto_module_layer(fused=fused_module_layer(tiles=lambda size: LOW), otherwise=refuse)
    given = inputs(experts)

    def forward(*given: Tensor) -> Tensor:
        return experts_forward(experts, *given, layer=layer)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), forward(*given))
    grads = [torch.autograd.grad(run(*given).square().sum(), experts.parameters()) for run in (compiled, forward)]
    torch.testing.assert_close(*grads)


def refuse(x: Tensor, routing: Any, params: Any) -> Tensor:
    raise AssertionError("this layer was not to be taken")


def zeros(x: Tensor, routing: Any, params: Any) -> Tensor:
    return torch.zeros_like(x)


def chosen(experts: Any, given: tuple[Tensor, Tensor, Tensor]) -> str:
    """Say which layer runs, with a device on which the kernels would."""
    taken = []
    layer = auto_module_layer(
        fused=lambda x, *rest: (taken.append("fused"), zeros(x, *rest))[1],
        on_cpu=lambda x, *rest: (taken.append("on the CPU"), zeros(x, *rest))[1],
        otherwise=lambda x, *rest: (taken.append("otherwise"), zeros(x, *rest))[1],
    )
    experts_forward(experts, *given, layer=layer)
    return taken.pop()


@starts_interpreter
def test_the_layer_does_what_why_not_fused_says(monkeypatch: pytest.MonkeyPatch) -> None:
    known, unknown, normed = (module(name) for name in ("OlmoeExperts", "GptOssExperts", "MuseSparkExperts"))
    given = inputs(known)
    if DEVICE == "cpu":
        assert why_not_fused(known) == {"": "its kernels are for CUDA devices, not cpu"}
        assert chosen(known, given) == "on the CPU"
        for other in (unknown, normed, module("GptOssExperts")):
            assert chosen(other, inputs(other)) == "otherwise"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    asked = []

    def on_a_gpu(device: torch.device, dtype: torch.dtype) -> str:
        asked.append(dtype)
        return why(torch.device("cuda"), dtype)

    why = backends.why_not_fused
    monkeypatch.setattr(backends, "why_not_fused", on_a_gpu)
    for experts, reason in ((known, ""), (unknown, UNKNOWN), (normed, NORMED)):
        assert why_not_fused(experts) == {"": reason}
        assert chosen(experts, inputs(experts)) == ("otherwise" if reason else "fused")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert chosen(known, given) == "fused"
    assert set(asked) == {torch.float32, torch.bfloat16}
    assert why_not_fused(known, dtype=torch.float64) == {"": "its kernels do not compute in float64"}


@starts_interpreter
@pytest.mark.usefixtures("hopper")
def test_parameters_of_several_dtypes_are_not_fused() -> None:
    experts = next(iter(experts_of(tiny_model(FAMILIES["MixtralExperts"]), FAMILIES["MixtralExperts"]).values()))
    assert why_not_fused(experts, device="cuda") == {"": ""}
    experts.down_proj.data = experts.down_proj.data.bfloat16()
    reason = "its parameters are of several dtypes: torch.bfloat16, torch.float32"
    assert why_not_fused(experts, device="cuda") == {"": reason}
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
        assert why_not_fused(experts, device="cuda") == {"": "" if torch.cuda.is_available() else reason}


@starts_interpreter
@pytest.mark.usefixtures("hopper")
def test_what_was_put_in_a_known_ones_place_is_unknown() -> None:
    experts = next(iter(experts_of(tiny_model(FAMILIES["MixtralExperts"]), FAMILIES["MixtralExperts"]).values()))
    handle = experts.act_fn.register_forward_hook(lambda *_: None)
    assert why_not_fused(experts, device="cuda") == {"": UNKNOWN}
    handle.remove()
    assert why_not_fused(experts, device="cuda") == {"": ""}
    for mine in (F.mish, nn.Tanh(), type("Own", (type(experts.act_fn),), {})()):
        experts.act_fn = mine if isinstance(mine, nn.Module) else Called(mine)
        assert why_not_fused(experts, device="cuda") == {"": UNKNOWN}
    experts.act_fn = nn.ReLU()
    assert module_params(experts).known == Activation("relu", gated=True)
    experts._apply_gate = lambda hidden: hidden.chunk(2, -1)[0]
    assert why_not_fused(experts, device="cuda") == {"": UNKNOWN}
    del experts._apply_gate

    class Swapped(type(experts)):
        def _apply_gate(self, hidden: Tensor) -> Tensor:
            up, gate = hidden.chunk(2, -1)
            return self.act_fn(gate) * up

    experts.__class__ = Swapped
    assert why_not_fused(experts, device="cuda") == {"": UNKNOWN}


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@starts_interpreter
def test_names_are_those_of_the_model() -> None:
    model = tiny_model(FAMILIES["MixtralExperts"])
    names = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert list(why_not_fused(model)) == names
    with pytest.raises(
        ValueError, match=r"why_not_fused: Linear has no experts modules .* @use_experts_implementation"
    ):
        why_not_fused(nn.Linear(2, 2))


@starts_interpreter
@pytest.mark.parametrize(("name", "reason"), [("GptOssExperts", UNKNOWN), ("MuseSparkExperts", NORMED)])
def test_the_fused_layer_refuses_what_its_kernels_do_not_know(name: str, reason: str) -> None:
    experts = module(name)
    with pytest.raises(ValueError, match=rf"fused_module_layer: {reason}; expected .* Use auto_module_layer\(\)"):
        experts_forward(experts, *inputs(experts), layer=fused_module_layer())
