"""What a kernel needs beside its launch, at the least cost of a call: operators, gradients, the numbers of blocks."""

from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of tensors as ``torch.ops.moekit.<name>``.

    ``torch.library.custom_op`` does this too, and then looks at every tensor of every call, which takes longer than
    the launch of a kernel. For a gradient, call ``torch.library.register_autograd`` with ``"moekit::<name>"``.

    torch's dispatcher takes as long again, so the decorated function is called directly where it would do nothing else:
    with gradients off, as inside a ``torch.autograd.Function``, for plain tensors, and while no mode, no transform, no
    compiler, no tracer and no profiler of this thread looks on. A profiler of all threads, and torch's observer for
    execution traces, see the kernels in other threads, and not the operators.

    Args:
        name: of the operator.
        fake: returns tensors of the shapes and dtypes of the function's, with any values, for compilers.

    Returns:
        A decorator of functions of positional arguments. The function must neither change nor return what it was given,
        and its annotations are the schema.

    Example:
        >>> @operator("doubled_for_an_example", torch.empty_like)
        ... def doubled(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> doubled(torch.ones(2))
        tensor([2., 2.])
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        qualified = f"moekit::{name}"
        torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(qualified, ("cpu", "cuda"), function)
        torch.library.register_fake(qualified, fake)
        registered: Callable[..., Any] = getattr(torch.ops.moekit, name).default

        @wraps(function)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling() or _is_looked_at() or not _are_plain(args):
                return registered(*args)
            return function(*args)

        return call

    return register


def _onlookers() -> tuple[Callable[[], Any], ...] | None:
    """Return functions that tell of who looks on: modes, transforms, tracers and this thread's profiler.

    None for a torch that does not know one of these private names: then every call is dispatched.
    """
    try:
        return (
            torch._C._len_torch_dispatch_stack,
            torch._C._len_torch_function_stack,
            torch._ops._len_torch_dispatch_stack_pre_dispatch,
            torch._C._functorch.peek_interpreter_stack,
            torch._C._get_tracing_state,
            torch.autograd._profiler_enabled,
        )
    except AttributeError:
        return None


_ONLOOKERS = _onlookers()


def _is_looked_at() -> bool:
    """Say whether somebody would see a call of an operator; autograd would, where gradients are on."""
    if _ONLOOKERS is None or torch.is_grad_enabled():
        return True
    for ask in _ONLOOKERS:  # noqa: SIM110 -- a generator takes longer than the questions
        if ask():
            return True
    return False


_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_CONSTANTS = frozenset({type(None), bool, int, float, str})


def _are_plain(args: Sequence[Any]) -> bool:
    """Say whether torch's dispatcher would hand arguments on as they are: tensors whose memory holds their values.

    That of meta tensors does not, nor that of negated views and of zeros that are none; another class may want to look.
    """
    for each in args:
        kind = type(each)
        if kind in _TENSORS:
            if not (each.is_cuda or each.is_cpu) or each.is_neg() or each._is_zerotensor():
                return False
        elif not (kind in _CONSTANTS or (kind is list and _are_plain(each))):
            return False
    return True


def is_transformed() -> bool:
    """Say whether a transform of ``torch.func`` is at work: grad, vjp, jvp, vmap and what is made of them.

    An ``autograd.Function`` that saves what it computes on the way cannot be transformed; operators of torch can. True
    for dual tensors, too. Compiled code has the answer of when it was compiled, inside of the transform: Dynamo would
    take the gradient of another ``autograd.Function`` for zero there.

    Returns:
        Whether one is.

    Example:
        >>> is_transformed(), torch.func.vmap(lambda x: x * is_transformed())(torch.ones(1))
        (False, tensor([1.]))
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def without_vmap(name: str) -> Callable[..., Any]:
    """Make the rule for ``torch.vmap`` of an ``autograd.Function`` that has none: torch would name the class alone.

    Args:
        name: of what users call, for the message.

    Returns:
        A function to be the class's static method ``vmap``, which raises NotImplementedError.

    Example:
        >>> without_vmap("a layer")(None, (0,), torch.ones(1))
        Traceback (most recent call last):
        NotImplementedError: a layer: it has no vmap support (torch.vmap, and what torch.func makes of it). Call it \
once for all tokens, flattened to (T, D), or compose the layer of `expert_layer` on `batched`, which has, with \
padded(capacity_factor=E / K), which drops nothing.
    """

    def refuse(info: Any, in_dims: Any, *args: Any) -> None:
        raise NotImplementedError(
            f"{name}: it has no vmap support (torch.vmap, and what torch.func makes of it). Call it once for all "
            f"tokens, flattened to (T, D), or compose the layer of `expert_layer` on `batched`, which has, with "
            f"padded(capacity_factor=E / K), which drops nothing."
        )

    return refuse


def transformable(
    name: str, function: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Let reverse-mode transforms of ``torch.func`` through an operator whose gradient torch has registered.

    A registered gradient is one that they do not know. So where one is at work, the operator is called in an
    ``autograd.Function`` of the same gradient.

    Args:
        name: of what users call, for the messages of transforms that do not go through.
        function: the operator, of positional arguments.
        backward: its gradient, as registered.
        setup_context: what it saves, as registered.

    Returns:
        A function of the same arguments and results.

    Example:
        >>> save = lambda ctx, inputs, output: None
        >>> doubled = transformable("doubled", lambda x: 2 * x, lambda ctx, grad: 2 * grad, save)
        >>> torch.func.grad(doubled)(torch.tensor(3.0))
        tensor(2.)
    """
    rule = without_vmap(name)
    methods = {"forward": function, "backward": backward, "setup_context": setup_context, "vmap": rule}
    whole: Any = type(name, (torch.autograd.Function,), {key: staticmethod(each) for key, each in methods.items()})

    def call(*args: Any) -> Any:
        return whole.apply(*args) if is_transformed() else function(*args)

    return call


class _Refusal(torch.autograd.Function):
    """(name, how many inputs, *inputs, *gradients) -> the gradients, which cannot be differentiated by the inputs."""

    @staticmethod
    def forward(name: str, num_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in tensors[num_inputs:])

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # type: ignore[no-untyped-def]
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[None, ...]:  # type: ignore[no-untyped-def]
        raise RuntimeError(
            f"{ctx.name}: its gradient has no gradient. For gradients of gradients compose the layer of operators that "
            f"have them: `expert_layer` on `loop` or `batched`, `top_k`, a float32 gate."
        )


def differentiated_once(name: str, inputs: Sequence[Tensor | None], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return what a backward of kernels returns; who differentiates it is told that this cannot be.

    Without it torch takes the gradient of a gradient for zero. Compiled code has no such gradients.

    Args:
        name: of the function whose gradients they are.
        inputs: that they depend on, the gradient that came in among them.
        grads: the gradients.

    Returns:
        The gradients.

    Example:
        >>> x, grad = torch.ones(2, requires_grad=True), torch.ones(2)
        >>> torch.autograd.grad(differentiated_once("a layer", [x, grad], grad, None)[0].sum(), x)
        Traceback (most recent call last):
        RuntimeError: a layer: its gradient has no gradient. For gradients of gradients compose the layer of \
operators that have them: `expert_layer` on `loop` or `batched`, `top_k`, a float32 gate.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # gradients are enabled by create_graph=True
        return grads
    given = [each for each in inputs if each is not None]
    kept = iter(_Refusal.apply(name, len(given), *given, *(grad.detach() for grad in grads if grad is not None)))
    return tuple(None if grad is None else next(kept) for grad in grads)


def refuse_tangents(name: str, *tensors: Tensor) -> None:
    """Refuse gradients in forward mode, which torch drops without a word where no input wants one in reverse.

    Args:
        name: of the function that has none, for the message.
        tensors: its inputs.

    Raises:
        NotImplementedError: if one of them has a tangent.

    Example:
        >>> refuse_tangents("a layer", torch.ones(1))  # it has none
    """
    if not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{name}: it has no forward-mode gradient (torch.func.jvp, dual tensors). Take one in reverse mode, by "
            f"torch.autograd.grad."
        )


def wants_gradient(*tensors: Tensor) -> bool:
    """Say whether a backward through any of these tensors can follow.

    An ``autograd.Function`` is told which of its inputs want a gradient, also where gradients are off, so ask before
    it is applied.

    Args:
        tensors: inputs of what is to be run.

    Returns:
        Whether one of them wants a gradient, and gradients are on.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> with torch.no_grad():
        ...     wants_gradient(w)
        False
        >>> wants_gradient(torch.ones(2), w)
        True
    """
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


HAS_TRITON = find_spec("triton") is not None and torch.version.hip is None
"""Whether kernels can run at all, on a device for which they are; a torch for AMD cards calls those CUDA."""

_F = TypeVar("_F", bound=Callable[..., Any])


def constant_in_graphs(function: _F) -> _F:
    """Let compiled code call a function when it is compiled, and never again: for what a process does not change.

    Does what ``torch.compiler.assume_constant_result`` does, which imports the compiler: a quarter of the time that an
    import of moekit took with it.

    Args:
        function: of constants, with a constant result.

    Returns:
        The function.

    Example:
        >>> @constant_in_graphs
        ... def has_triton() -> bool:
        ...     return find_spec("triton") is not None  # Dynamo could not trace this
        >>> from importlib.util import find_spec
        >>> has_triton()
        True
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def blocks_of(length: int, size: int) -> int:
    """Return how many blocks of a size cover a length. ``triton.cdiv`` takes microseconds for it, outside a kernel.

    Args:
        length: at least 0.
        size: at least 1.

    Returns:
        The quotient, rounded up.

    Example:
        >>> blocks_of(9, 4)
        3
    """
    return -(-length // size)


def power_of_two(length: int) -> int:
    """Return the least power of two that is not below a length.

    Args:
        length: at least 1.

    Returns:
        A power of two.

    Example:
        >>> power_of_two(5), power_of_two(8), power_of_two(1)
        (8, 8, 1)
    """
    return 1 << (length - 1).bit_length()
