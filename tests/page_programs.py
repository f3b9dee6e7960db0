"""Python of docs/parallelism.md as a program of one rank, on the CPU."""

import re
import textwrap
from pathlib import Path
from typing import Any
from unittest.mock import patch

from moekit.parallel import World, all_sum
from moekit.parallel.spread_tensors import local
from moekit.routing import routing_stats

PAGE = Path(__file__).parents[1] / "docs" / "parallelism.md"


def last_loss(world: World) -> float:
    """Run the page's loop, which joins the processes that there are, and return the loss of its last step."""
    loop, _, _ = _blocks()
    return _ran(loop, world)["total"].item()


def under_a_limit(world: World) -> tuple[float, float]:
    """Run it with the recipe that keeps to a capacity, and return the last loss and the mean drop rate of all ranks."""
    loop, recipe, _ = _blocks()
    before, found, rest = loop.partition("    recipe = mixtral")
    assert found
    _, found, after = rest.partition("    seeded = ")
    assert found
    measured = """
    plan = recipe.plan(output.routing)
    dropped = all_sum(world, routing_stats(output.logits, output.routing, plan).drop_rate.double()) / world.size
"""
    code = (
        before + textwrap.indent(recipe, "    ") + found + after.replace("(moe(x).y - x)", "((output := moe(x)).y - x)")
    )
    scope = _ran(code + measured, world)
    return scope["total"].item(), scope["dropped"].item()


def of_rounded_rows(world: World) -> dict[str, float]:
    """Run the page's layer whose tokens travel in 8 bits, and return how far it is from one whose tokens do not.

    As shares of the largest number: of the output, of the gradient of x, and of the gradient of a parameter.
    """
    loop, _, rounded = _blocks()
    last = "    total = all_sum(world, loss.detach())  # the same on any number of ranks\n"
    assert loop.endswith(last)
    code = """
    found = []
    for layer in (recipe.layer, rounded):
        moe.recipe = recipe._replace(layer=layer)
        x = x.detach().requires_grad_()
        y = moe(x).y
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), [x, moe.experts.up])))
    apart = [float((local(a) - local(b)).abs().max() / local(a).abs().max()) for a, b in zip(*found)]
"""
    scope = _ran(loop.removesuffix(last) + textwrap.indent(rounded, "    ") + code, world)
    return dict(zip(("y", "x", "up"), scope["apart"], strict=True))


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def _ran(code: str, world: World) -> dict[str, Any]:
    scope: dict[str, Any] = {"all_sum": all_sum, "local": local, "routing_stats": routing_stats}
    with patch("torch.cuda.is_available", return_value=False):
        exec(compile(code, PAGE.name, "exec"), scope)
    assert scope["world"].size == world.size
    assert len(scope["grid"].part.experts(8)) * world.size == 8
    return scope
