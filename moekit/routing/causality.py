"""The causality audit: whether an output depends on later tokens or on other sequences, found by intervention.

A router and a dispatcher are run on tokens, some tokens are replaced by others, and they are run again. What changes at
tokens that were left alone depends on those that were replaced. Nothing is read off the code, so it works for any
composition, and a dependence that is found is there. One that is not found may still exist where no draw came near it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.routing._interventions import DRAWS, Tokens, draw_tokens, output_of, replaced
from moekit.routing.fixed import hash_table
from moekit.types import Dispatcher, Routing, SoftRouting

_VOCABULARY = 64
_TOLERANCE = 1e-9  # relative to the largest output, in float64: rounding stays far below, a dependence far above


class Dependence(NamedTuple):
    """One intervention that showed something, enough to look at it again.

    Attributes:
        sequence: whose output changed.
        position: where in that sequence.
        changed_sequence: in which sequence tokens were replaced,
        changed_from: from which position on.
        difference: the largest change of the output there.
        before: name of the draw of the logits before.
        after: name of the draw of the logits of the replaced tokens.
    """

    sequence: int
    position: int
    changed_sequence: int
    changed_from: int
    difference: float
    before: str = ""
    after: str = ""

    def __str__(self) -> str:
        """Say it in a sentence."""
        return (
            f"the output at position {self.position} of sequence {self.sequence} changed by {self.difference:.2g} when "
            f"the tokens of sequence {self.changed_sequence} from position {self.changed_from} on were replaced "
            f"({self.before} logits by {self.after} ones)"
        )


class Causality(NamedTuple):
    """What a token's output depends on beside the tokens before it in its sequence.

    Attributes:
        later_token: an output that changed with later tokens of its own sequence; None if none was found.
        earlier_sequence: an output that changed with a sequence before it in the batch; None if none was found.
        later_sequence: an output that changed with a sequence after it in the batch; None if none was found.

    Example:
        >>> found = Causality()
        >>> found.leaks, found.other_sequences, str(found)
        (False, False, 'depends on no later token and on no other sequence')
    """

    later_token: Dependence | None = None
    earlier_sequence: Dependence | None = None
    later_sequence: Dependence | None = None

    @property
    def later_tokens(self) -> bool:
        """Whether an output depends on later tokens of its own sequence."""
        return self.later_token is not None

    @property
    def other_sequences(self) -> bool:
        """Whether an output depends on another sequence of the batch."""
        return self.earlier_sequence is not None or self.later_sequence is not None

    @property
    def leaks(self) -> bool:
        """Whether a language model would be trained on what it cannot see when it generates: later tokens.

        A dependence on other sequences alone tells a model nothing about its own future. It does make an output depend
        on the batch, so that evaluation with another batch size gives other numbers.
        """
        return self.later_tokens

    def __str__(self) -> str:
        """Say what was found, one line for each kind of dependence."""
        found = {
            "depends on later tokens of its sequence": self.later_token,
            "depends on earlier sequences of the batch": self.earlier_sequence,
            "depends on later sequences of the batch": self.later_sequence,
        }
        lines = [f"{what}: {dependence}" for what, dependence in found.items() if dependence is not None]
        return "\n".join(lines) or "depends on no later token and on no other sequence"


def causality(
    router: Callable[..., Routing | SoftRouting],
    dispatcher: Dispatcher | None = None,
    *,
    num_experts: int,
    needs: tuple[str, ...] = (),
    inputs: Mapping[str, Any] | None = None,
    sequences: int = 3,
    length: int = 64,
    trials: int = 49,
    seed: int = 0,
) -> Causality:
    """Find out by intervention whether outputs depend on later tokens, or on other sequences.

    Each trial draws tokens (logits, contents and vocabulary ids) for a batch of sequences, one after the other in it.
    It then replaces the last token of one sequence, its tokens from a random position on, and the whole sequence, and
    compares outputs elsewhere in float64. The draws go through all pairs of ordinary, skewed, tied, confident,
    crowded, contested and negative logits, so that loads are tight. Experts are replaced by known maps, a different one
    each, which work row by row: nothing but routing and dispatch can mix tokens. Routers that draw random numbers draw
    the same before and after.

    Top-k with ``by_position`` priority passes. Its output depends on earlier sequences of the batch where an expert is
    full, which ``other_sequences`` reports and ``leaks`` does not count.

    For use before training, not in it: synchronises with the host. Leaves torch's generator as it was. Deterministic.

    Args:
        router: (logits (T, E) float64, bias=None, and what ``needs`` lists) -> Routing or SoftRouting.
        dispatcher: what moves tokens to experts and back, and may drop some; None drops nothing. A SoftRouting is mixed
            by its weights, without a dispatcher. For a recipe, ``Dispatcher(recipe.plan, gather_rows, scatter_rows)``.
        num_experts: width of the logits: E, or E * S for soft slots.
        needs: what the router takes by keyword, of {"token_ids", "sequence_length", "table"}, and names in ``inputs``.
        inputs: by keyword for the router, as they are: a table of its own, or what else it remembers.
        sequences: in the batch, at least 2.
        length: of each, at least 2. T = sequences * length should be several times the tile of token rounding, and a
            multiple of a pool's size.
        trials: 49 tries every pair of draws once.
        seed: of the draws.

    Returns:
        Causality, with one witness for each kind of dependence that was found.

    Raises:
        ValueError: if a number is too small, or a need is not known.

    Example:
        >>> from functools import partial
        >>> from moekit.routing import top_k
        >>> causality(partial(top_k, k=2), num_experts=8).leaks
        False
        >>> def balanced(logits, *, bias=None):  # shifts the selection by what the batch prefers
        ...     return top_k(logits, k=2, bias=-logits.mean(0))
        >>> causality(balanced, num_experts=8).leaks
        True
    """
    keywords = _keywords(num_experts, length, needs, inputs or {})
    _check(sequences=sequences, length=length, trials=trials, needs=needs, keywords=keywords)
    generator, found = torch.Generator().manual_seed(seed), Causality()
    draw = partial(
        draw_tokens,
        num_tokens=sequences * length,
        num_experts=num_experts,
        vocab_size=keywords["table"].shape[0] if "table" in keywords else _VOCABULARY,
        generator=generator,
    )
    for trial in range(trials):
        first, second = DRAWS[trial % len(DRAWS)], DRAWS[(trial + trial // len(DRAWS)) % len(DRAWS)]
        run = partial(output_of, router=router, dispatcher=dispatcher, keywords=keywords, seed=seed + trial)
        new = _trial(run, draw(first), draw(second), interventions=_interventions(sequences, length, generator))
        named = [witness and witness._replace(before=first.__name__, after=second.__name__) for witness in new]
        found = Causality(*(old or witness for old, witness in zip(found, named, strict=True)))
        if None not in found:
            break
    return found


def _keywords(num_experts: int, length: int, needs: tuple[str, ...], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Put together what the router is called with; ``token_ids`` holds a place for those of each draw."""
    drawn: dict[str, Any] = {"token_ids": None, "sequence_length": length}
    if "table" in needs and "table" not in inputs:
        drawn["table"] = hash_table(_VOCABULARY, num_experts, k=min(2, num_experts))
    return {"bias": None, **{name: value for name, value in drawn.items() if name in needs}, **inputs}


def _trial(
    run: Callable[[Tokens], Tensor], tokens: Tokens, others: Tokens, *, interventions: list[Tensor]
) -> Causality:
    """Replace some of the tokens by others, in each way, and look what else changed."""
    found, before = Causality(), run(tokens)
    for changed in interventions:
        differences = _differences(before, run(replaced(tokens, others, changed.flatten())))
        new = _witnesses(differences.view(changed.shape).masked_fill(changed, 0.0), changed)
        found = Causality(*(old or witness for old, witness in zip(found, new, strict=True)))
    return found


def _interventions(sequences: int, length: int, generator: torch.Generator) -> list[Tensor]:
    """Choose a sequence and three ends of it to replace, each (sequences, length) bool."""
    sequence = int(torch.randint(sequences, (), generator=generator))
    middle = int(torch.randint(1, length, (), generator=generator))
    changed = []
    for start in (middle, length - 1, 0):
        mask = torch.zeros(sequences, length, dtype=torch.bool)
        mask[sequence, start:] = True
        changed.append(mask)
    return changed


def _differences(before: Tensor, after: Tensor) -> Tensor:
    """Compare two outputs (T, D): (T,), zero where they agree to rounding."""
    agree = torch.isclose(
        before, after, rtol=0.0, atol=_TOLERANCE * (1 + float(before.nan_to_num().abs().max())), equal_nan=True
    )
    return (after - before).nan_to_num(nan=torch.inf).abs().masked_fill(agree, 0.0).amax(-1)


def _witnesses(differences: Tensor, changed: Tensor) -> Causality:
    """Pick the largest difference of each kind, from differences (sequences, length) at tokens that were left alone."""
    sequence = int(changed.any(1).int().argmax())
    start = int(changed[sequence].int().argmax())

    def witness(first: int, end: int) -> Dependence | None:
        part = differences[first:end]
        if not part.any():
            return None
        row, position = divmod(int(part.argmax()), differences.shape[1])
        return Dependence(first + row, position, sequence, start, float(part.max()))

    # What depends on sequences after it changed in a sequence before the one that was replaced.
    return Causality(
        later_token=witness(sequence, sequence + 1),
        earlier_sequence=witness(sequence + 1, len(differences)),
        later_sequence=witness(0, sequence),
    )


def _check(*, sequences: int, length: int, trials: int, needs: tuple[str, ...], keywords: Mapping[str, Any]) -> None:
    if sequences < 2 or length < 2 or trials < 1:
        raise ValueError(
            f"causality: sequences = {sequences}, length = {length}, trials = {trials}; expected at least 2 sequences "
            f"of at least 2 tokens, and a trial. With less, there is nothing that an output could depend on."
        )
    unknown = set(needs) - set(keywords)
    if unknown:
        raise ValueError(
            f"causality: the router needs {sorted(unknown)}, which the audit cannot draw; expected a subset of "
            f"{{'token_ids', 'sequence_length', 'table'}}. Pass what it remembers as "
            f"inputs={{{sorted(unknown)[0]!r}: ...}}."
        )
