"""The axis legend, and the types and signatures that every stage of an MoE layer shares.

Every docstring of moekit names the axes of its tensors with these letters:

====  =====================================================  ====  =============================================
T     tokens (batch and sequence flattened)                  N     assignments: (token, expert) pairs, T*K for top-k
D     model dimension                                        R     rows handed to experts: N, or E*C when padded
F     expert hidden dimension                                C     capacity: rows per expert when all are equal
E     experts                                                S     slots per expert (soft routing)
K     experts per token                                      P     ranks of an expert-parallel group
G     pools: sets of tokens that compete or mix
====  =====================================================  ====  =============================================
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Ratio(NamedTuple):
    """An exact ratio of whole numbers, the second positive. ``moekit.ratios`` computes with them."""

    numerator: int
    denominator: int = 1

    def __str__(self) -> str:
        """Write it as a number.

        Example:
            >>> str(Ratio(5, 4))
            '1.25'
        """
        return str(self.numerator / self.denominator)

    def __mul__(self, other: object) -> Any:
        """Refuse what would repeat the tuple."""
        raise TypeError(f"{self!r} times {other!r}: a ratio is a tuple; use moekit.ratios (as_ratio, multiplied).")

    def __rmul__(self, other: object) -> Any:
        """Refuse it from the other side, too."""
        return self * other


class Routing(NamedTuple):
    """A sparse routing: a list of weighted (token, expert) pairs.

    The number of axes A says how regular the list is, and nothing else does:

    - two, (T, K): token choice. Row t holds the assignments of token t; -1 fills up a variable number of choices.
    - three, (G, E, C): expert choice. Row (g, e) holds the tokens that expert e took from pool g.
    - one, (N,): any other list, in any order.

    A drop by capacity is a matter of the plan and leaves the routing unchanged.

    Attributes:
        token_indices: (*A) int64 in [0, T).
        expert_indices: (*A) int64 in [0, E), or -1: this assignment does not exist. Nobody looks for other numbers,
            which would wait for the device: what they do is undefined.
        weights: (*A) float32. The only path of gradient from the layer's output to the router. That of an assignment
            that does not exist is zero, or, behind an exchange, that of a choice which lives on another rank.
        num_tokens: T, the rows of the ``x`` that ``token_indices`` points into.
        num_experts: E, the experts that ``expert_indices`` points into.
        pool: assignments that compete for the capacity of the E experts: N on one process. Behind an exchange, those of
            all ranks times this rank's share of their experts, which need not be whole.
        positions: (*A) int64, the place of each assignment among all that compete, which decides who is dropped; None
            is the order of the list.
        most: no more assignments exist than these; None for N. Exchanges set it, behind which most choices of a row are
            other ranks' and the host knows how many are not: experts then take memory for no more rows. Whoever adds
            assignments to such a routing has to reset it.

    Example:
        >>> import torch
        >>> from moekit.routing import top_k
        >>> routing = top_k(torch.tensor([[0.0, 2.0, 1.0]]), k=2)
        >>> routing.token_indices, routing.expert_indices, routing.num_tokens, routing.num_experts, routing.pool
        (tensor([[0, 0]]), tensor([[1, 2]]), 1, 3, 2)
    """

    token_indices: Tensor
    expert_indices: Tensor
    weights: Tensor
    num_tokens: int
    num_experts: int
    pool: int | Ratio
    positions: Tensor | None = None
    most: int | None = None


def existing_at_most(routing: Routing) -> int:
    """Return how many assignments of a routing exist at most, without reading them.

    Args:
        routing: any routing.

    Returns:
        N, or less where ``most`` says so.

    Example:
        >>> import torch
        >>> from moekit.routing import round_robin
        >>> routing = round_robin(torch.zeros(3, 4), k=2)
        >>> existing_at_most(routing), existing_at_most(routing._replace(most=4))
        (6, 4)
    """
    number = routing.expert_indices.numel()
    return number if routing.most is None else min(number, routing.most)


class SoftRouting(NamedTuple):
    """A soft routing: every token to every slot.

    Attributes:
        dispatch_weights: (G, T/G, E, S) float32, the share of each token in each slot's input.
        combine_weights: (G, T/G, E, S) float32, the share of each slot's output in each token.

    Example:
        >>> import torch
        >>> from moekit.routing import soft_slots
        >>> soft_slots(torch.zeros(6, 8), slots=2, sequence_length=3).dispatch_weights.shape
        torch.Size([2, 3, 4, 2])
    """

    dispatch_weights: Tensor
    combine_weights: Tensor


class NoisyLogits(NamedTuple):
    """Logits with noise in them, and what a loss over the noise needs.

    Attributes:
        logits: (T, E) float32, with noise: what the router decides by.
        clean: (T, E) float32, without.
        std: (T, E) float32, the standard deviation of the noise.

    Example:
        >>> import torch
        >>> from moekit.routing import init_noisy_gate, noisy_gate
        >>> noisy_gate(torch.ones(2, 4), init_noisy_gate(4, 3)).std.shape
        torch.Size([2, 3])
    """

    logits: Tensor
    clean: Tensor
    std: Tensor


Logits = Tensor | NoisyLogits


class Groups(NamedTuple):
    """Rows grouped by expert: expert e owns the next ``sizes[e]`` rows. Rows past ``sizes.sum()`` belong to nobody.

    Attributes:
        sizes: (E,) int32.
        capacity: C when every size is C and this is known without reading the device, else None.

    Example:
        >>> import torch
        >>> groups = Groups(torch.tensor([2, 1], dtype=torch.int32), capacity=None)  # rows 0 and 1, row 2
        >>> groups.sizes.sum()
        tensor(3)
    """

    sizes: Tensor
    capacity: int | None


class DispatchPlan(NamedTuple):
    """Which assignment each row of the experts' input carries. Integers only, never differentiated.

    Attributes:
        assignments: (R,) int64 into the flattened routing, each at most once; -1 for a padding row.
        groups: how the rows are grouped by expert.

    Example:
        >>> import torch
        >>> from moekit.dispatch import padded_plan
        >>> from moekit.routing import top_k
        >>> plan = padded_plan(top_k(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), k=1), capacity_factor=1.0)
        >>> plan.assignments, plan.groups.capacity  # the second token is dropped, expert 1 has a padding row
        (tensor([ 0, -1]), 1)
    """

    assignments: Tensor
    groups: Groups


class LayerOutput(NamedTuple):
    """What a feed-forward layer returns, dense or MoE. A dense layer fills ``y`` alone.

    Attributes:
        y: (..., D), the layer's output.
        routing: the decision, over the flattened tokens; of a soft layer, that of its slots.
        losses: name to scalar, not yet multiplied by any coefficient.
        logits: what the gate returned, which statistics need: (T, E) float32, or such logits with noise.

    Example:
        >>> import torch
        >>> from moekit import MoE
        >>> from moekit.recipes import mixtral
        >>> output = MoE(8, 4, mixtral(k=2), hidden=16)(torch.ones(2, 3, 8))
        >>> output.y.shape, output.logits.shape, list(output.losses)
        (torch.Size([2, 3, 8]), torch.Size([6, 4]), ['load_balance'])
    """

    y: Tensor
    routing: Routing | None = None
    losses: Mapping[str, Tensor] = {}
    logits: Logits | None = None


class Gate(Protocol):
    """The map from tokens to router logits."""

    def __call__(self, x: Tensor, params: Any, /) -> Logits:
        """Map x (T, D) to logits (T, E), in float32 whatever the autocast dtype.

        ``params`` is a tensor (D, E), or a NamedTuple of tensors.
        """
        ...


class Router(Protocol):
    """The decision which experts see which tokens."""

    def __call__(self, logits: Any, /, *, bias: Tensor | None = None) -> Routing | SoftRouting:
        """Map logits (T, E) to a routing; ``bias`` (E,) shifts the selection, never the weights.

        A routing with two axes is in the order of tokens: row t is of token t, as layers take it.
        A router may need more, which it then takes by keyword: ``token_ids`` (T,), ``sequence_length``, or what its
        state is called.
        """
        ...


class RouterState(NamedTuple):
    """What a router remembers from one optimizer step to the next, as functions of a tensor that others keep.

    Attributes:
        name: what the tensor is called, in checkpoints too. ``bias`` reaches the router as its selection bias; any
            other name reaches it if the recipe lists it in ``needs``.
        init: (num_experts, device=) -> the tensor to begin with, of any shape and dtype.
        observe: (logits, routing, state, token_mask=) -> float64 numbers, (n,) of any n, which are added up over
            micro-batches and ranks.
        update: (state, sums) -> the new state, of the same shape and dtype, once per optimizer step; None for a state
            that stays. ``docs/python.md`` has one of three rows.
        scales: name of the loss whose coefficient the state is, if it is one.

    Example:
        >>> from moekit.routing import selection_bias
        >>> state = selection_bias(rate=0.001)
        >>> state.name, state.init(4, device="cpu")
        ('bias', tensor([0., 0., 0., 0.]))
    """

    name: str
    init: Callable[..., Tensor]
    observe: Callable[..., Tensor] | None = None
    update: Callable[[Tensor, Tensor], Tensor] | None = None
    scales: str = ""


class SharedExperts(NamedTuple):
    """Experts that see every token, with weight one.

    Attributes:
        network: the feed-forward network, over one group of rows.
        number: how many: one network of as many times a routed expert's width.
        gated: whether a sigmoid of the token weighs them.

    Example:
        >>> from moekit.recipes import qwen2_moe
        >>> qwen2_moe().shared[1:]
        (8, True)
    """

    network: "Experts"
    number: int = 1
    gated: bool = False


class SimpleExperts(NamedTuple):
    """Experts that are no feed-forward networks, which the router knows by the numbers after E - 1.

    Attributes:
        number: how many.
        apply: (x (T, D), routing over all experts, params, num_experts=E) -> (T, D), their weighted sum.
        init: (dim, generator=, device=, dtype=) -> a NamedTuple of tensors, which may be empty.

    Example:
        >>> from moekit.experts import simple
        >>> simple(null=1, copy=1, constants=2).number
        4
    """

    number: int
    apply: Callable[..., Tensor]
    init: Callable[..., Any]


class Loss(Protocol):
    """A balancing loss of one layer."""

    def __call__(
        self,
        logits: Any,
        routing: Routing,
        /,
        *,
        token_mask: Tensor | None = None,
        tokens_per_expert: Tensor | None = None,
        sequence_length: int | None = None,
    ) -> Tensor:
        """Map logits (T, E) and the routing to a scalar.

        ``token_mask`` (T,) bool is True for real tokens; ``tokens_per_expert`` are counts of a larger batch, times this
        call's share of its tokens; ``sequence_length`` is how many consecutive tokens make a sequence.
        """
        ...


class Dispatcher(NamedTuple):
    """A way of moving tokens to experts and back: plan in integers first, then move.

    Attributes:
        plan: routing -> DispatchPlan.
        dispatch: (x (T, D), routing, plan) -> rows (R, D).
        combine: (rows (R, D), routing, plan) -> y (T, D); the transpose of ``dispatch``, weighted.

    Example:
        >>> import torch
        >>> from moekit.dispatch import dropless
        >>> from moekit.routing import top_k
        >>> x, routing, moves = torch.ones(3, 2), top_k(torch.zeros(3, 4), k=2, normalize=True), dropless()
        >>> plan = moves.plan(routing)
        >>> moves.combine(moves.dispatch(x, routing, plan), routing, plan).equal(x)
        True
    """

    plan: Callable[[Routing], DispatchPlan]
    dispatch: Callable[[Tensor, Routing, DispatchPlan], Tensor]
    combine: Callable[[Tensor, Routing, DispatchPlan], Tensor]


class GroupedMatmul(Protocol):
    """One matrix product per group of rows."""

    def __call__(self, rows: Tensor, groups: Groups, w: Tensor, /) -> Tensor:
        """Multiply expert e's rows of ``rows`` (R, D) by ``w[e]`` of ``w`` (E, D, F), giving (R, F)."""
        ...


class Experts(Protocol):
    """The expert feed-forward networks, all at once, over grouped rows."""

    def __call__(self, rows: Tensor, groups: Groups, params: Any, /) -> Tensor:
        """Map rows (R, D) to rows (R, D) with ``params``, a NamedTuple of (E, ., .) tensors.

        Behind a mask or variable k, rows of nobody follow the last group: R may be more than all sizes together.
        """
        ...


class ExpertLayer(Protocol):
    """The seam that backends and parallel strategies share: everything between the decision and the sum."""

    def __call__(self, x: Tensor, routing: Routing, params: Any, /) -> Tensor:
        """Map x (T, D) to y (T, D): each token's weighted sum over its experts."""
        ...
