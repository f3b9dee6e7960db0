"""Python of docs/parallelism.md as a program of one rank, on the CPU."""

import re
import textwrap
from pathlib import Path
from typing import Any
from unittest.mock import patch

from moekit.parallel import World, all_sum
from moekit.routing import routing_stats

PAGE = Path(__file__).parents[1] / "docs" / "parallelism.md"


def last_loss(world: World) -> float:
    """Run the page's loop, which joins the processes that there are, and return the loss of its last step."""
    loop, _ = _blocks()
    return _ran(loop, world)["total"].item()


def under_a_limit(world: World) -> tuple[float, float]:
    """Run it with the recipe that keeps to a capacity, and return the last loss and the mean drop rate of all ranks."""
    loop, recipe = _blocks()
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


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def _ran(code: str, world: World) -> dict[str, Any]:
    scope: dict[str, Any] = {"all_sum": all_sum, "routing_stats": routing_stats}
    with patch("torch.cuda.is_available", return_value=False):
        exec(compile(code, PAGE.name, "exec"), scope)
    assert scope["world"].size == world.size
    assert len(scope["grid"].part.experts(8)) * world.size == 8
    return scope
