import itertools

import pytest
import torch
from torch import Tensor

from moekit.routing import coefficients, load_balance_loss, round_robin, top_k
from moekit.routing.coefficients import (
    DEEPSEEK_SEQUENCE,
    FIRST_CHOICE,
    FIRST_CHOICE_SEQUENCE,
    GSHARD_PAPER,
    HUGGING_FACE,
    MEGABLOCKS,
    MEGATRON,
    MEGATRON_GLOBAL,
    MEGATRON_SEQUENCE,
    MOEKIT,
    OPENLM,
    SWITCH,
    LossForm,
    convert_coefficient,
    fastmoe_gshard,
    value_at_balance,
)
from moekit.routing.pooled_losses import pooled_balance_loss
from moekit.routing.sequence_losses import sequence_balance_loss

T, E, L, WORLD = 12, 4, 4, 2
FASTMOE = fastmoe_gshard(WORLD)
FORMS = [value for value in vars(coefficients).values() if isinstance(value, LossForm)] + [FASTMOE]
Layers = list[Tensor]


def counts(z: Tensor, k: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.topk(z, k).indices, E).double()  # (T, k, E)


def switch(layers: Layers, k: int) -> Tensor:
    return sum(E * (counts(z, k).sum((0, 1)) / (k * T) * z.softmax(-1).mean(0)).sum() for z in layers)


def megablocks(layers: Layers, k: int) -> Tensor:
    """One product over all (layer, expert) pairs, scaled once."""
    scores = torch.cat([z.softmax(-1) for z in layers], dim=1).mean(0)
    tokens_per_expert = torch.cat([counts(z, k).sum((0, 1)) for z in layers])
    return E / (len(layers) * T * k) * torch.dot(tokens_per_expert, scores)


def hugging_face(layers: Layers, k: int) -> Tensor:
    z = torch.cat(layers)
    return E * (counts(z, k).mean(0) * z.softmax(-1).mean(0)).sum()


def gshard(layers: Layers, k: int) -> Tensor:
    return sum((counts(z, 1).mean((0, 1)) * z.softmax(-1).mean(0)).mean() for z in layers)


def first_choice(layers: Layers, k: int) -> Tensor:
    return E**2 * gshard(layers, k)


def fastmoe(layers: Layers, k: int) -> Tensor:
    return (E // WORLD) ** 2 * gshard(layers, k)


def deepseek(layers: Layers, k: int) -> Tensor:
    parts = [part for z in layers for part in z.split(L)]
    return sum(E * (counts(z, k).sum((0, 1)) / (k * L) * z.softmax(-1).mean(0)).sum() for z in parts) / (T // L)


def first_choice_in_sequences(layers: Layers, k: int) -> Tensor:
    return sum(first_choice([part], k) for z in layers for part in z.split(L)) / (T // L)


# Global counts of one process and one micro-batch are those of the micro-batch.
WRITTEN = {
    SWITCH: switch,
    MEGATRON: switch,
    MEGATRON_GLOBAL: switch,
    MEGABLOCKS: megablocks,
    OPENLM: megablocks,
    MOEKIT: megablocks,
    HUGGING_FACE: hugging_face,
    GSHARD_PAPER: gshard,
    FIRST_CHOICE: first_choice,
    FIRST_CHOICE_SEQUENCE: first_choice_in_sequences,
    FASTMOE: fastmoe,
    DEEPSEEK_SEQUENCE: deepseek,
    MEGATRON_SEQUENCE: deepseek,
}


def draw_layers(num_layers: int) -> Layers:
    return [torch.randn(T, E, dtype=torch.float64, requires_grad=True) for _ in range(num_layers)]


def test_every_form_is_written_out_here() -> None:
    assert set(WRITTEN) == set(FORMS)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize(("k", "num_layers"), [(1, 1), (2, 3), (4, 2)])
def test_the_value_at_balance_is_that_of_the_projects_formula(form: LossForm, k: int, num_layers: int) -> None:
    order = round_robin(torch.zeros(T, E), k=k).expert_indices
    # Almost equal logits, whose order deals the choices out in turn.
    nudged = torch.zeros(T, E, dtype=torch.float64).scatter(
        1, order, 1e-9 * torch.arange(k, 0, -1.0).double().expand(T, k)
    )
    if form.choices == 1 and k > 1:
        nudged = torch.zeros(T, E, dtype=torch.float64)
        nudged[torch.arange(T), torch.arange(T) % E] = 1e-9
    value = WRITTEN[form]([nudged] * num_layers, k)
    assert value.item() == pytest.approx(value_at_balance(form, k=k, num_experts=E, num_layers=num_layers), rel=1e-6)


def conversion(source: LossForm, target: LossForm, **numbers: int) -> float | None:
    try:
        return convert_coefficient(0.01, source=source, target=target, **numbers)
    except ValueError:
        return None


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("k", [1, 2])
def test_a_converted_coefficient_gives_the_same_loss_and_gradients_or_there_is_none(k: int, num_layers: int) -> None:
    """For every pair of forms, on one unbalanced routing: exact where a number is returned; else not proportional."""
    layers = draw_layers(num_layers)
    losses = {form: WRITTEN[form](layers, k) for form in FORMS}
    grads = {form: torch.cat(torch.autograd.grad(loss, layers)) for form, loss in losses.items()}
    converted = refused = 0
    for source, target in itertools.product(FORMS, FORMS):
        factor = conversion(source, target, k=k, num_experts=E, num_layers=num_layers)
        if factor is not None:
            torch.testing.assert_close(factor * losses[target], 0.01 * losses[source])
            torch.testing.assert_close(factor * grads[target], 0.01 * grads[source])
            converted += 1
        elif source.global_counts == target.global_counts:  # which a single process cannot tell apart
            ratios = grads[source] / grads[target]
            assert ratios.max() - ratios.min() > 1e-3 * ratios.abs().max(), f"{source.name} to {target.name}"
            refused += 1
    assert converted > 30
    assert refused > 30


def test_moekits_own_losses_are_these_forms() -> None:
    layers, k = draw_layers(3), 2
    routings = [top_k(z, k=k) for z in layers]
    pairs = list(zip(layers, routings, strict=True))
    torch.testing.assert_close(sum(load_balance_loss(*pair) for pair in pairs), switch(layers, k))
    torch.testing.assert_close(sum(load_balance_loss(*pair) for pair in pairs) / 3, megablocks(layers, k))
    torch.testing.assert_close(sum(load_balance_loss(*pair, choices=1) for pair in pairs), first_choice(layers, k))
    torch.testing.assert_close(pooled_balance_loss(layers, routings), hugging_face(layers, k))
    of_sequences = sum(sequence_balance_loss(*pair, sequence_length=L) for pair in pairs)
    torch.testing.assert_close(of_sequences, deepseek(layers, k))
    of_sequences = sum(sequence_balance_loss(*pair, sequence_length=L, choices=1) for pair in pairs)
    torch.testing.assert_close(of_sequences, first_choice_in_sequences(layers, k))


def test_conversion_goes_back() -> None:
    numbers = {"k": 2, "num_experts": 8, "num_layers": 12}
    there = convert_coefficient(0.02, source=OPENLM, target=MEGATRON, **numbers)
    assert there == pytest.approx(0.02 / 12)
    assert convert_coefficient(there, source=MEGATRON, target=OPENLM, **numbers) == pytest.approx(0.02)


def test_pooling_does_not_matter_with_one_layer_and_does_with_two() -> None:
    assert convert_coefficient(
        0.02, source=HUGGING_FACE, target=SWITCH, k=2, num_experts=8, num_layers=1
    ) == pytest.approx(0.04)
    with pytest.raises(
        ValueError,
        match=r"no constant converts a coefficient from Hugging Face transformers to Switch.*pools the 32 layers "
        r"before the product.*Expected two forms over the same choices.*and nothing more, multiply by 0\.0625\.",
    ):
        convert_coefficient(0.02, source=HUGGING_FACE, target=SWITCH, k=2, num_experts=8, num_layers=32)


def test_two_layers_are_pooled_too() -> None:
    with pytest.raises(ValueError, match="pools the 2 layers"):
        convert_coefficient(0.02, source=HUGGING_FACE, target=SWITCH, k=2, num_experts=8, num_layers=2)


def test_an_error_names_every_difference() -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        convert_coefficient(1.0, source=FIRST_CHOICE, target=MEGATRON_SEQUENCE, k=2, num_experts=8, num_layers=4)
    assert "counts 1 of 2 choices, Megatron-LM, seq_aux_loss 2" in str(caught.value)
    assert "is over whole_batch, Megatron-LM, seq_aux_loss over each_sequence" in str(caught.value)
    with pytest.raises(ValueError, match=r"\(st-moe, V-MoE\) is over each_sequence, .*top-2\) over whole_batch\. Expe"):
        convert_coefficient(1.0, source=FIRST_CHOICE_SEQUENCE, target=FIRST_CHOICE, k=2, num_experts=8, num_layers=4)
    with pytest.raises(ValueError, match=r"counts over the global batch, Switch .* over a micro-batch"):
        convert_coefficient(1.0, source=SWITCH, target=MEGATRON_GLOBAL, k=2, num_experts=8, num_layers=4)


@pytest.mark.parametrize("numbers", [(0, 8, 1), (9, 8, 1), (2, 8, 0)])
def test_numbers_must_make_a_model(numbers: tuple[int, int, int]) -> None:
    k, num_experts, num_layers = numbers
    with pytest.raises(ValueError, match=r"expected 1 <= k <= num_experts and at least one layer"):
        value_at_balance(SWITCH, k=k, num_experts=num_experts, num_layers=num_layers)
    with pytest.raises(ValueError, match="world_size = 0; expected at least 1 rank"):
        fastmoe_gshard(0)
