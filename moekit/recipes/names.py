"""From a name on the command line to a recipe; the only place where a name becomes a function."""

import functools
import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from moekit.lookup import look_up
from moekit.recipes.families import dbrx, gpt_oss, granite_moe, jamba, phi_moe, qwen2_moe, qwen3_moe
from moekit.recipes.layers import Recipe
from moekit.recipes.published import deepseek_moe, gshard, mixtral, olmoe, openlm, switch
from moekit.recipes.published_routers import (
    base_sinkhorn,
    dynamic_k,
    expert_choice,
    hash_layer,
    moe_plus_plus,
    quantile_moe,
    remoe,
    soft_moe,
    sonic_token_rounding,
    sparsely_gated,
    st_moe,
    xmoe,
)
from moekit.recipes.recipe_checks import check_calls, check_same_plan
from moekit.recipes.routers import PREFIX, ROUTERS
from moekit.recipes.sigmoid_families import deepseek_v2, deepseek_v3, ernie_moe, llama4, longcat_flash, nemotron_moe

RECIPES: dict[str, Callable[..., Recipe]] = {
    "openlm": openlm,
    "sparsely_gated": sparsely_gated,
    "gshard": gshard,
    "switch": switch,
    "base_sinkhorn": base_sinkhorn,
    "hash_layer": hash_layer,
    "st_moe": st_moe,
    "expert_choice": expert_choice,
    "xmoe": xmoe,
    "soft_moe": soft_moe,
    "mixtral": mixtral,
    "dynamic_k": dynamic_k,
    "dbrx": dbrx,
    "jamba": jamba,
    "qwen2_moe": qwen2_moe,
    "granite_moe": granite_moe,
    "phi_moe": phi_moe,
    "olmoe": olmoe,
    "moe_plus_plus": moe_plus_plus,
    "remoe": remoe,
    "deepseek_moe": deepseek_moe,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "llama4": llama4,
    "qwen3_moe": qwen3_moe,
    "ernie_moe": ernie_moe,
    "gpt_oss": gpt_oss,
    "longcat_flash": longcat_flash,
    "nemotron_moe": nemotron_moe,
    "quantile_moe": quantile_moe,
    "sonic_token_rounding": sonic_token_rounding,
}

DEFAULT_K = 2
_FLAGS = {"k": "--moe-top-k", "capacity_factor": "--moe-capacity-factor"}


def find_recipe(
    name: str,
    *,
    k: int | None = None,
    capacity_factor: float | None = None,
    default_k: int = DEFAULT_K,
    **offered: Any,
) -> Recipe:
    """Return a recipe by name, or from a file of the user's.

    Args:
        name: one of ``RECIPES``; ``router:NAME``, with a name of ``ROUTERS``; or ``path/to/file.py:name``, where the
            name is a Recipe or a function that returns one.
        k: experts per token, handed to the recipe's function.
        capacity_factor: handed to the recipe's function.
        default_k: experts per token if ``k`` is None and the function takes a ``k``.
        offered: further options, for functions that take them: ``training``, ``vocab_size``.

    Returns:
        Recipe.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if there is no such recipe, it does not take an option that was given, what the file defines under
            that name is no recipe, its plan is not its layer's, or its router takes not what it is given.

    Example:
        >>> find_recipe("mixtral", k=1).route.keywords["k"]
        1
    """
    make = _maker(name)
    if isinstance(make, Recipe):
        make = _constant(make)
    known = inspect.signature(make).parameters
    given = {key: value for key, value in (("k", k), ("capacity_factor", capacity_factor)) if value is not None}
    for key in given:
        if key not in known:
            raise ValueError(
                f"recipe {name} takes no {key} (it was given as {given[key]}, by {_FLAGS[key]} or its key); it takes "
                f"{', '.join(known) or 'no options'}. Leave the flag out, or choose another recipe."
            )
    options = {key: value for key, value in {"k": default_k, **offered}.items() if key in known} | given
    needed = [key for key, parameter in known.items() if parameter.default is parameter.empty and key not in options]
    if any(known[key].kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for key in needed):
        raise ValueError(
            f"recipe {name} needs {', '.join(needed)}, which nobody gives it; expected a moekit.Recipe, or a function "
            f"that returns one and whose arguments have defaults. A router alone is no recipe: put it into one, for "
            f"example by mixtral()._replace(route=...)."
        )
    recipe = make(**options)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe {name}: expected a moekit.Recipe or a function that returns one, got {recipe!r}.")
    check_same_plan(recipe)
    check_calls(recipe)
    return recipe


def recipe_options(name: str) -> dict[str, Any]:
    """List the options that a recipe's function takes.

    Args:
        name: as for ``find_recipe``.

    Returns:
        Name of each argument to its default, None where it has none; nothing for a recipe that is a value.

    Example:
        >>> recipe_options("switch")["capacity_factor"]
        1.25
    """
    make = _maker(name)
    if isinstance(make, Recipe):
        return {}
    parameters = inspect.signature(make).parameters.values()
    return {each.name: None if each.default is each.empty else each.default for each in parameters}


def users_fault(name: str, error: Exception) -> str | None:
    """Say what a recipe's file of the user's raised, whose code may raise anything.

    Args:
        name: of the recipe, as for ``find_recipe``.
        error: that ended the program.

    Returns:
        The file, the line, and the last line of the traceback; None if no code of the file was running.

    Example:
        >>> users_fault("mixtral", ValueError("k is 9")) is None
        True
    """
    path, _, attribute = name.rpartition(":")
    if not attribute or not os.path.isfile(path):
        return None
    if not _lines(error, path):
        return None
    return f"recipe {name!r}: {path} raised {_told(error, path)}. Mend the file"


def _maker(name: str) -> Callable[..., Recipe]:
    if name.startswith(PREFIX):
        return look_up(ROUTERS, name.removeprefix(PREFIX), what="router")
    return _from_file(name) if ":" in name or name.endswith(".py") else look_up(RECIPES, name, what="recipe")


def _from_file(name: str) -> Callable[..., Recipe]:
    path, _, attribute = name.rpartition(":")
    if not attribute or not path.endswith(".py"):
        raise ValueError(f"recipe {name!r}: expected path/to/file.py:name, where the name is a recipe in that file.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"recipe {name!r}: there is no file {path}. Give its path from the current folder.")
    file = os.stat(path)
    try:
        module = _module(os.path.abspath(path), file.st_mtime_ns, file.st_size)
    except (Exception, SystemExit) as error:  # whatever the user's code raises, or sys.exit, which ends without a word
        raise ValueError(f"recipe {name!r}: importing {path} raised {_told(error, path)}. Mend the file") from error
    found = getattr(module, attribute, None)
    if not callable(found) and not isinstance(found, Recipe):
        names = [key for key in vars(module) if not key.startswith("_")]
        raise ValueError(f"recipe {name!r}: {path} defines no recipe {attribute!r}; it defines {', '.join(names)}.")
    return found


@functools.cache
def _module(path: str, _changed: int, _size: int) -> ModuleType:
    """Run a file, once unless it changes: what it makes at random, and its classes, are the same for all who ask."""
    name = f"moekit_recipe_{Path(path).stem}_{hashlib.blake2b(path.encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    spec.loader.exec_module(module)
    return module


def _told(error: BaseException, path: str) -> str:
    """Return the last line of a traceback, and the line of a file that it leads through."""
    lines = _lines(error, path)
    return traceback.format_exception_only(error)[-1].strip() + (f" (line {lines[-1]})" if lines else "")


def _lines(error: BaseException, path: str) -> list[int | None]:
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename or "", error.lineno))
    return [number for file, number in frames if file and os.path.abspath(file) == os.path.abspath(path)]


def _constant(recipe: Recipe) -> Callable[[], Recipe]:
    return lambda: recipe
