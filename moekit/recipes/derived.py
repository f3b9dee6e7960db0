"""Settings of a file that give way to the command line: what a run derived from others, and what excludes a flag."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moekit.lm.configs import OF_METHOD

DERIVED = "derived"  # the key of a run's file that is no setting: names of those that nobody gave
_EXCLUDING = (  # of the two sides the command line's counts
    (("batch_size",), ("global_batch_size",)),
    (("steps",), ("train_num_samples", "epochs")),
    (("keep_checkpoints",), ("delete_previous_checkpoint",)),
    (("fsdp_amp",), ("fsdp_pure_bf16",)),
    (("fsdp_hybrid",), ("fsdp_hybrid_o2",)),
)
OF_SHAPE = ("model_norm", "qk_norm", "positional_embedding_type", "ffn_type", "moe_freq")  # that a model's file may say
OF_EXCHANGE = (  # that --moe-expert-model-parallelism asks for
    *("moe_expert_ranks", "moe_hidden_ranks", "moe_exchange", "moe_exchange_capacity_factor", "moe_exchange_chunks"),
    "moe_hierarchical_exchange",
)
OF_LENGTH = ("steps", "train_num_samples", "epochs", "batch_size", "global_batch_size", "model")
_SOURCES = {  # what a run derives, and from which flags
    "warmup": OF_LENGTH,
    "lr_cooldown_end": ("lr", "lr_scheduler"),
    **dict.fromkeys(OF_METHOD, ("recipe", "model")),
    "moe_top_k": ("recipe", "model", "moe_num_experts"),
    **dict.fromkeys((*OF_SHAPE, "moe_num_experts"), ("model",)),
}


def derived_names(given: Mapping[str, Any], filled: Mapping[str, Any]) -> list[str]:
    """Name the settings that a run filled in.

    Args:
        given: name to value, as they were given.
        filled: the same, with what was left to defaults.

    Returns:
        Names, in the order of ``filled``.

    Example:
        >>> derived_names({"lr": 0.1, "warmup": None}, {"lr": 0.1, "warmup": 80})
        ['warmup']
    """
    return [name for name, value in filled.items() if value is not None and value != given.get(name)]


def is_of_a_run(values: Mapping[str, Any]) -> bool:
    """Say whether a run wrote a file of settings: it has those of a run's length all, though some are null.

    Args:
        values: name, with underscores, to value, of the file.

    Returns:
        Whether it did.

    Example:
        >>> is_of_a_run({"steps": 60})
        False
    """
    return values.keys() >= set(OF_LENGTH)


def give_way(values: Mapping[str, Any], derived: Collection[str], arguments: Sequence[str]) -> dict[str, Any]:
    """Leave out of a file's settings what the flags on the command line say otherwise, if only by what they imply.

    A flag drops what was derived from the setting that it changes, and what the two exclude each other with, also where
    that was given; of a run with a constant rate, the end of a cosine and its lower limit. What no flag touches stays,
    so that a run is repeated as it was when defaults have changed.

    Args:
        values: name, with underscores, to value, of the file.
        derived: names of those that nobody gave.
        arguments: the words of the command line.

    Returns:
        The settings that still count.

    Example:
        >>> file = {"lr": 5e-3, "lr_cooldown_end": 1e-4, "global_batch_size": 4, "warmup": 2}
        >>> give_way(file, ["lr_cooldown_end", "warmup"], ["--lr", "1e-5", "--batch-size", "8"])
        {'lr': 0.005}
    """
    typed = typed_flags(arguments)
    given = {name for name, value in typed.items() if value != "None"}
    dropped = {name for name in derived if any(source in typed for source in _SOURCES.get(name, ()))}
    for one, other in _EXCLUDING:
        dropped |= set(other) if given & set(one) else set()
        dropped |= set(one) if given & set(other) else set()
    if typed.get("moe_freq") == "0":
        dropped |= set(OF_METHOD)
    if typed.get("lr_scheduler", values.get("lr_scheduler") if is_of_a_run(values) else None) == "const":
        dropped |= {"lr_cooldown_end", "force_min_lr"}  # older versions wrote them there, too
    if "no_fsdp" in typed:
        dropped |= {name for name in values if name.startswith("fsdp_")}
    if "no_moe_expert_model_parallelism" in typed:
        dropped |= set(OF_EXCHANGE)
    return {name: value for name, value in values.items() if name not in dropped}


def typed_flags(arguments: Sequence[str]) -> dict[str, str | None]:
    """Read which flags stand on a command line.

    Args:
        arguments: its words.

    Returns:
        Name, with underscores, to the word behind it, if any; of a flag that is there twice, the last.

    Example:
        >>> typed_flags(["--moe-freq=0", "--steps", "7", "--fsdp"])
        {'moe_freq': '0', 'steps': '7', 'fsdp': None}
    """
    found: dict[str, str | None] = {}
    for word, following in zip(arguments, [*arguments[1:], None], strict=False):
        if word.startswith("--"):
            flag, equals, value = word.removeprefix("--").partition("=")
            name = flag.replace("-", "_")
            found["model" if name == "preset" else name] = value if equals else following
    return found
