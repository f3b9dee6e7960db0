"""The forward of a step compiled over sharded parameters, on two ranks."""

import warnings
from typing import Any

import torch

from moekit.lm.configs import load_config
from moekit.parallel import World, make_grid, replicated, shard_model, whole
from moekit.recipes import mixtral
from moekit.recipes.language_models import language_model, moe_layers
from moekit.recipes.steps import LossRules, run_forward, take_gradient


def blocks_are_whole_graphs(world: World) -> int:
    """Compare loss and gradients with those that are not compiled; return the number of graphs of four blocks."""
    graphs: list[Any] = []
    for own in (
        "The .grad attribute of a Tensor that is not a leaf",
        ".*autograd.*should not be instantiated",
        "Guards may run slower",
    ):
        warnings.filterwarnings("ignore", own)  # Dynamo's

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    config = load_config("moekit_tiny", moe_freq=2, moe_num_experts=4, n_layers=4)
    ids = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(world.rank))
    grid, found = make_grid(world, replicated(world.size, 4)), []
    for forward in (run_forward, torch.compile(run_forward, backend=backend)):
        torch.manual_seed(0)
        model = language_model(config, mixtral(k=2))
        shard_model(model, model.layers, grid, experts=[layer.experts for _, layer in moe_layers(model)])
        for _ in range(2):  # FSDP sets itself up in the first
            model.zero_grad()
            loss = take_gradient(model, [ids], rules=LossRules(forward=forward), world=world)
        grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.total, grads))
    (plain, expected), (compiled, grads) = found
    torch.testing.assert_close(compiled, plain)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    return len(graphs)
