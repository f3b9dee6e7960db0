"""What each stage of a composed layer costs, alone: gate, route, plan, dispatch, experts, combine."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.dispatch import dropless
from moekit.experts import grouped, swiglu
from moekit.recipes.bench.rows import Case
from moekit.recipes.bench.times import queue_launches
from moekit.routing import linear_gate


class Stage(NamedTuple):
    """One stage's forward.

    Attributes:
        name: of the stage.
        seconds: of each round.
        rate: work of the best round per second, in ``unit``.
        unit: GB/s of what has to be read and written at least, or TFLOP/s.
    """

    name: str
    seconds: list[float]
    rate: float
    unit: str


class _Body(NamedTuple):
    run: Callable[[], object]
    work: float
    unit: str


@torch.no_grad()
def measure_stages(case: Case, rounds: int) -> list[Stage]:
    """Measure the stages of the dropless layer on ``grouped``, in turn.

    Args:
        case: to compute with.
        rounds: how often.

    Returns:
        A stage each; empty where ``grouped`` does not work.
    """
    try:
        bodies = _bodies(case)
        for body in bodies.values():
            body.run()
    except Exception:  # the row `grouped` of the same table says why
        return []
    times: dict[str, list[float]] = {name: [] for name in bodies}
    for _ in range(rounds):
        for name, body in bodies.items():
            times[name].append(_seconds(body.run, case.x))
    scale = {"GB/s": 1e9, "TFLOP/s": 1e12}
    return [
        Stage(name, times[name], body.work / min(times[name]) / scale[body.unit], body.unit)
        for name, body in bodies.items()
    ]


def shares(stages: list[Stage]) -> list[float]:
    """Say which share of their sum each stage takes, by medians.

    Example:
        >>> shares([Stage("gate", [1.0], 0.0, ""), Stage("route", [3.0], 0.0, "")])
        [0.25, 0.75]
    """
    medians = [median(stage.seconds) for stage in stages]
    return [each / sum(medians) for each in medians]


def _bodies(case: Case) -> dict[str, _Body]:
    shape, dispatcher = case.shape, dropless()
    logits = linear_gate(case.x, case.gate)
    routing = case.route(logits)
    plan = dispatcher.plan(routing)
    rows = dispatcher.dispatch(case.x, routing, plan)
    y = swiglu(rows, plan.groups, case.experts, matmul=grouped)
    decision = routing.expert_indices.nbytes + routing.weights.nbytes
    moved = case.x.nbytes + rows.nbytes
    return {
        "gate": _Body(partial(linear_gate, case.x, case.gate), case.x.nbytes + logits.nbytes, "GB/s"),
        "route": _Body(partial(case.route, logits), logits.nbytes + decision, "GB/s"),
        "plan": _Body(partial(dispatcher.plan, routing), decision + plan.assignments.nbytes, "GB/s"),
        "dispatch": _Body(partial(dispatcher.dispatch, case.x, routing, plan), moved, "GB/s"),
        "experts": _Body(partial(swiglu, rows, plan.groups, case.experts, matmul=grouped), shape.flops, "TFLOP/s"),
        "combine": _Body(partial(dispatcher.combine, y, routing, plan), moved, "GB/s"),
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
