"""Coefficients of the load-balancing loss: what a project's number means, and what it is in another project's form.

Projects write the loss with other constant factors, over other choices, tokens and layers. A constant factor can be
moved into the coefficient, exactly. A loss over other tokens, choices or layers is another function: no coefficient
makes one into the other, and ``convert_coefficient`` says so.
"""

from typing import NamedTuple

from moekit.routing.scopes import Scope, each_sequence, whole_batch


class LossForm(NamedTuple):
    """How a project writes its load-balancing loss: a constant times sum_e f_e P_e, summed up over something.

    One layer's loss at perfect balance is factor * K^k_power * E^experts_power.

    Attributes:
        name: for messages.
        factor: see above.
        k_power: see above; 1 where f_e is a count per token, 0 where it is a share of all choices.
        experts_power: see above; -2 where no E multiplies the mean over experts.
        pooled: whether f and P are over the tokens of all layers together, before they are multiplied.
        averaged: whether the layers' losses are averaged; otherwise they are added up. Without meaning if pooled.
        choices: how many choices of a token f counts; None is all.
        scope: the tokens over which f and P are taken, a function of ``moekit.routing.scopes``.
        global_counts: whether f is of the whole global batch, over ranks and micro-batches.

    Example:
        >>> mine = LossForm("half of each layer's, averaged", factor=0.5, averaged=True)
        >>> value_at_balance(mine, k=2, num_experts=8, num_layers=16)
        0.5
    """

    name: str
    factor: float = 1.0
    k_power: int = 0
    experts_power: int = 0
    pooled: bool = False
    averaged: bool = False
    choices: int | None = None
    scope: Scope = whole_batch
    global_counts: bool = False


SWITCH = LossForm("Switch Transformer (equations 4 to 6)")
"""One per layer, E * sum_e f_e P_e; each is added to the total. moekit's form, one layer's loss at a time."""

MEGATRON = LossForm("Megatron-LM, aux_loss")
"""Each layer's is added to the gradient; what is logged is their average."""

MEGATRON_GLOBAL = LossForm("Megatron-LM, global_aux_loss", global_counts=True)
"""With f averaged over ranks and the micro-batches so far."""

MEGABLOCKS = LossForm("MegaBlocks", averaged=True)
"""Divided by the number of layers, of which MegaBlocks expects every one to be an MoE layer."""

OPENLM = LossForm("OpenLM", averaged=True)
"""MegaBlocks' loss, as OpenLM's guide promises it: the mean over MoE layers."""

MOEKIT = LossForm("moekit's trainer (--moe-loss-scope step)", averaged=True, global_counts=True)
"""The mean over MoE layers, f from the whole step; with ``_replace(global_counts=False)``, its micro-batch scope."""

HUGGING_FACE = LossForm("Hugging Face transformers", k_power=1, pooled=True)
"""Over the tokens of all layers together, K at perfect balance."""

DEEPSEEK_SEQUENCE = LossForm("DeepSeek-V3 (equations 17 to 20)", scope=each_sequence)
"""Within each sequence, averaged over sequences; every layer's is added."""

MEGATRON_SEQUENCE = LossForm("Megatron-LM, seq_aux_loss", scope=each_sequence)
"""The same as DeepSeek's."""

GSHARD_PAPER = LossForm("GShard (Algorithm 1, line 13)", experts_power=-2, choices=1)
"""The mean over experts of f_e P_e, first choices alone: 1 / E^2 at perfect balance."""

FIRST_CHOICE = LossForm("first choices (Tutel, DeepSpeed's top-2)", choices=1)
"""GShard's times E^2, as GShard's own code has it."""

FIRST_CHOICE_SEQUENCE = LossForm("first choices within a group (st-moe, V-MoE)", choices=1, scope=each_sequence)
"""The same within each sequence, averaged over sequences: ``sequence_balance_loss(choices=1)``."""


def fastmoe_gshard(world_size: int) -> LossForm:
    """Return the form of FastMoE's GShard gate: the mean over all experts of f_e P_e times local experts squared.

    Args:
        world_size: ranks that the experts are spread over. The loss falls with its square.

    Returns:
        LossForm.

    Raises:
        ValueError: if there is no rank.

    Example:
        >>> value_at_balance(fastmoe_gshard(4), k=2, num_experts=16)
        0.0625
    """
    if world_size < 1:
        raise ValueError(f"fastmoe_gshard: world_size = {world_size}; expected at least 1 rank.")
    return LossForm(f"FastMoE, GShard gate on {world_size} ranks", factor=world_size**-2, choices=1)


def value_at_balance(form: LossForm, *, k: int, num_experts: int, num_layers: int = 1) -> float:
    """Compute what a form's loss is, over all layers and without its coefficient, when every layer is balanced.

    Args:
        form: of the loss.
        k: experts per token.
        num_experts: E.
        num_layers: MoE layers.

    Returns:
        The value.

    Raises:
        ValueError: if the numbers make no MoE model.

    Example:
        >>> value_at_balance(HUGGING_FACE, k=2, num_experts=8, num_layers=32)
        2.0
        >>> value_at_balance(SWITCH, k=2, num_experts=8, num_layers=32)
        32.0
    """
    if not 1 <= k <= num_experts or num_layers < 1:
        raise ValueError(
            f"k = {k} of num_experts = {num_experts} in num_layers = {num_layers}; expected 1 <= k <= num_experts and "
            f"at least one layer."
        )
    layers = 1 if form.pooled or form.averaged else num_layers
    return layers * form.factor * float(k) ** form.k_power * float(num_experts) ** form.experts_power


def convert_coefficient(
    value: float, *, source: LossForm, target: LossForm, k: int, num_experts: int, num_layers: int
) -> float:
    """Convert a coefficient, so that the target's loss times the result is the source's loss times ``value``.

    Exact, for the value and for every gradient, whatever the routing is, if both losses are taken of the same scores.
    Where the two forms are not proportional there is no such number, and this is an error. They are proportional where
    both take f and P over the same choices, tokens and layers; pooling layers makes no difference with one layer, nor
    first choices with k = 1.

    Args:
        value: the coefficient in the source's form.
        source: the form that the coefficient is from.
        target: the form that it is for.
        k: experts per token.
        num_experts: E.
        num_layers: MoE layers.

    Returns:
        The coefficient in the target's form.

    Raises:
        ValueError: if no constant converts, or the numbers make no MoE model.

    Example:
        >>> convert_coefficient(0.5, source=OPENLM, target=SWITCH, k=2, num_experts=8, num_layers=20)
        0.025
    """
    differences = _differences(source, target, k=k, num_layers=num_layers)
    numbers = {"k": k, "num_experts": num_experts, "num_layers": num_layers}
    ratio = value_at_balance(source, **numbers) / value_at_balance(target, **numbers)
    if differences:
        raise ValueError(
            f"no constant converts a coefficient from {source.name} to {target.name}: {'; '.join(differences)}. "
            f"Expected two forms over the same choices, tokens and layers. To train with the source's loss, use its "
            f"function; to have the same value at perfect balance and nothing more, multiply by {ratio:g}."
        )
    return value * ratio


def _differences(source: LossForm, target: LossForm, *, k: int, num_layers: int) -> list[str]:
    differences = []
    if source.pooled != target.pooled and num_layers > 1:
        pooled, other = (source, target) if source.pooled else (target, source)
        differences.append(f"{pooled.name} pools the {num_layers} layers before the product, {other.name} does not")
    if _counted(source, k) != _counted(target, k):
        differences.append(
            f"{source.name} counts {_counted(source, k)} of {k} choices, {target.name} {_counted(target, k)}"
        )
    if source.scope != target.scope:
        differences.append(f"{source.name} is over {source.scope.__name__}, {target.name} over {target.scope.__name__}")
    if source.global_counts != target.global_counts:
        wide, other = (source, target) if source.global_counts else (target, source)
        differences.append(f"{wide.name} counts over the global batch, {other.name} over a micro-batch")
    return differences


def _counted(form: LossForm, k: int) -> int:
    return k if form.choices is None else min(form.choices, k)
