"""OpenLM's names of parameters, their order, and what to say where a file's tensors are not the model's."""

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Size, Tensor

TIED = ("tok_embeddings.weight", "output.weight")  # that are one matrix with weight_tying

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})  # parts of names
_OPENLM_NAMES = {  # of a block: ours -> OpenLM's
    "feed_forward.gate": "feed_forward.router.layer.weight",
    "feed_forward.experts.up": "feed_forward.experts.mlp.w1",
    "feed_forward.experts.down": "feed_forward.experts.mlp.w2",
    "feed_forward.w1.weight": "_ff_w1.weight",
    "feed_forward.w2.weight": "_ff_w2.weight",
}
_OUR_NAMES = {theirs: ours for ours, theirs in _OPENLM_NAMES.items()}
_ORDER = ("post_embed_norm.", "tok_embeddings.", "layers.", "norm.", "output.")  # in which OpenLM registers modules
_BLOCK_ORDER = (
    *("attention.in_proj.", "attention.out_proj.", "attention.pos_embed.", "attention.q_norm.", "attention.k_norm."),
    *("_ff_w1.", "_ff_w2.", "feed_forward.router.", "feed_forward.experts.bias", "feed_forward.experts.mlp."),
    *("feed_forward.", "attention_norm.", "ffn_norm."),
)


def openlm_name(name: str) -> str:
    """Return OpenLM's name of one of our parameters, the first if it has two.

    Example:
        >>> openlm_name("layers.0.feed_forward.gate")
        'layers.0.feed_forward.router.layer.weight'
    """
    prefix, local = split_name(name)
    return prefix + _OPENLM_NAMES.get(local, local) if prefix else name


def our_name(name: str) -> str:
    """Return our name of one of OpenLM's parameters.

    Example:
        >>> our_name("layers.0.feed_forward.experts.mlp.w2")
        'layers.0.feed_forward.experts.down'
    """
    prefix, local = split_name(name)
    return prefix + _OUR_NAMES.get(local, local) if prefix else name


def openlm_order(names: Iterable[str]) -> list[str]:
    """Sort OpenLM's names as its model registers them, which is how its optimizer counts parameters.

    Example:
        >>> openlm_order(["norm.weight", "layers.10.ffn_norm.weight", "layers.2.ffn_norm.weight"])
        ['layers.2.ffn_norm.weight', 'layers.10.ffn_norm.weight', 'norm.weight']
    """

    def place(name: str) -> tuple[int, int, int, bool, str]:
        prefix, local = split_name(name)
        layer = int(prefix.split(".")[1]) if prefix else 0
        return _rank(name, _ORDER), layer, _rank(local, _BLOCK_ORDER), local.endswith(".bias"), local

    return sorted(names, key=place)


def plain_name(name: str) -> str:
    """Cut off what DDP, FSDP, torch.compile and activation checkpointing put into a name, wherever it is.

    Example:
        >>> plain_name("module._orig_mod.layers.0._fsdp_wrapped_module.ffn_norm.weight")
        'layers.0.ffn_norm.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def split_name(name: str) -> tuple[str, str]:
    """Split a name into its block, ``layers.N.`` or nothing, and the name within.

    Example:
        >>> split_name("layers.3.ffn_norm.weight"), split_name("norm.weight")
        (('layers.3.', 'ffn_norm.weight'), ('', 'norm.weight'))
    """
    match = re.match(r"layers\.\d+\.", name)
    return (match.group(), name[match.end() :]) if match else ("", name)


def listed(names: Iterable[str], *, most: int = 12) -> str:
    """Join names for a message, the first ones if there are many.

    Example:
        >>> listed("abc", most=2)
        'a, b and 1 more'
    """
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Size],
    *,
    integers: Collection[str] = (),
    openlm: bool = False,
) -> None:
    """Check that a state dict has exactly a model's names and shapes, and its kinds of numbers.

    Args:
        tensors: our names to what was read.
        expected: our names to the model's shapes.
        integers: names of what is no weight in the model, such as a router's table.
        openlm: give the names of the message as OpenLM's file has them.

    Raises:
        ValueError: if not; the message lists names, shapes, and the flags that they depend on.

    Example:
        >>> check_tensors({"norm.weight": torch.ones(2)}, {"norm.weight": Size([2])})
    """
    spelled = openlm_name if openlm else str
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unknown:
        lists = (("the file lacks", missing), ("the model has no", unknown))
        text = "; ".join(f"{what} {listed(openlm_order(map(spelled, names)))}" for what, names in lists if names)
        flags = " ".join(sorted({flag for name in missing | unknown for flag in _flags(name)}))
        raise ValueError(f"the file's tensors are not the model's: {text}. They depend on {flags}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            found, wanted = tensor.shape, expected[name]
            if openlm and name.endswith("feed_forward.gate"):
                found, wanted = Size(reversed(found)), Size(reversed(wanted))
            flags = " ".join(_flags(name, shape=True))
            raise ValueError(f"{spelled(name)}: found {tuple(found)}, expected {tuple(wanted)}. It depends on {flags}")
        if tensor.is_floating_point() is (name in integers):
            wanted_kind = "integers" if name in integers else "floating-point weights"
            raise ValueError(f"{spelled(name)} is {tensor.dtype}; expected {wanted_kind}")


def check_tied(tensors: Mapping[str, Tensor]) -> None:
    """Check that embedding and head are one matrix, as in a model that ties them.

    Args:
        tensors: our names to what was read, both matrices among them.

    Raises:
        ValueError: if they differ, so that a model would keep one of the two.

    Example:
        >>> check_tied(dict.fromkeys(TIED, torch.ones(3, 2)))
    """
    one, other = TIED
    if tensors[one] is not tensors[other] and not torch.equal(tensors[one], tensors[other]):
        raise ValueError(
            f"the model ties {one} and {other}, but in the file they differ; expected equal ones. Choose a --model "
            "without weight_tying"
        )


def _rank(name: str, order: tuple[str, ...]) -> int:
    return next((i for i, start in enumerate(order) if name.startswith(start)), len(order))


def _flags(name: str, *, shape: bool = False) -> list[str]:
    """Name the flags on which a tensor's existence depends, or its shape."""
    local = split_name(name)[1]
    if re.search(r"gate$|router|experts", local):
        return ["--model", "--moe-num-experts"] if shape else ["--moe-freq", "--model"]
    if shape:
        return ["--model"]
    if re.fullmatch(r"attention\.[qk]_norm\.weight", local):
        return ["--qk-norm", "--model"]
    if "norm" in local:
        return ["--model-norm", "--model"]
    return ["--moe-freq", "--ffn-type", "--model"] if local.startswith(("feed_forward", "_ff")) else ["--model"]
