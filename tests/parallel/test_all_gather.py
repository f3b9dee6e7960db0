import pytest
import torch

from moekit.dispatch import dropless_plan
from moekit.experts import init_gated
from moekit.parallel import all_gather, plan_together, tensor_parallel
from moekit.recipes import mixtral
from moekit.routing import top_k


@pytest.mark.parametrize("equal", [True, False])
def test_where_ranks_have_equally_many_tokens_no_number_goes_to_the_device(group, monkeypatch, equal):
    """It would wait there for all that was queued before."""
    sent, tensor = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *given, **options: (sent.append(given), tensor(*given, **options))[1])
    x, routing, params = torch.randn(5, 4), top_k(torch.randn(5, 3), k=2), init_gated(3, 4, 8)
    expected = mixtral(k=2).layer(x, routing, params)
    for strategy in (all_gather, tensor_parallel):
        torch.testing.assert_close(strategy(mixtral(k=2).layer, group=group, equal=equal)(x, routing, params), expected)
    plan = plan_together(dropless_plan, group=group, equal=equal)(routing)
    assert torch.equal(plan.assignments, dropless_plan(routing).assignments)
    assert bool(sent) is not equal
