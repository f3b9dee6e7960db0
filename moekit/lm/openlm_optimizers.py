"""OpenLM's optimizer files, ``optimizer_N.pt``: AdamW's state, under the names of our parameters."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from moekit.lm.openlm_names import listed, openlm_name, openlm_order, our_name, plain_name, split_name
from moekit.lm.tensor_files import read_torch

_BIAS = "feed_forward.experts.bias"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def read_openlm_optimizer(
    path: str | os.PathLike[str], *, expected: Mapping[str, Size], weight_tying: bool = False
) -> dict[str, Tensor] | None:
    """Read the AdamW state that OpenLM wrote beside a checkpoint.

    Under FSDP, OpenLM stores the state by parameter name, otherwise by the number of the parameter in the order in
    which its model registers them. A number alone says little, so every shape is compared. The state of the experts'
    bias, which OpenLM adds to nothing, is skipped.

    Args:
        path: of the checkpoint, ``epoch_N.pt``. The state is read from ``optimizer_N.pt`` beside it. (OpenLM replaces
            ``epoch_`` in the folders' names too.)
        expected: our names to the shapes of the whole model.
        weight_tying: whether embedding and head are one parameter.

    Returns:
        ``optimizer.KEY.NAME`` to tensor, as ``moekit.lm.checkpoints.training_tensors`` names them; or None if there
        is no such file.

    Raises:
        ValueError: if the file cannot be read, or its state is not that of the model; the state is not to be used.

    Example:
        >>> read_openlm_optimizer("no/such/epoch_1.pt", expected={}) is None
        True
    """
    path = Path(path)
    beside = path.with_name(path.name.replace("epoch_", "optimizer_", 1))
    if beside == path or not beside.exists():
        return None
    content = read_torch(beside)
    try:
        return _our_state(content, expected=expected, weight_tying=weight_tying)
    except ValueError as error:
        raise ValueError(
            f"{beside}: {error}. The optimizer's state is not used; to go on with the weights alone and a fresh "
            f"optimizer, move this file away"
        ) from error


def _our_state(content: Any, *, expected: Mapping[str, Size], weight_tying: bool) -> dict[str, Tensor]:
    stored = content.get("optimizer") if isinstance(content, Mapping) else None
    state = stored.get("state") if isinstance(stored, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError("it holds no optimizer state; expected a dict optimizer -> state, as OpenLM saves it")
    names = _parameters(expected, weight_tying=weight_tying)
    named = _by_name(state, names)
    wanted = [name for name in names if not name.endswith(_BIAS)]
    missing, unknown = [name for name in wanted if name not in named], [name for name in named if name not in names]
    if missing or unknown:
        lists = (("lacks the state of", missing), ("has the state of unknown", unknown))
        raise ValueError("it " + " and ".join(f"{what} {listed(each)}" for what, each in lists if each))
    tensors = {}
    for name in wanted:
        ours = our_name(name)
        for key, tensor in _entry(named[name], name, shape=_their_shape(name, expected[ours])).items():
            turned = tensor.T.contiguous() if key in _MOMENTS and name.endswith("router.layer.weight") else tensor
            tensors[f"optimizer.{key}.{ours}"] = turned
    return tensors


def _parameters(expected: Mapping[str, Size], *, weight_tying: bool) -> list[str]:
    """Name OpenLM's parameters, in its order."""
    names = {openlm_name(name) for name in expected if not (weight_tying and name == "output.weight")}
    routers = (split_name(name) for name in expected if name.endswith("feed_forward.gate"))
    return openlm_order(names | {prefix + _BIAS for prefix, _ in routers})


def _by_name(state: Mapping[Any, Any], names: list[str]) -> dict[str, Any]:
    if all(isinstance(key, str) for key in state):
        return {plain_name(key): value for key, value in state.items()}
    strange = [key for key in state if not isinstance(key, int) or not 0 <= key < len(names)]
    if strange:
        raise ValueError(f"it has the state of parameters {strange[:8]}; expected 0 to {len(names) - 1}, or names")
    return {names[key]: value for key, value in state.items()}


def _entry(entry: Any, name: str, *, shape: Size) -> dict[str, Tensor]:
    entry = entry if isinstance(entry, Mapping) else {}
    step = entry.get("step")
    if not isinstance(step, int | float | Tensor) or (isinstance(step, Tensor) and step.numel() != 1):
        raise ValueError(f"the state of {name} has the step {step!r}; expected a number, as AdamW keeps it")
    for key in _MOMENTS:
        moment = entry.get(key)
        if not isinstance(moment, Tensor) or moment.shape != shape:
            found = tuple(moment.shape) if isinstance(moment, Tensor) else "nothing"
            raise ValueError(f"{key} of {name}: found {found}, expected {tuple(shape)}")
    return {"step": torch.tensor(float(step), dtype=torch.float32), **{key: entry[key] for key in _MOMENTS}}


def _their_shape(name: str, shape: Size) -> Size:
    return Size(reversed(shape)) if name.endswith("router.layer.weight") else shape
