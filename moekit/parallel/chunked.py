"""Overlap of exchange and compute: a layer runs on slices of its tokens, each on a CUDA stream of its own."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moekit.checks import check_tokens
from moekit.ratios import multiplied
from moekit.types import ExpertLayer, Ratio, Routing


def chunked(layer: ExpertLayer, *, num_chunks: int) -> ExpertLayer:
    """Run a layer on slices of its tokens, so that one slice's exchange overlaps another's compute.

    On CUDA the slices take two streams in turn, in the backward too. An exchange then runs beside the other stream's
    experts, provided that what travels back has a communicator of its own: exchanges of one communicator wait for each
    other in the order in which they were asked for, and the second slice's tokens would wait for the first's results.
    So: ``chunked(all_to_all(layer, group=a, return_group=b), num_chunks=2)`` with two groups of the same ranks.

    A capacity limit counts within a slice. It goes outside of an exchange: what arrives behind one ends in rows of
    nobody, which would be shared out among the slices like tokens. Causal if ``layer`` is. No host synchronisation
    beyond the layer's. Deterministic on CUDA if ``layer`` is.

    Args:
        layer: a parallel strategy, or any other.
        num_chunks: slices of as equal a number of tokens as possible; the same on every rank.

    Returns:
        ExpertLayer.

    Raises:
        ValueError: if ``num_chunks`` is not positive; when called, if the routing is not (T, K), or ``x`` not of its
            tokens.

    Example:
        >>> from moekit.experts import init_gated
        >>> from moekit.recipes import mixtral
        >>> from moekit.routing import top_k
        >>> layer = chunked(mixtral().layer, num_chunks=2)
        >>> layer(torch.ones(5, 4), top_k(torch.zeros(5, 2), k=1), init_gated(2, 4)).shape
        torch.Size([5, 4])
    """
    if num_chunks < 1:
        raise ValueError(f"chunked: num_chunks = {num_chunks}; expected at least 1")
    streams = [torch.cuda.Stream() for _ in range(2)] if torch.cuda.is_available() else []
    return partial(_chunked, layer=layer, num_chunks=num_chunks, streams=streams)


def _chunked(
    x: Tensor,
    routing: Routing,
    params: Any,
    *,
    layer: ExpertLayer,
    num_chunks: int,
    streams: Sequence[torch.cuda.Stream],
) -> Tensor:
    check_tokens("chunked", x, routing)
    if routing.expert_indices.ndim != 2:
        raise ValueError(
            "chunked slices the choices of tokens, (T, K), and this router's routing is none. Leave it out"
        )
    slices = zip(x.tensor_split(num_chunks), _split(routing, num_chunks), strict=True)
    if not x.is_cuda:
        return torch.cat([layer(tokens, part, params) for tokens, part in slices])
    outputs = []
    for number, (tokens, part) in enumerate(slices):
        outputs.append(_on_stream(streams[number % 2], layer, tokens, part, params))
    current = torch.cuda.current_stream()
    for stream in streams:
        current.wait_stream(stream)
    for y in outputs:
        y.record_stream(current)
    return torch.cat(outputs)


def _on_stream(stream: torch.cuda.Stream, layer: ExpertLayer, x: Tensor, routing: Routing, params: Any) -> Tensor:
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for tensor in (x, routing.token_indices, routing.expert_indices, routing.weights, routing.positions):
            if tensor is not None:
                tensor.record_stream(stream)  # its memory is not given away while this stream may read it
        return layer(x, routing, params)


def _split(routing: Routing, num_chunks: int) -> list[Routing]:
    """Slice a routing (T, K) by tokens; a slice has its share of the pool."""
    experts, weights = routing.expert_indices.tensor_split(num_chunks), routing.weights.tensor_split(num_chunks)
    positions: Sequence[Tensor | None] = [None] * num_chunks
    if routing.positions is not None:
        positions = routing.positions.tensor_split(num_chunks)
    parts = []
    for chosen, weight, position in zip(experts, weights, positions, strict=True):
        size = chosen.shape[0]
        tokens = torch.arange(size, device=chosen.device).unsqueeze(1).expand_as(chosen)
        pool = multiplied(routing.pool, Ratio(size, max(routing.num_tokens, 1)))
        parts.append(Routing(tokens, chosen, weight, size, routing.num_experts, pool, position, routing.most))
    return parts
