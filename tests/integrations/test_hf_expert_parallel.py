"""transformers' own expert parallelism, with moekit running each rank's experts, equals one process."""

from typing import Any

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.distributed

FAMILIES = ["mixtral", "gpt_oss"]


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, dict[str, dict[str, Any]]]]:
    """Compare all families on two ranks, which import transformers once."""
    return run_ranks("hf_ranks:compare", 2, FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_compute_what_one_does(name: str, by_rank: list[dict[str, dict[str, dict[str, Any]]]]) -> None:
    for results in (found[name] for found in by_rank):
        assert set(results) == {"all_reduce", "all_to_all"}
        for result in results.values():
            assert result["own"] == [2, 2]
            assert result["experts"] == [0, 1, 2, 3]  # recorded by their numbers over all ranks
            assert result["worst"] < 5e-5
