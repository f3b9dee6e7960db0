"""OpenLM's checkpoint files, ``epoch_N.pt``: reading without running code, converting both ways, writing.

Names of dense models are OpenLM's already. Three things differ: an MoE layer is MegaBlocks' there, whose router is the
transpose of our gate (its expert matrices are stored input-major, as ours); the two matrices of a dense ``gelu``
network have two names each; and the inverse frequencies of the rotary embedding are stored beside the parameters.

References:
    OpenLM, open_lm/model.py and open_lm/main.py, https://github.com/mlfoundations/open_lm, 2023.
    MegaBlocks, megablocks/layers/moe.py, https://github.com/databricks/megablocks, 2023.
"""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from moekit.lm.configs import ModelConfig
from moekit.lm.openlm_names import (
    check_tensors,
    check_tied,
    listed,
    openlm_name,
    openlm_order,
    our_name,
    plain_name,
    split_name,
)
from moekit.lm.tensor_files import own_storage, read_torch, write_torch

_BIAS, _FREQUENCIES = "feed_forward.experts.bias", "attention.pos_embed.inv_freq"
_TWINS = {"_ff_w1.weight": "feed_forward.0.weight", "_ff_w2.weight": "feed_forward.2.weight"}  # one tensor, two names


class OpenLMCheckpoint(NamedTuple):
    """What an ``epoch_N.pt`` holds.

    Attributes:
        state_dict: OpenLM's names, without the prefixes of wrappers, to tensors.
        epoch: epochs completed; None for a file that is a bare state dict.
        step: optimizer steps; None if the file does not say. Before 2024 it was that of the epoch's start.
        name: of the run, or None.
        others: everything else, for example ``samples_seen``.
    """

    state_dict: dict[str, Tensor]
    epoch: int | None
    step: int | None
    name: str | None
    others: dict[str, Any]


def read_openlm(path: str | os.PathLike[str]) -> OpenLMCheckpoint:
    """Read an OpenLM checkpoint, or a bare state dict, on the CPU and without running code.

    Args:
        path: of the file.

    Returns:
        OpenLMCheckpoint.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is a folder, cut short, no file of torch's, needs code to load, or holds no state dict.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_openlm(Path(folder) / "epoch_2.pt", {"norm.weight": torch.ones(2)}, epoch=2)
        ...     read_openlm(path).state_dict
        {'norm.weight': tensor([1., 1.])}
    """
    content = read_torch(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict, as OpenLM saves it")
    if "state_dict" not in content and "optimizer" in content:
        raise ValueError(
            f"{path} holds an optimizer's state and no weights; expected the epoch_N.pt beside it, with the same number"
        )
    fields = dict(content) if "state_dict" in content else {"state_dict": content}
    try:
        return OpenLMCheckpoint(
            _plain_names(fields.pop("state_dict")),
            _typed(fields, "epoch", int),
            _typed(fields, "step", int),
            _typed(fields, "name", str),
            fields,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_openlm(
    state_dict: Mapping[str, Tensor], *, expected: Mapping[str, Size], config: ModelConfig
) -> dict[str, Tensor]:
    """Convert a state dict from OpenLM's names and layouts to ours, and check that it is exactly the model's.

    The bias of the experts is dropped, since OpenLM adds it to nothing; if it is not zero, a warning says so. The
    rotary frequencies are dropped after a check.

    Args:
        state_dict: OpenLM's names, from ``read_openlm``.
        expected: our names to the shapes of the whole model, ``{n: t.shape for n, t in model.state_dict().items()}``.
        config: the model's.

    Returns:
        Our names to tensors, ready for ``model.load_state_dict``.

    Raises:
        ValueError: if a name is missing or unknown, a shape differs, the file holds one rank's experts only, its
            position embedding or tying is another.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.lm.model import LanguageModel
        >>> config = load_config("moekit_tiny")
        >>> model = LanguageModel(config)
        >>> theirs = to_openlm(model.state_dict(), config=config)
        >>> shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        >>> ours = from_openlm(theirs, expected=shapes, config=config)
        >>> model.load_state_dict(ours)
        <All keys matched successfully>
    """
    kept = _without_twins(state_dict)
    _check_rotary({name: kept.pop(name) for name in list(kept) if name.endswith(_FREQUENCIES)}, config)
    biases = {name: kept.pop(name) for name in list(kept) if name.endswith(_BIAS)}
    used = [name for name, bias in biases.items() if bias.count_nonzero()]
    if used:
        warnings.warn(
            f"dropping {listed(used)}, not zero in the file: OpenLM adds this bias to nothing, so outputs are the same",
            stacklevel=2,
        )
    _check_whole_experts(kept)
    ours = {our_name(name): _turned(name, tensor) for name, tensor in kept.items()}
    check_tensors(ours, expected, openlm=True)
    if config.weight_tying:
        check_tied(ours)
    return ours


def to_openlm(state_dict: Mapping[str, Tensor], *, config: ModelConfig) -> dict[str, Tensor]:
    """Convert a state dict from our names and layouts to OpenLM's, so that OpenLM loads it strictly.

    The zero bias of the experts and the rotary frequencies are put back. Names come in OpenLM's order. A state dict
    does not show activations and routing: it is the caller's part that the method is the ``openlm`` recipe.

    Args:
        state_dict: our names to tensors, the whole model.
        config: the model's.

    Returns:
        OpenLM's names to tensors; all but the routers share memory with the given ones.

    Raises:
        ValueError: if OpenLM has no layout for a tensor.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.lm.model import LanguageModel
        >>> config = load_config("moekit_tiny")
        >>> list(to_openlm(LanguageModel(config).state_dict(), config=config))[2:4]
        ['layers.0.attention.out_proj.weight', 'layers.0.attention.pos_embed.inv_freq']
    """
    _check_openlm_layout(state_dict, config)
    theirs = {openlm_name(name): _turned(openlm_name(name), tensor) for name, tensor in state_dict.items()}
    for name, tensor in list(theirs.items()):
        prefix, local = split_name(name)
        if local == "feed_forward.experts.mlp.w2":
            theirs[prefix + _BIAS] = torch.zeros(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
        if local == "attention.in_proj.weight" and config.positional_embedding_type in ("rotary", "head_rotary"):
            theirs[prefix + _FREQUENCIES] = _frequencies(config.head_dim)
        if local in _TWINS:
            theirs[prefix + _TWINS[local]] = tensor
    return {name: theirs[name] for name in openlm_order(theirs)}


def write_openlm(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    *,
    epoch: int,
    step: int | None = None,
    name: str | None = None,
) -> Path:
    """Write an OpenLM checkpoint, whole or not at all.

    Args:
        path: of the file, ``epoch_N.pt`` by OpenLM's habit; one that is there already is replaced.
        state_dict: OpenLM's names, from ``to_openlm``.
        epoch: epochs completed.
        step: optimizer steps done.
        name: of the run.

    Returns:
        The path.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_openlm(Path(folder) / "epoch_1.pt", {"norm.weight": torch.ones(2)}, epoch=1, step=50)
        ...     read_openlm(path).step
        50
    """
    tensors = {key: own_storage(tensor) for key, tensor in state_dict.items()}
    given = {"step": step} if step is not None else {}
    return write_torch(path, {"epoch": epoch, "name": name, "state_dict": tensors, **given})


def _turned(name: str, tensor: Tensor) -> Tensor:
    # The router is a Linear of (E, D) there and a matrix (D, E) here; the expert matrices are (E, in, out) in both.
    return tensor.T.contiguous() if name.endswith("router.layer.weight") and tensor.dim() == 2 else tensor


def _plain_names(state_dict: Any) -> dict[str, Tensor]:
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise ValueError(f"the state dict is {type(state_dict).__name__} of nothing; expected names and tensors")
    plain: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{name!r} is a {type(tensor).__name__}; expected names of dense tensors and nothing else")
        short = plain_name(name)
        if short in plain:
            raise ValueError(f"two tensors are named {short} once the prefixes of wrappers are cut off; expected one")
        plain[short] = tensor
    return plain


def _typed(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = fields.pop(name, None)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise ValueError(f"{name} is {value!r}; expected {kind.__name__}")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{name} is {value}; expected at least 0")
    return value


def _without_twins(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept = dict(state_dict)
    for name in state_dict:
        prefix, local = split_name(name)
        twin = prefix + _TWINS.get(local, "")
        if local in _TWINS and twin in kept and not torch.equal(kept.pop(twin), kept[name]):
            raise ValueError(
                f"{name} and {twin} differ, but are two names of one tensor in OpenLM; expected equal ones"
            )
    return kept


def _frequencies(head_dim: int) -> Tensor:
    return 1.0 / (10_000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim))


def _check_rotary(buffers: Mapping[str, Tensor], config: ModelConfig) -> None:
    kind = config.positional_embedding_type
    stored = kind in ("rotary", "head_rotary")
    if stored and not buffers:
        warnings.warn(
            f"the file has no {_FREQUENCIES}, so it does not show its position embedding; it is taken for {kind}",
            stacklevel=3,
        )
    for name, found in buffers.items():
        if not stored:
            raise ValueError(
                f"the file has {name}, so its position embedding is rotary or head_rotary, but the model's is {kind}. "
                f"It depends on --positional-embedding-type --model"
            )
        expected = _frequencies(config.head_dim)
        # A hundredth is what is lost where the buffer went through bf16.
        if found.shape != expected.shape or not torch.allclose(found.float(), expected, rtol=0.01, atol=0):
            raise ValueError(
                f"{name} has {found.numel()} frequencies from {found.flatten()[:3].tolist()}; expected those of heads "
                f"of width {config.head_dim}: {expected.numel()} from {expected[:3].tolist()}. It depends on --model"
            )


def _check_whole_experts(state_dict: Mapping[str, Tensor]) -> None:
    for name, router in state_dict.items():
        prefix, local = split_name(name)
        w1 = state_dict.get(f"{prefix}feed_forward.experts.mlp.w1")
        if local != "feed_forward.router.layer.weight" or w1 is None or w1.dim() != 3 or router.dim() != 2:
            continue
        experts, width = router.shape
        if w1.shape[0] < experts or w1.shape[2] < 4 * width:
            raise ValueError(
                f"{prefix}feed_forward has a router for {experts} experts, but its experts are {tuple(w1.shape)}; "
                f"expected {(experts, width, 4 * width)}. The file was written with --moe-expert-model-parallelism, "
                f"where OpenLM saves the experts of one rank only, so the others are not in it. They cannot be "
                f"restored from it: train without that flag there, or here, where files hold all experts"
            )


def _check_openlm_layout(state_dict: Mapping[str, Tensor], config: ModelConfig) -> None:
    ours = re.compile(r"feed_forward\.(gate|experts\.(up|down)|w[123]\.weight|w12\.weight)")
    layouts = [name for name in state_dict if split_name(name)[1].startswith("feed_forward.")]
    strange = [name for name in layouts if not ours.fullmatch(split_name(name)[1])]
    strange += [
        name
        for name in layouts
        if name.endswith("experts.up") and state_dict[name].shape[1:] != (config.hidden_dim, 4 * config.hidden_dim)
    ]
    if config.ffn_type == "geglu":
        strange += [name for name in layouts if "w12" in name]  # its gemma_geglu has biases and three matrices
    if strange:
        raise ValueError(
            f"OpenLM has no layout for {listed(strange)}: its experts are two matrices with GELU, four times as wide "
            f"as the model, without shared experts or a selection bias, and its dense networks swiglu or gelu. "
            f"A .safetensors file can hold them"
        )
