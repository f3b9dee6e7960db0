"""Slices of a layer's tokens, in one process: what each slice is given, and what comes of them."""

import pytest
import torch
from torch import Tensor

from moekit.parallel import chunked
from moekit.routing import round_robin, top_k
from moekit.types import Ratio, Routing


def choices(num_tokens: int, pool: Ratio | None = None) -> Routing:
    routing = top_k(torch.randn(num_tokens, 4, generator=torch.Generator().manual_seed(0)), k=2)
    return routing if pool is None else routing._replace(pool=pool)


@pytest.mark.parametrize(("num_tokens", "num_chunks"), [(7, 3), (2, 3), (0, 2), (5, 1)])
def test_slices_share_tokens_choices_and_pool(num_tokens: int, num_chunks: int) -> None:
    seen: list[tuple[Tensor, Routing]] = []

    def layer(x: Tensor, routing: Routing, params: object) -> Tensor:
        assert params == "params"
        seen.append((x, routing))
        return 2 * x

    x, routing = torch.randn(num_tokens, 3), choices(num_tokens, Ratio(2 * max(num_tokens, 1), 3))
    assert torch.equal(chunked(layer, num_chunks=num_chunks)(x, routing, "params"), 2 * x)
    assert len(seen) == num_chunks
    sizes = [len(tokens) for tokens, _ in seen]
    assert sum(sizes) == num_tokens
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat([part.expert_indices for _, part in seen]), routing.expert_indices)
    assert torch.equal(torch.cat([part.weights for _, part in seen]), routing.weights)
    for (tokens, part), size in zip(seen, sizes, strict=True):
        assert (part.num_tokens, part.num_experts) == (size, 4)
        assert torch.equal(part.token_indices, torch.arange(size).unsqueeze(1).expand(size, 2))
        assert part.pool.numerator * 3 == 2 * size * part.pool.denominator  # two thirds of its own tokens
        assert part.positions is None
        assert len(tokens) == size
    assert torch.equal(torch.cat([tokens for tokens, _ in seen]), x)


def test_positions_are_sliced_with_their_tokens() -> None:
    seen = []
    routing = round_robin(torch.zeros(5, 4), k=2)._replace(positions=torch.arange(10).view(5, 2))
    chunked(lambda x, part, _: (seen.append(part.positions), x)[1], num_chunks=2)(torch.ones(5, 1), routing, None)
    assert [each.tolist() for each in seen] == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9]]]


def test_what_cannot_be_sliced_is_refused() -> None:
    with pytest.raises(ValueError, match="num_chunks = 0; expected at least 1"):
        chunked(lambda x, routing, params: x, num_chunks=0)
    flat = choices(3)
    flat = flat._replace(**{name: getattr(flat, name).flatten() for name in Routing._fields[:3]})
    with pytest.raises(ValueError, match=r"chunked slices the choices of tokens, \(T, K\)"):
        chunked(lambda x, routing, params: x, num_chunks=2)(torch.ones(3, 1), flat, None)
