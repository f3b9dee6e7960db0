"""Routing of a Hugging Face model, recorded while it runs: statistics per layer, and traces over layers and steps."""

import inspect
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from traceback import walk_stack
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.dispatch import dropless_plan
from moekit.integrations.hf_experts import experts_modules, routing_of
from moekit.routing import RoutingStats, mask_tokens, routing_stats
from moekit.types import Routing

if TYPE_CHECKING:
    from tensordict import TensorDict

_TINY = torch.finfo(torch.float32).tiny


class LayerCall(NamedTuple):
    """One call of one experts module.

    Attributes:
        layer: the module's name in the model.
        routing: what it was called with, detached, padding tokens taken out.
    """

    layer: str
    routing: Routing


class RoutingRecorder:
    """What ``track_routing`` recorded: for every forward of the model (a step), the calls of its experts in order.

    Everything stays on its device, and nothing is ever forgotten but by ``clear``: K integers and K floats for each
    token and layer.

    Attributes:
        steps: one list of calls per step.

    Example:
        >>> recorder = RoutingRecorder()  # ``track_routing`` makes one, and fills it
        >>> recorder.steps, recorder.stats()
        ([], {})
    """

    def __init__(self) -> None:
        self.steps: list[list[LayerCall]] = []

    def clear(self) -> None:
        """Forget all steps."""
        self.steps.clear()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the experts modules, in the order of their calls in the last step; empty before the first."""
        return tuple(call.layer for call in self.steps[-1]) if self.steps else ()

    def stats(self) -> dict[str, RoutingStats]:
        """Describe the routing of each layer over all recorded steps.

        No host synchronisation. The experts' interface hands over no router logits: ``entropy`` is that of a token's
        combine weights over their sum, in nats, averaged over tokens (ln K for equal weights, 0 for k = 1).

        Returns:
            From the module's name to its statistics, in the order of the first calls.
        """
        calls: dict[str, list[Routing]] = {}
        for call in (call for step in self.steps for call in step):
            calls.setdefault(call.layer, []).append(call.routing)
        return {layer: _stats(routings) for layer, routings in calls.items()}

    def traces(self) -> "TensorDict":
        """Stack what was recorded over steps and layers.

        Steps and layers may have fewer tokens or choices than others (as when a prompt is followed by single tokens):
        they are filled up with expert -1 and weight 0.

        Returns:
            TensorDict of batch size (steps, layers) with ``expert_indices`` (steps, layers, T, K) int64, -1 for a
            choice that does not exist, and ``weights`` (steps, layers, T, K) float32. ``layers`` names the second axis.

        Raises:
            ValueError: if nothing was recorded, or steps called different layers.
            ImportError: if tensordict is not installed.
        """
        self._check_steps()
        from tensordict import TensorDict

        shapes = [call.routing.expert_indices.shape for step in self.steps for call in step]
        shape = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
        indices = [[_filled(call.routing.expert_indices, shape, -1) for call in step] for step in self.steps]
        weights = [[_filled(call.routing.weights, shape, 0.0) for call in step] for step in self.steps]
        fields = {"expert_indices": _stacked(indices), "weights": _stacked(weights)}
        return TensorDict(fields, batch_size=(len(self.steps), len(self.layers)))

    def _check_steps(self) -> None:
        if not any(self.steps):
            raise ValueError(
                "traces: nothing was recorded. Call the model first, inside `with track_routing(model)`, in the thread "
                "that opened it, and not compiled."
            )
        for number, step in enumerate(self.steps):
            called = tuple(call.layer for call in step)
            if called != self.layers:
                raise ValueError(
                    f"traces: step {number} called the layers {list(called)}, and the last step {list(self.layers)}; "
                    f"expected the same ones, to stack them. Read `steps`, or `clear()` between the two kinds of input."
                )


@contextmanager
def track_routing(model: nn.Module, *, mask_padding: bool = True) -> Iterator[RoutingRecorder]:
    """Record the routing of a Hugging Face MoE model for as long as the context is open.

    Hooks on the model and on its experts modules do it, whichever experts implementation runs them; they are removed at
    the end. A call of ``model`` that returns is a step, and a call within a call, as by a hook, is a step of its own.
    Layers that gradient checkpointing runs again in the backward pass are not counted again: that is outside of the
    call. Calls of other threads are not recorded: each thread opens a context of its own. No host synchronisation. Not
    for compiled models, whose graphs have no hooks: a context in which one was called warns at its end.

    Args:
        model: any module with transformers experts modules in it.
        mask_padding: leave out the tokens that a two-axis ``attention_mask`` of the call marks with zero.

    Yields:
        RoutingRecorder, which stays readable afterwards.

    Raises:
        ValueError: if the model has no experts modules, or, from the call, if its ``attention_mask`` has not two axes,
            or the experts see other tokens than those of the mask.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
        >>> config = MixtralConfig(vocab_size=16, num_hidden_layers=2, num_local_experts=4, **sizes)
        >>> model = MixtralForCausalLM(config)
        >>> with track_routing(model) as recorder:
        ...     output = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> recorder.traces()["expert_indices"].shape
        torch.Size([1, 2, 3, 2])
        >>> recorder.stats()["model.layers.0.mlp.experts"].tokens_per_expert.sum()
        tensor(6)

    References:
        The interface of the experts modules is that of transformers, ``transformers/integrations/moe.py``.
    """
    experts = experts_modules("track_routing", model)
    recorder = RoutingRecorder()
    calls = _ModelCalls(recorder, mask_padding)
    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(calls.begin, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(calls.end).remove)
        for name, module in experts.items():
            hook = partial(calls.record, name)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield recorder
    if calls.elsewhere and not calls.here:
        warnings.warn(
            f"track_routing: nothing was recorded, and the model was called {calls.elsewhere} times in other threads, "
            f"as `generate` is for a streamer; open the context in the thread that calls the model.",
            stacklevel=3,
        )
    if recorder.steps and not any(recorder.steps):
        warnings.warn(
            f"track_routing: nothing was recorded: the model was called {len(recorder.steps)} times, and none of its "
            f"experts modules, as a compiled model calls none. Record the model that was not compiled.",
            stacklevel=3,
        )


class _Call(NamedTuple):
    """A call of the model that is going on."""

    frame: FrameType  # torch's, which calls the hooks and the model's forward
    step: list[LayerCall]
    token_mask: Tensor | None


class _ModelCalls:
    """The calls of the model that are going on in the thread that made this, each within the one before.

    Hooks take their arguments as they come: torch hands over no keywords where another thread adds or removes a hook
    in the middle of a call.
    """

    def __init__(self, recorder: RoutingRecorder, mask_padding: bool) -> None:
        self.recorder = recorder
        self.mask_padding = mask_padding
        self.thread = threading.get_ident()
        self.calls: list[_Call] = []
        self.here = self.elsewhere = 0  # calls that returned in this thread, and those of others

    def begin(self, model: nn.Module, *inputs: Any) -> None:
        if threading.get_ident() != self.thread:
            self.elsewhere += 1
            return
        token_mask = _token_mask(model, *inputs) if self.mask_padding else None
        call = _Call(_caller(), [], token_mask)
        self.drop_ended()
        self.calls.append(call)

    def end(self, *_: object) -> None:
        if threading.get_ident() != self.thread:
            return
        self.drop_ended()
        if self.calls and self.calls[-1].frame is _caller():
            self.recorder.steps.append(self.calls.pop().step)
            self.here += 1

    def record(self, name: str, module: Any, *inputs: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self.drop_ended()
        if not self.calls:
            return
        args, kwargs = inputs
        index, weights = _choices(*args, **kwargs)
        # the parameter knows of all experts, where expert parallelism leaves the module those of one rank
        routing = routing_of(index, weights.detach(), num_experts=module.down_proj.shape[0])
        call = self.calls[-1]
        if call.token_mask is not None:
            _check_mask(call.token_mask, routing, name)
            routing = mask_tokens(routing, call.token_mask)
        call.step.append(LayerCall(name, routing))

    def drop_ended(self) -> None:
        """Forget calls that ended without a hook, as an error ends them."""
        while self.calls and all(frame is not self.calls[-1].frame for frame, _ in walk_stack(sys._getframe())):
            self.calls.pop()


def _caller() -> FrameType:
    """Find what called a hook: next to it, unless Dynamo has put frames between them."""
    return next(
        frame for frame, _ in walk_stack(sys._getframe()) if frame.f_code.co_filename == nn.modules.module.__file__
    )


def _choices(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
    return top_k_index, top_k_weights


def _token_mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    arguments = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
    mask, ids, embeds = (arguments.get(name) for name in ("attention_mask", "input_ids", "inputs_embeds"))
    tokens = embeds if ids is None else ids
    if mask is None or tokens is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        given = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"track_routing: the model was called with an attention_mask of {given}, which does not say what is "
            f"padding; expected (batch, tokens). `generate` makes such a mask for a static cache: take another cache, "
            f"or pass mask_padding=False to count all tokens."
        )
    return mask[:, -tokens.shape[1] :].flatten().bool()  # behind a cache the mask is longer than the input


def _check_mask(token_mask: Tensor, routing: Routing, name: str) -> None:
    if token_mask.numel() != routing.num_tokens:
        raise ValueError(
            f"track_routing: the experts {name} see {routing.num_tokens} tokens, but the attention mask marks "
            f"{token_mask.numel()}; expected one each. Pass mask_padding=False to count all tokens that they see."
        )


def _stats(routings: list[Routing]) -> RoutingStats:
    width = max(routing.expert_indices.shape[1] for routing in routings)
    shapes = [(routing.num_tokens, width) for routing in routings]
    pairs = list(zip(routings, shapes, strict=True))
    indices = torch.cat([_filled(routing.expert_indices, shape, -1) for routing, shape in pairs])
    weights = torch.cat([_filled(routing.weights, shape, 0.0) for routing, shape in pairs])
    routing = routing_of(indices, weights, num_experts=routings[0].num_experts)
    # The softmax of logarithms of weights is their share; an expert that was not chosen has none, so K axes do for E.
    logits = routing.weights.clamp_min(_TINY).log().masked_fill(indices < 0, -torch.inf)
    some = (indices >= 0).any(-1)
    logits = logits.masked_fill(~some.unsqueeze(-1), 0.0)
    return routing_stats(logits, routing, dropless_plan(routing), token_mask=some)


def _filled(values: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
    missing = [size - have for size, have in zip(shape, values.shape, strict=True)]
    return F.pad(values, (0, missing[1], 0, missing[0]), value=fill)


def _stacked(steps: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(step) for step in steps])
