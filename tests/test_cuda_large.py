"""Tensors of more than 2^31 numbers, on CUDA: each part of them is what a small call makes of that part alone.

A place that was computed in 32 bits would be another one, or outside of what is there.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from moekit.dispatch import dropless_plan, gather_rows, scatter_rows
from moekit.experts import EVERYTHING, INPUTS, PREACTIVATION, GatedParams, Keep, fused_layer, grouped, init_gated
from moekit.experts.tile_files import layer_tiles
from moekit.experts.tiles import LayerSize, LayerTiles
from moekit.experts.triton_matmul import triton
from moekit.routing import linear_gate, softmax, top_k
from moekit.routing.fused_top_k import fused_top_k_and_load
from moekit.routing.gates import score_and_pass
from moekit.routing.token_rounding import round_tokens
from moekit.types import Groups, Routing

LIMIT = 2**31
GIGABYTES = torch.cuda.mem_get_info()[1] / 1e9 if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GIGABYTES < 40, reason="needs a CUDA device of 40 GB")]


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    """Give back what one test took, up to 33 GiB, 76 in float32; others may run beside these."""
    yield
    torch.cuda.empty_cache()


def by_pointers(size: LayerSize) -> LayerTiles:
    return LayerTiles(*(tile._replace(specialized=False) for tile in layer_tiles(size)))


def part_of(routing: Routing, tokens: slice, *, k: int) -> Routing:
    """Take some tokens of a routing, of (T, K) or of a list in that order."""
    experts, weights = (each.view(-1, k)[tokens] for each in routing[1:3])
    number = len(experts)
    of_token = torch.arange(number, device=experts.device).unsqueeze(1).expand_as(experts)
    return Routing(of_token, experts, weights.detach().requires_grad_(), number, routing.num_experts, experts.numel())


def as_list(routing: Routing) -> Routing:
    return routing._replace(**{name: getattr(routing, name).flatten() for name in Routing._fields[:3]})


def spread(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


CASES: dict[str, tuple[torch.dtype, Keep, Callable[[LayerSize], LayerTiles], bool]] = {
    "warps that load": (torch.bfloat16, PREACTIVATION, layer_tiles, False),
    "inputs kept, a list": (torch.bfloat16, INPUTS, layer_tiles, True),
    "everything kept, by pointers": (torch.bfloat16, EVERYTHING, by_pointers, False),
    "float16 by pointers, a list": (torch.float16, PREACTIVATION, by_pointers, True),
    "tf32": (torch.float32, INPUTS, layer_tiles, False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_of_more_rows_than_32_bits_count(name: str) -> None:
    dtype, keep, tiles, listed = CASES[name]
    if dtype == torch.float32 and GIGABYTES < 100:
        pytest.skip("needs a CUDA device of 100 GB")
    num_tokens, k, dim, num_experts, chunk = 2**17 + 3, 8, 2056, 16, 2**14
    assert num_tokens * k * dim > LIMIT
    layer = fused_layer(keep=keep, tiles=tiles, precision="tf32")
    x = torch.randn(num_tokens, dim, device="cuda", dtype=dtype)
    params = GatedParams(*(p.requires_grad_() for p in init_gated(num_experts, dim, dim, device="cuda", dtype=dtype)))
    cotangent = torch.randn_like(x)
    routing = top_k(torch.randn(num_tokens, num_experts, device="cuda"), k=k)
    whole = as_list(routing) if listed else routing
    whole = whole._replace(weights=whole.weights.clone().requires_grad_())
    y = layer(x.requires_grad_(), whole, params)
    of_x, of_weights, *of_matrices = torch.autograd.grad(y, (x, whole.weights, *params), cotangent)
    y, of_weights = y.detach(), of_weights.view(num_tokens, k)
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in params]
    for start in range(0, num_tokens, chunk):
        tokens = slice(start, start + chunk)
        part, some = part_of(routing, tokens, k=k), x.detach()[tokens].requires_grad_()
        expected = layer(some, part, params)
        grads = torch.autograd.grad(expected, (some, part.weights, *params), cotangent[tokens])
        found = (y[tokens], of_x[tokens], of_weights[tokens])
        for what, a, b in zip(("y", "x", "weights"), found, (expected.detach(), *grads[:2]), strict=True):
            assert spread(a, b) <= 2 * torch.finfo(dtype).eps, f"{what} of tokens from {start} on"
        for total, grad in zip(sums, grads[2:], strict=True):
            total += grad
    for what, a, b in zip(params._fields, of_matrices, sums, strict=True):
        assert spread(a, b) <= 1e-2, what


def test_products_of_more_rows_than_32_bits_count() -> None:
    rows, dim, num_experts = 2**20 + 5, 2056, 4
    sizes = torch.tensor([5, rows // 2, 0, rows - rows // 2 - 5 - 3], dtype=torch.int32, device="cuda")  # 3 of nobody
    x = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(num_experts, dim, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    groups, cotangent = Groups(sizes, capacity=None), torch.randn_like(x)
    results = []
    for matmul in (triton, grouped):
        y = matmul(x, groups, w)
        of_x, of_w = torch.autograd.grad(y, (x, w), cotangent)
        results.append((y.detach()[:-3], of_x[:-3], of_w))
    for what, a, b in zip(("y", "x", "w"), *results, strict=True):
        for some, expected in zip(a.split(2**17), b.split(2**17), strict=True):  # in float32 they take memory
            assert spread(some, expected) <= 1e-2, what


def test_rows_of_more_numbers_than_32_bits_count() -> None:
    num_tokens, k, dim = 2**18 + 1, 4, 2056
    assert num_tokens * k * dim > LIMIT
    routing = top_k(torch.randn(num_tokens, 8, device="cuda"), k=k)
    for each in (routing, as_list(routing)):
        each = each._replace(weights=each.weights.detach().requires_grad_())
        x = torch.randn(num_tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        plan = dropless_plan(each)
        rows = gather_rows(x, each, plan)
        y = scatter_rows(rows, each, plan)
        [of_x] = torch.autograd.grad(rows, x, rows.detach(), retain_graph=True)
        of_weights = torch.autograd.grad(y, each.weights, y.detach())[0].view(num_tokens, k)
        for tokens in (slice(0, 1000), slice(num_tokens - 1000, num_tokens)):
            some, weights = x.detach()[tokens].float(), each.weights.detach().view(num_tokens, k)[tokens]
            expected = some * weights.sum(1, keepdim=True)
            assert spread(y.detach()[tokens], expected) <= 1e-2
            assert spread(of_x[tokens], k * some) <= 1e-2
            products = (expected * some).sum(1, keepdim=True).expand(-1, k)
            assert spread(of_weights[tokens], products) <= 1e-2


@pytest.mark.parametrize(("num_experts", "k"), [(64, 8), (1024, 2)])
def test_choices_among_more_logits_than_32_bits_count(num_experts: int, k: int) -> None:
    num_tokens = LIMIT // num_experts + 1000
    logits = torch.randn(num_tokens, num_experts, device="cuda").requires_grad_()
    routing, load = fused_top_k_and_load(logits, k=k, normalize=True)
    [grad] = torch.autograd.grad(routing.weights, logits, routing.weights.detach())
    assert load.sum().item() == num_tokens * k
    for tokens in (slice(0, 2000), slice(num_tokens - 2000, num_tokens)):
        some = logits.detach()[tokens].requires_grad_()
        expected, _ = fused_top_k_and_load(some, k=k, normalize=True)
        [of_some] = torch.autograd.grad(expected.weights, some, expected.weights.detach())
        found = (routing.expert_indices[tokens], routing.weights[tokens], grad[tokens])
        for a, b in zip(found, (*expected[1:3], of_some), strict=True):
            assert torch.equal(a, b)


def test_tokens_are_rounded_among_more_logits_than_32_bits_count() -> None:
    num_experts, tile = 1024, 128
    num_tokens = LIMIT // num_experts + 1000
    logits = torch.randn(num_tokens, num_experts, device="cuda")
    routing = top_k(logits, k=1)
    rounded = round_tokens(logits, routing, tile=tile)
    experts = rounded.expert_indices
    loads = torch.bincount(experts[experts >= 0], minlength=num_experts)
    assert (loads % tile == 0).all()
    first = torch.bincount(routing.expert_indices.flatten(), minlength=num_experts)
    for expert in (0, num_experts - 1):
        column, chose = softmax(logits).select(1, expert), routing.expert_indices.flatten() == expert
        kept = torch.zeros(num_tokens, dtype=torch.bool, device="cuda")
        kept[rounded.token_indices[experts == expert]] = True
        difference = int(loads[expert] - first[expert])
        if difference <= 0:
            assert (kept & ~chose).sum() == 0
            assert column[kept].min() >= column[chose & ~kept].max() if difference else True
        else:
            assert (chose & ~kept).sum() == 0
            assert column[kept & ~chose].min() >= column[~kept].max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gates_of_more_numbers_than_32_bits_count(dtype: torch.dtype) -> None:
    num_tokens, dim, num_experts = 2**20 + 5, 2056, 8
    assert num_tokens * dim > LIMIT
    x = torch.randn(num_tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(dim, num_experts, device="cuda") / dim**0.5).to(dtype).requires_grad_()
    logits, passed = score_and_pass(linear_gate, x, w)
    cotangents = torch.randn_like(logits), torch.randn_like(x)
    of_x, of_w = torch.autograd.grad((logits, passed), (x, w), cotangents)
    sums = torch.zeros(dim, num_experts, device="cuda")
    for start in range(0, num_tokens, 2**17):
        tokens = slice(start, start + 2**17)
        some = x.detach()[tokens].float()
        torch.testing.assert_close(logits[tokens], some @ w.float(), atol=2e-3, rtol=1e-3)
        expected = cotangents[0][tokens] @ w.float().T + cotangents[1][tokens].float()
        assert spread(of_x[tokens], expected) <= 1e-2
        sums += some.T @ cotangents[0][tokens]
    assert spread(of_w, sums) <= 1e-2
