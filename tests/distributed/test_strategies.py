"""Every parallel strategy on 1, 2, 4 and 8 gloo ranks equals one process: outputs, gradients, clip norm, AdamW step."""

import pytest
import torch
from page_programs import last_loss, under_a_limit
from ranks import run_ranks
from strategy_cases import STRATEGIES, Case, matrix

from moekit.parallel import one_process

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_strategies_equal_one_process(ranks, full):
    if ranks == 8 and not full:
        pytest.skip("is for --full")
    cases = matrix(ranks, full=full)
    done = run_ranks("strategy_cases:compare_all", ranks, cases, limit=600 if full else 120)
    assert done == [[str(case) for case in cases]] * ranks


def test_ranks_that_get_nothing_never_hang(full):
    """50 random routings on 4 ranks, most of which leave some ranks without tokens of their own or of others."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for seed in range(50):
        sizes = torch.randint(-4, 4, (4,), generator=generator).clamp_min(0).tolist()
        strategy, choice = STRATEGIES[seed % 5], ("token", "expert")[seed % 2]
        cases.append(Case(strategy, (0.0, 0.6)[seed // 2 % 2], choice, k=1, seed=seed, tokens=tuple(sizes)))
    assert sum(0 in case.tokens for case in cases) > 40
    assert sum(sum(case.tokens) == 0 for case in cases) > 2
    run_ranks("strategy_cases:compare_all", 4, cases, limit=30)


def test_the_static_exchange_compiles_without_a_graph_break():
    run_ranks("strategy_cases:compile_static", 2, limit=120)


def test_what_travels_back_has_a_communicator_of_its_own():
    assert run_ranks("strategy_cases:second_groups", 2, limit=30) == [([0, 1], True)] * 2


def test_ranks_learn_what_is_dropped_of_their_own_tokens():
    run_ranks("strategy_cases:drops_together", 3, limit=30)


def test_a_layer_that_returns_a_constant_does_not_hold_the_others_up():
    run_ranks("strategy_cases:constant_on_empty", 3, limit=30)


def test_the_loop_of_the_page_on_parallelism_has_one_loss_on_one_process_and_on_two_ranks():
    alone = last_loss(one_process())
    assert 0 < alone < 2
    assert run_ranks("page_programs:last_loss", 2, limit=60) == pytest.approx([alone, alone], rel=1e-5)


def test_under_a_capacity_limit_that_loop_has_one_loss_too_and_each_rank_knows_its_drops():
    alone = under_a_limit(one_process())
    assert alone[0] != last_loss(one_process())
    assert 0.2 < alone[1] < 0.6
    for loss, dropped in run_ranks("page_programs:under_a_limit", 2, limit=60):
        assert (loss, dropped) == pytest.approx(alone, rel=1e-5)


def test_tokens_that_the_page_rounds_to_8_bits_come_to_nearly_the_same():
    for apart in run_ranks("page_programs:of_rounded_rows", 2, limit=60):
        assert set(apart) == {"y", "x", "up"}
        for name, share in apart.items():
            assert 1e-3 < share < 0.1, name


def test_second_derivatives_refusals_no_choices_and_weights_drawn_anew():
    run_ranks("strategy_edges:edges", 4, limit=60)


@pytest.mark.parametrize(("ranks", "experts"), [(3, 8), (8, 4)])
def test_experts_that_ranks_cannot_share_evenly_are_refused(ranks, experts):
    [message, *_] = run_ranks("strategy_cases:refused", ranks, experts, limit=30)
    assert f"{experts} experts cannot be spread over {ranks} ranks in equal blocks" in message
    assert "expected a number of ranks that divides" in message


def test_rows_sent_are_the_distinct_pairs_of_token_and_rank():
    """K = 8 choices over P = 8 ranks: P (1 - (1 - 1/P)^K) = 5.25 rows a token if choices were independent, not 8."""
    rows, pairs, tokens = torch.tensor(run_ranks("strategy_cases:rows_sent", 8, limit=60)).sum(0).tolist()
    assert rows == pairs
    independent = 8 * (1 - (1 - 1 / 8) ** 8)
    assert rows / tokens == pytest.approx(independent, rel=0.01)
