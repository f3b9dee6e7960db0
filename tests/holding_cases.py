"""What ranks hold, counted and as the kernel sees it: what the ranks of ``test_holdings.py`` run."""

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moekit.parallel import Grid, Layout, World, distribute_experts, local, make_grid, sum_gradients
from moekit.recipes import MoE, mixtral
from moekit.recipes.configuration import parse_settings
from moekit.recipes.construction import make_model
from moekit.recipes.exchanges import spread_recipe
from moekit.recipes.expert_parameters import hidden_axes
from moekit.recipes.language_models import moe_layers
from moekit.recipes.optimizers import make_optimizer
from moekit.recipes.settings import OptimizerSettings, ParallelSettings

E, D = 8, 256
_M_MMAP_THRESHOLD = -3  # of malloc.h; set, it no longer grows with what is freed


class Held(NamedTuple):
    """Bytes on a rank: parameters, gradients, moments; of the whole model, and of its experts."""

    measured: tuple[int, int, int]
    experts: tuple[int, int, int]
    others: tuple[int, int, int]


def held(world: World, words: list[str]) -> Held:
    """Build the model of a command line, take one step, and count."""
    settings = parse_settings(words, prog="test")
    built = make_model(settings, world)
    model, optimizer = built.model, make_optimizer(built.model, settings.optimizer)
    tokens = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(world.rank))
    model(tokens).logits.logsumexp(-1).sum().backward()
    sum_gradients(model.parameters(), built.grid)
    optimizer.step()
    experts = [p for _, layer in moe_layers(model) for p in layer.experts.parameters()]
    inside = {id(p) for p in experts}
    others = [p for p in model.parameters() if id(p) not in inside]
    return Held(measured_holdings(model, optimizer), *(_bytes(group, optimizer) for group in (experts, others)))


def measured_holdings(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """Add up the bytes of parameters, of gradients and of all that the optimizer keeps but its steps, on this rank."""
    parameters = list(model.parameters())
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    gradients = [p.grad for p in parameters if p.grad is not None]
    return tuple(sum(local(t.detach()).nbytes for t in group) for group in (parameters, gradients, moments))  # type: ignore[return-value]


def held_all(world: World, commands: list[list[str]]) -> list[Held]:
    """Count for several command lines."""
    return [held(world, words) for words in commands]


def _bytes(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    columns = [0, 0, 0]
    for parameter in parameters:
        state = optimizer.state[parameter]
        assert parameter.grad is not None
        for column, tensors in enumerate(([parameter], [parameter.grad], [state["exp_avg"], state["exp_avg_sq"]])):
            columns[column] += sum(local(tensor.detach()).nbytes for tensor in tensors)
    return columns[0], columns[1], columns[2]


def peak(world: World, hidden: int) -> int:
    """Return the most memory, in bytes, that experts of so many hidden units made resident in two training steps.

    A layer with tiny experts runs first: what libraries, threads and connections take is resident then. Freed tensors
    go back to the system at once, so that what counts is what is held at a time, and not what malloc keeps for later.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
    layout = Layout(E, experts=world.size)
    grid = make_grid(world, layout)
    _train(grid, 8)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    _train(grid, hidden)
    return _status("VmHWM") - before


def _train(grid: Grid, hidden: int) -> None:
    recipe = mixtral(k=2)
    spread = spread_recipe(recipe, grid, ParallelSettings(moe_expert_model_parallelism=True), block=4)
    moe = MoE(D, E, spread, hidden=hidden, part=grid.part, generator=torch.Generator().manual_seed(0))
    distribute_experts(moe.experts, grid, hidden_axes(recipe.init, D, hidden))
    optimizer = make_optimizer(moe, OptimizerSettings())
    for _ in range(2):
        moe(torch.randn(16, D)).y.square().sum().backward()
        sum_gradients(moe.parameters(), grid)
        optimizer.step()
        optimizer.zero_grad()


def _status(name: str) -> int:
    """Read a number of /proc/self/status, which are in units of 1,024 bytes."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(name))
    return int(line.split()[1]) * 1024
