"""What strategies do at their edges, on four ranks: second derivatives, refusals, no choices, weights drawn anew."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from strategy_cases import Case, D, E, F, inner_layer, layout_of, route, wrapped
from torch import Tensor, nn

from moekit.dispatch import dropless_plan
from moekit.experts import init_biased_gated, init_gated
from moekit.parallel import (
    Grid,
    Layout,
    Part,
    World,
    all_gather,
    all_to_all,
    chunked,
    distribute_experts,
    local,
    make_grid,
    shard_model,
    static_all_to_all,
    tensor_parallel,
    whole,
)
from moekit.parallel.collectives import room_for
from moekit.recipes import MoE, mixtral
from moekit.recipes.expert_parameters import draw_experts, hidden_axes
from moekit.routing import top_k
from moekit.types import ExpertLayer, Routing, existing_at_most

T = 5
STRATEGIES: dict[str, Callable[..., ExpertLayer]] = {
    "all_to_all": all_to_all,
    "static_all_to_all": partial(static_all_to_all, capacity_factor=4.0),
    "all_gather": all_gather,
    "tensor_parallel": tensor_parallel,
    "chunked": lambda layer, group: chunked(all_to_all(layer, group=group), num_chunks=2),
}


def edges(world: World) -> None:
    """Go through all of them; a failure ends the list, since the other ranks wait elsewhere then."""
    second_derivatives(world)
    mismatches_are_refused(world)
    output_biases_are_refused(world)
    tokens_without_choices(world)
    hosts_know_how_many_choices_arrive(world)
    experts_are_drawn_anew(world)


def second_derivatives(world: World) -> None:
    """Differentiate the norm of a gradient, as gradient penalties do; ranks may have experts that no token chose."""
    grid = make_grid(world, layout_of("all_to_all", world.size), returning=True)
    for strategy in ("all_to_all", "static", "all_gather", "chunked"):
        for bend in (torch.sin, torch.sum):
            _compare_penalties(Case(strategy, loops=True), grid, bend)
        if strategy == "all_to_all":
            _compare_penalties(Case(strategy, choice="expert", loops=True), grid, torch.sin)
    for strategy in ("ep_tp", "hierarchical"):
        grid = make_grid(world, layout_of(strategy, world.size))
        _compare_penalties(Case(strategy, loops=True), grid, torch.sin)


def _compare_penalties(case: Case, grid: Grid, bend: Callable[[Tensor], Tensor]) -> None:
    rank, ranks = grid.world.rank, grid.world.size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ranks * T, D, generator=generator, dtype=torch.float64)
    gate = torch.randn(D, E, generator=generator, dtype=torch.float64)
    offset = 99.0 * (torch.arange(E) < 3)  # k = 3: all tokens go to the first rank or two

    def penalty(layer: ExpertLayer, tokens: Tensor, sizes: tuple[int, ...], pooled: bool, part: Part) -> list[Tensor]:
        tokens, own_gate = tokens.clone().requires_grad_(), gate.clone().requires_grad_()
        seed = torch.Generator().manual_seed(1)
        drawn = draw_experts(init_gated, E, D, F, part=part, generator=seed, dtype=torch.float64)
        params = type(drawn)(*(each.requires_grad_() for each in drawn))
        routing = route(tokens @ own_gate + offset, case=case, sizes=sizes, pooled=pooled)
        y = layer(tokens, routing, params)
        [grad] = torch.autograd.grad(bend(y).sum(), tokens, create_graph=True)
        return [*torch.autograd.grad(grad.square().sum(), [tokens, own_gate, *params])]

    expected = penalty(inner_layer(case), x, (T,) * ranks, False, Part())
    found = penalty(wrapped(inner_layer(case), case.strategy, grid), x.split(T)[rank], (T,), True, grid.part)
    dist.all_reduce(found[1])
    units = slice(grid.part.hidden * (F // grid.part.slices), (grid.part.hidden + 1) * (F // grid.part.slices))
    experts = list(grid.part.experts(E))
    expected[0] = expected[0].split(T)[rank]
    expected[2:] = [each[experts] for each in expected[2:]]
    expected[2:] = [expected[2][:, :, units], expected[3][:, :, units], expected[4][:, units]]
    for name, mine, theirs in zip(("x", "gate", *init_gated(1, 1)._fields), found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{case}, {n}: {m}")
    assert any(each.abs().max() > 1e-3 for each in expected)


def mismatches_are_refused(world: World) -> None:
    """Every rank raises, and none is left waiting for another."""
    routing = top_k(torch.randn(T, E), k=2)
    for name, strategy in STRATEGIES.items():
        layer = strategy(inner_layer(Case("")), group=dist.group.WORLD)
        for size in (T + 2, T - 2):
            _refused(layer, torch.ones(size, D), routing, rf"^{name}: x has shape \({size}, 6\); expected \(5, width\)")
        _refused(layer, torch.ones(T, 1, D), routing, rf"^{name}: x has shape \(5, 1, 6\); .* flattened to two axes")
        narrow = routing._replace(weights=routing.weights[:, :1])
        _refused(layer, torch.ones(T, D), narrow, rf"^{name}: the routing has weights \(5, 1\), experts \(5, 2\)")
        short = routing._replace(token_indices=routing.token_indices.int())
        _refused(layer, torch.ones(T, D), short, rf"^{name}: the routing has experts of .* expected torch\.int64")
    dist.barrier()


def output_biases_are_refused(world: World) -> None:
    """Each rank would add the whole bias."""
    routing = top_k(torch.randn(T, E), k=2)
    message = "with a down_bias, which each of the 4 ranks would add .* Spread whole experts, by all_to_all"
    layer = tensor_parallel(inner_layer(Case("")), group=dist.group.WORLD)
    _refused(layer, torch.ones(T, D), routing, message, init_biased_gated(E, D, F // world.size))


def _refused(layer: ExpertLayer, x: Tensor, routing: Routing, message: str, params: Any = None) -> None:
    with pytest.raises(ValueError, match=message):
        layer(x, routing, params)


def tokens_without_choices(world: World) -> None:
    """K = 0: every token gets zero, and a gradient of zero."""
    none = torch.zeros(T, 0, dtype=torch.int64)
    for strategy in STRATEGIES.values():
        for positions in (None, none):
            x, weights = torch.ones(T, D, requires_grad=True), torch.zeros(T, 0, requires_grad=True)
            routing = Routing(none, none, weights, num_tokens=T, num_experts=E, pool=0, positions=positions)
            split = strategy is not tensor_parallel
            params = init_gated(E // world.size if split else E, D, F)
            y = strategy(inner_layer(Case("", loops=True)), group=dist.group.WORLD)(x, routing, params)
            assert y.shape == (T, D)
            assert not y.any()
            y.sum().backward()
            assert not x.grad.any()


def hosts_know_how_many_choices_arrive(world: World) -> None:
    """Choices of other ranks' experts take no memory; where nobody asks, any of them may exist."""
    arrived: list[Routing] = []

    def layer(x: Tensor, routing: Routing, params: Any) -> Tensor:
        arrived.append(routing)
        return torch.zeros_like(x)

    generator = torch.Generator().manual_seed(world.rank)
    routing = top_k(torch.randn(T + world.rank, E, generator=generator), k=3)  # ranks have unlike numbers of tokens
    x, params = torch.ones(routing.num_tokens, D), init_gated(1, D, F)
    for name, strategy in STRATEGIES.items():
        if name == "static_all_to_all":
            continue
        arrived.clear()
        strategy(layer, group=dist.group.WORLD)(x, routing, params)
        for each in arrived:
            room = room_for(int((each.expert_indices >= 0).sum()))
            assert existing_at_most(each) == min(room, each.expert_indices.numel()), name
            assert dropless_plan(each).assignments.shape == (existing_at_most(each),)
        assert arrived
    slices = all_to_all(tensor_parallel(layer, group=dist.group.WORLD), group=dist.group.WORLD)
    slices(x, routing, params)
    total = torch.tensor(routing.expert_indices.numel())
    dist.all_reduce(total)
    assert existing_at_most(arrived[-1]) < arrived[-1].expert_indices.numel()
    assert int(total) <= arrived[-1].most <= int(total) + 16 * world.size


def experts_are_drawn_anew(world: World) -> None:
    """A module of the meta device, whose experts were distributed, and sharded over their replicas, or not."""
    expected = MoE(D, E, mixtral(), hidden=F, generator=torch.Generator().manual_seed(3))
    for layout, shards in (
        (Layout(E, hidden=2, experts=2), False),
        (Layout(E, replicas=2, experts=2), False),
        (Layout(E, replicas=2, experts=2), True),
    ):
        grid = make_grid(world, layout)
        with torch.device("meta"):
            moe = MoE(D, E, mixtral(), hidden=F, part=grid.part)
        distribute_experts(moe.experts, grid, hidden_axes(init_gated, D, F))
        if shards:
            shard_model(nn.Sequential(moe), [moe], grid, experts=[moe.experts], reduce_dtype=torch.float32)
        moe.to_empty(device="cpu")
        moe.reset_parameters(generator=torch.Generator().manual_seed(3))
        for name, parameter in expected.named_parameters():
            assert torch.equal(whole(moe.get_parameter(name)).detach(), parameter), (layout, shards, name)
        held = local(moe.experts.up).numel() * world.size
        assert held == expected.experts.up.numel() * (1 if shards else layout.replicas)
