from functools import partial

import pytest
import torch

from moekit.routing import fixed_table, hash_choice, hash_table, random_choice, round_robin, sigmoid
from moekit.segments import tokens_per_expert

T, E, K = 12, 5, 3
TABLE = hash_table(20, E, k=K)
ROUTERS = {
    "hash": partial(hash_choice, token_ids=torch.arange(T), table=TABLE),
    "random": partial(random_choice, k=K),
    "round robin": partial(round_robin, k=K),
}
every_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)


@every_router
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", [torch.sigmoid, partial(torch.softmax, dim=-1)], ids=["sigmoid", "softmax"])
def test_weights_are_the_scores_of_whoever_is_chosen(router, normalize: bool, score) -> None:
    logits = torch.randn(T, E, requires_grad=True)
    routing = router(logits, score=score, normalize=normalize)
    expected = score(logits).gather(1, routing.expert_indices)
    torch.testing.assert_close(routing.weights, expected / expected.sum(-1, keepdim=True) if normalize else expected)
    (grad,) = torch.autograd.grad(routing.weights[:, 0].sum(), logits)
    assert (grad != 0).any(-1).all()


@every_router
def test_choice_depends_on_neither_logits_nor_bias(router) -> None:
    torch.manual_seed(3)
    first = router(torch.randn(T, E), bias=torch.randn(E))
    torch.manual_seed(3)
    torch.randn(T, E), torch.randn(E)
    second = router(torch.zeros(T, E))
    assert torch.equal(first.expert_indices, second.expert_indices)


@every_router
def test_experts_of_a_token_differ(router) -> None:
    chosen = router(torch.zeros(T, E)).expert_indices
    assert all(len(set(row)) == K for row in chosen.tolist())


def test_hash_looks_ids_up_whatever_their_shape() -> None:
    ids = torch.tensor([[3, 0, 3], [19, 7, 7]])
    chosen = hash_choice(torch.zeros(6, E), token_ids=ids, table=TABLE).expert_indices
    assert torch.equal(chosen, TABLE[[3, 0, 3, 19, 7, 7]])


def test_hash_scales_weights_last() -> None:
    ids, logits = torch.arange(T), torch.randn(T, E)
    plain, scaled = (
        hash_choice(logits, token_ids=ids, table=TABLE, normalize=True, score=sigmoid, **options)
        for options in ({}, {"scale": 2.5})
    )
    torch.testing.assert_close(scaled.weights, 2.5 * plain.weights)
    torch.testing.assert_close(scaled.weights.sum(-1), torch.full((T,), 2.5))


def test_a_table_can_be_drawn_where_half_precision_is_the_default() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert hash_table(5, 4, k=2).shape == (5, 2)
    finally:
        torch.set_default_dtype(torch.float32)


def test_hash_table_is_a_function_of_its_seed_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    table = hash_table(50, 8, k=2, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(table, hash_table(50, 8, k=2, seed=4))
    assert not torch.equal(table, hash_table(50, 8, k=2, seed=5))
    assert (table[:, 0] != table[:, 1]).all()
    assert (table >= 0).all()
    assert (table < 8).all()


def test_random_choice_is_new_at_every_call_and_uniform() -> None:
    logits = torch.zeros(6000, E)
    logits[:, 0] = 50.0
    routing = random_choice(logits, k=2)
    assert not torch.equal(routing.expert_indices, random_choice(logits, k=2).expert_indices)
    loads = tokens_per_expert(routing.expert_indices, E) / 6000
    torch.testing.assert_close(loads, torch.full((E,), 2 / E), rtol=0, atol=0.04)  # six standard deviations


@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), [(7, 3, 2), (8, 4, 2), (5, 5, 5), (1, 6, 2)])
def test_round_robin_loads_differ_by_at_most_one(num_tokens: int, num_experts: int, k: int) -> None:
    routing = round_robin(torch.randn(num_tokens, num_experts), k=k, score=sigmoid)
    assert routing.expert_indices.flatten().tolist() == [n % num_experts for n in range(num_tokens * k)]
    loads = tokens_per_expert(routing.expert_indices, num_experts)
    assert loads.max() - loads.min() <= 1


@every_router
def test_no_tokens(router) -> None:
    if "token_ids" in router.keywords:
        router = partial(router, token_ids=torch.zeros(0, dtype=torch.int64))
    assert router(torch.zeros(0, E)).weights.shape == (0, K)


@pytest.mark.parametrize("router", [random_choice, round_robin])
@pytest.mark.parametrize("k", [0, E + 1])
def test_a_bad_k_says_so(router, k: int) -> None:
    with pytest.raises(ValueError, match=rf"{router.__name__}: k = {k} experts per token were asked of E = {E}"):
        router(torch.zeros(T, E), k=k)


def test_hash_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match=rf"hash_choice: 3 token ids were given for T = {T} tokens; expected one"):
        hash_choice(torch.zeros(T, E), token_ids=torch.arange(3), table=TABLE)
    with pytest.raises(ValueError, match="hash_choice: k = 3 experts per token were asked of E = 2"):
        hash_choice(torch.zeros(T, 2), token_ids=torch.arange(T), table=TABLE)
    with pytest.raises(ValueError, match="hash_table: k = 9 experts per token were asked of E = 8"):
        hash_table(10, 8, k=9)


def test_a_table_is_drawn_from_its_seed_and_stays():
    state = fixed_table(vocab_size=50, k=K, seed=3)
    assert torch.equal(state.init(E), hash_table(50, E, k=K, seed=3))
    assert state.update is None
    assert state.observe is None


def test_a_table_that_is_smaller_than_the_vocabulary_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"experts for 20 token ids, and there is one beyond.*hash_layer\(vocab_size="):
        hash_choice(torch.zeros(2, E), token_ids=torch.tensor([0, 20]), table=TABLE)
