import pytest
import torch

from moekit.routing import top_k
from moekit.routing.scopes import (
    counts_of_pools,
    each_sequence,
    each_token,
    hidden,
    mean_of_pools,
    real_tokens,
    sums_of_pools,
    whole_batch,
)
from moekit.types import Routing

T, E, K, L = 12, 5, 2, 4


def pools_of(scope) -> list[list[int]]:
    return {
        whole_batch: [list(range(T))],
        each_sequence: [list(range(i, i + L)) for i in range(0, T, L)],
        each_token: [[t] for t in range(T)],
        transposed: [list(range(i, T, L)) for i in range(L)],
    }[scope]


def transposed(values: torch.Tensor, sequence_length: int | None) -> torch.Tensor:
    """Split by position in the sequence: a scope of a user's own, whose pools are not consecutive."""
    return each_sequence(values, sequence_length).transpose(0, 1)


SCOPES = [whole_batch, each_sequence, each_token, transposed]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("masked", [False, True])
def test_sums_and_counts_are_those_of_the_loops(scope, masked: bool) -> None:
    values = torch.randn(T, 3, dtype=torch.float64)
    routing = top_k(torch.randn(T, E), k=K)
    routing = routing._replace(expert_indices=routing.expert_indices.masked_fill(routing.expert_indices == 3, -1))
    mask = torch.rand(T) < 0.6 if masked else torch.ones(T, dtype=torch.bool)
    given = mask.view(3, 4) if masked else None
    sums, counts, real = [], [], []
    for pool in pools_of(scope):
        kept = [t for t in pool if mask[t]]
        sums.append(sum((values[t] for t in kept), torch.zeros(3, dtype=torch.float64)))
        chosen = [e for t in kept for e in routing.expert_indices[t].tolist()]
        counts.append([chosen.count(e) for e in range(E)])
        real.append(len(kept))
    torch.testing.assert_close(sums_of_pools(values, given, scope=scope, sequence_length=L), torch.stack(sums))
    assert counts_of_pools(routing, given, scope=scope, sequence_length=L).tolist() == counts
    assert real_tokens(values, given, scope=scope, sequence_length=L).tolist() == real


@pytest.mark.parametrize("scope", SCOPES)
def test_a_routing_of_any_shape_is_counted_alike(scope) -> None:
    routing = top_k(torch.randn(T, E), k=K)
    order = torch.randperm(T * K)
    flat = Routing(*(part.flatten()[order] for part in routing[:3]), *routing[3:])
    mask = torch.arange(T) % 3 > 0
    expected = counts_of_pools(routing, mask, scope=scope, sequence_length=L)
    assert torch.equal(counts_of_pools(flat, mask, scope=scope, sequence_length=L), expected)
    assert expected.sum() == K * mask.sum()


def test_first_choices_alone_are_counted() -> None:
    routing = top_k(torch.randn(T, E), k=K)
    first = routing.expert_indices[:, 0].view(3, 4)
    counts = counts_of_pools(routing, None, choices=1, scope=each_sequence, sequence_length=L)
    assert counts.tolist() == [[row.eq(e).sum().item() for e in range(E)] for row in first]


@pytest.mark.parametrize("scope", SCOPES)
def test_no_tokens_make_sums_of_zero(scope) -> None:
    routing = top_k(torch.zeros(0, E), k=K)
    assert sums_of_pools(torch.zeros(0, E), None, scope=scope, sequence_length=L).sum() == 0
    assert counts_of_pools(routing, None, scope=scope, sequence_length=L).sum() == 0


def test_what_is_hidden_gets_no_gradient() -> None:
    values = torch.tensor([[torch.nan, torch.inf], [1.0, 2.0]], requires_grad=True)
    shown = hidden(values, torch.tensor([False, True]))
    assert shown.tolist() == [[0, 0], [1, 2]]
    assert torch.autograd.grad(shown.sum(), values)[0].tolist() == [[0, 0], [1, 1]]


def test_pools_count_by_their_tokens() -> None:
    assert mean_of_pools(torch.tensor([torch.nan, 4.0, 2.0]), torch.tensor([0, 1, 9])).item() == pytest.approx(2.2)
    assert mean_of_pools(torch.tensor([5.0]), torch.tensor([0])).item() == 0
    for masked in (True, False):
        assert mean_of_pools(torch.tensor([4.0, 2.0]), torch.tensor([3, 3]), masked=masked).item() == 3
        assert mean_of_pools(torch.tensor([torch.nan]), torch.tensor([0]), masked=masked).item() == 0
        assert mean_of_pools(torch.empty(0), torch.empty(0, dtype=torch.int64), masked=masked).item() == 0


@pytest.mark.parametrize("length", [None, 0, -3])
def test_sequences_need_a_length(length: int | None) -> None:
    with pytest.raises(
        ValueError, match=r"each_sequence: sequence_length = .*; expected how many.*Pass sequence_length="
    ):
        each_sequence(torch.zeros(T), length)


def test_sequences_must_be_whole() -> None:
    with pytest.raises(ValueError, match=r"T = 12 tokens are no whole number of sequences of 5.*Pad the last sequence"):
        each_sequence(torch.zeros(T), 5)
