"""Every router of the library with its gate and what it needs, at any size: for tests and benchmarks."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit import routing as r
from moekit.experts import simple
from moekit.recipes import Recipe
from moekit.recipes.published import gshard_route
from moekit.routing import fixed_table, selection_bias
from moekit.types import ExpertLayer, RouterState


class Case(NamedTuple):
    """A router with its gate, and what it needs."""

    route: Callable[..., Any]
    gate: Callable[..., Any] = r.linear_gate
    init_gate: Callable[..., Any] = r.init_linear_gate
    state: RouterState | None = None
    needs: tuple[str, ...] = ()
    extra: int = 0

    def recipe(self, layer: ExpertLayer) -> Recipe:
        """Put the router before an expert layer."""
        return Recipe(
            self.gate,
            self.route,
            layer,
            needs=self.needs,
            state=self.state,
            simple=simple() if self.extra else None,
            init_gate=self.init_gate,
        )


BIASED = selection_bias(rate=0.1)


def router_cases(*, k: int, experts: int, vocab_size: int = 10, tile: int = 4) -> dict[str, Case]:
    """List the routers for E experts, K per token where a router has a K."""
    pairs = experts // 2
    return {
        "softmax": Case(partial(r.top_k, k=k)),
        "softmax of top k": Case(partial(r.softmax_of_top_k, k=k)),
        "sigmoid of top k": Case(partial(r.sigmoid_of_top_k, k=k)),
        "sigmoid with bias": Case(partial(r.top_k, k=k, score=r.sigmoid, normalize=True, scale=2.5), state=BIASED),
        "root of softplus": Case(partial(r.top_k, k=k, score=r.sqrt_softplus, normalize=True), state=BIASED),
        "noisy": Case(partial(r.noisy_top_k, k=k), r.noisy_gate, partial(r.init_noisy_gate, std=0.5)),
        "jitter": Case(partial(r.top_k, k=1), r.input_jitter(r.linear_gate, eps=0.1)),
        "gumbel": Case(partial(r.noisy_top_k, k=k), r.gumbel_noise(r.linear_gate)),
        "logit noise": Case(partial(r.noisy_top_k, k=k), r.logit_noise(r.linear_gate, std=1.0)),
        "biased gate": Case(partial(r.softmax_of_top_k, k=k), r.biased_gate, r.init_biased_gate),
        "cosine": Case(partial(r.top_k, k=k), r.cosine_gate, r.init_cosine_gate),
        "random second": Case(gshard_route),
        "expert choice": Case(partial(r.expert_choice, capacity_factor=float(k))),
        "expert choice by sequence": Case(
            partial(r.expert_choice, capacity_factor=1.0, normalize=True), needs=("sequence_length", "token_mask")
        ),
        "sinkhorn": Case(partial(r.sinkhorn, k=1)),
        "sinkhorn of several": Case(partial(r.sinkhorn, k=k), needs=("token_mask",)),
        "quantiles": Case(partial(r.quantile_balanced, k=k), state=BIASED),
        "hash": Case(
            partial(r.hash_choice, normalize=True),
            state=fixed_table(vocab_size=vocab_size, k=k),
            needs=("token_ids", "table"),
        ),
        "groups": Case(
            partial(
                r.group_limited,
                k=k,
                num_groups=pairs,
                groups_kept=max(2 * pairs // 3, k // 2),
                score=r.sigmoid,
                normalize=True,
            ),
            state=BIASED,
        ),
        "relu": Case(r.relu_choice),
        "relu with little room": Case(partial(r.relu_choice, max_k=k)),
        "token rounding": Case(r.token_rounding(partial(r.top_k, k=k), tile=tile)),
        "token rounding up": Case(r.token_rounding(partial(r.top_k, k=k), tile=tile, rounding=torch.ceil)),
        "sparse mixer": Case(partial(r.sparse_mixer, k=k, eps=0.2)),
        "top p": Case(partial(r.top_p, p=0.6)),
        "top p with a budget": Case(partial(r.top_p, p=0.9, max_k=k + 1, normalize=True)),
        "threshold": Case(partial(r.threshold, threshold=0.6, at_least=0)),
        "topology": Case(partial(r.topology_limited, k=k, num_nodes=2, node=0, share=0.3)),
        "simple experts": Case(partial(r.top_k, k=k), extra=simple().number),
        "random": Case(partial(r.random_choice, k=k)),
        "round robin": Case(partial(r.round_robin, k=k)),
    }


def soft_case(slots: int) -> Case:
    """Make the soft router, whose routing is no list."""
    route, init = partial(r.soft_slots, slots=slots), partial(r.init_soft_gate, slots=slots)
    return Case(route, r.soft_gate, init, needs=("sequence_length",))


def tensors_of(case: Case, dim: int, experts: int, **options: Any) -> tuple[Any, Any, Tensor | None]:
    """Draw parameters of gate and simple experts, and a state that does something."""
    gate = case.init_gate(dim, experts + case.extra, **options)
    others = simple().init(dim, **options) if case.extra else None
    state = None if case.state is None else case.state.init(experts + case.extra, device=options.get("device"))
    if state is not None and state.is_floating_point():
        state = state + torch.linspace(-0.3, 0.3, state.numel(), device=state.device).view(state.shape)
    return gate, others, state
