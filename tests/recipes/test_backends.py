import importlib.util
from functools import partial

import pytest
import torch

from moekit.dispatch import dropless, gather_rows, padded, weigh_inputs
from moekit.experts import (
    CLAMPED_SWIGLU,
    EVERYTHING,
    GEGLU,
    GEGLU_TANH,
    GELU_MLP,
    INPUTS,
    PREACTIVATION,
    RELU2,
    RELU_MLP,
    SWIGLU,
    Activation,
    BiasedGatedParams,
    BiasedMlpParams,
    GatedParams,
    Keep,
    MlpParams,
    PackedGatedParams,
    geglu,
    gelu_mlp,
    init_biased_gated,
    init_biased_mlp,
    init_gated,
    init_mlp,
    loop,
    pack_gated,
    relu2,
    relu_mlp,
    swiglu,
    triton,
)
from moekit.recipes import MoEParams, Recipe, backends, expert_layer, limited, moe_layer
from moekit.recipes.backends import auto, choose_backend, experts_of, why_not_fused
from moekit.routing import linear_gate, sigmoid, softmax, top_k
from moekit.routing.top_k import sqrt_softplus

BF16 = torch.bfloat16


@pytest.fixture
def hopper(monkeypatch):
    """Let torch find a GPU of compute capability 9.0 and Triton, and give a function that changes either."""

    def be(capability: tuple[int, int] = (9, 0), *, triton: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr("moekit.recipes.backends.HAS_TRITON", triton)

    be()
    return be


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
@pytest.mark.parametrize("dispatcher", [None, dropless(), padded(capacity_factor=1.0)], ids=["none", "dropless", "pad"])
def test_the_cpu_has_one_layer_for_everything(dtype, dispatcher) -> None:
    choice = choose_backend("cpu", dtype, dispatcher=dispatcher)
    assert choice.name == "fused_cpu"
    assert choice.reason.startswith("the CPU: computes expert by expert")


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_a_gpu_with_triton_is_given_the_fused_kernels(hopper, dtype) -> None:
    choice = choose_backend("cuda", dtype, activation=GEGLU)
    assert choice.name == "fused_layer"
    assert choice.layer.keywords["activation"] == GEGLU
    assert "with Triton: activates inside the products, and keeps pre-activations alone" in choice.reason


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (EVERYTHING, "keeps the rows of tokens and pre-activations"),
        (PREACTIVATION, "keeps pre-activations alone"),
        (INPUTS, "keeps its inputs alone"),
        (Keep(rows=True, preactivation=False), "keeps the rows of tokens alone"),
    ],
)
def test_the_fused_kernels_keep_what_they_are_told_and_the_reason_says_it(hopper, keep, words) -> None:
    choice = choose_backend("cuda", BF16, keep=keep)
    assert choice.layer.keywords["keep"] == keep
    assert choice.reason.endswith(f"with Triton: activates inside the products, and {words}")
    for device, dispatcher in (("cpu", None), ("cuda", weigh_inputs(dropless()))):
        other, plain = (
            choose_backend(device, BF16, dispatcher=dispatcher, keep=keep),
            choose_backend(device, BF16, dispatcher=dispatcher),
        )
        assert (other.name, other.reason) == (plain.name, plain.reason)


def test_a_gpu_keeps_to_a_capacity_limit_on_the_fused_kernels(hopper) -> None:
    tight = padded(capacity_factor=1.25)
    choice = choose_backend("cuda", BF16, dispatcher=tight, activation=GEGLU, keep=INPUTS)
    assert (choice.name, choice.layer.func) == ("fused_layer", limited(choice.layer, plan=tight.plan).func)
    assert choice.layer.keywords["plan"] is tight.plan
    kernels = choice.layer.keywords["layer"]
    assert kernels.func is choose_backend("cuda", BF16).layer.func
    assert (kernels.keywords["activation"], kernels.keywords["keep"]) == (GEGLU, INPUTS)
    assert choice.reason.startswith("cuda in bfloat16, without what the dispatcher's plan drops, with Triton: ")
    assert choose_backend("cuda", BF16, dispatcher=padded(capacity_factor=0)).reason.startswith(
        "cuda in bfloat16, dropless, with Triton"
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep": "everything"}, r"keep = 'everything'; expected EVERYTHING, PREACTIVATION, INPUTS or another Keep\."),
        ({"tiles": "tiles.json"}, r"tiles = 'tiles\.json'; expected a function of a LayerSize, such as from_table"),
        ({"activation": "swiglu"}, r"activation = 'swiglu'; expected an Activation, such as moekit\.experts\.SWIGLU"),
        ({"activation": Activation("tanh", gated=True)}, r"activation = .*'tanh'.*; expected .* function of silu"),
        ({"activation": CLAMPED_SWIGLU._replace(gated=False)}, r".* has no gate, and clamps one; expected gated"),
        ({"dispatcher": dropless}, r"dispatcher = <function dropless .*; expected a Dispatcher, such as dropless\(\)"),
        ({"dispatcher": dropless().plan}, r"dispatcher = <function dropless_plan .*; expected a Dispatcher"),
    ],
)
def test_what_is_no_argument_is_refused_when_a_layer_is_made(hopper, given, words) -> None:
    """Whatever device it will run on: a recipe that is tried on the CPU is to train on CUDA."""
    with pytest.raises(ValueError, match=rf"^auto: {words}"):
        auto(**given)
    for device in ("cpu", "cuda", "meta"):
        with pytest.raises(ValueError, match=rf"^choose_backend: {words}"):
            choose_backend(device, BF16, **given)


def test_parameters_and_dtypes_that_are_none_are_refused() -> None:
    words = r"^experts_of: the type of the parameters is given as a GatedParams; expected one of GatedParams, Biased.*"
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=words + r"\. Pass the type, type\(params\)\.$"):
            choose_backend(device, BF16, params=init_gated(3, 4, 8))
        with pytest.raises(ValueError, match=r"^choose_backend: dtype = 'bfloat16'; expected a torch\.dtype, such as"):
            choose_backend(device, "bfloat16")


def test_auto_hands_keep_and_tiles_on(monkeypatch) -> None:
    given = []
    monkeypatch.setattr(backends, "why_not_fused", lambda device, dtype, **options: "")
    monkeypatch.setattr(backends, "fused_layer", lambda **options: given.append(options) or (lambda x, r, p: x))
    with torch.device("meta"):  # neither the CPU nor a device that has to be there
        x, params, routing = torch.randn(7, 6), init_gated(3, 6, 10), top_k(torch.randn(7, 3), k=2)
    tiles = lambda size: None  # noqa: E731
    auto()(x, routing, params)
    auto(keep=INPUTS, tiles=tiles)(x, routing, params)
    assert [each["keep"] for each in given] == [PREACTIVATION, INPUTS]
    assert given[1]["tiles"] is tiles


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled"),
        (RuntimeError("No CUDA GPUs are available.\nmore"), "No CUDA GPUs are available"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_device_that_torch_cannot_use_is_refused_in_words(hopper, monkeypatch, error, why) -> None:
    def fail(device: torch.device) -> tuple[int, int]:
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    words = rf"^device = cuda:3, which torch cannot use here: {why}\. Give one that `moekit doctor` lists\.$"
    for ask in (choose_backend, why_not_fused):
        with pytest.raises(ValueError, match=words):
            ask(torch.device("cuda:3"), BF16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="without Triton no device is asked")
def test_a_torch_that_finds_no_cuda_says_so_in_words() -> None:
    with pytest.raises(ValueError, match="device = cuda, which torch cannot use here: "):
        choose_backend("cuda", BF16)


def test_a_card_of_another_maker_is_not_given_the_fused_kernels(hopper, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.1")  # its capability 9 is not Hopper's
    choice = choose_backend("cuda", BF16)
    assert choice.name != "fused_layer"
    assert "its kernels are for NVIDIA cards" in choice.reason


@pytest.mark.parametrize(
    ("experts", "k", "score", "unusable", "kernel"),
    [
        (1024, 32, softmax, "", True),
        (8, 2, sigmoid, "", True),
        (1025, 2, softmax, "", False),
        (64, 33, softmax, "", False),
        (8, 2, sqrt_softplus, "", False),
        (8, 2, softmax, "Triton is not installed", False),
    ],
)
def test_the_router_s_kernel_is_taken_where_it_fits(monkeypatch, experts, k, score, unusable, kernel) -> None:
    taken = []
    monkeypatch.setattr(backends, "why_not_fused", lambda device, dtype: unusable)
    monkeypatch.setattr(backends, "fused_top_k", lambda logits, **options: taken.append(options))
    logits, bias = torch.randn(3, experts), torch.zeros(experts)
    found = backends.auto_top_k(logits, k=k, score=score, scale=2.0, bias=bias)
    assert taken == ([{"k": k, "score": score, "normalize": False, "scale": 2.0, "bias": bias}] if kernel else [])
    if not kernel:
        expected = top_k(logits, k=k, score=score, scale=2.0, bias=bias)
        assert torch.equal(found.weights, expected.weights)
        assert torch.equal(found.expert_indices, expected.expert_indices)


def test_float32_products_on_a_gpu_follow_torchs_own_setting(hopper, monkeypatch) -> None:
    assert choose_backend("cuda", torch.float32).layer.keywords["precision"] == "ieee"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert choose_backend("cuda", torch.float32).layer.keywords["precision"] == "tf32"


@pytest.mark.parametrize(
    ("device", "dtype", "factor", "widths", "name", "why"),
    [
        ("cuda", torch.float64, 0, None, "loop", "its kernels do not compute in float64"),
        ("cuda", torch.float64, 1.25, None, "batched", "its kernels do not compute in float64"),
        ("mps", torch.float32, 0, None, "loop", "its kernels are for CUDA devices, not mps"),
        ("mps", torch.float32, 1.25, None, "batched", "its kernels are for CUDA devices, not mps"),
    ],
)
def test_what_the_fused_kernels_cannot_do_is_said(hopper, device, dtype, factor, widths, name, why) -> None:
    choice = choose_backend(device, dtype, dispatcher=padded(capacity_factor=factor), widths=widths)
    assert choice.name == name
    assert choice.reason.endswith(f"; not fused_layer: {why}")
    assert choice.layer.keywords["experts"].keywords["matmul"].__name__ == name


@pytest.mark.parametrize(("device", "fused"), [("cpu", "fused_cpu"), ("cuda", "fused_layer")])
@pytest.mark.parametrize("dispatcher", [dropless(), padded(capacity_factor=0.8)], ids=["dropless", "padded"])
def test_a_dispatcher_that_does_more_than_move_rows_keeps_its_place(hopper, device, fused, dispatcher) -> None:
    weighing = weigh_inputs(dispatcher)
    choice = choose_backend(device, torch.float32, dispatcher=weighing)
    assert choice.layer.keywords["dispatcher"] is weighing
    said = "it copies rows and adds them up by weight, and the dispatcher has ways of its own"
    assert choice.reason.endswith(f"; not {fused}: {said}")
    odd = choose_backend("cuda", BF16, dispatcher=weighing, widths=(12, 64))
    assert odd.name == ("triton" if dispatcher.plan is dropless().plan else "batched")
    full = choose_backend("cuda", BF16, dispatcher=weighing)
    assert full.name == "grouped"
    hopper(triton=False)
    assert choose_backend("cuda", BF16, dispatcher=weighing, widths=(12, 64)).name == (
        "loop" if dispatcher.plan is dropless().plan else "batched"
    )


@pytest.mark.parametrize(("setting", "precision"), [("highest", "ieee"), ("high", "tf32")])
def test_a_product_in_triton_has_the_precision_that_torch_was_told(hopper, monkeypatch, setting, precision) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    choice = choose_backend("cuda", torch.float32, dispatcher=weigh_inputs(dropless()))
    matmul = choice.layer.keywords["experts"].keywords["matmul"]
    assert choice.name == "triton"
    assert (matmul.keywords["precision"] if isinstance(matmul, partial) else "ieee") == precision
    half = choose_backend("cuda", torch.float16, dispatcher=weigh_inputs(dropless()))
    assert half.layer.keywords["experts"].keywords["matmul"] is triton


def test_an_old_gpu_and_a_missing_triton(hopper) -> None:
    hopper((7, 5))
    choice = choose_backend("cuda", torch.float16)
    assert choice.name == "grouped"
    assert choice.reason.endswith("not fused_layer: compute capability 7.5 is below 8.0")
    hopper(triton=False)
    assert choose_backend("cuda", BF16).reason.endswith("Triton is not installed (pip install triton)")
    assert choose_backend("cuda", BF16, widths=(12, 64)).name == "loop"
    assert "widths (12, 64): no grouped product takes them" in choose_backend("cuda", BF16, widths=(12, 64)).reason


@pytest.mark.parametrize(
    ("activation", "ffn", "init"),
    [
        (SWIGLU, swiglu, init_gated),
        (GEGLU, geglu, init_gated),
        (GELU_MLP, gelu_mlp, init_mlp),
        (RELU_MLP, relu_mlp, init_mlp),
        (RELU2, relu2, init_mlp),
    ],
)
@pytest.mark.parametrize("factor", [0, 0.6])
def test_auto_computes_what_the_composed_layer_does(activation, ffn, init, factor) -> None:
    assert experts_of(activation) is ffn
    dispatcher = padded(capacity_factor=factor)
    composed = expert_layer(dispatcher=dispatcher, experts=partial(ffn, matmul=loop))
    x, params = torch.randn(12, 6).double(), init(4, 6, 10, dtype=torch.float64)
    routing = top_k(torch.randn(12, 4).double(), k=2)
    torch.testing.assert_close(
        auto(dispatcher=dispatcher, activation=activation)(x, routing, params), composed(x, routing, params)
    )


def test_auto_inside_autocast_asks_for_the_dtype_of_autocast(monkeypatch) -> None:
    asked = []

    choose = backends._choose

    def asking(device, dtype, **options):
        asked.append((dtype, options["widths"]))
        return choose(device, dtype, **options)

    monkeypatch.setattr(backends, "_choose", asking)
    x, params = torch.randn(12, 6), init_gated(4, 6, 10)
    routing = top_k(torch.randn(12, 4), k=2)
    with torch.autocast("cpu", dtype=BF16):
        assert auto()(x, routing, params).dtype == BF16
    assert auto()(x, routing, params).dtype == torch.float32
    assert asked == [(BF16, (6, 10)), (torch.float32, (6, 10))]


def test_auto_compiles_to_one_graph() -> None:
    recipe = Recipe(linear_gate, lambda logits, *, bias=None: top_k(logits, k=2, bias=bias), auto())
    x, gate, experts = torch.randn(12, 6, requires_grad=True), torch.randn(6, 4), init_gated(4, 6, 10)

    def run(x):
        return moe_layer(x, MoEParams(gate, experts), recipe).y

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(run(x).sum(), x)[0])


STEEP = Activation("clamped_swiglu", gated=True, alpha=1.3, limit=0.5)


def draw(kind: type, *, experts: int = 3, dim: int = 6, hidden: int = 10):
    """Draw parameters of a type in float64, biases too."""
    init = {BiasedGatedParams: init_biased_gated, BiasedMlpParams: init_biased_mlp, MlpParams: init_mlp}
    params = init.get(kind, init_gated)(experts, dim, hidden, dtype=torch.float64)
    if kind is PackedGatedParams:
        return pack_gated(params)
    return kind(*(p + torch.randn_like(p) if p.shape[1] == 1 else p for p in params))


def one_row(x: torch.Tensor, params, expert: int, activation: Activation) -> torch.Tensor:
    """Compute an expert of any parameters from the formula of its activation."""
    name, gated, alpha, limit = activation
    packed = isinstance(params, PackedGatedParams)
    up, down = (params.gate_up, params.down) if packed else (params.up, params.down)
    if packed:
        both, out = up[expert] @ x, down[expert].T
        first, second = both[: len(both) // 2], both[len(both) // 2 :]
    else:
        bias = {each: getattr(params, each, torch.zeros(1))[expert] for each in params._fields if "bias" in each}
        add = lambda y, each: y + bias[each][0] if each in bias else y  # noqa: E731
        second, out = add(x @ up[expert], "up_bias"), down[expert]
        first = add(x @ params.gate[expert], "gate_bias") if gated else second
    if name == "clamped_swiglu":
        first, second = first.clamp(max=limit), second.clamp(-limit, limit)
        hidden = first * (alpha * first).sigmoid() * (second + 1)
    else:
        curve = {
            "silu": lambda h: h * h.sigmoid(),
            "gelu": lambda h: h * (1 + (h / 2**0.5).erf()) / 2,
            "gelu_tanh": lambda h: h * (1 + ((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)).tanh()) / 2,
            "relu": lambda h: h.clamp(min=0),
            "relu2": lambda h: h.clamp(min=0) ** 2,
        }[name]
        hidden = curve(first) * second if gated else curve(first)
    y = hidden @ out
    return y if packed or "down_bias" not in params._fields else y + params.down_bias[expert][0]


GATED = (SWIGLU, GEGLU, GEGLU_TANH, CLAMPED_SWIGLU, STEEP, Activation("relu", True), Activation("relu2", True))
PLAIN = (GELU_MLP, RELU_MLP, RELU2, Activation("gelu", False), Activation("silu", False))
NETWORKS = [
    *((a, k) for a in GATED for k in (GatedParams, BiasedGatedParams, PackedGatedParams)),
    *((a, k) for a in PLAIN for k in (MlpParams, BiasedMlpParams)),
]


@pytest.mark.parametrize(("activation", "kind"), NETWORKS)
def test_auto_takes_the_parameters_of_every_network(activation: Activation, kind: type) -> None:
    x, params = torch.randn(7, 6).double().requires_grad_(), draw(kind)
    leaves = [p.requires_grad_() for p in params]
    routing = top_k(torch.randn(7, 3).double(), k=2)
    y = auto(activation=activation)(x, routing, params)
    rows = [
        sum(w * one_row(x[t], params, e, activation) for e, w in zip(chosen.tolist(), weights, strict=True))
        for t, (chosen, weights) in enumerate(zip(routing.expert_indices, routing.weights, strict=True))
    ]
    torch.testing.assert_close(y, torch.stack(rows))
    for name, found, wanted in zip(
        ("x", *params._fields),
        torch.autograd.grad(y.square().sum(), (x, *leaves)),
        torch.autograd.grad(torch.stack(rows).square().sum(), (x, *leaves)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, msg=name)


@pytest.mark.parametrize("activation", [Activation("relu", True), Activation("gelu", False)])
def test_an_activation_without_a_name_is_composed_where_nothing_is_fused(hopper, activation: Activation) -> None:
    """A dispatcher with ways of its own takes the fused layer's place; so does a dtype that no kernel has."""
    weighing, x = weigh_inputs(dropless()), torch.randn(7, 6).double()
    params, routing = draw(GatedParams if activation.gated else MlpParams), top_k(torch.randn(7, 3).double(), k=1)
    rows = [w * x[t] for t, (w,) in enumerate(routing.weights.double())]
    chosen = routing.expert_indices[:, 0].tolist()
    expected = torch.stack([one_row(row, params, e, activation) for row, e in zip(rows, chosen, strict=True)])
    y = auto(dispatcher=weighing, activation=activation)(x, routing, params)
    torch.testing.assert_close(y, expected)
    choice = choose_backend("cuda", torch.float64, activation=activation)
    assert (choice.name, choice.layer.func) == ("loop", expert_layer(dispatcher=weighing, experts=len).func)


@pytest.mark.parametrize(("activation", "kind"), NETWORKS)
def test_every_network_is_fused_on_a_gpu(hopper, activation: Activation, kind: type) -> None:
    assert choose_backend("cuda", BF16, activation=activation, params=kind).name == "fused_layer"


@pytest.mark.parametrize(
    ("activation", "kind", "why"),
    [
        (SWIGLU, BiasedGatedParams, "it does not take BiasedGatedParams"),
        (RELU2, BiasedMlpParams, "it does not take BiasedMlpParams"),
        (CLAMPED_SWIGLU, GatedParams, "it does not know clamped_swiglu"),
        (CLAMPED_SWIGLU, None, "it does not know clamped_swiglu"),
    ],
)
@pytest.mark.parametrize(("factor", "name"), [(0, "grouped"), (1.25, "batched")])
def test_what_the_cpus_fused_layer_does_not_take_is_said(activation, kind, why, factor, name) -> None:
    dispatcher = padded(capacity_factor=factor)
    choice = choose_backend("cpu", torch.float64, dispatcher=dispatcher, activation=activation, params=kind)
    assert choice.name == name
    assert choice.reason.endswith(f"; not fused_cpu: {why}")


def test_auto_asks_with_the_widths_and_type_of_its_parameters(monkeypatch) -> None:
    asked = []

    choose = backends._choose

    def asking(device, dtype, **options):
        asked.append((options["params"], options["widths"]))
        return choose(device, dtype, **options)

    monkeypatch.setattr(backends, "_choose", asking)
    kinds = [GatedParams, BiasedGatedParams, PackedGatedParams]
    for kind in kinds:
        auto()(torch.randn(7, 6).double(), top_k(torch.randn(7, 3).double(), k=2), draw(kind))
    assert asked == [(kind, (6, 10)) for kind in kinds]


def test_parameters_of_other_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"are MlpParams, and the activation .*'silu'.*; expected GatedParams, Biased"):
        choose_backend("cpu", BF16, params=MlpParams)
    with pytest.raises(ValueError, match=r"are PackedGatedParams.*'relu2'.*; expected MlpParams, BiasedMlpParams"):
        experts_of(RELU2, PackedGatedParams)


def untraceable(device=None) -> tuple[int, int]:
    torch._dynamo.graph_break()
    return (9, 0)


@pytest.mark.parametrize("triton", [True, False])
def test_a_choice_for_a_gpu_is_a_constant_of_a_compiled_graph(hopper, monkeypatch, triton) -> None:
    hopper(triton=triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", untraceable)
    names = []

    def run(x):
        choice = choose_backend(torch.device("cuda"), BF16, params=PackedGatedParams, widths=(8, 8))
        names.append(choice.name)
        return x + 1

    torch._dynamo.reset()
    torch.compile(run, fullgraph=True, backend="eager")(torch.ones(2))
    assert names == ["fused_layer" if triton else "grouped"]


@pytest.mark.parametrize("unusable", ["", "Triton is not installed"])
def test_the_router_that_is_chosen_gets_every_option(monkeypatch, unusable) -> None:
    monkeypatch.setattr(backends, "why_not_fused", lambda device, dtype: unusable)
    logits, bias = torch.randn(11, 6), torch.randn(6)
    options = {"k": 3, "score": sigmoid, "normalize": True, "scale": 2.5, "bias": bias}
    found, expected = backends.auto_top_k(logits, **options), top_k(logits, **options)
    assert torch.equal(found.expert_indices, expected.expert_indices)
    assert torch.equal(found.weights, expected.weights)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_ampere_and_all_later_cards_are_given_the_fused_kernels(hopper, capability) -> None:
    hopper(capability)
    assert choose_backend("cuda", BF16).name == "fused_layer"


@pytest.mark.parametrize(
    ("widths", "dtype", "name"),
    [
        ((64, 12), BF16, "loop"),
        ((12, 64), BF16, "loop"),
        ((8, 8), BF16, "grouped"),
        ((4, 12), torch.float32, "grouped"),
    ],
)
def test_the_grouped_product_needs_both_widths_in_whole_16_bytes(hopper, widths, dtype, name) -> None:
    hopper(triton=False)
    assert choose_backend("cuda", dtype, widths=widths).name == name


@pytest.mark.parametrize(("setting", "precision"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_every_setting_of_torchs_is_a_precision(hopper, monkeypatch, setting, precision) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    assert choose_backend("cuda", torch.float32).layer.keywords["precision"] == precision


def test_meta_tensors_of_a_capacity_are_multiplied_in_one_batch() -> None:
    choice = choose_backend("meta", BF16, dispatcher=padded(capacity_factor=1.25))
    assert choice.name == "batched"
    assert choose_backend("meta", BF16).name == "grouped"


def _seconds_off(routing):
    """Drop every second choice, as a plan of somebody's own may."""
    kept = torch.tensor([True, False], device=routing.expert_indices.device)
    return dropless().plan(routing._replace(expert_indices=routing.expert_indices.where(kept, -1)))


@pytest.mark.parametrize("plan", [_seconds_off, partial(dropless().plan), partial(_seconds_off)])
@pytest.mark.parametrize(
    ("device", "dtype", "name"),
    [
        ("cpu", torch.float32, "grouped"),
        ("meta", torch.float32, "grouped"),
        ("cuda", torch.float64, "loop"),
        ("mps", torch.float32, "loop"),
    ],
)
def test_a_plan_of_ones_own_is_not_taken_for_equal_groups(hopper, plan, device, dtype, name) -> None:
    dispatcher = dropless()._replace(plan=plan)
    assert choose_backend(device, dtype, dispatcher=dispatcher, params=BiasedGatedParams).name == name
    assert choose_backend("cuda", BF16, dispatcher=dispatcher).layer.func is limited(len, plan=len).func


@pytest.mark.parametrize("kind", [GatedParams, BiasedGatedParams])
def test_auto_runs_a_plan_of_ones_own(kind) -> None:
    x, params, routing = torch.randn(7, 6).double(), draw(kind), top_k(torch.randn(7, 3).double(), k=2)
    layer = auto(dispatcher=dropless()._replace(plan=_seconds_off))
    first = [
        w * one_row(x[t], params, int(routing.expert_indices[t, 0]), SWIGLU) for t, (w, _) in enumerate(routing.weights)
    ]
    torch.testing.assert_close(layer(x, routing, params), torch.stack(first))
    bodiless = routing._replace(
        **{name: getattr(routing, name).to("meta") for name in ("token_indices", "expert_indices", "weights")}
    )
    assert layer(x.to("meta"), bodiless, kind(*(p.to("meta") for p in params))).shape == x.shape


def test_the_router_s_kernel_is_asked_for_in_float32(hopper, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(backends, "why_not_fused", lambda device, dtype: asked.append(dtype) or "no")
    backends.auto_top_k(torch.randn(3, 4).double(), k=2)
    assert asked == [torch.float32]


def test_a_subclass_of_parameters_runs_where_its_type_does() -> None:
    class Named(GatedParams):
        """A type of one's own."""

    class NamedPacked(PackedGatedParams):
        """Another."""

    x, routing, params = torch.randn(5, 4), top_k(torch.randn(5, 3), k=2), init_gated(3, 4, 8)
    expected = auto()(x, routing, params)
    assert torch.equal(auto()(x, routing, Named(*params)), expected)
    torch.testing.assert_close(auto()(x, routing, NamedPacked(*pack_gated(params))), expected)
    composed = auto(dispatcher=dropless()._replace(dispatch=lambda *given: gather_rows(*given)))
    torch.testing.assert_close(composed(x, routing, NamedPacked(*pack_gated(params))), expected)
