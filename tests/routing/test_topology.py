import pytest
import torch
from torch import Tensor

from moekit.routing.top_k import softmax_of_top_k
from moekit.routing.topology import over_nodes, topology_limited

T, E, NODES = 23, 6, 2


def in_loops(logits: Tensor, k: int, node: int, share: float, bias: Tensor) -> list[list[int]]:
    each = E // NODES
    local = set(range(node * each, (node + 1) * each))
    scores = (logits + bias).tolist()
    choices = [sorted(range(E), key=lambda e: -z[e])[:k] for z in scores]
    leaving = [t for t, experts in enumerate(choices) if set(experts) - local]
    leaving.sort(key=lambda t: -max(scores[t][e] for e in choices[t] if e not in local))
    for t in leaving[int(round(share * len(scores), 9)) :]:
        choices[t] = sorted(local, key=lambda e: -scores[t][e])[:k]
    return choices


@pytest.mark.parametrize("k", [1, 2, E // NODES])
@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("share", [0.0, 0.14, 0.5, 1.0])
@pytest.mark.parametrize("biased", [False, True])
def test_choice_weights_and_gradient_are_those_of_loops(k: int, node: int, share: float, biased: bool) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(E, dtype=torch.float64) if biased else torch.zeros(E)
    routing = topology_limited(logits, k=k, num_nodes=NODES, node=node, share=share, bias=bias if biased else None)
    choices = in_loops(logits, k, node, share, bias)
    assert routing.expert_indices.tolist() == choices
    weights = torch.stack([torch.exp(z[e]) / torch.exp(z[e]).sum() for z, e in zip(logits, choices, strict=True)])
    torch.testing.assert_close(routing.weights, weights)
    probe = torch.randn(T, k, dtype=torch.float64)
    grads = [torch.autograd.grad((w * probe).sum(), logits)[0] for w in (routing.weights, weights)]
    torch.testing.assert_close(*grads)
    leaves = (routing.expert_indices // (E // NODES) != node).any(-1)
    assert leaves.sum() <= share * T


@pytest.mark.parametrize(("num_nodes", "share"), [(1, 0.0), (2, 1.0)])
def test_without_a_limit_it_is_plain_top_k(num_nodes: int, share: float) -> None:
    logits = torch.randn(T, E)
    routing = topology_limited(logits, k=2, num_nodes=num_nodes, node=0, share=share)
    plain = softmax_of_top_k(logits, k=2)
    assert torch.equal(routing.expert_indices, plain.expert_indices)
    assert torch.equal(routing.weights, plain.weights)
    assert (routing.num_tokens, routing.num_experts, routing.pool) == (T, E, 2 * T)


def test_one_node_takes_all_experts() -> None:
    logits = torch.randn(T, E)
    routing = topology_limited(logits, k=E, num_nodes=1, node=0)
    torch.testing.assert_close(routing.weights, torch.softmax(logits, -1).sort(-1, descending=True).values)


def test_those_with_the_largest_remote_logit_leave_and_equals_rank_by_position() -> None:
    logits = torch.tensor([[0.5, 2.0], [9.0, 8.0], [0.0, 3.0], [0.0, 2.0], [0.0, 3.0]])
    for share, leaving in ((0.2, [2]), (0.4, [2, 4]), (0.6, [0, 2, 4]), (0.79, [0, 2, 4]), (0.8, [0, 2, 3, 4])):
        routing = topology_limited(logits, k=1, num_nodes=2, node=0, share=share)
        assert routing.expert_indices.flatten().nonzero().flatten().tolist() == leaving


def test_a_share_is_taken_as_the_number_that_was_written() -> None:
    logits = torch.tensor([[0.0, 1.0]]).expand(100, 2)
    assert (
        topology_limited(logits, k=1, num_nodes=2, node=0, share=0.29).expert_indices.sum() == 29
    )  # 28.999... in binary


def test_a_later_token_takes_the_leave_of_an_earlier_one() -> None:
    options = {"k": 1, "num_nodes": 2, "node": 0, "share": 0.5}
    for later, first in ((0.5, 1), (9.0, 0)):
        logits = torch.tensor([[0.0, 1.0], [0.0, later]])
        assert topology_limited(logits, **options).expert_indices[0] == first


def test_no_tokens() -> None:
    assert topology_limited(torch.zeros(0, E), num_nodes=NODES, node=1).weights.shape == (0, 2)


def test_one_graph() -> None:
    torch._dynamo.reset()
    logits = torch.randn(T, E, requires_grad=True)

    def route(logits: Tensor) -> Tensor:
        return topology_limited(logits, num_nodes=NODES, node=1).weights.square().sum()

    (actual,) = torch.autograd.grad(torch.compile(route, fullgraph=True, backend="aot_eager")(logits), logits)
    torch.testing.assert_close(actual, torch.autograd.grad(route(logits), logits)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"num_nodes": 4, "node": 0},
            "num_nodes = 4 and node = 0 were given for E = 6 experts; expected a num_nodes that",
        ),
        ({"num_nodes": 0, "node": 0}, "num_nodes = 0 and node = 0 were given"),
        ({"num_nodes": 2, "node": 2}, "num_nodes = 2 and node = 2 .*0 <= node < num_nodes"),
        ({"num_nodes": 3, "node": 0, "k": 3}, "k = 3 experts per token, but a node has only 2 of E = 6.*Lower k"),
        ({"num_nodes": 2, "node": 0, "share": 1.5}, "share = 1.5; expected a number between 0 and 1"),
        ({"num_nodes": 2, "node": 0, "k": 7}, "k = 7 experts per token were asked of E = 6"),
    ],
)
def test_errors_say_what_was_given(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"topology_limited: {words}"):
        topology_limited(torch.zeros(T, E), **options)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_masked_tokens_take_no_leave_from_real_ones(share: float) -> None:
    logits, mask = torch.randn(T, E), torch.rand(T) < 0.6
    spoiled = logits.masked_fill(~mask.unsqueeze(1), torch.nan)
    spoiled[torch.arange(T)[~mask][:3]] = 1e9
    alone = topology_limited(logits[mask], k=2, num_nodes=NODES, node=0, share=share)
    found = topology_limited(spoiled, k=2, num_nodes=NODES, node=0, share=share, token_mask=mask)
    assert torch.equal(found.expert_indices[mask], alone.expert_indices)
    assert torch.equal(found.weights[mask], alone.weights)
    even, mask = T // 2 * 2, mask[: T // 2 * 2]
    parts = over_nodes(spoiled[:even], k=2, num_nodes=2, share=share, token_mask=mask.view(2, -1))
    pieces = zip(logits[:even].chunk(2), mask.chunk(2), parts.expert_indices.chunk(2), strict=True)
    for node, (part, real, chosen) in enumerate(pieces):
        alone = topology_limited(part[real], k=2, num_nodes=2, node=node, share=share)
        assert torch.equal(chosen[real], alone.expert_indices)


def test_a_bias_shifts_the_choice_of_every_node() -> None:
    logits, bias = torch.randn(T - 1, E), 3 * torch.randn(E)
    chosen = over_nodes(logits, num_nodes=NODES, bias=bias).expert_indices
    for node, (part, found) in enumerate(zip(logits.chunk(NODES), chosen.chunk(NODES), strict=True)):
        expected = topology_limited(part, num_nodes=NODES, node=node, bias=bias).expert_indices
        assert torch.equal(found, expected)
    assert not torch.equal(chosen, over_nodes(logits, num_nodes=NODES).expert_indices)


def test_parts_of_no_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_nodes = 0 and node = 0 were given"):
        over_nodes(torch.zeros(T, E), k=2, num_nodes=0)
