"""The fused CPU layer against the composed one: output and every gradient, on awkward sizes, threads or none."""

import mmap
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from differentiated_once import check_differentiated_once
from interpreted import Calls
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from moekit.dispatch import by_weight, dropless, padded
from moekit.experts import (
    GatedParams,
    _fused_cpu,
    _huge_pages,
    _workers,
    geglu,
    gelu_mlp,
    init_gated,
    init_mlp,
    loop,
    relu2,
    relu_mlp,
    swiglu,
)
from moekit.experts.activations import CLAMPED_SWIGLU, GEGLU, GEGLU_TANH, GELU_MLP, RELU2, RELU_MLP, SWIGLU
from moekit.experts.fused_cpu import fused_cpu
from moekit.experts.packed import PackedGatedParams, pack_gated
from moekit.recipes import expert_layer
from moekit.recipes.expert_networks import experts_of
from moekit.routing import expert_choice, top_k
from moekit.routing.top_k import token_choice
from moekit.types import DispatchPlan, Routing

# It comes from torch's own compiler: Dynamo instantiates torch.autograd.Function.


def packed(num_experts: int, dim: int, hidden: int, dtype: torch.dtype | None = None) -> PackedGatedParams:
    return pack_gated(init_gated(num_experts, dim, hidden, dtype=dtype))


D, F, E = 5, 7, 4
KINDS = {
    "swiglu": (SWIGLU, swiglu, init_gated),
    "geglu": (GEGLU, geglu, init_gated),
    "geglu tanh": (GEGLU_TANH, partial(geglu, approximate="tanh"), init_gated),
    "gelu_mlp": (GELU_MLP, gelu_mlp, init_mlp),
    "relu_mlp": (RELU_MLP, relu_mlp, init_mlp),
    "relu2": (RELU2, relu2, init_mlp),
    "packed": (GEGLU, experts_of(GEGLU, PackedGatedParams), packed),
}
DISPATCHERS = {
    "dropless": dropless(),
    "tight": padded(capacity_factor=0.5, priority=by_weight),
    "roomy": padded(capacity_factor=2.0),
}


def some_missing(logits: Tensor) -> Routing:
    routing = top_k(logits, k=3)
    gone = (torch.arange(logits.shape[0] * 3).view(-1, 3) % 4 == 1) | (torch.arange(logits.shape[0]) == 2).unsqueeze(1)
    return routing._replace(expert_indices=routing.expert_indices.masked_fill(gone, -1))


def hot(logits: Tensor) -> Routing:
    return token_choice(torch.full((logits.shape[0], 1), 2), logits[:, 2:3].sigmoid(), logits)


def as_list(logits: Tensor) -> Routing:
    routing = top_k(logits, k=2)
    flat = (each.flatten().flip(0) for each in routing[:3])
    return Routing(*flat, *routing[3:])


ROUTERS = {
    "top 2": partial(top_k, k=2),
    "all": partial(top_k, k=E),
    "some missing": some_missing,
    "hot": hot,
    "expert choice": partial(expert_choice, capacity_factor=1.5),
    "list": as_list,
}


def outputs(layer, route, tensors: list[Tensor], init) -> dict[str, Tensor]:
    x, logits, *params = tensors
    params = type(init(1, 1, 1))(*params)
    y = layer(x, route(logits), params)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    names = ("x", "logits", *params._fields)
    return {"y": y, **dict(zip(names, torch.autograd.grad(y, tensors, cotangent), strict=True))}


def draw(init, *, tokens: int = 13, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    experts = init(E, D, F, dtype=torch.float64)
    tensors = [torch.randn(tokens, D).double(), torch.randn(tokens, E).double(), *experts]
    return [each.to(dtype).requires_grad_() for each in tensors]


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text: f"{name}\n{text}", **tolerance)  # noqa: B023


@pytest.fixture(params=["one block, one thread", "small blocks", "threads", "together"])
def schedule(request, monkeypatch):
    """Have blocks of 2 rows, and divide work among threads that is far too small for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    if request.param != "one block, one thread":
        monkeypatch.setattr(_fused_cpu, "_BLOCK", 2)
    if request.param == "threads":
        monkeypatch.setattr(_workers, "divided", lambda costs, order, threads: ([], order))
    if request.param == "together":
        monkeypatch.setattr(_workers, "divided", lambda costs, order, threads: (order[:2], order[2:]))
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("poison", "schedule")
@pytest.mark.parametrize("route", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("dispatcher", DISPATCHERS.values(), ids=DISPATCHERS)
def test_equals_the_composed_layer(dispatcher, route) -> None:
    if dispatcher is DISPATCHERS["tight"] and route in (as_list, ROUTERS["expert choice"]):
        pytest.skip("by_weight orders the choices of tokens")
    tensors = draw(init_gated)
    composed = expert_layer(dispatcher=dispatcher, experts=partial(swiglu, matmul=loop))
    compare(outputs(fused_cpu(plan=dispatcher.plan), route, tensors, init_gated),
            outputs(composed, route, tensors, init_gated))  # fmt: skip


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kind", KINDS)
def test_every_activation(kind: str) -> None:
    activation, ffn, init = KINDS[kind]
    tensors, plan = draw(init), dropless().plan
    composed = expert_layer(dispatcher=dropless(), experts=partial(ffn, matmul=loop))
    layer = fused_cpu(plan=plan, activation=activation)
    compare(outputs(layer, some_missing, tensors, init), outputs(composed, some_missing, tensors, init))


@pytest.mark.usefixtures("poison", "schedule")
@pytest.mark.parametrize("route", ROUTERS.values(), ids=ROUTERS)
def test_packed_experts_are_the_same_in_blocks_and_threads(route) -> None:
    tensors = draw(packed)
    composed = expert_layer(dispatcher=dropless(), experts=partial(experts_of(SWIGLU, PackedGatedParams), matmul=loop))
    compare(outputs(fused_cpu(plan=dropless().plan), route, tensors, packed), outputs(composed, route, tensors, packed))


@pytest.mark.parametrize("kind", ["swiglu", "relu2", "packed"])
@pytest.mark.parametrize("turned", [False, True])
def test_gradients_of_matrices_lie_in_memory_as_their_matrices(kind: str, turned: bool) -> None:
    activation, _, init = KINDS[kind]
    x, logits, *params = draw(init)
    leaves = [w.detach().transpose(1, 2).contiguous().requires_grad_() if turned else w for w in params]
    given = type(init(1, 1, 1))(*(w.transpose(1, 2) if turned else w for w in leaves))
    y = fused_cpu(plan=dropless().plan, activation=activation)(x, top_k(logits, k=2), given)
    expected = fused_cpu(plan=dropless().plan, activation=activation)(
        x, top_k(logits, k=2), type(given)(*(w.contiguous() for w in given))
    )
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    for w in leaves:
        assert w.grad.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", [ROUTERS["top 2"], as_list], ids=["token choice", "list"])
def test_narrow_dtypes_stay_close_to_float64(dtype: torch.dtype, route) -> None:
    exact = draw(init_gated)
    narrow = [each.detach().to(dtype).requires_grad_() for each in exact]
    narrow[1] = exact[1].detach().float().requires_grad_()  # logits are float32 whatever the experts' dtype
    layer = fused_cpu(plan=dropless().plan)
    expected, actual = (outputs(layer, route, tensors, init_gated) for tensors in (exact, narrow))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2 if dtype == torch.bfloat16 else 5e-3
    for name, value in expected.items():
        assert actual[name].dtype == (torch.float32 if name == "logits" else dtype)
        assert (actual[name].double() - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("of_weights", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", [ROUTERS["top 2"], as_list], ids=["token choice", "list"])
def test_weights_of_any_dtype_get_gradients_in_it(route, dtype: torch.dtype, of_weights: torch.dtype) -> None:
    x, logits, *params = (each.detach() for each in draw(init_gated))
    routing = route(logits)
    weights = routing.weights.to(of_weights)

    def run(layer, narrow: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
        leaves = [each.to(dtype).to(narrow).requires_grad_() for each in (x, *params)]
        leaves.append(weights.to(wide).requires_grad_())
        y = layer(leaves[0], routing._replace(weights=leaves[-1]), GatedParams(*leaves[1:-1]))
        names = ("x", *GatedParams._fields, "weights")
        return {"y": y, **dict(zip(names, torch.autograd.grad(y, leaves, torch.ones_like(y)), strict=True))}

    found = run(fused_cpu(plan=dropless().plan), dtype, of_weights)
    composed = expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=loop))
    for name, value in run(composed, torch.float64, torch.float64).items():
        assert found[name].dtype == (of_weights if name == "weights" else dtype), name
        tolerance = max(4 * torch.finfo(each).eps for each in (dtype, found[name].dtype))
        assert (found[name].double() - value).norm() <= tolerance * value.norm(), name


def test_no_tokens() -> None:
    tensors = draw(init_gated, tokens=0)
    result = outputs(fused_cpu(plan=dropless().plan), ROUTERS["top 2"], tensors, init_gated)
    assert result["y"].shape == (0, D)
    assert all((result[name] == 0).all() for name in ("gate", "up", "down"))


def test_gradcheck_with_frozen_parts() -> None:
    x, logits, *params = draw(init_gated, tokens=4)
    routing = top_k(logits.detach(), k=2)
    params = type(init_gated(1, 1, 1))(*(w.detach() for w in params))
    layer = fused_cpu(plan=dropless().plan)
    assert torch.autograd.gradcheck(lambda x: layer(x, routing, params), (x,))


@pytest.mark.parametrize("kind", ["swiglu", "relu2", "packed"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_where_gradients_are_off(kind: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fused_cpu, "_BLOCK", 3)
    activation, _, init = KINDS[kind]
    x, logits, *projections = draw(init)
    layer, routing = fused_cpu(plan=dropless().plan, activation=activation), top_k(logits.detach(), k=2)
    params = type(init(1, 1, 1))(*projections)
    expected = layer(x, routing, params)
    with mode(), Calls() as calls:
        y = layer(x, routing, params)
    [args] = [args for function, args in calls.calls if function.name() == "moekit::fused_cpu"]
    assert args[-1] is False
    assert torch.equal(y, expected)
    assert not y.requires_grad
    frozen = [each.detach() for each in (x, *projections)]
    with Calls() as calls:
        layer(frozen[0], routing, type(params)(*frozen[1:]))
    assert [args[-1] for function, args in calls.calls if function.name() == "moekit::fused_cpu"] == [False]


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_threads_work_in_the_mode_that_they_are_asked_in(mode: Any) -> None:
    x, logits, *projections = (each.detach() for each in draw(init_gated))
    layer, routing, params = fused_cpu(plan=dropless().plan), top_k(logits, k=2), GatedParams(*projections)
    expected = layer(x, routing, params)
    with mode():
        y = layer(x, routing, params)
    assert torch.equal(y, expected)
    assert y.is_inference() == (mode is torch.inference_mode)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kind", ["swiglu", "relu2", "packed"])
def test_what_was_not_kept_is_computed_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fused_cpu, "_BLOCK", 3)
    activation, _, init = KINDS[kind]
    x, logits, *projections = draw(init)
    routing = some_missing(logits.detach())
    assignments, groups = dropless().plan(routing)
    leaves = [x, routing.weights.detach().requires_grad_(), *projections]
    found = []
    matrices = [w.transpose(1, 2) for w in projections] if kind == "packed" else projections
    for keep in (True, False):
        gate = matrices[0] if kind == "swiglu" else None
        inputs = (
            x, leaves[1], routing.token_indices, assignments, groups.sizes, gate, *matrices[-2:],
            activation.function, kind == "packed", keep,
        )  # fmt: skip
        torch.library.opcheck(_fused_cpu.fused, inputs, test_utils=("test_schema", "test_faketensor"))
        y, h = _fused_cpu.fused(*inputs)
        parts, width = (1, 2 * F) if kind == "packed" else (1 + activation.gated, F)
        assert h.shape == (parts, assignments.shape[0] if keep else 0, width)
        found.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for each, again in zip(*found, strict=True):
        assert torch.equal(each, again)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kind", ["swiglu", "relu2", "packed"])
def test_gradients_of_frozen_experts_are_not_computed(kind: str) -> None:
    activation, _, init = KINDS[kind]
    layer, tensors = fused_cpu(plan=dropless().plan, activation=activation), draw(init)
    expected = outputs(layer, some_missing, tensors, init)
    x, logits, *frozen = tensors
    y = layer(x, some_missing(logits), type(init(1, 1, 1))(*(w.detach() for w in frozen)))
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with Calls() as calls:
        found = torch.autograd.grad(y, (x, logits), cotangent)
    for name, grad in zip(("x", "logits"), found, strict=True):
        assert torch.equal(grad, expected[name]), name
    [args] = [args for function, args in calls.calls if function.name() == "moekit::fused_cpu_backward"]
    torch.library.opcheck(_fused_cpu._fused_backward, args, test_utils=("test_schema", "test_faketensor"))
    assert len(_fused_cpu._fused_backward(*args)) == 2


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1)])
def test_gradients_lie_as_it_was_said_whatever_the_order_in_memory(order: tuple[int, int, int]) -> None:
    x, logits, *projections = draw(init_gated)
    back = torch.tensor(order).argsort().tolist()
    projections = [w.detach().permute(order).contiguous().permute(back).requires_grad_() for w in projections]
    y = fused_cpu(plan=dropless().plan)(x, some_missing(logits), GatedParams(*projections))
    with Calls() as calls:
        grads = torch.autograd.grad(y.sum(), projections)
    if order == (0, 2, 1):  # transposed matrices have transposed gradients
        assert [grad.stride() for grad in grads] == [w.stride() for w in projections]
    [args] = [args for function, args in calls.calls if function.name() == "moekit::fused_cpu_backward"]
    torch.library.opcheck(_fused_cpu._fused_backward, args, test_utils=("test_schema", "test_faketensor"))


def test_compiles_to_one_graph_and_works_inside_checkpoint_and_autocast() -> None:
    tensors, layer = draw(init_gated, dtype=torch.float32), fused_cpu(plan=dropless().plan)
    expected = outputs(layer, some_missing, tensors, init_gated)
    torch._dynamo.reset()

    def routed(x: Tensor, logits: Tensor, params) -> Tensor:
        return layer(x, some_missing(logits), params)

    compiled = torch.compile(routed, fullgraph=True, backend="aot_eager")
    compare(outputs(compiled, lambda logits: logits, tensors, init_gated), expected)
    checkpointed = partial(checkpoint, layer, use_reentrant=False)
    compare(outputs(checkpointed, some_missing, tensors, init_gated), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(tensors[0], some_missing(tensors[1]), type(init_gated(1, 1, 1))(*tensors[2:]))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected["y"], rtol=0.05, atol=0.05)


def test_keeps_the_preactivations_alone() -> None:
    held: list[tuple[int, ...]] = []
    tensors = draw(init_gated)
    own = {each.data_ptr() for each in tensors}

    def pack(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.data_ptr() not in own:
            held.append(tuple(t.shape))
        return t

    routing = top_k(tensors[1], k=2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused_cpu(plan=dropless().plan)(tensors[0], routing, type(init_gated(1, 1, 1))(*tensors[2:]))
    assert sorted(held) == [(2, 26, F), (13, 2)]


def test_gradients_of_gradients_are_refused() -> None:
    x, logits, *params = draw(init_gated)
    layer, routing = fused_cpu(plan=dropless().plan), top_k(logits.detach(), k=2)
    total = lambda x, *params: layer(x, routing, type(init_gated(1, 1, 1))(*params)).square().sum()  # noqa: E731
    check_differentiated_once("fused_cpu", total, x, *params)


def test_gradients_in_forward_mode_are_refused() -> None:
    x, logits, *params = (each.detach() for each in draw(init_gated))
    layer, routing = fused_cpu(plan=dropless().plan), top_k(logits, k=2)
    params = type(init_gated(1, 1, 1))(*params)
    with pytest.raises(NotImplementedError, match=r"fused_cpu: it has no forward-mode gradient .* reverse mode"):
        torch.func.jvp(lambda x: layer(x, routing, params), (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"no forward-mode gradient"):
        layer(x, routing._replace(weights=forward_ad.make_dual(routing.weights, routing.weights)), params)


def test_errors_say_what_was_given() -> None:
    x, logits, *params = draw(init_gated)
    layer, routing = fused_cpu(plan=dropless().plan), top_k(logits, k=2)
    gated = type(init_gated(1, 1, 1))(*params)
    with pytest.raises(ValueError, match=r"are GatedParams, and the activation .*'relu2'.*; expected MlpParams\. Pass"):
        fused_cpu(plan=dropless().plan, activation=RELU2)(x, routing, gated)
    with pytest.raises(ValueError, match=r"are PackedGatedParams, and the activation .*; expected MlpParams\. Pass"):
        fused_cpu(plan=dropless().plan, activation=RELU2)(x, routing, pack_gated(gated))
    with pytest.raises(ValueError, match=r"expected x \(T, D\), gate_up \(E, 2F, D\), down \(E, D, F\): "):
        layer(x, routing, PackedGatedParams(gated.gate, gated.down))
    with pytest.raises(ValueError, match=r"fused_cpu: activation = .*'clamped_swiglu'.*; expected an Activation"):
        fused_cpu(plan=dropless().plan, activation=CLAMPED_SWIGLU)
    with pytest.raises(ValueError, match=r"x \(12, 5\) and parameters .* do not fit a routing of 13 tokens and 4"):
        layer(x[:12], routing, gated)
    with pytest.raises(
        ValueError, match=r"tokens and parameters are torch.float32, torch.float64, .*expected one dtype"
    ):
        layer(x.float(), routing, gated)
    with pytest.raises(ValueError, match=r"x is on meta; expected the CPU. Use fused_layer on a GPU"):
        layer(x.to("meta"), routing, gated)
    with pytest.raises(ValueError, match=r"parameters \[\(.*\] do not fit .* expected x \(T, D\), gate \(E, D, F\)"):
        layer(x, routing, type(gated)(*[w[0] for w in gated]))
    for part in ("weights", "expert_indices", "token_indices"):
        with pytest.raises(ValueError, match=r"fused_cpu: the routing has .*\(13, 1\).*; expected one shape. Give"):
            layer(x, routing._replace(**{part: getattr(routing, part)[:, :1]}), gated)


@pytest.fixture
def kept():
    """The free memory of large tensors, which is nobody else's in this test."""
    before = _huge_pages._kept()[:]
    _huge_pages._kept().clear()
    yield _huge_pages._kept()
    _huge_pages._kept()[:] = before


LARGE = 2**23 + 1  # float32 entries, a little over 32 MiB


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")
def test_the_memory_of_a_large_tensor_is_used_again(kept) -> None:
    first = _huge_pages.empty((LARGE, 1), torch.float32).fill_(2.0)
    assert first.shape == (LARGE, 1)
    assert first.is_contiguous()
    address, view = first.data_ptr(), first[5:]
    second = _huge_pages.empty((LARGE,), torch.float32)
    assert second.data_ptr() != address
    del first
    assert not kept  # a view holds the storage
    assert (view == 2).all()
    del view
    assert [len(memory) for memory in kept] == [4 * LARGE]
    third = _huge_pages.empty((LARGE,), torch.float32)
    assert third.data_ptr() == address
    assert not kept
    third.fill_(1.0)
    second.fill_(3.0)
    assert third.sum(dtype=torch.float64) == LARGE


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")
def test_no_more_is_kept_than_was_in_use_at_one_time(kept) -> None:
    for more in range(5):  # every one of another size
        large = _huge_pages.empty((LARGE + more,), torch.float32)
        del large
        assert [len(memory) for memory in kept] == [4 * (LARGE + more)]
    two = [_huge_pages.empty((LARGE + more,), torch.float32) for more in (7, 8)]
    del two
    assert sum(map(len, kept)) == 4 * (2 * LARGE + 15)
    large = _huge_pages.empty((2 * LARGE,), torch.float32)
    assert kept == []
    del large


def test_small_tensors_and_poisoned_ones_are_torch_s_own(kept, request) -> None:
    small = _huge_pages.empty((2, 3), torch.float32)
    del small
    assert kept == []
    request.getfixturevalue("poison")
    large = _huge_pages.empty((LARGE,), torch.float32)
    assert large.isnan().all()
    del large
    assert kept == []


def test_tasks_too_large_for_one_thread_are_done_together() -> None:
    unit = 10**9
    assert _workers.divided([unit] * 8, list(range(8)), 2) == ([], list(range(8)))
    assert _workers.divided([unit, 9 * unit, unit], [1, 0, 2], 2) == ([1], [0, 2])
    assert _workers.divided([2 * unit, *[unit] * 8], list(range(9)), 2) == ([], list(range(9)))
    assert _workers.divided([3 * unit, *[unit] * 8], list(range(9)), 2) == ([0], list(range(1, 9)))
    assert _workers.divided([unit] * 8, list(range(8)), 16) == (list(range(8)), [])
    assert _workers.divided([unit] * 8, list(range(8)), 1) == (list(range(8)), [])
    assert _workers.divided([10] * 8, list(range(8)), 2) == (list(range(8)), [])


def test_every_thread_gets_tasks_and_each_task_is_done_once() -> None:
    before, done, threads = torch.get_num_threads(), [], []
    torch.set_num_threads(2)
    both = threading.Barrier(2, timeout=30)

    def prepare():
        threads.append(threading.get_ident())
        both.wait()
        assert torch.get_num_threads() == 1
        return done.append

    try:
        _workers.share([10**9] * 6, prepare)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert sorted(done) == list(range(6))
    assert len(set(threads)) == 2
    assert threading.get_ident() in threads


def test_what_a_thread_raises_reaches_the_caller_and_threads_stay_as_many() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def fail(task: int) -> None:
        raise RuntimeError(f"task {task}")

    try:
        with pytest.raises(RuntimeError, match="task "):
            _workers.share([10**9] * 6, lambda: fail)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("alone", [*GatedParams._fields])
def test_a_parameter_that_alone_wants_a_gradient_gets_it(alone: str) -> None:
    x, routing, params = torch.randn(13, 5), top_k(torch.randn(13, 4), k=2), init_gated(4, 5, 7)
    layer = fused_cpu(plan=dropless().plan)
    every = type(params)(*(p.clone().requires_grad_() for p in params))
    expected = torch.autograd.grad(layer(x, routing, every).sum(), list(every))[params._fields.index(alone)]
    leaf = getattr(params, alone).requires_grad_()
    [found] = torch.autograd.grad(layer(x, routing, params).sum(), leaf)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("poison")
def test_rows_past_the_last_group_of_a_plan_are_nobodys() -> None:
    def without_the_last(routing: Routing) -> DispatchPlan:
        assignments, groups = dropless().plan(routing)
        sizes = groups.sizes.clone()
        sizes[-1] = 0
        return DispatchPlan(assignments, groups._replace(sizes=sizes))

    x, routing, params = torch.randn(13, 5), top_k(torch.randn(13, 4), k=2), init_gated(4, 5, 7)
    leaves = [each.requires_grad_() for each in (x, routing.weights, *params)]
    masked = routing._replace(expert_indices=routing.expert_indices.masked_fill(routing.expert_indices == 3, -1))
    layers = (fused_cpu(plan=without_the_last), routing), (fused_cpu(plan=dropless().plan), masked)
    found, expected = (
        [y := layer(x, given, params), *torch.autograd.grad(y.sin().sum(), leaves)] for layer, given in layers
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_list_s_weights_and_sums_are_float32_whatever_the_dtype() -> None:
    x, params = torch.ones(1, 5).bfloat16(), init_gated(1, 5, 7, dtype=torch.bfloat16)

    def weighed(*weights: float) -> torch.Tensor:
        zeros = torch.zeros(len(weights), dtype=torch.int64)
        return fused_cpu(plan=dropless().plan)(
            x, Routing(zeros, zeros, torch.tensor(weights), 1, 1, len(weights)), params
        )

    once = weighed(1.0)
    assert torch.equal(weighed(1 + 2**-9, -1.0), once * 2**-9)
    assert torch.equal(weighed(*[1.0] * 512), once * 512)


@pytest.mark.parametrize("name", GatedParams._fields)
def test_a_tangent_of_a_parameter_is_refused(name: str) -> None:
    x, routing, params = torch.randn(13, 5), top_k(torch.randn(13, 4), k=2), init_gated(4, 5, 7)
    w = getattr(params, name)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"no forward-mode gradient"):
        fused_cpu(plan=dropless().plan)(x, routing, params._replace(**{name: forward_ad.make_dual(w, w)}))


@pytest.mark.parametrize("number", [3, 5])
def test_parameters_of_another_number_of_experts_are_refused(number: int) -> None:
    x, routing = torch.randn(13, 5), top_k(torch.randn(13, 4), k=2)
    with pytest.raises(ValueError, match=r"do not fit a routing of 13 tokens and 4 experts"):
        fused_cpu(plan=dropless().plan)(x, routing, init_gated(number, 5, 7))


@pytest.mark.parametrize("alone", ["x", "weights", *GatedParams._fields])
def test_preactivations_are_kept_where_anything_wants_a_gradient(alone: str) -> None:
    x, routing, params = torch.randn(13, 5), top_k(torch.randn(13, 4), k=2), init_gated(4, 5, 7)
    {"x": x, "weights": routing.weights, **params._asdict()}[alone].requires_grad_()
    with Calls() as calls:
        fused_cpu(plan=dropless().plan)(x, routing, params)
    assert [args[-1] for function, args in calls.calls if function.name() == "moekit::fused_cpu"] == [True]


def test_matrices_that_do_not_fit_each_other_are_refused() -> None:
    x, routing, params = torch.randn(13, 5), top_k(torch.randn(13, 4), k=2), init_gated(4, 5, 7)
    layer = fused_cpu(plan=dropless().plan)
    for wrong in (
        init_gated(4, 6, 7),
        params._replace(up=params.up[..., :6]),
        params._replace(down=params.down[:, :6]),
        params._replace(down=params.down[..., :4]),
        params._replace(down=params.down[:3]),
        params._replace(down=params.down.flatten()),
        params._replace(gate=params.gate.sum()),
    ):
        with pytest.raises(ValueError, match=r"x \(13, 5\) and parameters .* do not fit"):
            layer(x, routing, wrong)


class _OtherOrder(NamedTuple):
    up: Tensor
    gate: Tensor
    down: Tensor


def test_parameters_are_not_read_by_position() -> None:
    x, routing, params = torch.randn(13, 5), top_k(torch.randn(13, 4), k=2), init_gated(4, 5, 7)
    for wrong in (_OtherOrder(params.up, params.gate, params.down), tuple(params)):
        with pytest.raises(ValueError, match=r"are (_OtherOrder|tuple), .*; expected GatedParams or PackedGatedParams"):
            fused_cpu(plan=dropless().plan)(x, routing, wrong)


def test_matrices_of_the_other_order_are_refused_with_a_word_on_how_to_turn_them() -> None:
    x, routing, params = torch.randn(13, 5), top_k(torch.randn(13, 4), k=2), init_gated(4, 5, 7)
    with pytest.raises(ValueError, match=r"stored \(E, in, out\), and these fit the other way round: pass w\.mT"):
        fused_cpu(plan=dropless().plan)(x, routing, GatedParams(*(w.mT for w in params)))


def test_a_dispatcher_in_the_place_of_its_plan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fused_cpu: plan is a Dispatcher; expected a function .*Pass that of a"):
        fused_cpu(plan=dropless())  # type: ignore[arg-type]


def test_fewer_projections_than_the_activation_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"are MlpParams, .*; expected GatedParams or PackedGatedParams"):
        fused_cpu(plan=dropless().plan)(torch.randn(13, 5), top_k(torch.randn(13, 4), k=2), init_mlp(4, 5, 7))


def test_what_any_other_thread_raises_reaches_the_caller() -> None:
    before, together, raised = torch.get_num_threads(), threading.Barrier(3, timeout=30), threading.Event()
    begun: list[int] = []  # the threads beside this one
    torch.set_num_threads(3)

    def prepare():
        if threading.get_ident() != caller:
            begun.append(threading.get_ident())
        together.wait()
        return do

    def do(task: int) -> None:
        if threading.get_ident() == begun[-1]:
            raised.set()
            raise RuntimeError(f"task {task}")
        assert raised.wait(30)

    caller = threading.get_ident()
    try:
        with pytest.raises(RuntimeError, match="task "):
            _workers.share([10**9] * 9, prepare)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_a_new_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments)))
    thread.start()
    thread.join()
    return found[0]


def beside_a_task(function: Callable[[], Any]) -> Any:
    """Return what a function finds while all threads of ``share`` have begun."""
    both, found = threading.Barrier(2, timeout=30), []

    def prepare():
        both.wait()
        found.append(function())
        both.wait()
        return lambda task: None

    _workers.share([10**9] * 6, prepare)
    return found[0]


per_thread = pytest.mark.skipif(
    _workers._function("omp_set_num_threads") is None, reason="OpenMP's functions are not found on this system"
)


@per_thread
@pytest.mark.usefixtures("two_threads")
def test_threads_that_begin_meanwhile_have_the_process_s_number() -> None:
    assert beside_a_task(lambda: in_a_new_thread(torch.get_num_threads)) == 2
    assert torch.get_num_threads() == 2


@per_thread
@pytest.mark.usefixtures("two_threads")
def test_a_number_that_another_thread_sets_meanwhile_stays() -> None:
    beside_a_task(lambda: in_a_new_thread(torch.set_num_threads, 3))
    assert in_a_new_thread(torch.get_num_threads) == 3
    assert torch.get_num_threads() == 2  # of this thread, which was in the layer


@pytest.mark.usefixtures("two_threads")
def test_products_of_a_task_have_one_thread_and_of_others_as_many_as_before() -> None:
    counts = [line.strip() for line in beside_a_task(torch.__config__.parallel_info).splitlines() if "_max_thr" in line]
    after = [line.strip() for line in torch.__config__.parallel_info().splitlines() if "_max_thr" in line]
    assert counts
    assert {line.rpartition(" ")[2] for line in counts} == {"1"}, counts
    assert {line.rpartition(" ")[2] for line in after} == {"2"}, after


@pytest.mark.usefixtures("two_threads")
def test_where_a_thread_cannot_be_told_alone_torch_is(monkeypatch) -> None:
    monkeypatch.setattr(_workers, "_function", lambda name: None)
    assert beside_a_task(torch.get_num_threads) == 1
    assert torch.get_num_threads() == in_a_new_thread(torch.get_num_threads) == 2


@pytest.mark.usefixtures("two_threads")
def test_a_library_that_torch_does_not_count_by_is_not_relied_on(monkeypatch) -> None:
    monkeypatch.setattr(_workers, "_function", lambda name: lambda number: None)
    assert beside_a_task(torch.get_num_threads) == 1
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("started", [0, 1])
def test_where_no_thread_can_start_those_there_are_do_all(monkeypatch, started) -> None:
    before, start, begun, done = torch.get_num_threads(), threading.Thread.start, [], []

    def start_some(thread: threading.Thread) -> None:
        if len(begun) == started:
            raise RuntimeError("can't create new thread at interpreter shutdown")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    torch.set_num_threads(3)
    try:
        _workers.share([10**9] * 9, lambda: done.append)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert sorted(done) == list(range(9))
    assert len(begun) == started
    assert not any(thread.is_alive() for thread in begun)


AT_THE_END = """
import atexit, threading, torch
from moekit.experts import _workers
def work(when):
    done = []
    _workers.share([10**9] * 6, lambda: done.append)
    print(when, sorted(done), flush=True)
def serve():
    threading.main_thread().join()
    work("after the main thread")
torch.set_num_threads(2)
work("before")  # an executor's module is loaded by then
atexit.register(work, "in atexit")
threading.Thread(target=serve).start()
"""


def test_layers_run_after_the_main_thread_has_ended_and_in_atexit() -> None:
    result = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, check=False)
    whens = ("before", "after the main thread", "in atexit")
    assert result.stdout.splitlines() == [f"{when} [0, 1, 2, 3, 4, 5]" for when in whens], result.stderr
    assert result.returncode == 0, result.stderr


def test_as_much_is_given_back_as_is_mapped_the_longest_free_first(kept) -> None:
    three = [_huge_pages.empty((LARGE + more,), torch.float32) for more in (1, 2, 3)]
    while three:
        del three[0]
    assert [len(memory) for memory in kept] == [4 * (LARGE + more) for more in (1, 2, 3)]
    large = _huge_pages.empty((2 * LARGE + 3,), torch.float32)
    assert [len(memory) for memory in kept] == [4 * (LARGE + 3)]
    del large


def test_a_smaller_tensor_does_not_hold_the_memory_of_a_larger_one(kept) -> None:
    for size in (2 * LARGE, LARGE):
        large = _huge_pages.empty((size,), torch.float32)
        del large
        assert [len(memory) for memory in kept] == [4 * size]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["swiglu", "relu2", "packed"])
def test_blocks_of_one_expert_are_added_up_in_float32(kind: str, dtype: torch.dtype, monkeypatch) -> None:
    """Contributions of one sign: rounded after each block, their sum would stop to grow."""
    monkeypatch.setattr(_fused_cpu, "_BLOCK", 4)
    activation, _, init = KINDS[kind]
    number = 2048
    x, cotangent = (torch.rand(number, D) + 0.5 for _ in range(2))
    routing = top_k(torch.zeros(number, 1), k=1)
    params = init(1, D, F)
    params = type(params)(*(w.abs().to(dtype) for w in params))
    grads = []
    for each in (dtype, torch.float64):
        leaves = [w.to(each).requires_grad_() for w in params]
        y = fused_cpu(plan=dropless().plan, activation=activation)(x.to(dtype).to(each), routing, type(params)(*leaves))
        grads.append(torch.autograd.grad(y, leaves, cotangent.to(dtype).to(each)))
    for found, expected in zip(*grads, strict=True):
        assert (found.double() - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()
