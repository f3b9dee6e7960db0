"""Count what every strategy hands to its collectives, on eight gloo ranks, beside the formulas.

Run it as ``python -m torch.distributed.run --nproc-per-node 8 tests/distributed/traffic_program.py``. Each strategy
runs forward and backward once on random tokens with a random routing. A dispatch mode sees every collective that torch
runs, whoever asks for it, so nothing in moekit counts for itself. Two nodes of four ranks are imagined. The word
``json`` prints a line of JSON for each strategy in place of the table.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moekit.experts import GatedParams, init_gated
from moekit.parallel import (
    World,
    all_gather,
    all_sum,
    all_to_all,
    chunked,
    costs,
    make_grid,
    replicated,
    shard_experts,
    spread_experts,
    start_processes,
    static_all_to_all,
    tensor_parallel,
)
from moekit.parallel.payloads import Sent, Shape, total
from moekit.recipes import mixtral
from moekit.routing import top_k
from moekit.types import ExpertLayer, Routing

RANKS, NODE = 8, 4
SHAPE = Shape(tokens=256, width=64, hidden=32, experts=64, top_k=8, element_bytes=4)
CAPACITY_FACTOR = 0.75


class Counter(TorchDispatchMode):
    """Adds up the bytes that this rank hands to collectives: for itself, for its node, for the other node."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.bytes = torch.zeros(3, dtype=torch.int64)
        self.exchanges: list[list[int]] = []  # rows of D elements for every rank, one list per all-to-all of such
        self.calls = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.name().partition(".")[0]
        if name == "_c10d_functional::all_to_all_single":
            self._to_each(args[0], args[2], dist.distributed_c10d._resolve_process_group(str(args[3])))
        elif name == "c10d::alltoall_base_":
            self._to_each(args[1], args[4], dist.ProcessGroup.unbox(args[2]))
        elif name in ("_c10d_functional::all_gather_into_tensor", "_c10d_functional::reduce_scatter_tensor"):
            pieces = args[2] if "reduce" in name else 1
            self._to_all(args[0].numel() * args[0].element_size() // pieces, args[-2])
        elif name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            size, ranks = min(t.numel() * t.element_size() for t in args[:2]), RANKS
            self._to_all(size, ranks)
        elif name.startswith(("c10d::", "_c10d_functional::")) and "wait_tensor" not in name:
            raise NotImplementedError(f"{name} is not counted")
        return operator(*args, **(kwargs or {}))

    def _to_each(self, x: Tensor, rows: list[int], group: dist.ProcessGroup) -> None:
        self.calls += 1
        row = x[:1].numel() * x.element_size() if x.shape[0] else 0
        for rank, number in zip(dist.get_process_group_ranks(group), rows, strict=True):
            place = 0 if rank == self.rank else 1 if rank // NODE == self.rank // NODE else 2
            self.bytes[place] += number * row
        if x.shape[1:] == (SHAPE.width,):
            self.exchanges.append(list(rows))

    def _to_all(self, size: int, ranks: int) -> None:
        self.calls += 1
        self.bytes[0] += size
        self.bytes[1] += size * (ranks - 1)  # which of them cross the network is up to the backend


class ExpertModule(nn.Module):
    """Experts as a module, which FSDP wraps."""

    def __init__(self, params: GatedParams) -> None:
        super().__init__()
        for name, value in params._asdict().items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return mixtral().layer(x, routing, GatedParams(**dict(self.named_parameters(recurse=False))))


@contextmanager
def counted(world: World) -> Iterator[Counter]:
    counter = Counter(world.rank)
    with counter:
        yield counter
    counter.bytes = all_sum(world, counter.bytes)  # outside, for it is no part of the strategy


def groups_of(*lists: list[int]) -> dist.ProcessGroup:
    """Make a group of each list of ranks; return the one that this rank is in."""
    made = [dist.new_group(ranks) for ranks in lists]
    return next(group for group, ranks in zip(made, lists, strict=True) if dist.get_rank() in ranks)


def run_layer(layer: ExpertLayer, world: World, *, experts: int, hidden: int) -> tuple[Counter, Routing]:
    """Run a strategy forward and backward."""
    generator = torch.Generator().manual_seed(world.rank)
    x = torch.randn(SHAPE.tokens, SHAPE.width, generator=generator, requires_grad=True)
    logits = torch.randn(SHAPE.tokens, SHAPE.experts, generator=generator, requires_grad=True)
    params = GatedParams(*(p.requires_grad_() for p in init_gated(experts, SHAPE.width, hidden)))
    routing = top_k(logits, k=SHAPE.top_k)
    with counted(world) as counter:
        layer(x, routing, params).square().sum().backward()
    return counter, routing


def run_fsdp(world: World) -> Counter:
    """Run replicated experts under FSDP forward and backward."""
    generator = torch.Generator().manual_seed(0)
    module = ExpertModule(init_gated(SHAPE.experts, SHAPE.width, SHAPE.hidden, generator=generator))
    grid = make_grid(world, replicated(RANKS, SHAPE.experts))
    shard_experts([module], grid)
    x = torch.randn(SHAPE.tokens, SHAPE.width, requires_grad=True)
    routing = top_k(torch.randn(SHAPE.tokens, SHAPE.experts), k=SHAPE.top_k)
    module(x, routing).sum().backward()  # the first step sets FSDP up
    with counted(world) as counter:
        module(x, routing).sum().backward()
    return counter


def distinct_pairs(routing: Routing, blocks: int) -> int:
    """Count (token, block of experts) pairs in a routing, in plain Python."""
    per_block = SHAPE.experts // blocks
    return sum(len({expert // per_block for expert in experts}) for experts in routing.expert_indices.tolist())


def strategies() -> dict[str, tuple[Callable[[], ExpertLayer], list[Sent], int, int]]:
    """Name every strategy that exchanges tokens: how to make it, its formula, and the experts and F of a rank."""
    inner, everyone = mixtral().layer, dist.group.WORLD
    flat = spread_experts(RANKS, SHAPE.experts, SHAPE.hidden)
    by_hidden = spread_experts(RANKS, SHAPE.experts, SHAPE.hidden, expert_ranks=1, hidden_ranks=RANKS)
    grid = spread_experts(RANKS, SHAPE.experts, SHAPE.hidden, expert_ranks=4, hidden_ranks=2)
    nodes = spread_experts(RANKS, SHAPE.experts, SHAPE.hidden, ranks_per_node=NODE)
    near, far = groups_of([0, 1, 2, 3], [4, 5, 6, 7]), groups_of([0, 4], [1, 5], [2, 6], [3, 7])
    at = {"ranks_per_node": NODE}
    static = {"capacity_factor": CAPACITY_FACTOR}
    per_rank, f = SHAPE.experts // RANKS, SHAPE.hidden
    half = costs.all_to_all(SHAPE._replace(tokens=SHAPE.tokens // 2), flat, **at)
    return {
        "all_to_all": (
            lambda: all_to_all(inner, group=everyone),
            costs.all_to_all(SHAPE, flat, **at),
            per_rank,
            f,
        ),
        "static_all_to_all": (
            lambda: static_all_to_all(inner, group=everyone, **static),
            costs.static_all_to_all(SHAPE, flat, **at, **static),
            per_rank,
            f,
        ),
        "chunked, 2 slices": (
            lambda: chunked(all_to_all(inner, group=everyone), num_chunks=2),
            half * 2,
            per_rank,
            f,
        ),
        "hierarchical": (
            lambda: all_to_all(all_to_all(inner, group=near), group=far),
            costs.hierarchical(SHAPE, nodes, **at),
            per_rank,
            f,
        ),
        "all_gather": (
            lambda: all_gather(inner, group=everyone),
            costs.all_gather(SHAPE, flat, **at),
            per_rank,
            f,
        ),
        "tensor_parallel": (
            lambda: tensor_parallel(inner, group=everyone),
            costs.tensor_parallel(SHAPE, by_hidden, **at),
            SHAPE.experts,
            f // RANKS,
        ),
        "all_to_all x tensor_parallel": (
            lambda: all_to_all(tensor_parallel(inner, group=far), group=near),
            costs.experts_by_hidden(SHAPE, grid, **at),
            SHAPE.experts // 4,
            f // 2,
        ),
    }


def measure(world: World) -> Iterator[dict[str, Any]]:
    """Run everything; bytes are means over ranks."""
    for name, (make, formula, experts, hidden) in strategies().items():
        counter, routing = run_layer(make(), world, experts=experts, hidden=hidden)
        pairs = [int(all_sum(world, torch.tensor(distinct_pairs(routing, blocks)))) for blocks in (RANKS, 2)]
        rows = [int(all_sum(world, torch.tensor(sum(sent)))) for sent in counter.exchanges]
        yield line(name, counter, formula, rows=rows, pairs=pairs[0], node_pairs=pairs[1])
    formula = costs.parameters(SHAPE, replicated(RANKS, SHAPE.experts), ranks_per_node=NODE)
    yield line("FSDP, no exchange", run_fsdp(world), formula)


def line(name: str, counter: Counter, formula: list[Sent], **more: Any) -> dict[str, Any]:
    """Put what was measured beside what was expected."""
    expected, (own, node, network) = total(formula), counter.bytes.tolist()
    return {
        "strategy": name,
        "own": own / RANKS,
        "others": (node + network) / RANKS,
        "own_formula": expected.own,
        "others_formula": expected.others,
        "network": network / RANKS,
        "network_formula": expected.network,
        "calls": counter.calls,
        "calls_formula": len(formula),
        **more,
    }


def row_lines(found: dict[str, Any]) -> list[str]:
    """Say how many rows all_to_all sent, and what was to be expected."""
    sent, tokens, k = found["rows"][0], RANKS * SHAPE.tokens, SHAPE.top_k
    exact, draws = costs.distinct_blocks(k, SHAPE.experts, RANKS), RANKS * (1 - (1 - 1 / RANKS) ** k)
    return [
        f"all_to_all: {sent:,} rows for {tokens:,} tokens; distinct (token, rank) pairs: {found['pairs']:,}; "
        f"K rows per token would be {k * tokens:,}",
        f"rows per token: {sent / tokens:.3f}; P (1 - C(E - E/P, K) / C(E, K)) = {exact:.3f}, "
        f"P (1 - (1 - 1/P)^K) = {draws:.3f}",
    ]


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    with start_processes() as world:
        if world.size != RANKS:
            raise SystemExit(f"traffic_program.py: there are {world.size} ranks; start {RANKS}")
        if world.rank == 0 and not words:
            print(f"{SHAPE}; bytes that a rank sends, forward and backward")
            print(f"{'':30}{'to others':>12}{'formula':>12}{'to itself':>12}{'formula':>12}{'calls':>7}{'formula':>9}")
        for found in measure(world):
            if world.rank == 0 and words:
                print("measured " + json.dumps(found), flush=True)
            elif world.rank == 0:
                sizes = [found[key] for key in ("others", "others_formula", "own", "own_formula")]
                numbers = "".join(f"{size:12,.0f}" for size in sizes)
                print(f"{found['strategy']:30}{numbers}{found['calls']:7}{found['calls_formula']:9}", flush=True)
                if found["strategy"] == "all_to_all":
                    rows = found
        if world.rank == 0 and not words:
            print("\n".join(row_lines(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
