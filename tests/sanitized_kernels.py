"""Run the kernels of the fused layer, its plan, its routers and its pieces on awkward shapes, for compute-sanitizer.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no \\
    python tests/sanitized_kernels.py [layers float32 products rows plans routers roundings whole]

Errors of the driver's functions are left out, for by one of them a launch learns how many parameters a kernel has.
docs/lab.md says which parts have run, and when.
"""

import sys
from typing import Any

import torch

from moekit._segments_triton import counting_sort
from moekit.dispatch import dropless, padded
from moekit.experts import EVERYTHING, INPUTS, PREACTIVATION, SWIGLU, MlpParams, fused_layer, init_gated, init_mlp
from moekit.experts.activations import GELU_MLP
from moekit.experts.biased import BiasedMlpParams, init_biased_gated, init_biased_mlp
from moekit.experts.kernels._plan_triton import make_plan
from moekit.experts.packed import pack_gated
from moekit.experts.triton_matmul import triton
from moekit.recipes.bench.rows import make_case, moekit_rows
from moekit.recipes.bench.shapes import LayerShape
from moekit.routing import expert_choice, fused_top_k, round_tokens, sigmoid, softmax, top_k
from moekit.routing.fused_top_k import fused_top_k_and_load
from moekit.types import Groups

CUDA = torch.device("cuda")
# T, D, F, E, K: tails of tiles, several tiles a program, few rows
LAYERS = ((700, 320, 384, 5, 3), (1500, 256, 512, 16, 2), (100, 512, 256, 3, 2), (700, 256, 320, 5, 2))
FLOAT32_LAYERS = ((700, 320, 384, 5, 3), (2100, 130, 200, 3, 2), (300, 203, 101, 5, 3), (40, 64, 72, 16, 1))
WHOLE_LAYERS = ((513, 320, 384, 12, 3), (130, 264, 136, 512, 8))
# T, K, E, height of tiles, alignment: more experts than blocks of assignments, one of everything, many blocks
PLANS = (
    (8, 1, 1024, 64, 128), (1000, 8, 64, 128, 64), (3, 2, 512, 128, 64), (5000, 8, 512, 128, 64),
    (700, 32, 1024, 64, 32), (1, 1, 1, 64, 32), (40000, 2, 8, 128, 64),
)  # fmt: skip
# T, E, k, tile: several chunks of tokens, of assignments, more places besides than lanes, experts without tokens
ROUNDINGS = (
    (5000, 12, 3, 128), (1000, 300, 8, 16), (2500, 2, 1, 4500), (33, 1500, 2, 4), (1, 1, 1, 2), (4096, 512, 8, 64),
)  # fmt: skip
# sizes of groups, D, F: of 0 and 1 row, of more than a tile, not of whole 16 bytes, rows past the last group
PRODUCTS = (((0, 1, 300, 17, 0), 64, 96), ((129, 0, 1), 203, 101), ((1,), 8, 8), ((0, 0), 16, 24))
ROUTERS = ((1, 1, 1), (7, 1024, 32), (1000, 64, 8), (333, 129, 4), (5000, 8, 2), (2049, 512, 8))  # T, E, k


def run_layer(
    shape: tuple[int, ...], kind: str, keep: Any, *, dtype: torch.dtype = torch.bfloat16, precision: str = "ieee"
) -> None:
    num_tokens, dim, hidden, num_experts, k = shape
    x = torch.randn(num_tokens, dim, device=CUDA, dtype=dtype, requires_grad=True)
    routing = top_k(torch.randn(num_tokens, num_experts, device=CUDA), k=k)
    experts = torch.where(torch.rand(num_tokens, k, device=CUDA) < 0.1, -1, routing.expert_indices)
    weights = routing.weights.detach().requires_grad_()
    init: Any = {"mlp": init_mlp, "biased": init_biased_gated, "biased mlp": init_biased_mlp}.get(kind, init_gated)
    params: Any = init(num_experts, dim, hidden, device=CUDA, dtype=dtype)
    params = pack_gated(params) if kind == "packed" else params
    if kind == "turned":
        params = type(params)(*(each.transpose(1, 2).contiguous().transpose(1, 2) for each in params))
    params = type(params)(*(each.detach().requires_grad_() for each in params))
    activation = GELU_MLP if isinstance(params, MlpParams | BiasedMlpParams) else SWIGLU
    layer = fused_layer(activation=activation, keep=keep, precision=precision)
    y = layer(x, routing._replace(expert_indices=experts, weights=weights), params)
    torch.autograd.grad(y, [x, weights, *params], torch.randn_like(y))


def run_router(num_tokens: int, num_experts: int, k: int) -> None:
    for score in (softmax, sigmoid):
        logits = torch.randn(num_tokens, num_experts, device=CUDA, requires_grad=True)
        fused_top_k_and_load(logits, k=k, score=score, normalize=True)[0].weights.sum().backward()
        bias = torch.randn(num_experts, device=CUDA)
        fused_top_k(logits, k=k, score=score, bias=bias).weights.square().sum().backward()


def run_rounding(num_tokens: int, num_experts: int, k: int, tile: int) -> None:
    logits = torch.randn(num_tokens, num_experts, device=CUDA, requires_grad=True)
    routing = top_k(logits, k=k)
    routing = routing._replace(expert_indices=routing.expert_indices.where(routing.weights > 0.01, -1))
    for rounding in (torch.round, torch.ceil, torch.floor):
        round_tokens(logits, routing, tile=tile, rounding=rounding).weights.square().sum().backward(retain_graph=True)


def run_product(sizes: tuple[int, ...], dim: int, hidden: int, dtype: torch.dtype, precision: str) -> None:
    rows = torch.randn(sum(sizes) + 3, dim, device=CUDA, dtype=dtype, requires_grad=True)
    groups = Groups(torch.tensor(sizes, device=CUDA), None)
    for turned in (False, True):
        w = torch.randn(len(sizes), *((hidden, dim) if turned else (dim, hidden)), device=CUDA, dtype=dtype)
        w.requires_grad_()
        y = triton(rows, groups, w.transpose(1, 2) if turned else w, precision=precision)
        torch.autograd.grad(y, [rows, w], torch.randn_like(y))


def run_rows(num_tokens: int, num_experts: int, k: int) -> None:
    logits = torch.randn(num_tokens, num_experts, device=CUDA)
    token_choice = top_k(logits, k=k)
    missing = torch.where(torch.rand(num_tokens, k, device=CUDA) < 0.2, -1, token_choice.expert_indices)
    for routing in (
        token_choice,
        token_choice._replace(expert_indices=missing),
        expert_choice(logits, capacity_factor=k),
    ):
        for moves in (dropless(), padded(capacity_factor=0.7)):
            x = torch.randn(num_tokens, 72, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
            weights = routing.weights.detach().requires_grad_()
            given, plan = routing._replace(weights=weights), moves.plan(routing)
            y = moves.combine(moves.dispatch(x, given, plan), given, plan)
            torch.autograd.grad(y, [x, weights], torch.randn_like(y))


def products() -> None:
    for sizes, dim, hidden in PRODUCTS:
        for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")):
            run_product(sizes, dim, hidden, dtype, precision)
            torch.cuda.synchronize()
            print("product", sizes, dim, hidden, dtype, precision, flush=True)


def rows() -> None:
    for sizes in ((700, 5, 3), (1, 1, 1), (3000, 300, 8), (33, 1024, 2)):
        run_rows(*sizes)
        torch.cuda.synchronize()
        print("rows", *sizes, flush=True)


def layers() -> None:
    for shape in LAYERS:
        for kind, keep in (
            *((kind, PREACTIVATION) for kind in ("gated", "packed", "mlp", "biased", "biased mlp")),
            ("gated", INPUTS), ("gated", EVERYTHING),
        ):  # fmt: skip
            run_layer(shape, kind, keep)
            torch.cuda.synchronize()
            print("layer", shape, kind, keep, flush=True)


def float32() -> None:
    for shape in FLOAT32_LAYERS:
        for precision in ("ieee", "tf32"):
            for kind in ("gated", "packed", "turned", "mlp", "biased", "biased mlp"):
                run_layer(shape, kind, PREACTIVATION, dtype=torch.float32, precision=precision)
                torch.cuda.synchronize()
                print("layer", shape, kind, precision, flush=True)


def plans() -> None:
    for tokens, k, experts, height, align in PLANS:
        chosen = torch.randint(-1, experts, (tokens, k), device=CUDA)
        make_plan(chosen, experts, height=height, align=align, most=chosen.numel())
        counting_sort(chosen.view(-1), experts)
        torch.cuda.synchronize()
        print("plan", tokens, k, experts, flush=True)


def routers() -> None:
    for sizes in ROUTERS:
        run_router(*sizes)
        torch.cuda.synchronize()
        print("router", *sizes, flush=True)


def roundings() -> None:
    for sizes in ROUNDINGS:
        run_rounding(*sizes)
        torch.cuda.synchronize()
        print("rounding", *sizes, flush=True)


def whole() -> None:
    for shape in WHOLE_LAYERS:
        for dtype in (torch.bfloat16, torch.float16):
            case = make_case(LayerShape("odd", *shape), "uniform", device="cuda", dtype=dtype)
            for name in ("fused_layer", "fused_layer, tokens rounded"):  # whose routing is no (T, K)
                row = moekit_rows()[name](case)
                torch.autograd.grad(row.forward(), row.leaves, row.grad)
                torch.cuda.synchronize()
                print("whole layer,", name, shape, dtype, flush=True)


if __name__ == "__main__":
    parts = {each.__name__: each for each in (layers, float32, products, rows, plans, routers, roundings, whole)}
    for name in sys.argv[1:] or parts:
        parts[name]()
