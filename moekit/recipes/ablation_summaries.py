"""What the runs of an ablation come to, router by router.

A number is a mean over seeds. Load is that over all validation sets together, so that an expert that serves one domain
alone is not called dead.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Line = Mapping[str, Any]  # of results.jsonl


class Spread(NamedTuple):
    """A number over seeds.

    Attributes:
        mean: over them.
        half_range: half of largest minus smallest; 0 for a single seed.
        values: one for each seed.
    """

    mean: float
    half_range: float
    values: tuple[float, ...]


class Summary(NamedTuple):
    """What a table says about a router.

    Attributes:
        label: its name.
        losses: name of a validation set to the loss, nats per token; nothing where a run failed.
        against: loss minus that of the first router with the same seed, averaged over validation sets; None for the
            first itself, and without a seed in common.
        experts_per_token: on validation, averaged over layers; simple experts, which cost nothing, are not counted.
        max_violation: on validation, of the worst layer: its busiest network's load over the mean load, minus 1.
        dead_experts: networks without a token on validation, over all layers.
        drop_rate: in training, by a capacity limit; the mean of the steps that were logged.
        tokens_per_second: of training.
        leaks_training: whether a token's output depends on later tokens when it is trained,
        leaks_evaluation: and when it is evaluated, so that its loss is that of a model that sees its targets.
        verdict: "trains", or what went wrong.
        older: whether a run is of a version that did not count the assignments of validation: see ``is_older``.
        counts_all: whether a run is of a version that counted what costs nothing: see ``counts_all``.
        seeds: of the ablation, those of all routers' lines; the numbers of a router are of fewer if runs are missing.

    All but the losses are means over seeds.
    """

    label: str
    losses: Mapping[str, Spread]
    against: Spread | None
    experts_per_token: float
    max_violation: float
    dead_experts: float
    drop_rate: float
    tokens_per_second: float
    leaks_training: bool
    leaks_evaluation: bool
    verdict: str
    older: bool
    counts_all: bool
    seeds: int


def spread(values: Sequence[float]) -> Spread:
    """Summarize a number over seeds.

    Args:
        values: one for each seed, at least one.

    Returns:
        Spread.

    Example:
        >>> spread([1.0, 2.0])
        Spread(mean=1.5, half_range=0.5, values=(1.0, 2.0))
    """
    return Spread(_mean(values), (max(values) - min(values)) / 2, tuple(values))


def summaries(lines: Sequence[Line]) -> list[Summary]:
    """Summarize runs by router, in the order in which routers appear.

    Args:
        lines: of ``results.jsonl``, one for each router and seed.

    Returns:
        One per router; the first is what the others are compared with.
    """
    by_router: dict[str, list[Line]] = {}
    for line in lines:
        by_router.setdefault(line["router"], []).append(line)
    first = next(iter(by_router.values()), [])
    seeds = len({line["seed"] for line in lines})
    return [_summary(label, own, None if own is first else first, seeds) for label, own in by_router.items()]


def _summary(label: str, lines: Sequence[Line], first: Sequence[Line] | None, seeds: int) -> Summary:
    whole = [line for line in lines if "failed" not in line]
    if not whole:
        nan = float("nan")
        return Summary(
            label,
            {},
            None,
            *(nan,) * 5,
            leaks_training=False,
            leaks_evaluation=False,
            verdict=verdict(lines),
            older=False,
            counts_all=False,
            seeds=seeds,
        )
    return Summary(
        label=label,
        losses={name: spread([line["validation"][name]["loss"] for line in whole]) for name in whole[0]["validation"]},
        against=None if first is None else _difference(whole, first),
        experts_per_token=_mean([line["experts_per_token"] for line in whole]),
        max_violation=_mean([max(map(_violation, loads(line))) for line in whole]),
        dead_experts=_mean([dead_experts(line) for line in whole]),
        drop_rate=_mean([line["drop_rate"] for line in whole]),
        tokens_per_second=_mean([tokens_per_second(line) for line in whole]),
        leaks_training=any(line["leaks"]["training"] for line in whole),
        leaks_evaluation=any(line["leaks"]["evaluation"] for line in whole),
        verdict=verdict(lines),
        older=any(map(is_older, whole)),
        counts_all=any(map(counts_all, whole)),
        seeds=seeds,
    )


def tokens_per_second(line: Line) -> float:
    """Say how fast a run was, by the tokens that it trained on.

    Args:
        line: of ``results.jsonl``; one of an older version, or of steps of another program, has nominal tokens alone.

    Returns:
        Tokens per second of training.

    Example:
        >>> tokens_per_second({"tokens": 512, "trained_tokens": 500, "seconds": 2.0})
        250.0
    """
    trained = line.get("trained_tokens")
    return float((line["tokens"] if trained is None else trained) / max(line["seconds"], 0.1))


def loads(line: Line) -> list[list[float]]:
    """Add the loads of a run's validation sets up, each by its assignments.

    Args:
        line: of a run; in one of an older version a set counts by its tokens.

    Returns:
        For each MoE layer, the share of assignments of each network; zeros where there is no assignment. What is
        missing to 1 went to simple experts.

    Example:
        >>> one, other = ({"layers": [{"load": [e, 1.0 - e], "assignments": 1 + 2 * e}]} for e in (0, 1))
        >>> loads({"validation": {"prose": one, "code": other}})
        [[0.75, 0.25]]
    """
    older = is_older(line)
    by_set = [
        [(each["tokens"] if older else layer["assignments"], _of_networks(layer)) for layer in each["layers"]]
        for each in line["validation"].values()
    ]
    return [_added(of_sets) for of_sets in zip(*by_set, strict=True)]


def _of_networks(layer: Line) -> Sequence[float]:
    load: Sequence[float] = layer["load"]
    return load[: len(load) - layer.get("simple_experts", 0)]


def _added(of_sets: Sequence[tuple[int, Sequence[float]]]) -> list[float]:
    """Add the shares of one layer up, each by its set's weight."""
    total = sum(weight for weight, _ in of_sets) or 1
    parts = [[weight * share for share in load] for weight, load in of_sets]
    return [sum(of_expert) / total for of_expert in zip(*parts, strict=True)]


def _violation(load: Sequence[float]) -> float:
    return max(load) * len(load) / sum(load) - 1 if any(load) else 0.0


def is_older(line: Line) -> bool:
    """Say whether a run is of a version that did not count assignments, so that its numbers are other ones.

    Its loads are weighed by tokens, its experts per token are those of each set's first batch, and its ``unigram`` is
    the entropy of up to a million tokens of a set, however many are scored.

    Args:
        line: of a run that has not failed.

    Returns:
        Whether it is.

    Example:
        >>> is_older({"validation": {"prose": {"layers": [{"load": [1.0]}]}}})
        True
    """
    return any("assignments" not in layer for each in line["validation"].values() for layer in each["layers"])


def counts_all(line: Line) -> bool:
    """Say whether a run is of a version that counted what costs nothing.

    Its numbers take simple experts for networks, and have the slots of sequences without a token.

    Args:
        line: of a run that has not failed.

    Returns:
        Whether it is.

    Example:
        >>> counts_all({"validation": {"prose": {"layers": [{"load": [1.0], "assignments": 2}]}}})
        True
    """
    return any("simple_experts" not in layer for each in line["validation"].values() for layer in each["layers"])


def dead_experts(line: Line) -> int:
    """Count the networks of all layers that no validation set sends a token to.

    Args:
        line: of a run.

    Returns:
        How many.
    """
    return sum(load.count(0.0) for load in loads(line))


def verdict(lines: Sequence[Line]) -> str:
    """Say whether a router collapsed.

    It did if a loss was not finite, if an expert of some layer got no token of validation, or if a validation set is
    scored no better than by the best distribution without context. One seed is enough.

    Args:
        lines: of a router's runs.

    Returns:
        "trains", "collapsed" with the reason, or "failed" with the class of the error that ended a run.
    """
    errors = [line["error"] for line in lines if "error" in line]
    if errors:
        return f"failed: {errors[0]}"
    if any("failed" in line for line in lines):
        return "collapsed: not finite"
    dead = max(dead_experts(line) for line in lines)
    if dead:
        return f"collapsed: {dead} dead"
    scored = [scores for line in lines for scores in line["validation"].values()]
    blind = any(scores["loss"] >= scores["unigram"] for scores in scored)
    return "collapsed: unigram" if blind else "trains"


def _difference(lines: Sequence[Line], first: Sequence[Line]) -> Spread | None:
    base = {line["seed"]: _loss(line) for line in first if "failed" not in line}
    paired = [_loss(line) - base[line["seed"]] for line in lines if line["seed"] in base]
    return spread(paired) if paired else None


def _loss(line: Line) -> float:
    return _mean([scores["loss"] for scores in line["validation"].values()])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
