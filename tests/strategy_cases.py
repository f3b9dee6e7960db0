"""One MoE layer under every parallel strategy against one process that holds all tokens: what the ranks run."""

import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.dispatch import by_choice, by_position, by_weight, dropless, padded
from moekit.experts import grouped, init_gated, loop, swiglu
from moekit.parallel import (
    Grid,
    Layout,
    World,
    all_gather,
    all_to_all,
    chunked,
    distribute_experts,
    group_of,
    in_order,
    make_grid,
    plan_together,
    static_all_to_all,
    sum_gradients,
    tensor_parallel,
    whole,
)
from moekit.parallel.collectives import room_for
from moekit.recipes import MoE, Recipe, expert_layer
from moekit.recipes.expert_parameters import hidden_axes
from moekit.recipes.optimizers import clip_gradients, gradient_norm, make_optimizer
from moekit.recipes.settings import OptimizerSettings
from moekit.routing import linear_gate, top_k
from moekit.types import Dispatcher, ExpertLayer, Routing

E, D, F = 8, 6, 8
STRATEGIES = ("all_to_all", "all_gather", "tensor_parallel", "ep_tp", "hierarchical", "static")
DTYPES = (torch.float64, torch.float32)
SEEDS = (1, 2, 3)
PRIORITIES = {"position": by_position, "choice": by_choice, "weight": by_weight}


class Case(NamedTuple):
    """What is compared: a strategy, what the inner layer drops, who chooses, and the tokens of each rank."""

    strategy: str
    capacity: float = 0.0
    choice: str = "token"
    k: int = 3
    priority: str = "position"
    dtype: torch.dtype = torch.float64
    seed: int = 0
    tokens: tuple[int, ...] = ()
    loops: bool = False  # the grouped product of CUDA takes no float64 and no odd widths


def matrix(ranks: int, *, full: bool) -> list[Case]:
    """List the cases of a number of ranks: strategies x {dropless, capacity} x {token choice, expert choice}."""
    cases = [
        Case(strategy, capacity, choice)
        for strategy, capacity, choice in itertools.product(STRATEGIES, (0.0, 0.6), ("token", "expert"))
    ]
    cases += [Case("static_tight", capacity, choice) for capacity in (0.0, 0.8) for choice in ("token", "expert")]
    cases += [Case("chunked"), Case("chunked", k=1), Case("all_to_all", k=8), Case("all_to_all", 0.3, k=1)]
    cases += [Case("all_to_all", 0.6, priority=priority) for priority in ("choice", "weight")]
    cases += [Case("hierarchical", 0.6, priority=priority) for priority in ("choice", "weight")]
    if ranks >= 4:
        cases += [Case("replicas"), Case("replicas", choice="expert"), Case("hybrid")]
    if full:
        cases = [case._replace(dtype=dtype, seed=seed) for case in cases for dtype in DTYPES for seed in SEEDS]
    return cases


def layout_of(strategy: str, ranks: int) -> Layout:
    """Arrange the ranks as a strategy wants them."""
    half = max(ranks // 2, 1)
    return {
        "tensor_parallel": Layout(E, hidden=ranks),
        "ep_tp": Layout(E, hidden=ranks // half, experts=half),
        "replicas": Layout(E, replicas=ranks // half, experts=half),
        "hybrid": Layout(E, replicas=ranks // half, experts=half),
        "hierarchical": Layout(E, nodes=half, experts=ranks // half),
    }.get(strategy, Layout(E, experts=ranks))


def wrapped(layer: ExpertLayer, strategy: str, grid: Grid) -> ExpertLayer:
    """Wrap a layer in a strategy; on one rank as well, where the groups have one member."""
    experts = partial(group_of, grid.exchange)
    size = grid.world.size
    if strategy in ("all_to_all", "replicas", "hybrid"):
        return all_to_all(layer, group=experts("experts"))
    if strategy == "all_gather":
        return all_gather(layer, group=experts("experts"))
    if strategy == "tensor_parallel":
        return tensor_parallel(layer, group=group_of(grid.experts, "hidden"))
    if strategy == "ep_tp":
        return all_to_all(tensor_parallel(layer, group=group_of(grid.experts, "hidden")), group=experts("experts"))
    if strategy == "hierarchical":
        inner = all_to_all(layer, group=experts("experts"))
        return in_order(all_to_all(inner, group=experts("nodes")), rank=grid.world.rank, num_ranks=size)
    if strategy == "chunked":
        exchange = all_to_all(layer, group=experts("experts"), return_group=grid.returns["experts"])
        return chunked(exchange, num_chunks=3)
    factor = {"static": float(size), "static_tight": 0.5}[strategy]
    return static_all_to_all(layer, group=experts("experts"), capacity_factor=factor)


def expert_choice(logits: Tensor, *, k: int, sizes: tuple[int, ...], pooled: bool) -> Routing:
    """Let every expert take its best tokens of each pool; one pool is (1, E, C), several become a list."""
    tokens, experts, weights, first = [], [], [], 0
    for size in sizes:
        scores = logits[first : first + size].softmax(-1)
        taken, chosen = scores.T.topk(math.ceil(size * k / E), dim=-1)  # (E, C)
        tokens.append(first + chosen)
        experts.append(torch.arange(E, device=logits.device).unsqueeze(1).expand_as(chosen))
        weights.append(taken)
        first += size
    columns = [torch.cat([each.flatten() for each in column]) for column in (tokens, experts, weights)]
    if pooled:
        columns = [column.view(1, E, -1) for column in columns]
    return Routing(*columns, num_tokens=first, num_experts=E, pool=columns[0].numel())


def route(logits: Tensor, *, bias: Tensor | None = None, case: Case, sizes: tuple[int, ...], pooled: bool) -> Routing:
    """Route as a case says, ``sizes`` being the tokens of the ranks at hand."""
    if case.choice == "expert":
        return expert_choice(logits, k=case.k, sizes=sizes, pooled=pooled)
    return top_k(logits, k=case.k)


def left_behind(routing: Routing, sizes: tuple[int, ...], ranks: int, factor: float) -> Routing:
    """Take out what a tight static exchange drops: tokens beyond C for a rank, or assignments of a list."""
    tokens, experts = routing.token_indices.flatten().tolist(), routing.expert_indices.flatten().tolist()
    starts = [sum(sizes[:n]) for n in range(ranks + 1)]
    kept, seen, counts, choices = [], {}, {}, routing.expert_indices.ndim == 2
    sources = [next(n for n in range(ranks) if starts[n] <= token < starts[n + 1]) for token in tokens]
    per_source = [sources.count(n) for n in range(ranks)]
    limits = [max(1, int(factor * number / ranks)) for number in per_source]
    wanted: dict[tuple[int, int], list[int]] = {}
    for source, token, expert in zip(sources, tokens, experts, strict=True):
        wanted.setdefault((source, expert // (E // ranks)), []).append(token)
    for (source, target), group in wanted.items():
        seen[source, target] = set(sorted(set(group))[: limits[source]])
    for source, token, expert in zip(sources, tokens, experts, strict=True):
        pair = source, expert // (E // ranks)
        stays = token in seen[pair] and (choices or counts.get(pair, 0) < limits[source])
        counts[pair] = counts.get(pair, 0) + (token in seen[pair])
        kept.append(expert if stays else -1)
    return routing._replace(expert_indices=routing.expert_indices.new_tensor(kept).view_as(routing.expert_indices))


def recipe_of(case: Case, layer: ExpertLayer, router: Callable[..., Routing]) -> Recipe:
    return Recipe(linear_gate, router, layer, init=init_gated, plan=dispatcher_of(case).plan)


def dispatcher_of(case: Case) -> Dispatcher:
    if not case.capacity:
        return dropless()
    return padded(capacity_factor=case.capacity, priority=PRIORITIES[case.priority])


def inner_layer(case: Case) -> ExpertLayer:
    return expert_layer(dispatcher=dispatcher_of(case), experts=partial(swiglu, matmul=loop if case.loops else grouped))


def model_of(case: Case, recipe: Recipe, world: World, **options) -> MoE:
    generator = torch.Generator().manual_seed(case.seed)
    return MoE(D, E, recipe, hidden=F, generator=generator, dtype=case.dtype, **options).to(world.device)


def stepped(moe: MoE, grid: Grid | None, x: Tensor, target: Tensor, count: int) -> dict[str, Tensor]:
    """Run forward, backward, clipping and one AdamW step; name everything that came out."""
    x = x.clone().requires_grad_()
    output = moe(x)
    ((output.y * target).sum() / count).backward()
    if grid is not None:
        sum_gradients(moe.parameters(), grid)
    found = {"y": output.y.detach(), "grad x": x.grad}
    found |= {f"grad {name}": whole(p.grad).clone() for name, p in moe.named_parameters()}
    norm = gradient_norm(moe, None if grid is None else grid.world)
    clip_gradients(moe, norm.item(), 1e-3)
    found["norm"] = norm
    make_optimizer(moe, OptimizerSettings(lr=0.1, eps=1e-4)).step()
    return found | {f"stepped {name}": whole(p).detach().clone() for name, p in moe.named_parameters()}


def compare(world: World, case: Case, grid: Grid) -> None:
    """Compare a strategy with one process, on this rank."""
    ranks, rank = world.size, world.rank
    generator = torch.Generator().manual_seed(case.seed + 1)
    sizes = case.tokens or tuple(torch.randint(0, 14, (ranks,), generator=generator).tolist())
    if case.strategy.startswith("static"):
        sizes = (11,) * ranks
    total = sum(sizes)
    drawn = (torch.randn(total, D, generator=generator, dtype=torch.float64) for _ in range(2))
    x, target = (each.to(world.device, case.dtype) for each in drawn)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def one_route(logits: Tensor, *, bias: Tensor | None = None) -> Routing:
        routing = route(logits, case=case, sizes=sizes, pooled=False)
        return left_behind(routing, sizes, ranks, 0.5) if case.strategy == "static_tight" else routing

    expected = stepped(
        model_of(case, recipe_of(case, inner_layer(case), one_route), world), None, x, target, max(total, 1)
    )
    layer = wrapped(inner_layer(case), case.strategy, grid)
    router = partial(route, case=case, sizes=(sizes[rank],), pooled=True)
    moe = model_of(case, recipe_of(case, layer, router), world, part=grid.part)
    distribute_experts(moe.experts, grid, hidden_axes(init_gated, D, F))
    found = stepped(moe, grid, x[own], target[own], max(total, 1))
    for name in ("y", "grad x"):
        expected[name] = expected[name][own]
    assert sorted(found) == sorted(expected)
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}[case.dtype]
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{case}, {n}: {m}"
        )
    assert total == 0 or expected["norm"] > 0


def lonely_grid(world: World) -> Grid:
    """Make a grid of one rank with all its meshes, so that strategies can be tried on one."""
    from torch.distributed.device_mesh import init_device_mesh

    return Grid(
        world,
        Layout(E),
        experts=init_device_mesh("cpu", (1, 1, 1, 1), mesh_dim_names=("copies", "shards", "hidden", "blocks")),
        exchange=init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("others", "nodes", "experts")),
        returns={"experts": torch.distributed.new_group([0])},
    )


def compile_static(world: World) -> None:
    """Compile a layer behind the static exchange, without a graph break, and compare every gradient with eager."""
    warnings.simplefilter("ignore", DeprecationWarning)  # the compiler's own
    case = Case("static", dtype=torch.float32)
    grid = make_grid(world, layout_of("static", world.size))
    for capacity, strategy in ((0.0, "static"), (0.7, "static_tight")):
        case = case._replace(capacity=capacity)
        layer = wrapped(inner_layer(case), strategy, grid)
        moe = model_of(case, recipe_of(case, layer, partial(top_k, k=3)), world, part=grid.part)
        generator = torch.Generator().manual_seed(world.rank)
        results = []
        for run in (moe, torch.compile(moe, fullgraph=True, backend="aot_eager")):
            moe.zero_grad()
            x = torch.randn(11, D, generator=generator.manual_seed(world.rank)).requires_grad_()
            y = run(x).y
            y.square().sum().backward()
            results.append({"y": y.detach(), "x": x.grad, **{n: p.grad.clone() for n, p in moe.named_parameters()}})
        for name, tensor in results[0].items():
            torch.testing.assert_close(
                results[1][name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert tensor.abs().sum() > 0, name
        with torch.no_grad():
            torch.testing.assert_close(
                torch.compile(moe, fullgraph=True, backend="aot_eager")(x).y, results[0]["y"], rtol=1e-5, atol=1e-5
            )


def second_groups(world: World) -> tuple[list[int], bool]:
    """Make a grid with second communicators; say whom one has, and whether it is another than the first."""
    grid = make_grid(world, Layout(E, experts=world.size), returning=True)
    group = grid.returns["experts"]
    return torch.distributed.get_process_group_ranks(group), group is not group_of(grid.exchange, "experts")


def drops_together(world: World) -> None:
    """Plan with the routing of all ranks, of different lengths: what is dropped is what one process drops."""
    sizes = (3, 0, 7)
    generator = torch.Generator().manual_seed(0)
    whole_routing = top_k(torch.randn(sum(sizes), E, generator=generator), k=2)
    plan = padded(capacity_factor=0.5).plan
    kept = set(plan(whole_routing).assignments.tolist())
    start, size = sum(sizes[: world.rank]), sizes[world.rank]
    experts, weights = (each[start : start + size] for each in whole_routing[1:3])
    tokens = torch.arange(size).unsqueeze(1).expand(-1, 2)
    own = Routing(tokens, experts, weights, num_tokens=size, num_experts=E, pool=2 * size)
    found = plan_together(plan, group=torch.distributed.group.WORLD)(own).assignments
    assert sorted(found[found >= 0].tolist()) == [n for n in range(2 * size) if 2 * start + n in kept]


def constant_on_empty(world: World) -> None:
    """Run a layer that forgets its inputs where it gets no rows: the other ranks must still get their gradients."""

    def layer(x, routing, params):
        return (
            torch.zeros(0, D, dtype=x.dtype) if x.shape[0] == 0 else inner_layer(Case("all_to_all"))(x, routing, params)
        )

    group = torch.distributed.group.WORLD
    for strategy in (all_to_all, partial(static_all_to_all, capacity_factor=1.0)):
        x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
        experts = torch.zeros(4, 1, dtype=torch.int64)  # rank 0's
        weights = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
        routing = Routing(torch.arange(4).unsqueeze(1), experts, weights, num_tokens=4, num_experts=6, pool=4)
        params = init_gated(2, D, F, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        strategy(layer, group=group)(x, routing, params).sum().backward()
        assert (x.grad != 0).any(-1).any()
        assert (weights.grad != 0).any()


def refused(world: World, num_experts: int) -> str:
    """Spread experts over ranks that cannot share them."""
    routing = top_k(torch.zeros(3, num_experts), k=1)
    messages = set()
    for strategy in (all_to_all, all_gather, partial(static_all_to_all, capacity_factor=1.0)):
        try:
            strategy(inner_layer(Case("")), group=torch.distributed.group.WORLD)(torch.ones(3, D), routing, None)
        except ValueError as error:
            messages.add(str(error).split(". Use")[0])
    assert len(messages) == 1
    return messages.pop()


def rows_sent(world: World) -> tuple[int, int, int]:
    """Count the rows that the inner layers of all ranks see, and the distinct pairs of (token, rank) in the routing."""
    seen = []

    def layer(x, routing, params):
        real = (routing.expert_indices >= 0).any(1)
        assert x.shape[0] == room_for(int(real.sum()))
        assert not x[~real].any()
        seen.append(int(real.sum()))
        return x

    experts = 1024  # many, so that choices without repetition are nearly independent
    generator = torch.Generator().manual_seed(world.rank)
    routing = top_k(torch.randn(512, experts, generator=generator), k=8)
    all_to_all(layer, group=torch.distributed.group.WORLD)(torch.ones(512, D), routing, None)
    owners = routing.expert_indices // (experts // world.size)
    return seen[0], sum(len(set(row)) for row in owners.tolist()), 512


def compare_all(world: World, cases: list[Case]) -> list[str]:
    """Compare every case; a failure ends the list, since the other ranks wait elsewhere then."""
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    grids: dict[tuple[Layout, int | None], Grid] = {}
    for case in cases:
        layout = layout_of(case.strategy, world.size)
        shards = world.size // 2 if case.strategy == "hybrid" else None  # replicas are copies, not shards
        if (layout, shards) not in grids:
            grids[layout, shards] = (
                make_grid(world, layout, ranks_per_shard=shards, returning=True)
                if world.size > 1
                else lonely_grid(world)
            )
        compare(world, case, grids[layout, shards])
    return [str(case) for case in cases]
