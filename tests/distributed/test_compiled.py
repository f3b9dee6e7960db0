"""Compiled code over sharded parameters: the same numbers, and a block is one graph."""

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.distributed


def test_a_block_is_one_graph_under_fsdp():
    """What gathers parameters ends a graph: experts gathered by themselves would make five of a block.

    Those of unlike blocks, a dense one and one of experts, the embedding, the last norm, and the sum of the loss; what
    else lies between blocks is eager.
    """
    assert run_ranks("compiled_ranks:blocks_are_whole_graphs", 2, limit=90) == [5, 5]
