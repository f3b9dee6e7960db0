"""Bytes and messages of collectives, as one rank of a group sends them, from shapes alone."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_INT64, _FLOAT32 = 8, 4
_COUNTS = 4  # integers that ranks tell each other first: rows, assignments, and the pool as a fraction


class Shape(NamedTuple):
    """An MoE layer, and the tokens that a rank gives it.

    Attributes:
        tokens: T on each rank.
        width: D.
        hidden: F of each expert.
        experts: E.
        top_k: K.
        element_bytes: of an element of a token, a parameter or a gradient; 2 for bf16.
        matrices: (D, F) matrices of an expert; 3 for SwiGLU.
    """

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int
    element_bytes: int = 2
    matrices: int = 3

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return self.width * self.element_bytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of all E experts' parameters."""
        return self.matrices * self.experts * self.width * self.hidden * self.element_bytes

    @property
    def flops(self) -> int:
        """Operations of a rank's share of the experts: T * K rows, forward once and backward twice."""
        return 6 * self.matrices * self.tokens * self.top_k * self.width * self.hidden


class Peers(NamedTuple):
    """The ranks of a group, as one of them sees it.

    Attributes:
        size: P, itself included.
        near: those in its node, itself included.
    """

    size: int
    near: int

    @property
    def far(self) -> int:
        """Ranks in other nodes."""
        return self.size - self.near


class Sent(NamedTuple):
    """What one rank sends in one collective.

    Attributes:
        name: of what is sent.
        backward: whether the backward pass sends it.
        own: bytes that stay on the rank.
        node: bytes to ranks of its node.
        network: bytes to other nodes.
        node_messages: messages, or steps of a ring, inside the node.
        network_messages: the same between nodes.
    """

    name: str
    backward: bool
    own: float
    node: float
    network: float
    node_messages: int
    network_messages: int

    @property
    def others(self) -> float:
        """Bytes that leave the rank."""
        return self.node + self.network


def peers(size: int, stride: int, *, ranks_per_node: int) -> Peers:
    """Place a group of every ``stride``-th rank on nodes of consecutive ranks.

    Args:
        size: P.
        stride: distance between neighbours.
        ranks_per_node: on each machine.

    Returns:
        Peers.

    Example:
        >>> peers(16, 1, ranks_per_node=8), peers(4, 8, ranks_per_node=8)
        (Peers(size=16, near=8), Peers(size=4, near=1))
    """
    return Peers(size, min(size, max(1, ranks_per_node // stride)))


def total(sent: Iterable[Sent], name: str = "total") -> Sent:
    """Add collectives up.

    Args:
        sent: any number of them.
        name: of the sum.

    Returns:
        Their sum; ``backward`` is False.

    Example:
        >>> total([Sent("a", False, 1, 2, 3, 4, 5), Sent("b", True, 1, 2, 3, 4, 5)])
        Sent(name='total', backward=False, own=2, node=4, network=6, node_messages=8, network_messages=10)
    """
    columns = list(zip(*(entry[2:] for entry in sent), strict=True)) or [()] * 5
    return Sent(name, False, *(sum(column) for column in columns))


def there_and_back(shape: Shape, group: Peers, rows: float, *, positions: bool) -> list[Sent]:
    """Count rows that are sent to the ranks of a group, outputs that come back, and the same for gradients.

    Args:
        shape: of the layer.
        group: the ranks.
        rows: that one rank sends, to itself included.
        positions: whether choices carry their place among all that compete for capacity.

    Returns:
        One entry per collective; none in a group of one.

    Example:
        >>> sent = there_and_back(Shape(8, 4, 8, 4, 2), Peers(4, 2), 12.0, positions=False)
        >>> [(s.own, s.node, s.network) for s in sent if s.name == "tokens"]
        [(24.0, 24.0, 48.0)]
    """
    counts = {"counts": group.size * _COUNTS * _INT64}
    return [_spread(*entry) for entry in _payload(shape, group, rows, counts, 2 if positions else 1)]


def gathered(shape: Shape, group: Peers, rows: float, *, existing: int) -> list[Sent]:
    """Count rows that every rank of a group gathers, outputs that are reduce-scattered, and the same for gradients.

    Args:
        shape: of the layer.
        group: the ranks.
        rows: of one rank.
        existing: how many numbers say how many assignments exist.

    Returns:
        One entry per collective; none in a group of one.

    Example:
        >>> sent = gathered(Shape(8, 4, 8, 4, 2), Peers(4, 4), 8.0, existing=1)
        >>> [(s.own, s.node) for s in sent if s.name == "tokens"]
        [(64.0, 192.0)]
    """
    return [ring(*entry) for entry in _payload(shape, group, rows, {"counts": (_COUNTS + existing) * _INT64}, 1)]


def _payload(
    shape: Shape, group: Peers, rows: float, counts: Mapping[str, float], numbers: int
) -> list[tuple[str, bool, Peers, float]]:
    """List what travels with rows and comes back for them, both ways: K expert numbers, maybe K places, K weights."""
    row, choices = rows * shape.row_bytes, rows * shape.top_k
    forward = {
        **counts,
        "tokens": row,
        "weights": choices * _FLOAT32,
        "numbers": choices * numbers * _INT64,
        "outputs": row,
    }
    backward = {"output gradients": row, "token gradients": row, "weight gradients": choices * _FLOAT32}
    sent = [(name, False, group, size) for name, size in forward.items()]
    sent += [(name, True, group, size) for name, size in backward.items()]
    return sent if group.size > 1 else []


def _spread(name: str, backward: bool, group: Peers, size: float) -> Sent:
    """Cut ``size`` bytes into equal pieces, one for each rank of the group: all-to-all."""
    piece = size / group.size
    return Sent(name, backward, piece, piece * (group.near - 1), piece * group.far, group.near - 1, group.far)


def ring(name: str, backward: bool, group: Peers, size: float) -> Sent:
    """Count an all-gather, or reversed, a reduce-scatter: each rank's bytes are passed around the whole group.

    A ring leaves a node once, whatever the node's number of ranks; with as many rings as ranks, each rank's own port
    carries its share of that.

    Args:
        name: of what is sent.
        backward: whether the backward pass sends it.
        group: the ranks.
        size: bytes of one rank.

    Returns:
        Sent.

    Example:
        >>> ring("tokens", False, Peers(16, 8), 100.0)[2:]
        (100.0, 1312.5, 187.5, 14, 1)
    """
    passed = size * (group.size - 1)
    outside = passed / group.near if group.far else 0.0
    jumps = math.ceil(group.size / group.near) - 1
    return Sent(name, backward, size, passed - outside, outside, group.size - 1 - jumps, jumps)
