"""The parameters of routed experts: drawn expert by expert, so that a rank draws what it owns and nothing else."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from moekit.parallel import Part, local
from moekit.types import ExpertLayer, Routing


class RoutedExperts(nn.Module):
    """The parameters of a layer's routed experts, and the place where the layer runs on them.

    It is a module with a forward of its own so that FSDP can gather them when they are needed, and over other ranks
    than the parameters around them.

    Args:
        params: a NamedTuple of (E, ., .) tensors, or of this rank's part of them.

    Attributes:
        compute_dtype: what they are converted to for the layer; None leaves them as they are.

    Example:
        >>> from moekit.experts import init_gated
        >>> [name for name, _ in RoutedExperts(init_gated(2, 4)).named_parameters()]
        ['gate', 'up', 'down']
    """

    def __init__(self, params: Any) -> None:
        super().__init__()
        for name, tensor in params._asdict().items():
            self.register_parameter(name, nn.Parameter(tensor))
        self._type = type(params)
        self.compute_dtype: torch.dtype | None = None

    def params(self) -> Any:
        """Return what this rank holds, as the NamedTuple that an expert layer takes."""
        mine = [local(getattr(self, name)) for name in self._type._fields]
        dtype = self.compute_dtype
        return self._type(*(mine if dtype is None else [tensor.to(dtype) for tensor in mine]))

    def forward(self, layer: ExpertLayer, x: Tensor, routing: Routing) -> Tensor:
        """Run an expert layer, x (T, D) to (T, D)."""
        return layer(x, routing, self.params())

    def extra_repr(self) -> str:
        """Describe the shapes in ``print(model)``, of all experts even where they are spread over ranks."""
        return ", ".join(f"{name}={tuple(parameter.shape)}" for name, parameter in self.named_parameters())


def draw_experts(
    init: Callable[..., Any],
    num_experts: int,
    dim: int,
    hidden: int | None,
    *,
    part: Part = Part(),  # noqa: B008, an immutable tuple
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Draw a part of a layer's experts: the same values whichever part it is, and never more memory than it takes.

    Each expert has a random generator of its own, seeded from one number of ``generator`` and the expert's.

    Args:
        init: (1, dim, hidden, generator=, device=, dtype=) -> a NamedTuple of (1, ., .) tensors.
        num_experts: E of the layer.
        dim: D.
        hidden: F of each expert; None takes what ``init`` takes.
        part: which experts, and which slice of their hidden dimension.
        generator: of the layer's seed; None takes torch's global one.
        device: of the parameters.
        dtype: of the parameters.

    Returns:
        A NamedTuple of tensors (E / X, ., .), their hidden axis cut Y ways.

    Raises:
        ValueError: if the part lies outside its grid, or does not divide the experts or their hidden dimension; if
            ``init`` returns no NamedTuple.

    Example:
        >>> from moekit.experts import init_mlp
        >>> seed = torch.Generator().manual_seed(0)
        >>> draw_experts(init_mlp, 8, 4, 6, part=Part(block=1, blocks=4, slices=2), generator=seed).up.shape
        torch.Size([2, 4, 3])
    """
    _check_part(part)
    if num_experts % part.blocks:
        raise ValueError(f"{num_experts} experts cannot be cut into {part.blocks} equal blocks; expected a divisor")
    own = part.experts(num_experts)
    seed = _seed(generator)
    draw = partial(init, 1, dim, hidden, device=device, dtype=dtype)
    axes = hidden_axes(init, dim, hidden) if part.slices > 1 else {}
    tensors: list[Tensor] = []
    for number, expert in enumerate(own):
        drawn = draw(generator=_generator(device, seed + expert))
        _check_drawn(drawn)
        pieces = {name: _slice(name, tensor, axes, part) for name, tensor in drawn._asdict().items()}
        if not tensors:
            tensors = [piece.new_empty(len(own), *piece.shape[1:]) for piece in pieces.values()]
        for tensor, piece in zip(tensors, pieces.values(), strict=True):
            tensor[number] = piece[0]
    return type(drawn)(*tensors)


def hidden_axes(init: Callable[..., Any], dim: int, hidden: int | None) -> Mapping[str, int]:
    """Find which axis of each parameter is the experts' hidden dimension, by asking for another one.

    Args:
        init: of the parameters.
        dim: D.
        hidden: F; None takes what ``init`` takes.

    Returns:
        Name of a parameter to its axis.

    Raises:
        ValueError: if a parameter has no such axis, or several; if these axes differ in size, as that of ``gate_up``
            does, which may hold two parts behind each other: a slice of it is then not one of each.

    Example:
        >>> from moekit.experts import init_gated
        >>> hidden_axes(init_gated, 8, 8)
        {'gate': 2, 'up': 2, 'down': 1}
    """
    width = hidden_size(init, dim, hidden)
    small = init(1, dim, width, device="meta")
    large = init(1, dim, 2 * width, device="meta")
    axes = {}
    for name in small._fields:
        shapes = getattr(small, name).shape, getattr(large, name).shape
        differing = [axis for axis, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b]
        if len(differing) != 1:
            raise ValueError(
                f"experts' parameter {name!r} has shape {tuple(shapes[0])} for hidden = {width} and {tuple(shapes[1])} "
                f"for {2 * width}; expected exactly one axis to follow the hidden dimension, which ranks can share. "
                f"Keep the experts whole (--moe-hidden-ranks 1): ranks that are left hold replicas."
            )
        axes[name] = differing[0]
    sizes = {name: getattr(small, name).shape[axis] for name, axis in axes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"the hidden axes of experts' parameters have different sizes for hidden = {width}: "
            f"{', '.join(f'{name} {size}' for name, size in sizes.items())}; expected one size, so that a rank's "
            f"slices belong to the same hidden units. Parts that lie behind each other in one tensor, as gate and up, "
            f"would be cut in the wrong places, and sizes cannot tell whether these do: keep parts apart, as "
            f"init_gated does, or the experts whole (--moe-hidden-ranks 1)."
        )
    return axes


_WIDTH = 64  # of the first of two other F


def hidden_size(init: Callable[..., Any], dim: int, hidden: int | None) -> int:
    """Say what F is.

    Where nobody gave one it is read off the parameters that ``init`` makes then, by the axes that follow F: of how many
    rows or columns is told by asking for two other F. An ``init`` that takes no others has F last in its first field.

    Args:
        init: of the parameters.
        dim: D.
        hidden: F; None takes what ``init`` takes.

    Returns:
        F.

    Example:
        >>> from moekit.experts import init_mlp
        >>> hidden_size(init_mlp, 8, None)
        32
    """
    if hidden is not None:
        return hidden
    own, small, large = (init(1, dim, width, device="meta") for width in (None, _WIDTH, 2 * _WIDTH))
    for mine, low, high in zip(own, small, large, strict=True):
        if not isinstance(mine, Tensor):  # which a module cannot hold, and says so
            continue
        for size, few, many in zip(mine.shape, low.shape, high.shape, strict=True):
            if many > few and size * _WIDTH % (many - few) == 0:
                return int(size * _WIDTH // (many - few))
    return int(own[0].shape[-1])


def _check_drawn(params: Any) -> None:
    """Refuse parameters that the module cannot hold, or cannot stack expert by expert."""
    if not hasattr(params, "_asdict"):
        raise ValueError(
            f"the experts' init returned a {type(params).__name__}; expected a NamedTuple of tensors, such as "
            f"GatedParams: by its names parameters are stored."
        )
    for name, each in params._asdict().items():
        what = f"the experts' init returned {type(params).__name__} with {name} ="
        if not isinstance(each, Tensor) or not each.is_floating_point():
            given = each.dtype if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(
                f"{what} {given}; expected a tensor of floating point numbers for each field. What is no parameter "
                f"belongs in the expert network, by functools.partial."
            )
        if each.ndim < 1 or each.shape[0] != 1:
            raise ValueError(f"{what} a tensor {tuple(each.shape)} for one expert; expected (1, ...), experts first.")
        if hasattr(RoutedExperts, name) or name in ("compute_dtype", "training"):
            raise ValueError(f"the experts' parameters cannot be called {name!r}, as a module has it; rename it.")


def _check_part(part: Part) -> None:
    for number, count in (("block", "blocks"), ("hidden", "slices")):
        own, total = getattr(part, number), getattr(part, count)
        if total < 1:
            raise ValueError(f"{part}: {count} = {total}; expected a positive integer.")
        if not 0 <= own < total:
            raise ValueError(
                f"{part}: {number} = {own} of {count} = {total}; expected 0 to {total - 1}, the number of this rank's."
            )


def _slice(name: str, tensor: Tensor, axes: Mapping[str, int], part: Part) -> Tensor:
    if part.slices == 1:
        return tensor
    size = tensor.shape[axes[name]]
    if size % part.slices:
        raise ValueError(
            f"a hidden dimension of {size} cannot be cut into {part.slices} equal slices; expected a divisor"
        )
    return tensor.narrow(axes[name], part.hidden * (size // part.slices), size // part.slices)


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    drawn = torch.randint(2**62, (), generator=generator, device=device)
    return 0 if isinstance(drawn, FakeTensor) else int(drawn)  # shapes alone are asked for: there is no number


def _generator(device: torch.device | str | None, seed: int) -> torch.Generator | None:
    target = torch.empty(0, device=device).device
    return None if target.type == "meta" else torch.Generator(target).manual_seed(seed)
