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
from moekit.recipes.bench.rows import Case
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


def measure_stages(case: Case, rounds: int) -> dict[str, list[Stage]]:
    """Measure the stages of layers, in turn: those of the dropless layer on ``grouped``, and of ``fused_layer``.

    Args:
        case: to compute with.
        rounds: how often.

    Returns:
        By a layer's row and direction, a stage each; without layers that do not work here.
    """
    layers = {"grouped, forward": composed_stages, "fused_layer": fused_stages}
    found = {name: _measured(stages, case, rounds) for name, stages in layers.items()}
    return {name: stages for name, stages in found.items() if stages}


def _measured(stages: Callable[[Case], Mapping[str, Work]], case: Case, rounds: int) -> list[Stage]:
    try:
        works = stages(case)
        for work in works.values():
            work.run()
    except Exception:  # the layer's row of the same table says why
        return []
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(_seconds(work.run, case.x))
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
    moved, matrices = x.nbytes + rows.nbytes, sum(w.nbytes for w in experts)
    return {
        "gate": Work(partial(linear_gate, x, gate), x.nbytes + logits.nbytes, 2 * shape.tokens * gate.numel()),
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
