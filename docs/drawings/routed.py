"""A small routing that the schematics are computed from: random, the same every time."""

from typing import NamedTuple

import torch

from moekit.parallel.exchange_plans import plan_exchange
from moekit.routing import top_k


class Routed(NamedTuple):
    """Tokens of several ranks, and where they want to go.

    Attributes:
        ranks: P.
        tokens: T on each rank; token n of all is on rank n div T.
        experts: E.
        choices: (P * T, K), the experts of each token.
    """

    ranks: int
    tokens: int
    experts: int
    choices: list[list[int]]

    def home(self, token: int) -> int:
        """Return the rank that a token is on."""
        return token // self.tokens

    def owners(self, token: int, *, blocks: int) -> list[int]:
        """Return the distinct blocks of experts that a token needs, in order."""
        return sorted({expert * blocks // self.experts for expert in self.choices[token]})

    def on(self, rank: int) -> list[int]:
        """Return the tokens of a rank."""
        return list(range(rank * self.tokens, (rank + 1) * self.tokens))

    def wanting(self, block: int, *, blocks: int, sources: list[int] | None = None) -> list[int]:
        """Return the tokens, of some ranks or of all, that need a block: in the order in which they arrive there."""
        sources = list(range(self.ranks)) if sources is None else sources
        return [n for source in sources for n in self.on(source) if block in self.owners(n, blocks=blocks)]

    def rows(self, *, blocks: int) -> list[list[int]]:
        """Return how many rows each rank sends for each block, by the plan of ``all_to_all`` itself."""
        return [
            plan_exchange(self.routing(rank), blocks).sizes.tolist()  # the number that the strategy sends
            for rank in range(self.ranks)
        ]

    def routing(self, rank: int):  # type: ignore[no-untyped-def]
        """Return a rank's share as a ``Routing``."""
        logits = torch.zeros(self.tokens, self.experts)
        chosen = torch.tensor([self.choices[n] for n in self.on(rank)])
        rank_of_choice = torch.arange(chosen.shape[1], 0, -1.0).expand(chosen.shape)
        return top_k(logits.scatter(1, chosen, rank_of_choice), k=chosen.shape[1])


def routed(*, ranks: int, tokens: int, experts: int, k: int, seed: int) -> Routed:
    """Draw a routing."""
    logits = torch.randn(ranks * tokens, experts, generator=torch.Generator().manual_seed(seed))
    return Routed(ranks, tokens, experts, top_k(logits, k=k).expert_indices.tolist())
