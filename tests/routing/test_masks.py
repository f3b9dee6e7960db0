import pytest
import torch

from moekit.routing import mask_tokens, random_second, top_k
from moekit.types import Routing


def test_masked_tokens_lose_their_assignments_and_their_gradient() -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    before = top_k(logits, k=2)
    after = mask_tokens(before, mask)
    real = mask.flatten()
    assert (after.expert_indices[~real] == -1).all()
    assert (after.weights[~real] == 0).all()
    assert torch.equal(after.expert_indices[real], before.expert_indices[real])
    assert torch.equal(after.weights[real], before.weights[real])
    (grad,) = torch.autograd.grad(after.weights.square().sum(), logits)
    assert (grad[~real] == 0).all()
    assert (grad[real] != 0).any(-1).all()


def test_pool_stays_as_it_is() -> None:
    after = mask_tokens(top_k(torch.randn(6, 4), k=2), torch.arange(6) < 2)
    assert (after.num_tokens, after.pool) == (6, 12)


def test_mask_follows_the_token_of_each_assignment_in_any_list() -> None:
    routing = Routing(
        torch.tensor([2, 0, 2, 1]),
        torch.tensor([1, 1, 0, 0]),
        torch.ones(4),
        num_tokens=3,
        num_experts=2,
        pool=4,
    )
    assert mask_tokens(routing, torch.tensor([True, True, False])).expert_indices.tolist() == [-1, 1, -1, 0]


def test_mask_of_numbers_is_taken_as_truth() -> None:
    routing = top_k(torch.randn(3, 4), k=1)
    assert (mask_tokens(routing, torch.tensor([0, 1, 2])).expert_indices >= 0).flatten().tolist() == [False, True, True]


def test_mask_of_another_size_says_so() -> None:
    with pytest.raises(ValueError, match=r"token_mask has 5 elements \(shape \(5,\)\); expected one per token, 6"):
        mask_tokens(top_k(torch.randn(6, 4), k=2), torch.ones(5, dtype=torch.bool))


@pytest.mark.parametrize("second", [0.05, 0.25, 0.4, 0.5])
def test_second_choice_is_kept_with_twice_its_weight(second: float) -> None:
    probs = torch.tensor([1 - second, second]).log().expand(4000, 2)
    routing = random_second(top_k(probs, k=2, normalize=True))
    assert (routing.expert_indices[:, 0] >= 0).all()
    kept = (routing.expert_indices[:, 1] >= 0).double().mean().item()
    assert kept == pytest.approx(min(1.0, 2 * second), abs=0.045)  # at least five standard deviations


def test_random_second_leaves_the_weights_of_what_it_keeps() -> None:
    before = top_k(torch.randn(200, 4), k=2, normalize=True)
    after = random_second(before)
    kept = after.expert_indices >= 0
    assert 0 < (~kept).sum() < 200
    assert torch.equal(after.weights[kept], before.weights[kept])
    assert (after.weights[~kept] == 0).all()


def test_random_second_wants_two_choices() -> None:
    with pytest.raises(ValueError, match=r"random_second: the routing has shape \(5, 3\); expected \(T, 2\).*k = 2"):
        random_second(top_k(torch.randn(5, 4), k=3))
