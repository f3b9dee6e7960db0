"""Permutations of shards and of members, drawn from a seed and a place alone, and from no global generator."""

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

BLOCK = 256  # members that are shuffled among each other within a shard, and so kept in memory at once


class Address(NamedTuple):
    """Where a sequence is to be found.

    Attributes:
        source: number of the source.
        lane: the lane of the source whose shard holds the sequence.
        data_pass: how often the source had been gone through before.
        shard: number of the shard within its source.
        position: of the sequence in the reading order of the shard, see `block_permutation`.
    """

    source: int
    lane: int
    data_pass: int
    shard: int
    position: int


def visits(counts: Sequence[int], *, seed: int, source: int, data_pass: int) -> list[int]:
    """Draw the order in which a pass visits the shards of a source that hold anything.

    Args:
        counts: sequences per shard.
        seed: of the run.
        source: number of the source.
        data_pass: number of the pass.

    Returns:
        Numbers of shards, each once.

    Example:
        >>> visits([5, 0, 5, 5], seed=0, source=0, data_pass=0)
        [0, 3, 2]
    """
    filled = [shard for shard, count in enumerate(counts) if count]
    return [filled[i] for i in permutation(len(filled), f"{seed}/{source}/{data_pass}")]


def block_permutation(block: int, size: int, *, seed: int, address: Address) -> list[int]:
    """Draw the order in which the members of one block of a shard are read.

    The positions [256 b, 256 b + 255] of a shard hold the members of block b, the members [256 b, 256 b + 255] of the
    tar from front to end: shuffled well, and still read as a stream.

    Args:
        block: b, number of the block.
        size: members in it; 256, or fewer in the last block of a shard.
        seed: of the run.
        address: of any sequence of the shard, in the same pass.

    Returns:
        For each position within the block, the member within the block.

    Example:
        >>> block_permutation(0, 5, seed=0, address=Address(0, 0, 0, 0, 0))
        [4, 2, 3, 0, 1]
    """
    return permutation(size, f"{seed}/{address.source}/{address.data_pass}/{address.shard}/{block}")


def permutation(size: int, key: str) -> list[int]:
    """Draw a permutation of ``range(size)`` that depends on a text alone, and on no global generator."""
    generator = torch.Generator().manual_seed(drawn(key))
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


def shuffled(items: Sequence[int], key: str) -> list[int]:
    """Put integers into an order that depends on a text alone, without torch, whose threads a training loop needs."""
    drawn_keys = struct.unpack(f"<{len(items)}Q", hashlib.shake_128(key.encode()).digest(8 * len(items)))
    return [items[i] for i in sorted(range(len(items)), key=drawn_keys.__getitem__)]


def drawn(key: str) -> int:
    """Draw an integer in [0, 2^56) that depends on a text alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest())
