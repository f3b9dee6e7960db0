"""How long collectives take on given links, by the alpha-beta model: latency per message, then bytes over bandwidth."""

from collections.abc import Iterable
from typing import NamedTuple

from moekit.parallel.payloads import Sent


class Link(NamedTuple):
    """A link that every rank has one of.

    Attributes:
        bandwidth: bytes per second in one direction.
        latency: seconds per message.
    """

    bandwidth: float
    latency: float


class Machine(NamedTuple):
    """The links of a cluster of equal nodes.

    Attributes:
        node: between ranks of a node.
        network: between nodes.
        start: seconds that any collective takes before it sends.
        ranks_per_node: GPUs of a node.
    """

    node: Link
    network: Link
    start: float
    ranks_per_node: int


def h100_machine() -> Machine:
    """Describe nodes of eight H100 SXM GPUs, each with its own InfiniBand NDR port, by published figures.

    These are ceilings of bandwidth and floors of latency: real collectives reach less, so measure yours.

    Returns:
        Machine.

    Example:
        >>> h100_machine().node.bandwidth / h100_machine().network.bandwidth
        9.0

    References:
        NVIDIA H100 Tensor Core GPU datasheet: NVLink 900 GB/s, which is both directions together.
        NVIDIA DGX H100 user guide, "Network modules": eight ConnectX-7 ports of 400 Gb/s, one for each GPU.
        NVIDIA NCCL, src/graph/tuning.cc at commit b647562, ``baseLat`` and ``hwLat`` of ring and LL: 6.6 us to start,
        0.6 us per step over NVLink, 2.7 us over the network.
    """
    return Machine(Link(450e9, 0.6e-6), Link(50e9, 2.7e-6), start=6.6e-6, ranks_per_node=8)


def seconds(sent: Iterable[Sent], machine: Machine) -> float:
    """Predict how long collectives take, one after the other.

    Each takes start + messages * latency, summed over both links, + the longer of bytes / bandwidth over the two: a
    rank's ports to its node and to the network work at the same time.

    Args:
        sent: what one rank sends.
        machine: the links.

    Returns:
        Seconds.

    Example:
        >>> seconds([Sent("tokens", False, 0, 450e6, 0, 7, 0)], h100_machine()).__round__(6)
        0.001011
    """
    return sum(_one(entry, machine) for entry in sent)


def not_hidden(exchange: float, compute: float, *, num_chunks: int) -> float:
    """Say how much of an exchange is left beside the computation, once ``chunked`` overlaps the two.

    The longer one runs without a pause, and one chunk of the shorter one sticks out: max + min / n - compute.

    Args:
        exchange: seconds on the links.
        compute: seconds of the experts.
        num_chunks: n; 1 hides nothing.

    Returns:
        Seconds that the layer takes longer than its experts.

    Example:
        >>> not_hidden(3.0, 4.0, num_chunks=1), not_hidden(3.0, 4.0, num_chunks=3)
        (3.0, 1.0)
    """
    return max(exchange, compute) + min(exchange, compute) / num_chunks - compute


def _one(sent: Sent, machine: Machine) -> float:
    latency = sent.node_messages * machine.node.latency + sent.network_messages * machine.network.latency
    transfer = max(sent.node / machine.node.bandwidth, sent.network / machine.network.bandwidth)
    return machine.start + latency + transfer
