"""What every loss keeps: one signature, one graph, padding that changes nothing, float32 for float32."""

import importlib
import inspect
import pkgutil
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit import routing
from moekit.routing import load_balance_loss, mask_tokens, top_k, z_loss
from moekit.routing.heterogeneous import heterogeneous_balance_loss
from moekit.routing.importance_losses import importance_loss, load_loss
from moekit.routing.regularizers import entropy_loss, weighted_l1_loss
from moekit.routing.scopes import each_sequence, each_token, ignores_counts, uses_counts
from moekit.routing.sequence_losses import sequence_balance_loss
from moekit.types import NoisyLogits

T, E, K, L = 12, 5, 2, 4
LOSSES = {
    "load balance": load_balance_loss,
    "first choice": partial(load_balance_loss, choices=1),
    "per token": partial(load_balance_loss, per_token=1),
    "sequence": sequence_balance_loss,
    "z": z_loss,
    "importance": importance_loss,
    "importance of scores by sequence": partial(importance_loss, score=torch.sigmoid, scope=each_sequence),
    "load": load_loss,
    "load as V-MoE": partial(load_loss, excluding_self=False),
    "weighted l1": partial(weighted_l1_loss, k=K),
    "entropy": entropy_loss,
    "entropy by token": partial(entropy_loss, scope=each_token),
    "simple experts": partial(heterogeneous_balance_loss, num_simple=2),
}


def noisy_logits(dtype: torch.dtype = torch.float64) -> NoisyLogits:
    clean = torch.randn(T, E, dtype=dtype, requires_grad=True)
    return NoisyLogits(clean + torch.randn(T, E, dtype=dtype), clean, torch.ones(T, E, dtype=dtype))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_the_same_arguments_and_returns_a_scalar(name: str) -> None:
    logits = noisy_logits(torch.float32)
    routing = top_k(logits.logits, k=K)
    mask, counts = torch.arange(T) < 9, torch.arange(K * E).view(K, E)
    loss = LOSSES[name](logits, routing, token_mask=mask, tokens_per_expert=counts, sequence_length=L)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    (grad,) = torch.autograd.grad(loss, logits.clean)
    assert grad[~mask].abs().max() == 0
    assert grad[mask].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_refused_by_whatever_reads_logits(name: str, dtype: torch.dtype) -> None:
    """A sum over tokens in float16 is infinite from some thousands on."""
    logits = noisy_logits(torch.float32)
    half = NoisyLogits(*(part.to(dtype) for part in logits))
    routing = top_k(logits.logits, k=K)
    if name in ("importance", "weighted l1"):  # of weights
        assert torch.equal(LOSSES[name](half, routing), LOSSES[name](logits, routing))
        return
    with pytest.raises(ValueError, match=rf"_loss: logits are in {dtype}; expected float32 .*or pass logits\.float"):
        LOSSES[name](half, routing, sequence_length=L)


@pytest.mark.parametrize("shape", [(T, E + 1), (T - L, E)], ids=["experts", "tokens"])
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"z", "entropy", "entropy by token"}))  # which read no routing
def test_a_routing_of_other_tokens_or_experts_is_refused(name: str, shape: tuple[int, int]) -> None:
    """Numbers of another width would be spread over each other, or fail in words that name neither."""
    routing = top_k(torch.randn(shape), k=K)
    with pytest.raises(ValueError, match=rf"shape \({T}, {E}\), .* \(T, E\) = \({shape[0]}, {shape[1]}\); expected"):
        LOSSES[name](noisy_logits(torch.float32), routing, sequence_length=L)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("already", [False, True], ids=["mask alone", "routing masked too"])
def test_padding_sequences_change_nothing(name: str, already: bool) -> None:
    """Whole sequences of padding, so that the scopes over sequences have as many tokens in each as before."""
    logits, mask = noisy_logits(), torch.arange(T) < 2 * L
    real = NoisyLogits(*(part[: 2 * L] for part in logits))
    expected = LOSSES[name](real, top_k(real.logits, k=K), sequence_length=L)
    routing = top_k(logits.logits, k=K)
    if already:
        routing = mask_tokens(routing, mask)
    torch.testing.assert_close(LOSSES[name](logits, routing, token_mask=mask, sequence_length=L), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_no_tokens_give_zero(name: str) -> None:
    empty = NoisyLogits(*(torch.zeros(0, E) for _ in range(3)))
    loss = LOSSES[name](empty, top_k(empty.logits, k=K), sequence_length=L)
    assert loss.item() == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_exactly_losses_that_are_marked_ignore_counts_of_a_larger_batch(name: str, masked: bool) -> None:
    """Value and gradient, bit for bit: training counts no load for those."""
    logits, mask = noisy_logits(torch.float32), torch.arange(T) < 9 if masked else None
    routing, uneven = top_k(logits.logits, k=K), torch.arange(1.0, K * E + 1).view(K, E) ** 2
    loss, found = LOSSES[name], []
    for counts in (None, uneven, uneven.flip(1)):
        value = loss(logits, routing, token_mask=mask, tokens_per_expert=counts, sequence_length=L)
        (grad,) = torch.autograd.grad(value, logits.clean, retain_graph=True)
        found.append(torch.cat([value.detach().view(1), grad.flatten()]))
    assert [not each.equal(found[0]) for each in found[1:]] == [uses_counts(loss)] * 2


def test_all_losses_are_here() -> None:
    names = [each.name for each in pkgutil.iter_modules(routing.__path__)]
    modules = [importlib.import_module(f"moekit.routing.{name}") for name in names if not name.endswith("_triton")]
    functions = {value for module in modules for value in vars(module).values() if inspect.isfunction(value)}
    options = {"token_mask", "tokens_per_expert", "sequence_length"}
    losses = {function for function in functions if options <= inspect.signature(function).parameters.keys()}
    assert losses == {getattr(loss, "func", loss) for loss in LOSSES.values()}


def test_what_nobody_marked_counts_as_using_counts() -> None:
    @wraps(z_loss)  # which copies attributes
    def own(*given: Any, tokens_per_expert: Tensor | None = None, **options: Any) -> Tensor:
        return load_balance_loss(*given, tokens_per_expert=tokens_per_expert, **options)

    assert uses_counts(own)
    assert uses_counts(partial(own))
    assert not uses_counts(partial(partial(entropy_loss), scope=each_token))
    assert not uses_counts(ignores_counts(lambda *given, **options: z_loss(*given)))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_one_graph(name: str) -> None:
    """A graph break would mean that the host reads the device, or that a compiled model cannot hold the loss."""
    torch._dynamo.reset()
    logits, mask = noisy_logits(), torch.arange(T) % 5 != 0

    def loss_of(clean: Tensor, noise: Tensor, token_mask: Tensor) -> Tensor:
        seen = NoisyLogits(clean + noise, clean, torch.ones_like(clean))
        routing = top_k(seen.logits, k=K)
        return LOSSES[name](seen, routing, token_mask=token_mask, sequence_length=L)

    arguments = logits.clean, (logits.logits - logits.clean).detach(), mask
    expected = loss_of(*arguments)
    actual = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits.clean)[0] for loss in (actual, expected)))
