"""The balancing loss over networks and simple experts, against its formula."""

import pytest
import torch

from moekit.routing import heterogeneous_balance_loss, load_balance_loss, top_k

T, E, SIMPLE = 23, 7, 3


@pytest.mark.parametrize("masked", [False, True])
def test_it_follows_the_formula(masked):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(T) < 0.6 if masked else torch.ones(T, dtype=torch.bool)
    routing = top_k(logits, k=2)
    given = mask if masked else None
    found = heterogeneous_balance_loss(logits, routing, num_simple=SIMPLE, tau=0.3, token_mask=given)
    chosen = [e for t in range(T) if mask[t] for e in routing.expert_indices[t].tolist()]
    mean = logits[mask].softmax(-1).mean(0)
    expected = sum(E * (0.3 if e >= E - SIMPLE else 1.0) * chosen.count(e) / len(chosen) * mean[e] for e in range(E))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)))


def test_with_equal_weights_it_is_the_usual_loss():
    logits = torch.randn(T, E)
    routing, counts = top_k(logits, k=2), torch.randint(9, (2, E))
    for given in (None, counts, counts.sum(0)):
        found = heterogeneous_balance_loss(logits, routing, num_simple=SIMPLE, tau=1.0, tokens_per_expert=given)
        torch.testing.assert_close(found, load_balance_loss(logits, routing, tokens_per_expert=given))


@pytest.mark.parametrize(("number", "tau"), [(-1, 0.5), (E + 1, 0.5), (1, 0.0)])
def test_numbers_that_make_no_sense_are_refused(number, tau):
    logits = torch.randn(T, E)
    with pytest.raises(ValueError, match=rf"num_simple = {number} and tau = {tau} .* {E} experts; expected"):
        heterogeneous_balance_loss(logits, top_k(logits, k=1), num_simple=number, tau=tau)
