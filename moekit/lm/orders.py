"""Which sequences come next: the order of the data, planned in integers before a byte is read.

The order is a pure function of the sequences per shard, the weights, the seed, the number of lanes and the batch size.
Ranks and workers do not enter it: each of them walks through the whole order and reads what is its own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moekit.lm.permutations import Address, block_permutation, shuffled, visits

__all__ = [
    "Address",
    "DataExhausted",
    "Order",
    "block_permutation",
    "check_budget",
]

_EXACT_UP_TO = 2_000_000


class DataExhausted(ValueError):
    """The order asks for a sequence of a source of which every allowed pass is used up."""


class Order:
    """The order in which a run takes its sequences, from one or several sources of shards.

    Each sequence comes from the source that is furthest behind its share (of equals, the first), so the weights hold
    whatever the sizes are: after any number of steps to within one sequence with up to three sources, and with more to
    little more than one. Which of them has which slot of its step is drawn, for ranks and micro-batches take slots at
    regular distances, and would have sources of their own. A source visits its shards in an order drawn for each pass,
    and reads several shards at once, one per lane: the n-th sequence is served by lane n modulo ``lanes``. A lane
    without a shard claims the next one of the pass; if none is left, the sequence comes from the lane that has most
    left (of equals, the first). So a pass has every sequence exactly once, and ends before the next begins.

    Args:
        counts: sequences per shard, for each source; shards without any are skipped.
        weights: one positive number per source; their scale does not matter. None: in proportion to the number of
            sequences.
        seed: the same seed gives the same order.
        lanes: shards of a source that are read at the same time.
        max_passes: how often a source may be gone through; None is without end.

    Raises:
        ValueError: if there is no source, a source has no sequences, the weights are not one positive number per
            source, or ``lanes`` or ``max_passes`` is below 1.

    Example:
        >>> order = Order([[2, 2], [3]], seed=0, lanes=2)
        >>> [tuple(address) for address in order.step(3)]
        [(0, 0, 0, 1, 0), (0, 1, 0, 0, 0), (1, 0, 0, 0, 0)]
    """

    def __init__(
        self,
        counts: Sequence[Sequence[int]],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        lanes: int = 8,
        max_passes: int | None = None,
    ) -> None:
        _check_weights(weights, num_sources=len(counts))
        for name, value in (("lanes", lanes), ("max_passes", max_passes)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        for source, shards in enumerate(counts):
            if min(shards, default=0) < 0 or sum(shards) < 1:
                raise ValueError(
                    f"source {source} holds {sum(shards)} sequences in {len(shards)} shards; expected at least one "
                    "sequence. Leave out a source that has none"
                )
        self.weights = [float(weight) for weight in weights or map(sum, counts)]
        self._shares = _shares(self.weights)
        self._taken = [0] * len(counts)
        self._seed, self._lanes = seed, lanes
        self._sources = [
            _SourceOrder(number, shards, seed=seed, lanes=lanes, max_passes=max_passes)
            for number, shards in enumerate(counts)
        ]

    @property
    def passes(self) -> tuple[int, ...]:
        """How often each source was used up so far."""
        return tuple(source.data_pass for source in self._sources)

    @property
    def taken(self) -> tuple[int, ...]:
        """How many sequences each source has given so far."""
        return tuple(self._taken)

    def step(self, batch_size: int) -> tuple[Address, ...]:
        """Return the addresses of the next global batch, in slot order.

        Args:
            batch_size: sequences in it, over all ranks.

        Raises:
            DataExhausted: if there are fewer left in a source that may not be gone through again; the order stays where
                it is.
        """
        before, done = self.state_dict(), sum(self._taken)
        try:
            return tuple(
                self._sources[source].next((done + slot) % self._lanes)
                for slot, source in enumerate(self._next_sources(batch_size, done))
            )
        except DataExhausted:
            self.load_state_dict(before)
            raise

    def _next_sources(self, number: int, done: int) -> list[int]:
        """Choose the sources of the next step, and draw who has which slot."""
        chosen = []
        for _ in range(number):
            chosen.append(_furthest_behind(self._shares, self._taken))
            self._taken[chosen[-1]] += 1
        return shuffled(chosen, f"{self._seed}/slots/{done}")

    def state_dict(self) -> dict[str, Any]:
        """Return the position, made of ints, lists and dicts alone."""
        return {"taken": list(self._taken), "sources": [source.state_dict() for source in self._sources]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state_dict` of an order with the same arguments returned; ValueError if it is none."""
        taken, positions = state.get("taken", []), state.get("sources", [])
        for part in (taken, positions):
            if not isinstance(part, list) or len(part) != len(self._sources):
                raise ValueError(f"the saved position is damaged: it has {part!r} for {len(self._sources)} sources")
        for number, source in enumerate(self._sources):
            source.load_state_dict(positions[number])
            if taken[number] != source.taken:
                raise ValueError(
                    f"the saved position is damaged: {taken[number]!r} sequences were taken of source {number}, but "
                    f"its shards are {source.taken} sequences on"
                )
        self._taken = list(taken)


class _SourceOrder:
    """The order of one source: which shard each lane is in, and how far."""

    def __init__(self, source: int, counts: Sequence[int], *, seed: int, lanes: int, max_passes: int | None) -> None:
        self._source, self._counts, self._seed, self._lanes = source, list(counts), seed, lanes
        self._max_passes = max_passes
        self._start(0)

    def next(self, lane: int) -> Address:
        if self._max_passes is not None and self.data_pass >= self._max_passes:
            raise DataExhausted(
                f"source {self._source} is used up: its {sum(self._counts):,} sequences were taken in "
                f"{self.data_pass} passes and no more are allowed. Go over the data again with --multiple-data-passes, "
                "or ask for less with --train-num-samples or --epochs"
            )
        lane = self._serving(lane)
        shard = self._shards[lane]
        address = Address(self._source, lane, self.data_pass, shard, self._counts[shard] - self._left[lane])
        self._left[lane] -= 1
        self._left_in_pass -= 1
        if not self._left_in_pass:
            self._start(self.data_pass + 1)
        return address

    @property
    def taken(self) -> int:
        total = sum(self._counts)
        return (self.data_pass + 1) * total - self._left_in_pass

    def state_dict(self) -> dict[str, Any]:
        lanes = [[shard, left] for shard, left in zip(self._shards, self._left, strict=True)]
        return {"pass": self.data_pass, "claimed": self._claimed, "lanes": lanes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not self._is_position(state):
            raise ValueError(f"the saved position of source {self._source} is damaged: {state!r}")
        self._start(state["pass"])
        self._claimed = state["claimed"]
        self._shards = [shard for shard, _ in state["lanes"]]
        self._left = [left for _, left in state["lanes"]]
        self._left_in_pass = sum(self._left) + sum(self._counts[shard] for shard in self._visits[self._claimed :])

    def _is_position(self, state: Any) -> bool:
        lanes = state.get("lanes") if isinstance(state, Mapping) else None
        if not isinstance(lanes, list) or len(lanes) != self._lanes or not all(map(self._is_lane, lanes)):
            return False
        return _is_within(state.get("pass"), math.inf) and _is_within(state.get("claimed"), len(self._visits))

    def _is_lane(self, lane: Any) -> bool:
        if not isinstance(lane, list) or len(lane) != 2:
            return False
        shard, left = lane  # -1 is no shard yet, of which nothing is left
        return _is_within(shard, len(self._counts) - 1, least=-1) and _is_within(
            left, self._counts[shard] if shard >= 0 else 0
        )

    def _start(self, data_pass: int) -> None:
        self.data_pass = data_pass
        self._visits = visits(self._counts, seed=self._seed, source=self._source, data_pass=data_pass)
        self._claimed = 0
        self._shards, self._left = [-1] * self._lanes, [0] * self._lanes
        self._left_in_pass = sum(self._counts)

    def _serving(self, lane: int) -> int:
        if self._left[lane]:
            return lane
        if self._claimed < len(self._visits):
            self._shards[lane] = self._visits[self._claimed]
            self._left[lane] = self._counts[self._shards[lane]]
            self._claimed += 1
            return lane
        return self._left.index(max(self._left))


def _is_within(number: Any, most: float, *, least: int = 0) -> bool:
    return type(number) is int and least <= number <= most


def _sequences_needed(num_sequences: int, weights: Sequence[float]) -> list[int]:
    """Count how many sequences of each source a run takes of ``num_sequences``.

    Exact for a single source and up to 2 million sequences, by going through the rule; above that a bound: of k sources
    the one that is furthest behind lacks 1 / k of a sequence or more, so that none gets past share * n + 1 - 1 / k.
    """
    _check_weights(weights, num_sources=len(weights))
    shares = _shares(weights)
    if len(weights) == 1:
        return [num_sequences]
    if num_sequences > _EXACT_UP_TO:
        return [math.floor(share * num_sequences + 1 - 1 / len(shares)) for share in shares]
    taken = [0] * len(shares)
    for _ in range(num_sequences):
        taken[_furthest_behind(shares, taken)] += 1
    return taken


def check_budget(
    names: Sequence[str],
    counts: Sequence[Sequence[int]],
    weights: Sequence[float] | None = None,
    *,
    num_sequences: int,
    max_passes: int | None,
) -> None:
    """Check before the first step that the sources last for the whole run.

    Args:
        names: what the user calls each source, such as the path of its manifest.
        counts: sequences per shard, for each source.
        weights: see `Order`.
        num_sequences: sequences in the whole run.
        max_passes: how often a source may be gone through; None is without end, so everything lasts.

    Raises:
        ValueError: if a source does not last; it names every source, with what it holds and what is needed.

    Example:
        >>> check_budget(["a", "b"], [[50, 50], [40]], [0.5, 0.5], num_sequences=80, max_passes=1)
    """
    held = [sum(shards) for shards in counts]
    _check_weights(weights, num_sources=len(counts))
    needed = _sequences_needed(num_sequences, weights or held)
    if max_passes is None or all(n <= max_passes * h for n, h in zip(needed, held, strict=True)):
        return
    lines = [
        f"  {name}: {n:,} needed, {max_passes * h:,} there"
        + (f" ({n - max_passes * h:,} short)" * (n > max_passes * h))
        for name, n, h in zip(names, needed, held, strict=True)
    ]
    passes = "one pass" if max_passes == 1 else f"{max_passes} passes"
    raise ValueError(
        f"the run takes {num_sequences:,} sequences, more than {passes} over the data can give:\n"
        + "\n".join(lines)
        + "\n"
        "Go over the data again with --multiple-data-passes, ask for less with --train-num-samples or --epochs, "
        "or change the weights with --train-data-mix-weights"
    )


def _check_weights(weights: Sequence[float] | None, *, num_sources: int) -> None:
    """Check that there is at least one source, and one positive weight for each."""
    if not num_sources:
        raise ValueError("there is no source; expected at least one manifest")
    if weights is None:
        return
    if len(weights) != num_sources:
        raise ValueError(
            f"there are {len(weights)} weights, {list(weights)}, for {num_sources} manifests; expected one per manifest"
        )
    if not all(0 < weight < math.inf for weight in weights) or sum(weights) == math.inf:
        raise ValueError(
            f"weights are {list(weights)}; expected positive numbers, of a finite sum. Leave out a source that you do "
            "not want"
        )


def _shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def _furthest_behind(shares: Sequence[float], taken: Sequence[int]) -> int:
    if len(shares) == 1:
        return 0
    number = sum(taken) + 1
    behind = [share * number - n for share, n in zip(shares, taken, strict=True)]
    return behind.index(max(behind))
