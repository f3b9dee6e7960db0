"""The program ``moekit traffic``: predicted communication of every parallel strategy, by number of GPUs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import tyro

from moekit.lm.consoles import print_lines, wide_console
from moekit.parallel import costs
from moekit.parallel.layouts import Layout, replicated, spread_experts
from moekit.parallel.link_times import Link, Machine, h100_machine, seconds
from moekit.parallel.payloads import Sent, Shape, total
from moekit.recipes.traffic_tables import Prediction, byte_table, cheapest_lines, time_table

_GPUS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_H100 = h100_machine()
_TOO_LARGE = 2**63  # for a whole number: products of all of them are floats still


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 6)  # 6.6, not 6.6000000000000005


@dataclass(frozen=True)
class TrafficSettings:
    """Predict what an MoE layer's strategies send, and how long it takes, forward and backward.

    Routing is taken to be uniform and links to carry what is published for them (H100, InfiniBand NDR). The shape is
    OLMoE's by default. Where experts are replicated, FSDP of their parameters is counted too.
    """

    tokens: int = 8192
    """T, on each GPU."""
    width: int = 2048
    """D."""
    hidden: int = 1024
    """F, of each expert."""
    experts: int = 64
    """E."""
    top_k: int = 8
    """K."""
    element_bytes: int = 2
    """Of an element of a token, a parameter or a gradient; 2 for bf16."""
    matrices: int = 3
    """(D, F) matrices of an expert; 3 for SwiGLU, 2 for a plain MLP."""
    gpus: tuple[int, ...] = _GPUS
    """Numbers of GPUs, a column each."""
    gpus_per_node: int = _H100.ranks_per_node
    """GPUs that share a node's links."""
    node_bandwidth: float = _H100.node.bandwidth / 1e9
    """GB/s that a GPU sends inside its node."""
    network_bandwidth: float = _H100.network.bandwidth / 1e9
    """GB/s that a GPU sends to other nodes."""
    node_latency: float = _microseconds(_H100.node.latency)
    """Microseconds per message inside a node."""
    network_latency: float = _microseconds(_H100.network.latency)
    """Microseconds per message between nodes."""
    start: float = _microseconds(_H100.start)
    """Microseconds that any collective takes before it sends."""
    capacity_factor: float = 1.25
    """Of static_all_to_all."""
    chunks: int = 4
    """Of chunked."""
    teraflops: float = 400.0
    """What a GPU reaches in its experts, which chunked hides the exchange behind; H100's dense bf16 peak is 989."""


def main(arguments: list[str] | None = None, *, prog: str = "moekit traffic") -> None:
    """Run the program.

    Args:
        arguments: the words of the command line; None takes ``sys.argv``.
        prog: its name in messages.

    Raises:
        SystemExit: with a message, if a setting is out of range.
    """
    settings = tyro.cli(TrafficSettings, args=arguments, prog=prog)
    try:
        predictions = predict(settings)
    except ValueError as error:
        raise SystemExit(f"{prog}: {error}") from error
    compute = shape_of(settings).flops / (settings.teraflops * 1e12)
    console = wide_console()
    print_lines(console, *_conditions(settings))
    console.print(time_table(settings.gpus, predictions, compute=compute, chunks=settings.chunks))
    for network in (False, True):
        console.print(byte_table(settings.gpus, predictions, network=network))
    print_lines(console, *cheapest_lines(settings.gpus, predictions))


def predict(settings: TrafficSettings) -> dict[str, list[Prediction | None]]:
    """Predict every strategy on every number of GPUs.

    Args:
        settings: the shape and the links.

    Returns:
        Strategy to a prediction for each of ``settings.gpus``; None where it would be one of the others.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> found = predict(TrafficSettings(gpus=(8, 64)))
        >>> [round(1e3 * p.seconds, 2) for p in found["FSDP, no exchange"]]
        [4.73, 6.12]
    """
    _check(settings)
    machine = machine_of(settings)
    columns = [strategies(settings, world_size) for world_size in settings.gpus]
    return {name: [_prediction(column[name], machine) for column in columns] for name in columns[0]}


def strategies(settings: TrafficSettings, world_size: int) -> dict[str, list[Sent] | None]:
    """Count what every strategy sends on so many GPUs, parameters of replicated experts included.

    Args:
        settings: the shape.
        world_size: W.

    Returns:
        Name to the collectives of a layer; None where it would be one of the others.
    """
    shape, at, e, f = shape_of(settings), settings.gpus_per_node, settings.experts, settings.hidden
    x = math.gcd(world_size, e)
    inside, slices = math.gcd(x, at), math.gcd(math.gcd(world_size, at), f)
    by_expert = spread_experts(world_size, e, f, expert_ranks=x)
    by_rule = spread_experts(world_size, e, f)
    by_node = spread_experts(world_size, e, f, expert_ranks=x, ranks_per_node=at if x % at == 0 else None)
    in_node = spread_experts(world_size, e, f, expert_ranks=inside)
    by_hidden = spread_experts(world_size, e, f, expert_ranks=1, hidden_ranks=slices)
    spread = by_expert if x > 1 else None
    static = partial(costs.static_all_to_all, capacity_factor=settings.capacity_factor)
    plans: dict[str, tuple[Layout | None, Callable[..., list[Sent]]]] = {
        "FSDP, no exchange": (replicated(world_size, e), _nothing),
        "all_gather": (spread, costs.all_gather),
        "tensor_parallel in a node": (by_hidden if slices > 1 else None, costs.tensor_parallel),
        "all_to_all in a node": (in_node if 1 < inside < x else None, costs.all_to_all),
        "all_to_all": (spread, costs.all_to_all),
        "static_all_to_all": (spread, static),
        "hierarchical": (by_node if by_node.nodes > 1 else None, costs.hierarchical),
        "all_to_all x tensor_parallel": (by_rule if by_rule.hidden > 1 and x > 1 else None, costs.experts_by_hidden),
    }
    return {
        name: None
        if layout is None
        else [*costs.parameters(shape, layout, ranks_per_node=at), *exchange(shape, layout, ranks_per_node=at)]
        for name, (layout, exchange) in plans.items()
    }


def _nothing(shape: Shape, layout: Layout, *, ranks_per_node: int) -> list[Sent]:
    return []


def shape_of(settings: TrafficSettings) -> Shape:
    """Take the layer's shape out of the settings.

    Args:
        settings: of the program.

    Returns:
        Shape.

    Example:
        >>> shape_of(TrafficSettings()).expert_bytes
        805306368
    """
    s = settings
    return Shape(s.tokens, s.width, s.hidden, s.experts, s.top_k, s.element_bytes, s.matrices)


def machine_of(settings: TrafficSettings) -> Machine:
    """Take the links out of the settings.

    Args:
        settings: of the program.

    Returns:
        Machine.

    Example:
        >>> machine_of(TrafficSettings(network_bandwidth=25)).network.bandwidth
        25000000000.0
    """
    node = Link(settings.node_bandwidth * 1e9, settings.node_latency / 1e6)
    network = Link(settings.network_bandwidth * 1e9, settings.network_latency / 1e6)
    return Machine(node, network, settings.start / 1e6, settings.gpus_per_node)


def _prediction(sent: list[Sent] | None, machine: Machine) -> Prediction | None:
    return None if sent is None else Prediction(seconds(sent, machine), total(sent))


def _check(settings: TrafficSettings) -> None:
    may_be_zero = {"node_latency", "network_latency", "start"}
    gpus = settings.gpus
    if min(gpus, default=0) < 1 or max(gpus) >= _TOO_LARGE or len(set(gpus)) < len(gpus):
        given = " ".join(map(str, gpus)) or "given no numbers"
        raise ValueError(f"--gpus is {given}; expected numbers of GPUs, each once and more than 0, below 2^63")
    for name, value in vars(settings).items():
        if name == "gpus":
            continue
        fits = value < _TOO_LARGE if isinstance(value, int) else math.isfinite(value)
        if not (fits and (value > 0 or (value == 0 and name in may_be_zero))):
            wanted = "a finite number, 0 or more" if name in may_be_zero else "a finite number above 0"
            limit = ", below 2^63" if isinstance(value, int) else ""
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected {wanted}{limit}")
    if settings.top_k > settings.experts:
        raise ValueError(f"--top-k is {settings.top_k}; expected 1 to {settings.experts}, the number of experts")


def _conditions(settings: TrafficSettings) -> list[str]:
    s, shape = settings, shape_of(settings)
    return [
        f"T {s.tokens:,} on each GPU, D {s.width:,}, F {s.hidden:,}, E {s.experts}, K {s.top_k}, {s.element_bytes} "
        f"bytes per element; a token is {shape.row_bytes:,} bytes, all experts are {shape.expert_bytes / 1e6:,.0f} MB",
        f"{s.gpus_per_node} GPUs in a node: {s.node_bandwidth:g} GB/s and {s.node_latency:g} us inside, "
        f"{s.network_bandwidth:g} GB/s and {s.network_latency:g} us between nodes; {s.start:g} us to start",
    ]
