"""Where experts live: integers alone, so that a layout can be planned for any number of ranks on one process."""

import math
from typing import NamedTuple


class Layout(NamedTuple):
    """A grid of ranks, (replicas, hidden, nodes, experts), rank numbers running fastest along the last axis.

    Rank r of a grid without replicas and nodes owns expert block r mod X and hidden slice r div X, as in MegaBlocks.

    Attributes:
        num_experts: E.
        replicas: ranks that hold the same parameters of experts; FSDP shards them over these.
        hidden: slices that an expert's hidden dimension F is cut into.
        nodes: expert blocks are spread over so many nodes first ...
        experts: ... and over so many ranks of a node then; the expert-parallel degree X is nodes * experts.

    Example:
        >>> layout = Layout(64, replicas=2, nodes=2, experts=8)
        >>> layout.world_size, layout.expert_ranks, layout.exchanges
        (32, 16, True)
    """

    num_experts: int
    replicas: int = 1
    hidden: int = 1
    nodes: int = 1
    experts: int = 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.replicas * self.hidden * self.expert_ranks

    @property
    def expert_ranks(self) -> int:
        """X, the number of expert blocks."""
        return self.nodes * self.experts

    @property
    def exchanges(self) -> bool:
        """Whether tokens travel: experts or their hidden dimension are spread over several ranks."""
        return self.hidden * self.expert_ranks > 1


class Part(NamedTuple):
    """The part of a layer's experts that one rank owns.

    Attributes:
        block: number of its expert block.
        blocks: X, how many there are.
        hidden: number of its slice of the hidden dimension.
        slices: Y, how many there are.

    Example:
        >>> Part(block=1, blocks=4).experts(8)
        range(2, 4)
    """

    block: int = 0
    blocks: int = 1
    hidden: int = 0
    slices: int = 1

    def experts(self, num_experts: int) -> range:
        """Return the global numbers of the experts in the block."""
        size = num_experts // self.blocks
        return range(self.block * size, (self.block + 1) * size)


def spread_experts(
    world_size: int,
    num_experts: int,
    hidden: int,
    *,
    expert_ranks: int | None = None,
    hidden_ranks: int | None = None,
    ranks_per_node: int | None = None,
) -> Layout:
    """Spread experts over ranks, by OpenLM's rule where it applies.

    X, the expert blocks, is the greatest common divisor of W and E: min(W, E) wherever that divides the other. With
    more ranks than experts, each expert's hidden dimension is cut Y = W / E ways, or as many as divide both. Ranks that
    are left hold replicas.

    Args:
        world_size: W.
        num_experts: E.
        hidden: F, of each expert.
        expert_ranks: X, to choose it.
        hidden_ranks: Y, to choose it.
        ranks_per_node: exchange hierarchically where the expert blocks span several nodes of so many ranks.

    Returns:
        Layout of W ranks.

    Raises:
        ValueError: if a degree does not divide what it splits.

    Example:
        >>> spread_experts(8, 4, 1952)
        Layout(num_experts=4, replicas=1, hidden=2, nodes=1, experts=4)
        >>> spread_experts(6, 4, 1952)
        Layout(num_experts=4, replicas=3, hidden=1, nodes=1, experts=2)

    References:
        OpenLM, MOE.md: "if the number of GPUs exceeds the number of experts, tensor parallelism is used".
    """
    x = math.gcd(world_size, num_experts) if expert_ranks is None else expert_ranks
    _divides("expert_ranks (--moe-expert-ranks)", x, "experts", num_experts)
    _divides("expert_ranks (--moe-expert-ranks)", x, "ranks", world_size)
    left = world_size // x
    if hidden_ranks is None:
        y = math.gcd(left, hidden) if x == num_experts and expert_ranks is None else 1
    else:
        y = hidden_ranks
    _divides("hidden_ranks (--moe-hidden-ranks)", y, "hidden units of an expert", hidden)
    _divides("hidden_ranks (--moe-hidden-ranks)", y, f"ranks per expert block ({world_size} / {x})", left)
    nodes = 1
    if ranks_per_node is not None and x > ranks_per_node:
        _divides("ranks_per_node", ranks_per_node, "ranks that share the experts", x)
        nodes = x // ranks_per_node
    return Layout(num_experts, left // y, y, nodes, x // nodes)


def replicated(world_size: int, num_experts: int) -> Layout:
    """Let every rank hold all experts.

    Args:
        world_size: W.
        num_experts: E.

    Returns:
        Layout of W replicas.

    Example:
        >>> replicated(4, 8).exchanges
        False
    """
    return Layout(num_experts, replicas=world_size)


def experts_per_rank(num_experts: int, num_ranks: int) -> int:
    """Divide experts into equal blocks.

    Args:
        num_experts: E.
        num_ranks: P.

    Returns:
        E / P.

    Raises:
        ValueError: if P does not divide E.

    Example:
        >>> experts_per_rank(8, 4)
        2
    """
    if num_experts % num_ranks:
        raise ValueError(
            f"{num_experts} experts cannot be spread over {num_ranks} ranks in equal blocks; expected a number "
            "of ranks that divides the number of experts. Use a smaller group, or experts on several ranks each"
        )
    return num_experts // num_ranks


def part_of(layout: Layout, rank: int) -> Part:
    """Say which part of the experts a rank owns.

    Args:
        layout: of all ranks.
        rank: 0 to W - 1.

    Returns:
        Part.

    Example:
        >>> part_of(spread_experts(8, 4, 1952), 5)
        Part(block=1, blocks=4, hidden=1, slices=2)
    """
    blocks = layout.expert_ranks
    return Part(rank % blocks, blocks, rank // blocks % layout.hidden, layout.hidden)


def _divides(name: str, number: int, what: str, total: int) -> None:
    if number < 1 or total % number:
        divisors = [n for n in range(1, total + 1) if total % n == 0]
        raise ValueError(
            f"{name} is {number}, which does not divide {total}, the {what}; expected one of "
            f"{', '.join(map(str, divisors[:8]))}{' ...' if len(divisors) > 8 else ''}"
        )
