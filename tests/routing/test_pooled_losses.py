import pytest
import torch
from torch.nn.functional import one_hot

from moekit.routing import load_balance_loss, round_robin, sigmoid, top_k
from moekit.routing.pooled_losses import pooled_balance_loss
from moekit.types import NoisyLogits

T, E, K = 10, 4, 2


def pooled(layers: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """The formula over the concatenated layers: E * sum over choices and experts of a mean times a mean."""
    logits = torch.cat([z[mask] for z in layers])
    chosen = one_hot(torch.topk(torch.softmax(logits, -1), K).indices, E).double()  # (layers * T, K, E)
    return E * (chosen.mean(0) * torch.softmax(logits, -1).mean(0)).sum()


@pytest.mark.parametrize("kept", [T, 7])
def test_it_follows_the_formula_over_concatenated_layers(kept: int) -> None:
    layers = [torch.randn(T, E, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.arange(T) < kept
    loss = pooled_balance_loss(layers, [top_k(z, k=K) for z in layers], token_mask=mask if kept < T else None)
    expected = pooled(layers, mask)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, layers), torch.autograd.grad(expected, layers))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_it_is_k_at_balance_and_one_as_a_share(k: int) -> None:
    z = torch.zeros(12, E)
    layers = [z] * 2, [round_robin(z, k=k)] * 2
    assert pooled_balance_loss(*layers).item() == pytest.approx(k)
    assert pooled_balance_loss(*layers, per_token=None).item() == pytest.approx(1)


def test_it_is_at_its_minimum_while_every_layer_has_collapsed_and_asks_nobody_to_change() -> None:
    layers = [(20.0 * (torch.arange(E) == e)).expand(T, E).clone().requires_grad_() for e in range(E)]
    routings = [top_k(z, k=1) for z in layers]
    loss = pooled_balance_loss(layers, routings)
    assert loss.item() == pytest.approx(1)
    each = [load_balance_loss(z, routing) for z, routing in zip(layers, routings, strict=True)]
    assert [one.item() for one in each] == pytest.approx([E] * E, rel=1e-6)
    assert all(grad.abs().max() < 1e-9 for grad in torch.autograd.grad(loss, layers))


def test_one_layer_is_k_times_the_loss_of_a_layer() -> None:
    z = torch.randn(T, E, dtype=torch.float64)
    noisy = NoisyLogits(z + 1, z, torch.ones(T, E))
    torch.testing.assert_close(
        pooled_balance_loss([noisy], [top_k(z, k=K)], score=sigmoid),
        K * load_balance_loss(z, top_k(z, k=K), score=sigmoid),
    )
    torch.testing.assert_close(
        pooled_balance_loss([z], [top_k(z, k=K)], choices=1), load_balance_loss(z, top_k(z, k=K), choices=1)
    )


def test_layers_must_fit() -> None:
    z, narrow = torch.zeros(T, E), torch.zeros(T, E - 1)
    for layers in ([], [z, narrow]):
        with pytest.raises(
            ValueError, match=r"pooled_balance_loss: the layers' logits.*all of the same T and E\. Take"
        ):
            pooled_balance_loss(layers, [top_k(layer, k=1) for layer in layers])
    with pytest.raises(ValueError, match=r"expected one pair per layer"):
        pooled_balance_loss([z, z], [top_k(z, k=1)])
