from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moekit.dispatch import by_choice, by_position, by_weight, dropless, padded
from moekit.routing import hash_choice, hash_table, random_choice, round_robin, sigmoid, token_choice, top_k
from moekit.routing.causality import Causality, Dependence, causality
from moekit.routing.dynamic_k import top_p
from moekit.routing.expert_choice import expert_choice
from moekit.routing.relu import relu_choice
from moekit.routing.sinkhorn import sinkhorn
from moekit.routing.soft import soft_slots
from moekit.routing.token_rounding import token_rounding
from moekit.segments import tokens_per_expert
from moekit.types import Dispatcher, Routing, SoftRouting

E, K = 8, 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plain_expert_choice(logits: Tensor, *, sequence_length: int | None = None, bias: Tensor | None = None) -> Routing:
    """Let every expert take its best tokens of a pool: of the batch, or of each sequence."""
    pool = sequence_length or logits.shape[0]
    scores = logits.softmax(-1).view(-1, pool, E).transpose(1, 2)  # (G, E, pool)
    weights, tokens = torch.topk(scores, pool * K // E, dim=-1)
    tokens = tokens + pool * torch.arange(scores.shape[0]).view(-1, 1, 1)
    return Routing(tokens, torch.arange(E).view(1, E, 1).expand_as(tokens), weights, logits.shape[0], E, tokens.numel())


def soft(logits: Tensor, *, sequence_length: int | None = None, bias: Tensor | None = None) -> SoftRouting:
    pools = logits.view(-1, sequence_length or logits.shape[0], E, 1)
    return SoftRouting(pools.softmax(1), pools.softmax(2))


def plain_sinkhorn(logits: Tensor, *, bias: Tensor | None = None) -> Routing:
    balanced = logits.exp()
    for _ in range(8):
        balanced = balanced / balanced.sum(0)
        balanced = balanced / balanced.sum(1, keepdim=True)
    return top_k(logits, k=K, bias=None)._replace(expert_indices=torch.topk(balanced, K).indices)


def batch_balanced(logits: Tensor, *, bias: Tensor | None = None) -> Routing:
    """Take off what is overloaded, by the counts of the batch."""
    load = tokens_per_expert(top_k(logits, k=K).expert_indices, E)
    return top_k(logits, k=K, bias=-0.5 * load / load.sum())


def rounded(logits: Tensor, *, tile: int, bias: Tensor | None = None) -> Routing:
    """Round every expert's tokens down to whole tiles, keeping the best."""
    routing = top_k(logits, k=1)
    kept = torch.full_like(routing.expert_indices, -1)
    for e in range(E):
        own = (routing.expert_indices[:, 0] == e).nonzero()[:, 0]
        best = own[routing.weights[own, 0].argsort(descending=True)][: len(own) // tile * tile]
        kept[best] = e
    return routing._replace(expert_indices=kept, weights=routing.weights * (kept >= 0))


def next_token(logits: Tensor, *, bias: Tensor | None = None) -> Routing:
    """Route each token by the one behind it, if there is one: the shortest look ahead."""
    return top_k(torch.cat([logits[1:], torch.zeros_like(logits[:1])]), k=K)


def previous_token(logits: Tensor, *, bias: Tensor | None = None) -> Routing:
    return top_k(torch.cat([torch.zeros_like(logits[:1]), logits[:-1]]), k=K)


def relu(logits: Tensor, *, bias: Tensor | None = None) -> Routing:
    experts = torch.arange(E).expand_as(logits).where(logits > 0, -1)
    return token_choice(experts, torch.relu(logits), logits)


def flat(logits: Tensor, *, bias: Tensor | None = None) -> Routing:
    """Top-k as a list in the order of experts."""
    routing = top_k(logits, k=K)
    order = routing.expert_indices.flatten().argsort(stable=True)
    return Routing(*(part.flatten()[order] for part in routing[:3]), *routing[3:])


class Case(NamedTuple):
    """A composition, and on what its outputs depend: later tokens, earlier and later sequences of the batch."""

    router: Callable[..., Any]
    dispatcher: Dispatcher | None
    later_tokens: bool
    earlier_sequences: bool
    later_sequences: bool
    needs: tuple[str, ...] = ()


def tight(priority, factor: float = 1.0) -> Dispatcher:
    return padded(capacity_factor=factor, priority=priority)


TOP_K = partial(top_k, k=K)
CASES = {
    "top k": Case(TOP_K, None, False, False, False),
    "top k dropless": Case(TOP_K, dropless(), False, False, False),
    "top k with room for all": Case(TOP_K, tight(by_weight, E / K), False, False, False),
    "top k by position": Case(TOP_K, tight(by_position), False, True, False),
    "top k by position, hardly tight": Case(TOP_K, tight(by_position, 3.9), False, True, False),
    "top k by choice": Case(TOP_K, tight(by_choice), True, True, True),
    "top k by choice, hardly tight": Case(TOP_K, tight(by_choice, 3.5), True, True, True),
    "top k by weight": Case(TOP_K, tight(by_weight), True, True, True),
    "top k by weight, hardly tight": Case(TOP_K, tight(by_weight, 3.9), True, True, True),
    "sigmoid": Case(partial(top_k, k=3, score=sigmoid, normalize=True), dropless(), False, False, False),
    "hash": Case(hash_choice, dropless(), False, False, False, ("token_ids", "table")),
    "hash by position": Case(hash_choice, tight(by_position), False, True, False, ("token_ids", "table")),
    "round robin": Case(partial(round_robin, k=K), tight(by_position, 0.5), False, False, False),
    "random": Case(partial(random_choice, k=K), tight(by_position), False, False, False),
    "relu": Case(relu, dropless(), False, False, False),
    "a list": Case(flat, dropless(), False, False, False),
    "previous token": Case(previous_token, dropless(), False, True, False),
    "next token": Case(next_token, dropless(), True, False, True),
    "expert choice": Case(plain_expert_choice, dropless(), True, True, True),
    "expert choice without a dispatcher": Case(plain_expert_choice, None, True, True, True),
    "expert choice within sequences": Case(plain_expert_choice, dropless(), True, False, False, ("sequence_length",)),
    "soft": Case(soft, None, True, True, True),
    "soft within sequences": Case(soft, None, True, False, False, ("sequence_length",)),
    "sinkhorn": Case(plain_sinkhorn, dropless(), True, True, True),
    "batch balanced": Case(batch_balanced, dropless(), True, True, True),
    "token rounding by 4": Case(partial(rounded, tile=4), dropless(), True, True, True),
    "token rounding by 128": Case(partial(rounded, tile=128), dropless(), True, True, True),
}
# The package's own routers, beside top-k and the fixed ones.
CASES |= {
    "moekit: expert choice": Case(partial(expert_choice, capacity_factor=1.0), dropless(), True, True, True),
    "moekit: expert choice within sequences": Case(
        partial(expert_choice, capacity_factor=1.0), dropless(), True, False, False, ("sequence_length",)
    ),
    "moekit: soft slots": Case(partial(soft_slots, slots=2), None, True, True, True),
    "moekit: soft slots within sequences": Case(
        partial(soft_slots, slots=2), None, True, False, False, ("sequence_length",)
    ),
    "moekit: sinkhorn": Case(partial(sinkhorn, k=K), dropless(), True, True, True),
    "moekit: sinkhorn at evaluation": Case(partial(sinkhorn, k=K, balanced=False), dropless(), False, False, False),
    "moekit: token rounding": Case(token_rounding(TOP_K, tile=16), dropless(), True, True, True),
    "moekit: token rounding by one": Case(token_rounding(TOP_K, tile=1), dropless(), False, False, False),
    "moekit: top p": Case(partial(top_p, p=0.6), dropless(), False, False, False),
    "moekit: relu": Case(relu_choice, dropless(), False, False, False),
}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_dependence_is_found_and_none_else(name: str) -> None:
    router, dispatcher, later, earlier_sequences, later_sequences, needs = CASES[name]
    found = causality(router, dispatcher, num_experts=E, needs=needs)
    seen = found.later_tokens, found.earlier_sequence is not None, found.later_sequence is not None
    assert seen == (later, earlier_sequences, later_sequences), str(found)
    assert found.leaks == later
    assert found.other_sequences == (earlier_sequences or later_sequences)


@pytest.mark.parametrize("seed", [1, 2])
def test_neither_finds_nor_misses_by_luck(seed: int) -> None:
    for name in ("top k by choice", "top k by weight", "next token", "token rounding by 128", "batch balanced"):
        router, dispatcher, *_ = CASES[name]
        assert causality(router, dispatcher, num_experts=E, seed=seed).leaks, name
    assert not causality(TOP_K, tight(by_position), num_experts=E, seed=seed).leaks


@pytest.mark.parametrize("num_experts", [1, 2, 64])
def test_numbers_of_experts(num_experts: int) -> None:
    one = partial(top_k, k=1, score=sigmoid)  # a softmax over one expert tells tokens apart no more
    assert not causality(one, tight(by_position, 0.7), num_experts=num_experts).leaks
    assert causality(one, tight(by_weight, 0.7), num_experts=num_experts).leaks


def test_a_leak_through_a_dispatcher_of_ones_own_is_found() -> None:
    """The router is causal, and the sum is over neighbours."""
    dispatcher = dropless()

    def combine(rows: Tensor, routing: Routing, plan) -> Tensor:
        y = dispatcher.combine(rows, routing, plan)
        return y + 1e-4 * y.roll(-1, 0)

    assert causality(TOP_K, dispatcher._replace(combine=combine), num_experts=E).leaks


def test_a_witness_can_be_looked_at_again() -> None:
    witness = causality(next_token, num_experts=E, length=16).later_token
    assert witness is not None
    # Only the token just before those that were replaced can have changed.
    assert witness.sequence == witness.changed_sequence
    assert witness.position == witness.changed_from - 1
    assert witness.difference > 1e-3
    earlier = causality(previous_token, num_experts=E, length=16).earlier_sequence
    assert earlier is not None
    assert (earlier.sequence, earlier.position) == (earlier.changed_sequence + 1, 0)


def test_it_says_what_it_found() -> None:
    text = str(causality(TOP_K, tight(by_weight), num_experts=E))
    assert text.count("\n") == 2
    assert "depends on later tokens of its sequence: the output at position" in text
    assert "logits by" in text
    assert str(Causality()) == "depends on no later token and on no other sequence"
    other = Causality(earlier_sequence=Dependence(1, 2, 0, 3, 0.5, "tied", "skewed"))
    assert str(other) == (
        "depends on earlier sequences of the batch: the output at position 2 of sequence 1 changed by 0.5 when the "
        "tokens of sequence 0 from position 3 on were replaced (tied logits by skewed ones)"
    )
    assert (other.leaks, other.other_sequences) == (False, True)


def test_torchs_generator_is_left_as_it_was_and_the_audit_repeats() -> None:
    torch.default_generator.manual_seed(3)
    before = torch.get_rng_state()
    first = causality(partial(random_choice, k=K), tight(by_weight), num_experts=E)
    assert torch.equal(torch.get_rng_state(), before)
    torch.default_generator.manual_seed(4)
    assert causality(partial(random_choice, k=K), tight(by_weight), num_experts=E) == first


def test_a_router_gets_what_it_needs_and_what_it_is_given() -> None:
    seen: list[dict[str, Any]] = []

    def router(logits: Tensor, **keywords: Any) -> Routing:
        seen.append({"shape": tuple(logits.shape), "dtype": logits.dtype, **keywords})
        return top_k(logits, k=K)

    table, state = hash_table(11, E, k=1), torch.ones(E)
    causality(router, num_experts=E, sequences=2, length=5, needs=("sequence_length", "token_ids", "table", "state"),
              inputs={"table": table, "state": state})  # fmt: skip
    given = seen[0]
    assert given["shape"] == (10, E)
    assert given["dtype"] == torch.float64
    assert (given["bias"], given["sequence_length"]) == (None, 5)
    assert given["table"] is table
    assert given["state"] is state
    assert given["token_ids"].shape == (10,)
    assert max(call["token_ids"].max() for call in seen) == 10  # every id has a row in the table
    seen.clear()
    causality(router, num_experts=E, sequences=2, length=5, trials=1)
    assert set(seen[0]) == {"shape", "dtype", "bias"}
    assert len(seen) == 4  # once before, and three ways of replacing


def test_a_remembered_bias_is_no_leak() -> None:
    bias = {"bias": torch.randn(E, dtype=torch.float64)}
    assert not causality(TOP_K, dropless(), num_experts=E, inputs=bias).leaks


def test_what_it_cannot_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"needs \['state'\], which the audit cannot draw.*as inputs=\{'state': ...\}"):
        causality(TOP_K, num_experts=E, needs=("state", "token_ids"))


@pytest.mark.parametrize("numbers", [{"sequences": 1}, {"length": 1}, {"trials": 0}])
def test_numbers_must_leave_something_to_depend_on(numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"expected at least 2 sequences of at least 2 tokens, and a trial"):
        causality(TOP_K, num_experts=E, **numbers)
