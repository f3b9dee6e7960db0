"""The one ``nn.Module`` that users need: parameters and state around ``moe_layer``."""

import operator
import reprlib
from typing import Any

import torch
from torch import Tensor, nn

from moekit.parallel import Part, fill, local
from moekit.recipes.choices import num_choices
from moekit.recipes.expert_parameters import RoutedExperts, draw_experts, hidden_size
from moekit.recipes.layers import MoEParams, Recipe, check_recipe, check_shared, moe_layer
from moekit.recipes.recipe_checks import check_calls, check_same_plan
from moekit.routing import init_linear_gate
from moekit.types import LayerOutput, Routing


class MoE(nn.Module):
    """A Mixture-of-Experts feed-forward layer, (..., D) -> (..., D), that runs a recipe.

    Args:
        dim: D, the model dimension.
        num_experts: E.
        recipe: the method; ``moe.recipe = moe.recipe._replace(...)`` swaps a stage.
        hidden: F of each expert; None takes what the recipe's ``init`` takes.
        part: the part of the routed experts that this rank owns, where the recipe's layer is wrapped in a strategy that
            spreads them over ranks.
        generator: of the initial weights; None takes torch's global one.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        gate: (D, E) parameter, or several by name.
        experts: module with the parameters of the routed experts, each (E, ., .).
        shared: parameters of the shared experts, if the recipe has any.
        shared_gate: (D, 1) parameter that weighs them, or None.
        simple: parameters of the simple experts, if the recipe has any.
        state: buffer that the router remembers, if the recipe has one, registered under its name. Its update is the
            trainer's job, once per optimizer step: see ``update_state``. It keeps its dtype when the module is cast.

    Raises:
        TypeError: if the recipe is none.
        ValueError: if a size, or the number of shared experts, is not positive, or the part is none; if a stage of the
            recipe is of another kind, or its state's name is taken; if another recipe is put in that has another number
            of shared experts; from the layer, if another recipe was put in whose
            gate or experts take other parameters.
        RuntimeError: from what reads ``state``, if another recipe was put in that has one and the first had none of its
            name.

    Example:
        >>> from moekit.recipes import mixtral
        >>> moe = MoE(16, 4, mixtral(k=2), hidden=32)
        >>> output = moe(torch.randn(2, 5, 16))
        >>> output.y.shape, output.routing.expert_indices.shape
        (torch.Size([2, 5, 16]), torch.Size([10, 2]))
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        recipe: Recipe,
        *,
        hidden: int | None = None,
        part: Part = Part(),  # noqa: B008, an immutable tuple
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, num_experts = _size("dim", dim), _size("num_experts", num_experts)
        hidden = None if hidden is None else _size("hidden", hidden)
        options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        self._num_shared: int | None = None  # until they are made
        self.recipe = recipe
        choices = num_choices(recipe, num_experts)
        self.dim, self.num_experts = dim, num_experts
        self._hidden, self._part = hidden, part
        self.gate, self._gate_type = _held(recipe.init_gate(dim, choices, **options))
        self.experts = RoutedExperts(draw_experts(recipe.init, num_experts, dim, hidden, part=part, **options))
        shared = gate = simple = None
        if recipe.shared is not None:
            shared = recipe.init(1, dim, hidden_size(recipe.init, dim, hidden) * recipe.shared.number, **options)
            gate = init_linear_gate(dim, 1, **options) if recipe.shared.gated else None
            self._num_shared = recipe.shared.number
        if recipe.simple is not None:
            simple = recipe.simple.init(dim, **options)
        self.shared, self._shared_type = _held(shared)
        self.shared_gate = None if gate is None else nn.Parameter(gate)
        self.simple, self._simple_type = _held(simple)
        if recipe.state is not None:
            _check_name(self, recipe.state.name)
            self.register_buffer(recipe.state.name, recipe.state.init(choices, device=device))

    @property
    def recipe(self) -> Recipe:
        """The method, which can be replaced by another one that takes the same parameters."""
        return self._recipe

    @recipe.setter
    def recipe(self, recipe: Recipe) -> None:
        check_recipe("MoE", recipe)
        check_calls(recipe)
        check_same_plan(recipe)
        check_shared("MoE", recipe.shared)
        if recipe.shared is not None and self._num_shared not in (None, recipe.shared.number):
            raise ValueError(
                f"MoE: the recipe has {recipe.shared.number} shared experts, and the module was made with "
                f"{self._num_shared}, whose parameters are as wide as these together; expected as many. Make a new MoE "
                f"of the recipe, or take recipe.shared._replace(number={self._num_shared})."
            )
        self._recipe = recipe

    @property
    def state(self) -> Tensor | None:
        """What the router remembers, or None."""
        if self.recipe.state is None:
            return None
        if self.recipe.state.name not in self._buffers:
            before = " and ".join(f"remembered {name!r}" for name in self._buffers) or "did not"
            raise RuntimeError(
                f"MoE: its recipe remembers {self.recipe.state.name!r}, and the one that it was made of {before}; make "
                f"a new MoE of the recipe."
            )
        return self._buffers[self.recipe.state.name]

    def _apply(self, fn: Any, recurse: bool = True) -> "MoE":
        """Move the router's state with the parameters, but keep its dtype: steps of 0.001 vanish in bfloat16."""
        states = dict(self._buffers)  # of the recipe that it was made of, whatever it has now
        super()._apply(fn, recurse)
        for name, before in states.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                kept = torch.empty_like(after, dtype=before.dtype) if before.is_meta else before.to(after.device)
                self._buffers[name] = kept
        return self

    def params(self) -> MoEParams:
        """Return the parameters as the NamedTuple that ``moe_layer`` takes."""
        return self._params(self.experts.params())

    def _params(self, experts: Any) -> MoEParams:
        shared, simple = _taken(self.shared, self._shared_type), _taken(self.simple, self._simple_type)
        return MoEParams(_taken(self.gate, self._gate_type), experts, shared, self.shared_gate, simple)

    def _routed(self, x: Tensor, routing: Routing, _: Any) -> Tensor:
        return self.experts(self.recipe.layer, x, routing)

    def forward(self, x: Tensor, *, token_ids: Tensor | None = None, token_mask: Tensor | None = None) -> LayerOutput:
        """Apply the layer; see ``moe_layer`` for arguments and result."""
        options = {"state": self.state, "token_ids": token_ids, "token_mask": token_mask}
        return moe_layer(x, self._params(None), self.recipe, layer=self._routed, **options)

    @torch.no_grad()
    def update_state(self, observed: Tensor) -> None:
        """Let the router's state take its step, from what it observed, summed over a whole optimizer step.

        Args:
            observed: (n,), the sum of what ``recipe.state.observe`` returned. A recipe without a state, or whose state
                stays, ignores it.

        Raises:
            ValueError: if the update is no tensor of the state's shape, or no integers where the state is.
        """
        if self.recipe.state is not None and self.recipe.state.update is not None:
            state = self.state
            assert state is not None
            updated = self.recipe.state.update(state, observed)
            _check_update(self.recipe.state.name, state, updated)
            state.copy_(updated.clone())  # which may be a view of the state

    @torch.no_grad()
    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """Draw all parameters anew, in place, and let the router forget: for a module that was made on the meta device.

        All ranks must draw alike: give them generators of one seed. A rank whose part of the experts is its own
        (``distribute_experts``) draws that part alone. Other sharded parameters (``fully_shard``) get their shares of
        what each rank draws whole.

        Args:
            generator: of the weights, on the parameters' device; None takes torch's global one.

        Raises:
            ValueError: if there are parameters of other names, as those of ``torch.nn.utils.parametrize``.

        Example:
            >>> from moekit.recipes import mixtral
            >>> with torch.device("meta"):
            ...     moe = MoE(16, 4, mixtral(), hidden=32)
            >>> moe.to_empty(device="cpu").reset_parameters(generator=torch.Generator().manual_seed(0))
            >>> torch.equal(moe.gate, MoE(16, 4, mixtral(), hidden=32, generator=torch.Generator().manual_seed(0)).gate)
            True
        """
        like = next(self.parameters())
        drawn = MoE(
            self.dim, self.num_experts, self.recipe, hidden=self._hidden, part=self._part_to_draw(),
            generator=generator, device=like.device, dtype=like.dtype,
        ).state_dict()  # fmt: skip
        if unknown := self.state_dict().keys() - drawn.keys():
            raise ValueError(
                f"MoE.reset_parameters: the module has {', '.join(sorted(unknown))}, which its recipe draws no values "
                f"for; expected the parameters of MoE(...). Reset them before parametrizing them."
            )
        for name, tensor in self.state_dict().items():
            fill(tensor if tensor.shape == drawn[name].shape else local(tensor), drawn[name])

    def _part_to_draw(self) -> Part:
        """Return this rank's part of the experts, or all of them where it holds another share than its part."""
        options: dict[str, Any] = {"part": self._part, "generator": torch.Generator(), "device": "meta"}
        own = draw_experts(self.recipe.init, self.num_experts, self.dim, self._hidden, **options)
        held = self.experts.parameters()
        fits = (p.shape in (each.shape, local(each).shape) for p, each in zip(own, held, strict=True))
        return self._part if all(fits) else Part()

    def extra_repr(self) -> str:
        """Describe the sizes in ``print(moe)``."""
        return f"dim={self.dim}, num_experts={self.num_experts}"


def _size(name: str, given: Any) -> int:
    """Return a size as an int, NumPy's too."""
    try:
        size = operator.index(given)
    except TypeError:
        size = 0
    if size < 1:
        raise ValueError(f"MoE: {name} = {given!r}; expected a positive integer.")
    return size


def _held(tensors: Any) -> tuple[Any, type | None]:
    """Return the parameters of a NamedTuple, and its type; a tensor alone is one parameter, and None none."""
    if tensors is None:
        return nn.ParameterDict(), None
    if isinstance(tensors, Tensor):
        return nn.Parameter(tensors), Tensor
    return nn.ParameterDict({name: nn.Parameter(each) for name, each in _fields(tensors).items()}), type(tensors)


def _fields(tensors: Any) -> dict[str, Tensor]:
    """Return the fields of a NamedTuple; refuse what a module cannot hold as parameters."""
    kind = type(tensors).__name__
    if not hasattr(tensors, "_asdict"):
        raise ValueError(_NOT_HELD.format(given=kind))
    fields: dict[str, Any] = tensors._asdict()
    for name, each in fields.items():
        if not isinstance(each, Tensor):
            raise ValueError(_NOT_HELD.format(given=f"{kind} with {name} = {each!r}"))
        if hasattr(nn.ParameterDict, name):
            raise ValueError(f"MoE: parameters cannot be called {name!r}, as torch's dictionaries have it; rename it.")
    return fields


_NOT_HELD = (
    "MoE: the recipe's parameters are a {given}; expected a tensor, a NamedTuple of tensors, or None. What is no "
    "parameter belongs in the function that takes them, by functools.partial."
)


def _taken(held: Any, kind: type | None) -> Any:
    if kind is None or kind is Tensor:
        return held if kind is Tensor else None
    return kind(*(held[name] for name in kind._fields))  # type: ignore[attr-defined]


def _check_name(moe: nn.Module, name: Any) -> None:
    """Refuse a name of a state that is an attribute of the module, or reaches routers with another meaning."""
    if not isinstance(name, str) or not name.isidentifier():
        why = "no name that an argument can have"
    elif name in ("token_ids", "token_mask", "sequence_length"):
        why = "what a layer tells routers"
    elif name in dir(moe):
        why = "a name that the module has"
    else:
        return
    raise ValueError(
        f"MoE: the recipe's state is called {name!r}, {why}; expected one of its own, such as 'memory'. Rename it: "
        f"recipe.state._replace(name='memory'), and in recipe.needs."
    )


def _check_update(name: str, state: Tensor, updated: Any) -> None:
    if (
        isinstance(updated, Tensor)
        and updated.shape == state.shape
        and (state.is_floating_point() or not updated.is_floating_point())
    ):
        return
    found = _described(updated) if isinstance(updated, Tensor) else reprlib.repr(updated)
    raise ValueError(
        f"MoE: the update of the state {name!r} returned {found}; expected {_described(state)}, as the state is. Mend "
        f"recipe.state.update, or the shape and dtype of recipe.state.init."
    )


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
