"""transformers' own expert parallelism, with moekit running each rank's experts, equals one process."""

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_two_ranks_compute_what_one_does(name: str) -> None:
    for results in run_ranks("hf_ranks:compare", 2, name):
        assert set(results) == {"all_reduce", "all_to_all"}
        for result in results.values():
            assert result["own"] == [2, 2]
            assert result["experts"] == [0, 1, 2, 3]  # recorded by their numbers over all ranks
            assert result["worst"] < 5e-5
