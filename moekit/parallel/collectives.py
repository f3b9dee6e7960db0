"""Exchanges between the ranks of a group that gradients flow through: each one's backward is the opposite exchange.

Those of a backward that is to have a gradient itself (``create_graph=True``) have one, too.

All ranks of the group must call each of them, in the same order, forward and backward; a rank without rows sends none.
NCCL carries tensors on GPUs, gloo those on CPUs.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from moekit.autocast import in_autocast
from moekit.operators import wants_gradient
from moekit.rows import differentiable


def exchange(
    x: Tensor,
    *,
    group: ProcessGroup,
    sent: Sequence[int] | None = None,
    received: Sequence[int] | None = None,
    room: int | None = None,
    fill: int = 0,
) -> Tensor:
    """Send consecutive blocks of rows to the ranks of a group, and receive theirs in rank order (all-to-all).

    Args:
        x: (R, ...), the rows for rank 0 first; rows past the sum of ``sent`` stay here, and have a gradient of zero.
        group: of P ranks.
        sent: P numbers of rows; None means equal blocks, and then R must be a multiple of P.
        received: P numbers of rows; None like ``sent``.
        room: R', not less than the sum of ``received``; None is that sum.
        fill: what rows past that sum are filled with.

    Returns:
        (R', ...). The gradient goes back the way that the rows came.
    """
    return _Exchange.apply(x, sent, received, group, room, fill)


def room_for(number: int) -> int:
    """Round a number of rows up, by a thirty-second at most where there are many, so that few numbers occur.

    What another rank sends is another number in every step. Memory that was freed fits one of the same size again, and
    kernels whose arguments are known are launched without looking at them (``moekit._operators_triton``).

    Args:
        number: of rows.

    Returns:
        A multiple of 16.

    Example:
        >>> room_for(5), room_for(60_000), room_for(61_440), room_for(0)
        (16, 60416, 61440, 0)
    """
    step = 16
    while 64 * step < number:  # by comparisons, which a compiler can keep for other numbers
        step *= 2
    return -(-number // step) * step


def gather(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """Put the rows of all ranks below each other, on every rank (all-gather).

    Args:
        x: (R, ...), of the same shape on every rank.
        group: of P ranks.

    Returns:
        (P * R, ...). The gradient is the sum over ranks of each rank's block.
    """
    return _Gather.apply(x, group)


def reduce_scatter(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """Add up over ranks, and keep this rank's block of rows.

    Args:
        x: (P * R, ...), of the same shape on every rank. Sums are taken in its dtype.
        group: of P ranks.

    Returns:
        (R, ...). The gradient is gathered.
    """
    return _ReduceScatter.apply(x, group)


def narrowed(x: Tensor) -> Tensor:
    """Convert to the dtype that autocast would compute in, so that no wider rows travel than are used.

    Args:
        x: any tensor.

    Returns:
        The same where autocast is off.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     narrowed(torch.ones(1)).dtype
        torch.bfloat16
    """
    return in_autocast(x)[0]


def connect(y: Tensor, *inputs: Tensor) -> Tensor:
    """Make a tensor depend on others, with gradient zero, so that their backward runs whatever ``y`` was made from.

    A layer that got no rows may return a constant. Without this its rank would skip the exchange of gradients that the
    other ranks wait for. The gradients of ``inputs`` are connected to that of ``y`` and to ``inputs`` in the same way,
    where they are to have gradients themselves.

    Args:
        y: any tensor.
        inputs: what it shall depend on.

    Returns:
        The values of ``y``.

    Example:
        >>> connect(torch.zeros(1), torch.ones(2, requires_grad=True)).requires_grad
        True
    """
    # Compiled without gradients, Dynamo would hand back another of the arguments.
    if not wants_gradient(y, *inputs):
        return y
    return _Connect.apply(y, *(inputs if torch.compiler.is_compiling() else map(_Tail.apply, inputs)))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sent, received, group: ProcessGroup, room, fill) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.sent, ctx.received, ctx.group, ctx.num_rows = sent, received, group, x.shape[0]
        return _all_to_all(x, sent, received, group, room, fill)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        if differentiable():
            back = exchange(grad, group=ctx.group, sent=ctx.received, received=ctx.sent, room=ctx.num_rows)
        else:
            back = _all_to_all(grad, ctx.received, ctx.sent, ctx.group, ctx.num_rows, 0)
        return back, *[None] * 5


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return reduce_scatter(grad, group=ctx.group) if differentiable() else _reduce_scatter(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gather(grad, group=ctx.group) if differentiable() else _all_gather(grad, ctx.group), None


class _Connect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, *inputs: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.others = len(inputs)
        if not torch.compiler.is_compiling():
            ctx.save_for_backward(*inputs)  # tails
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        if not differentiable():
            return grad, *[None] * ctx.others  # runs their backward all the same, and costs nothing
        tails = ctx.saved_tensors
        return grad, *[connect(torch.zeros_like(tail), grad, *tails) for tail in tails]


class _Tail(torch.autograd.Function):
    """An empty tensor that depends on another without keeping its memory."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.shape = x.shape
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor | None:  # type: ignore[no-untyped-def]
        return connect(grad.new_zeros(ctx.shape), grad) if differentiable() else None


# The operators behind ``torch.distributed``'s functional collectives: they return new tensors, and compile. What is to
# arrive in a part of a tensor goes there by another, where nothing is compiled.


def _all_to_all(
    x: Tensor,
    sent: Sequence[int] | None,
    received: Sequence[int] | None,
    group: ProcessGroup,
    room: int | None,
    fill: int,
) -> Tensor:
    equal = [x.shape[0] // group.size()] * group.size()
    leaving, arriving = (equal if sizes is None else list(sizes) for sizes in (sent, received))
    leaves, arrives = sum(leaving), sum(arriving)
    x = (x if leaves == x.shape[0] else x[:leaves]).contiguous()
    spare = 0 if room is None else room - arrives
    if spare and not torch.compiler.is_compiling():
        out = x.new_empty(arrives + spare, *x.shape[1:])
        out[arrives:] = fill
        dist.all_to_all_single(out[:arrives], x, arriving, leaving, group=group)
        return out
    ops = torch.ops._c10d_functional
    arrived = ops.wait_tensor(ops.all_to_all_single(x, arriving, leaving, group.group_name))
    return F.pad(arrived, (*[0] * (2 * x.ndim - 1), spare), value=fill) if spare else arrived


def _all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))


def _reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name))
