"""What each stage of a layer costs, alone: of the composed layer, forward, and of the fused one, also backward."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.dispatch import dropless
from moekit.experts import grouped, swiglu
from moekit.recipes.bench.fused_stages import fused_stages
from moekit.recipes.bench.rows import Case, reason_of
from moekit.recipes.bench.times import Work, queue_launches
from moekit.routing import linear_gate


class Stage(NamedTuple):
    """One stage.

    Attributes:
        name: of the stage.
        seconds: of each round.
        nbytes: that have to be read and written at least.
        flops: of its products; 0 if it has none.
    """

    name: str
    seconds: list[float]
    nbytes: int
    flops: int

    @property
    def gigabytes_per_second(self) -> float:
        """Of the best round."""
        return self.nbytes / min(self.seconds) / 1e9

    @property
    def teraflops(self) -> float:
        """TFLOP/s of the best round."""
        return self.flops / min(self.seconds) / 1e12


def measure_stages(
    case: Case, rounds: int, *, fused: bool = True, tell: Callable[[str], object] = lambda line: None
) -> dict[str, list[Stage]]:
    """Measure the stages of layers, in turn: those of the dropless layer on ``grouped``, and of ``fused_layer``.

    Args:
        case: to compute with.
        rounds: how often.
        fused: whether those of ``fused_layer`` are wanted.
        tell: gets a line for a layer that does not work here.

    Returns:
        By layer, a stage each; without layers that do not work here.
    """
    layers = {"grouped, forward": composed_stages, **({"fused_layer": fused_stages} if fused else {})}
    found = {}
    for name, stages in layers.items():
        try:
            works = stages(case)
            for work in works.values():
                work.run()
        except Exception as error:  # as the layer's row: whatever it raises is the answer
            tell(f"  stages of {name}: skipped, {reason_of(error)}")
        else:
            found[name] = _measured(works, case.x, rounds)
    return found


def _measured(works: Mapping[str, Work], like: Tensor, rounds: int) -> list[Stage]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(_seconds(work.run, like))
    return [Stage(name, times[name], work.nbytes, work.flops) for name, work in works.items()]


def shares(stages: list[Stage]) -> list[float]:
    """Say which share of their sum each stage takes, by medians.

    Example:
        >>> shares([Stage("gate", [1.0], 0, 0), Stage("route", [3.0], 0, 0)])
        [0.25, 0.75]
    """
    medians = [median(stage.seconds) for stage in stages]
    return [each / sum(medians) for each in medians]


def composed_stages(case: Case) -> dict[str, Work]:
    """Return the stages of the dropless layer on ``grouped``, forward.

    Args:
        case: to compute with.

    Returns:
        By name.
    """
    shape, dispatcher = case.shape, dropless()
    x, gate, experts = case.x.detach(), case.gate.detach(), type(case.experts)(*(w.detach() for w in case.experts))
    logits = linear_gate(x, gate)
    routing = case.route(logits)
    plan = dispatcher.plan(routing)
    rows = dispatcher.dispatch(x, routing, plan)
    y = swiglu(rows, plan.groups, experts, matmul=grouped)
    decision = routing.expert_indices.nbytes + routing.weights.nbytes
    live = int(plan.groups.sizes.count_nonzero())  # experts with rows, whose matrices are read
    moved, matrices = x.nbytes + rows.nbytes, sum(w[0].nbytes for w in experts) * live
    return {
        "gate": Work(
            partial(linear_gate, x, gate), x.nbytes + gate.nbytes + logits.nbytes, 2 * shape.tokens * gate.numel()
        ),
        "route": Work(partial(case.route, logits), logits.nbytes + decision),
        "plan": Work(partial(dispatcher.plan, routing), decision + plan.assignments.nbytes),
        "dispatch": Work(partial(dispatcher.dispatch, x, routing, plan), moved),
        "experts": Work(
            partial(swiglu, rows, plan.groups, experts, matmul=grouped), 2 * rows.nbytes + matrices, shape.flops
        ),
        "combine": Work(partial(dispatcher.combine, y, routing, plan), moved),
    }


_QUEUED = 20  # runs on CUDA, so that the host is ahead of all but the shortest


def _seconds(run: Callable[[], object], like: Tensor) -> float:
    if like.is_cuda:
        seconds = queue_launches(run, _QUEUED)
        torch.cuda.synchronize()
        return seconds()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
