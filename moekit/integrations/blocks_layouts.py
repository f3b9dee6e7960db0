"""How the sparse MoE blocks of Hugging Face transformers name and lay out their tensors, piece by piece.

A piece reads some entries of a state dict into tensors of moekit, (E, in, out), and writes them back: two functions
that are each other's inverse. Reading takes the entries out, so that what is left in the end is what nobody knew. Both
ways are differentiable.

Three traps lie here. transformers stores (out, in) in most blocks, and (in, out) in some; gate and up are the halves of
one matrix, first gate, or its even and odd columns; and one nn.Linear of a shared expert has no axis E.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from moekit.experts import BiasedGatedParams, GatedParams, MlpParams
from moekit.routing import BiasedGateParams

Entries = dict[str, Tensor]


class Piece(NamedTuple):
    """A part of a state dict.

    Attributes:
        read: (entries, config) -> tensors of moekit; takes the entries out.
        write: (tensors of moekit, config) -> entries.
    """

    read: Callable[[Entries, Any], Any]
    write: Callable[[Any, Any], Entries]


def take(entries: Entries, name: str) -> Tensor:
    """Take one entry out; a ValueError says what there is if it is missing."""
    if name not in entries:
        raise ValueError(
            f"the state dict lacks {name!r}; it has {sorted(entries)}. Pass the state dict of the MoE block alone, "
            f"whose names begin where the block begins, and the family that it is of."
        )
    return entries.pop(name)


def optional(piece: Piece, first: str) -> Piece:
    """Make a piece that may be absent, which the entry ``first`` tells; absent, it is None."""
    return Piece(partial(_read_if, piece=piece, first=first), partial(_write_if, piece=piece))


def _read_if(entries: Entries, config: Any, *, piece: Piece, first: str) -> Any:
    return piece.read(entries, config) if first in entries else None


def _write_if(value: Any, config: Any, *, piece: Piece) -> Entries:
    return {} if value is None else piece.write(value, config)


# Gates and biases.


def linear(name: str) -> Piece:
    """Make the piece of one weight, (out, in) <-> (in, out)."""
    return Piece(lambda entries, _: turned(take(entries, name)), lambda w, _: {name: turned(w)})


def biased_linear(weight: str, bias: str) -> Piece:
    """Make the piece of a gate with a bias, <-> ``BiasedGateParams``."""
    return Piece(
        lambda entries, _: BiasedGateParams(turned(take(entries, weight)), take(entries, bias)),
        lambda gate, _: {weight: turned(gate.w), bias: gate.b},
    )


def vector(name: str) -> Piece:
    """Make the piece of one vector (E,)."""
    return Piece(lambda entries, _: take(entries, name), lambda v, _: {name: v})


def row(name: str) -> Piece:
    """Make the piece of one vector stored as (1, E)."""
    return Piece(lambda entries, _: take(entries, name).squeeze(0), lambda v, _: {name: v.unsqueeze(0)})


# Routed experts.


def halves(gate_up: str, down: str) -> Piece:
    """Make the piece of (E, 2F, D), first gate, then up, and (E, D, F) <-> ``GatedParams``."""
    return Piece(
        lambda entries, _: GatedParams(*_split(turned(take(entries, gate_up))), turned(take(entries, down))),
        lambda p, _: {gate_up: turned(torch.cat([p.gate, p.up], -1)), down: turned(p.down)},
    )


def halves_in_out(gate_up: str, down: str) -> Piece:
    """Make the piece of (E, D, 2F), first gate, then up, and (E, F, D) <-> ``GatedParams``."""
    return Piece(
        lambda entries, _: GatedParams(*_split(take(entries, gate_up)), take(entries, down)),
        lambda p, _: {gate_up: torch.cat([p.gate, p.up], -1), down: p.down},
    )


def interleaved_biased(prefix: str) -> Piece:
    """Make the piece of gpt-oss's experts: (E, D, 2F) with gate in even columns and up in odd ones, and biases."""
    return Piece(partial(_read_interleaved, prefix=prefix), partial(_write_interleaved, prefix=prefix))


def _read_interleaved(entries: Entries, _: Any, *, prefix: str) -> BiasedGatedParams:
    gate, up = _every_other(take(entries, f"{prefix}.gate_up_proj"))
    gate_bias, up_bias = _every_other(take(entries, f"{prefix}.gate_up_proj_bias").unsqueeze(1))
    down, down_bias = take(entries, f"{prefix}.down_proj"), take(entries, f"{prefix}.down_proj_bias").unsqueeze(1)
    return BiasedGatedParams(gate, up, down, gate_bias, up_bias, down_bias)


def _write_interleaved(p: BiasedGatedParams, _: Any, *, prefix: str) -> Entries:
    return {
        f"{prefix}.gate_up_proj": torch.stack([p.gate, p.up], -1).flatten(-2),
        f"{prefix}.gate_up_proj_bias": torch.stack([p.gate_bias, p.up_bias], -1).flatten(-2).squeeze(1),
        f"{prefix}.down_proj": p.down,
        f"{prefix}.down_proj_bias": p.down_bias.squeeze(1),
    }


def rows_of_experts(prefix: str, num_experts: Callable[[Any], int]) -> Piece:
    """Make the piece of DBRX's experts: w1 (gate), v1 (up) and w2 (down), each (E * F, D)."""
    return Piece(
        partial(_read_rows, prefix=prefix, num_experts=num_experts),
        lambda p, _: {
            f"{prefix}.w1": rearrange(p.gate, "e d f -> (e f) d"),
            f"{prefix}.v1": rearrange(p.up, "e d f -> (e f) d"),
            f"{prefix}.w2": rearrange(p.down, "e f d -> (e f) d"),
        },
    )


def _read_rows(entries: Entries, config: Any, *, prefix: str, num_experts: Callable[[Any], int]) -> GatedParams:
    matrices = (take(entries, f"{prefix}.{name}") for name in ("w1", "v1", "w2"))
    w1, v1, w2 = (rearrange(w, "(e f) d -> e f d", e=num_experts(config)) for w in matrices)
    return GatedParams(turned(w1), turned(v1), w2.contiguous())


def ungated(up: str, down: str) -> Piece:
    """Make the piece of (E, F, D) and (E, D, F) <-> ``MlpParams``."""
    return Piece(
        lambda entries, _: MlpParams(turned(take(entries, up)), turned(take(entries, down))),
        lambda p, _: {up: turned(p.up), down: turned(p.down)},
    )


def listed_ungated(up: str, down: str) -> Piece:
    """Make the piece of one nn.Linear per expert <-> ``MlpParams``; names have a place {} for the expert's number."""
    return Piece(
        lambda entries, _: MlpParams(_stacked(entries, up), _stacked(entries, down)),
        lambda p, _: _unstacked(p.up, up) | _unstacked(p.down, down),
    )


def _stacked(entries: Entries, name: str) -> Tensor:
    number = 0
    while name.format(number) in entries:
        number += 1
    return turned(torch.stack([take(entries, name.format(e)) for e in range(max(number, 1))]))


def _unstacked(w: Tensor, name: str) -> Entries:
    return {name.format(e): w_e for e, w_e in enumerate(turned(w).unbind(0))}


def halves_with_unused(gate_up: str, down: str, unused: Callable[[Any], int]) -> Piece:
    """Make the piece of LongCat's experts: ``halves`` whose first matrix has rows of zero experts, which nobody reads.

    They are left out, and written as zeros.
    """
    return Piece(
        partial(_read_without_unused, gate_up=gate_up, down=down),
        partial(_write_with_unused, gate_up=gate_up, down=down, unused=unused),
    )


def _read_without_unused(entries: Entries, _: Any, *, gate_up: str, down: str) -> GatedParams:
    downs = turned(take(entries, down))
    return GatedParams(*_split(turned(take(entries, gate_up)[: downs.shape[0]])), downs)


def _write_with_unused(
    p: GatedParams, config: Any, *, gate_up: str, down: str, unused: Callable[[Any], int]
) -> Entries:
    used = turned(torch.cat([p.gate, p.up], -1))  # (E, 2F, D)
    return {gate_up: torch.cat([used, used.new_zeros(unused(config), *used.shape[1:])]), down: turned(p.down)}


# Shared experts: one network without the axis E.


def gated_mlp(prefix: str) -> Piece:
    """Make the piece of gate_proj, up_proj and down_proj, each an nn.Linear <-> ``GatedParams`` with E = 1."""
    return _one_network(prefix, ("gate_proj", "up_proj", "down_proj"), GatedParams)


def mlp(prefix: str) -> Piece:
    """Make the piece of up_proj and down_proj, each an nn.Linear <-> ``MlpParams`` with E = 1."""
    return _one_network(prefix, ("up_proj", "down_proj"), MlpParams)


def _one_network(prefix: str, linears: tuple[str, ...], kind: type) -> Piece:
    names = [f"{prefix}.{linear}.weight" for linear in linears]
    return Piece(
        lambda entries, _: kind(*(turned(take(entries, name)).unsqueeze(0) for name in names)),
        lambda p, _: {name: turned(w.squeeze(0)) for name, w in zip(names, p, strict=True)},
    )


def halves_mlp(gate_up: str, down: str) -> Piece:
    """Make the piece of (2F, D), first gate, then up, and (D, F) <-> ``GatedParams`` with E = 1."""
    routed = halves(gate_up, down)
    return Piece(
        lambda entries, config: routed.read(_with_experts(entries, (gate_up, down)), config),
        lambda p, config: {name: w.squeeze(0) for name, w in routed.write(p, config).items()},
    )


def _with_experts(entries: Entries, names: tuple[str, ...]) -> Entries:
    return {name: take(entries, name).unsqueeze(0) for name in names}


def turned(w: Tensor) -> Tensor:
    """Exchange the last two axes, in memory too."""
    return w.transpose(-1, -2).contiguous()


def _split(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.contiguous(), up.contiguous()


def _every_other(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up[..., ::2].contiguous(), gate_up[..., 1::2].contiguous()
