"""Shapes of language models under OpenLM's JSON keys, and the presets that ship with the package."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from moekit.lm.feed_forward import make_feed_forward
from moekit.lm.norms import make_norm
from moekit.lm.rotary import make_rotary
from moekit.lookup import unknown_name

_TOO_LARGE = 2**31
OF_METHOD = {"moe_top_k": int, "moe_capacity_factor": float, "moe_loss_weight": float}
"""Keys that a file may have too, as OpenLM's do, with their types: of the MoE layers' method, no part of a shape."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a language model.

    The first seven are required; the others default as in OpenLM. OpenLM's published runs chose
    ``gain_only_layer_norm``, by a flag, where its default is ``default_layer_norm``.

    Attributes:
        hidden_dim: D, the width of the residual stream.
        n_layers: number of blocks.
        n_heads: attention heads per block.
        seq_len: tokens per training sequence. Longer inputs work, since rotary positions have no end.
        vocab_size: number of token ids.
        post_embed_norm: normalize after the embedding.
        weight_tying: let the embedding and the output head share one matrix.
        model_norm: the norm of every place, a name of :func:`moekit.lm.norms.make_norm`.
        qk_norm: normalize queries and keys.
        positional_embedding_type: a name of :func:`moekit.lm.rotary.make_rotary`.
        ffn_type: the dense feed-forward, a name of :func:`moekit.lm.feed_forward.make_feed_forward`.
        moe_freq: layer i is MoE if ``i % moe_freq == 0``; 0 makes every layer dense.
        moe_num_experts: E; required where ``moe_freq`` is positive.

    Raises:
        ValueError: if a value has the wrong type, is out of range, is an unknown name, or contradicts another.

    Example:
        >>> config = ModelConfig(hidden_dim=488, n_layers=12, n_heads=12, seq_len=2048, vocab_size=50432,
        ...                      post_embed_norm=False, weight_tying=False, moe_freq=2, moe_num_experts=8)
        >>> config.head_dim  # of 12 heads, which are 480 wide together
        40
        >>> [i for i in range(config.n_layers) if config.is_moe_layer(i)]
        [0, 2, 4, 6, 8, 10]
    """

    hidden_dim: int
    n_layers: int
    n_heads: int
    seq_len: int
    vocab_size: int
    post_embed_norm: bool
    weight_tying: bool
    model_norm: str = "default_layer_norm"
    qk_norm: bool = False
    positional_embedding_type: str = "rotary"
    ffn_type: str = "swiglu"
    moe_freq: int = 0
    moe_num_experts: int | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size"):
            if not 1 <= getattr(self, name) < _TOO_LARGE:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1 and less than 2^31")
        make_norm(self.model_norm)
        make_rotary(self.positional_embedding_type)
        make_feed_forward(self.ffn_type)
        _check_heads(self)
        _check_moe(self)

    @property
    def head_dim(self) -> int:
        """Width of one attention head: hidden_dim / n_heads, rounded down."""
        return self.hidden_dim // self.n_heads

    def is_moe_layer(self, layer_index: int) -> bool:
        """Say whether the zero-based layer is MoE. If any is, layer 0 is."""
        return self.moe_freq > 0 and layer_index % self.moe_freq == 0


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets, aliases included, sorted.

    Example:
        >>> "open_lm_41m" in preset_names()
        True
    """
    files = (resources.files("moekit.lm") / "presets").iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def load_config(
    name_or_path: str | Path, /, *, defaults: Mapping[str, Any] | None = None, **overrides: Any
) -> ModelConfig:
    """Load the shape of a model.

    Args:
        name_or_path: the name of a preset, or a path that ends in ``.json``.
        defaults: values for keys that the file leaves out.
        **overrides: values that win over the file.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: if there is no file at the path.
        ValueError: if no preset has this name, the file is no JSON object, a key is unknown or missing, or a value
            is bad.

    Example:
        >>> config = load_config("aphid_neox", model_norm="gain_only_layer_norm")
        >>> config == load_config("open_lm_87m", model_norm="gain_only_layer_norm")
        True
    """
    source, values = str(name_or_path), read_config(name_or_path)
    _check_keys(defaults or {}, source="defaults")
    _check_keys(overrides, source="overrides")
    of_shape = {key: value for key, value in values.items() if key not in OF_METHOD}
    merged = {**(defaults or {}), **of_shape, **overrides}
    required = [f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in merged]
    if missing:
        raise ValueError(f"{source} lacks the required keys {', '.join(missing)}; it needs {', '.join(required)}")
    try:
        return ModelConfig(**merged)
    except ValueError as error:
        raise ValueError(f"model config {source}: {error}") from error


def read_config(name_or_path: str | Path, /) -> dict[str, Any]:
    """Read the keys that a preset or a file sets, and no others.

    Beside the shape's it may say, as OpenLM's, what its MoE layers do: ``moe_top_k``, ``moe_capacity_factor`` (0 means
    dropless) and ``moe_loss_weight``.

    Args:
        name_or_path: the name of a preset, or a path that ends in ``.json``.

    Returns:
        Key to value.

    Raises:
        FileNotFoundError: if there is no file at the path.
        ValueError: if no preset has this name, the file is no JSON object, a key is unknown, or what it says of the MoE
            layers is out of range.

    Example:
        >>> "moe_num_experts" in read_config("open_lm_41m")
        False
    """
    source = str(name_or_path)
    values = _read_path(Path(source)) if source.endswith(".json") else _read_preset(source)
    _check_keys(values, source=source, others=OF_METHOD)
    try:
        _check_method(values)
    except ValueError as error:
        raise ValueError(f"model config {source}: {error}") from error
    return values


def _read_path(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no model config at {path}; a name that ends in .json is a path, "
            f"any other name is a preset: {', '.join(preset_names())}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"model config {path} is no UTF-8 text ({error}); expected JSON") from error
    return _parse(text, source=str(path))


def _read_preset(name: str) -> dict[str, Any]:
    names = preset_names()
    if name not in names:
        raise ValueError(f"{unknown_name(name, names, what='preset')}. A config of your own is a path ending in .json.")
    file = resources.files("moekit.lm") / "presets" / f"{name}.json"
    values = _parse(file.read_text(encoding="utf-8"), source=name)
    return _read_preset(values["alias"]) if "alias" in values else values


def _parse(text: str, *, source: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # beside syntax errors: integers of more than 4300 digits
        raise ValueError(f"{source} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds a JSON {type(values).__name__}, expected an object of keys and values")
    return values


def _check_keys(values: Mapping[str, Any], *, source: str, others: Iterable[str] = ()) -> None:
    known = [*(f.name for f in dataclasses.fields(ModelConfig)), *others]
    for key in values:
        if key in OF_METHOD and key not in known:
            raise ValueError(f"{source}: {key} is of the MoE layers' method, not of a shape; give it to the recipe")
        if key not in known:
            raise ValueError(f"{source}: {unknown_name(key, known, what='model config key')}")


def _check_types(config: ModelConfig) -> None:
    for field in dataclasses.fields(config):
        _check_type(field.name, getattr(config, field.name), field.type)


def _check_type(name: str, value: Any, expected: Any) -> None:
    if isinstance(value, bool):  # a bool is an int to isinstance
        good = expected is bool
    else:
        good = isinstance(value, int | float if expected is float else expected)
    if not good:
        wanted = getattr(expected, "__name__", str(expected))
        raise ValueError(f"{name} is {value!r} ({type(value).__name__}), expected {wanted}")


def _check_heads(config: ModelConfig) -> None:
    if config.n_heads > config.hidden_dim:
        raise ValueError(
            f"n_heads is {config.n_heads}, more than hidden_dim {config.hidden_dim}: heads would be 0 wide"
        )
    if config.positional_embedding_type != "none" and config.head_dim % 2:
        raise ValueError(
            "rotary rotates pairs of channels, so hidden_dim // n_heads must be even, but it is "
            f"{config.hidden_dim} // {config.n_heads} = {config.head_dim}; change either, or set "
            "positional_embedding_type to 'none'"
        )


def _check_moe(config: ModelConfig) -> None:
    if config.moe_freq < 0:
        raise ValueError(f"moe_freq is {config.moe_freq}, expected 0 (dense) or a positive step such as 2")
    if config.moe_freq == 0:
        return
    if config.moe_num_experts is None:
        raise ValueError(f"moe_freq is {config.moe_freq}, so moe_num_experts is needed too, for example 8")
    if not 1 <= config.moe_num_experts < _TOO_LARGE:
        raise ValueError(f"moe_num_experts is {config.moe_num_experts}, expected at least 1 and less than 2^31")


def _check_method(values: Mapping[str, Any]) -> None:
    given = {name: values[name] for name in OF_METHOD if name in values}
    for name, value in given.items():
        _check_type(name, value, OF_METHOD[name])
        if name == "moe_top_k" and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, expected a finite number that is not negative")
