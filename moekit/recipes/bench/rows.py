"""The rows of the layer benchmark: whole MoE layers by backend."""

import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.dispatch import dropless, padded
from moekit.experts import GatedParams, batched, grouped, loop, swiglu
from moekit.experts.fused import fused_layer
from moekit.experts.fused_cpu import fused_cpu
from moekit.experts.keep import EVERYTHING, INPUTS, PREACTIVATION, Keep
from moekit.experts.tile_files import layer_tiles
from moekit.experts.tiles import LayerSize, LayerTiles
from moekit.experts.triton_matmul import triton
from moekit.recipes.backends import auto, float32_products
from moekit.recipes.bench.shapes import LayerShape, load_offsets
from moekit.recipes.expert_layers import expert_layer, limited
from moekit.recipes.layers import MoEParams, Recipe, moe_layer
from moekit.recipes.wording import first_line
from moekit.routing import fused_top_k, linear_gate, routing_stats, softmax, token_rounding, top_k
from moekit.routing.fused_top_k import kernel_takes
from moekit.segments import tokens_per_expert
from moekit.types import Dispatcher, DispatchPlan, ExpertLayer, Groups, Router, Routing


class Case(NamedTuple):
    """What all rows of one table compute with.

    Attributes:
        shape: of the layer.
        load: of the experts, one of ``LOADS``.
        x: (T, D), a leaf.
        gate: (D, E), a leaf; logits have about unit variance.
        experts: leaves.
        grad: (T, D), of the output.
        offsets: (E,) float32, added to the logits.
        tiles: chooses the tiles of ``fused_layer``'s kernels, in its rows, in that of ``auto``, and in its stages.
    """

    shape: LayerShape
    load: str
    x: Tensor
    gate: Tensor
    experts: GatedParams
    grad: Tensor
    offsets: Tensor
    tiles: Callable[[LayerSize], LayerTiles] = layer_tiles

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that wants a gradient."""
        return [self.x, self.gate, *self.experts]

    def route(self, logits: Tensor, *, bias: Tensor | None = None) -> Routing:
        """Choose the k best experts, as the load would have it."""
        shifted = logits if self.load == "uniform" else logits + self.offsets
        choose = fused_top_k if kernel_takes(self.shape.experts, self.shape.k, softmax) else top_k
        return choose(shifted, k=self.shape.k, bias=bias)


class Contender(NamedTuple):
    """One row: something to run forward and backward.

    Attributes:
        forward: () -> y; with gradients off, y without a history.
        leaves: what to differentiate y by.
        grad: of y.
        no_inference: why it does not run with gradients off; "" if it does.
        dropped: share of the T K rows that a capacity limit leaves out; neither TFLOP/s nor fractions count them.
    """

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    grad: Tensor
    no_inference: str = ""
    dropped: float = 0.0


Build = Callable[[Case], Contender]
_LIMIT = padded(capacity_factor=1.25)  # OpenLM's


def make_case(shape: LayerShape, load: str, *, device: str, dtype: torch.dtype, seed: int = 0) -> Case:
    """Draw a case.

    Args:
        shape: of the layer.
        load: one of ``LOADS``.
        device: of the tensors.
        dtype: of tokens and experts; the gate's too, which computes in float32 all the same.
        seed: of the draw.

    Returns:
        Case.

    Raises:
        MemoryError: if the CPU has no memory for it.
        torch.OutOfMemoryError: if a CUDA device has none.

    Example:
        >>> make_case(LayerShape("", 8, 4, 6, 4, 2), "uniform", device="cpu", dtype=torch.float32).x.shape
        torch.Size([8, 4])
    """
    generator = torch.Generator(device).manual_seed(seed)
    _, t, d, f, e, _ = shape

    def draw(*size: int, scale: float) -> Tensor:
        drawn = torch.randn(*size, device=device, dtype=dtype, generator=generator)
        return drawn.mul_(scale).requires_grad_()

    up = partial(draw, e, d, f, scale=d**-0.5)
    try:
        experts = GatedParams(up(), up(), draw(e, f, d, scale=f**-0.5))
        x, gate, grad = draw(t, d, scale=1.0), draw(d, e, scale=d**-0.5), draw(t, d, scale=1.0).detach()
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch has no type for it on the CPU
            raise
        size = dtype.itemsize * (3 * e * d * f + 2 * t * d + d * e)
        raise MemoryError(
            f"shape {shape.name}: its tokens and experts alone take {size / 2**30:,.1f} GiB, which this machine does "
            f"not give; measure a smaller one."
        ) from error
    return Case(shape, load, x, gate, experts, grad, load_offsets(load, shape).to(device))


@torch.no_grad()
def loads_of(case: Case) -> tuple[float, int]:
    """Measure how uneven a case's load is.

    Args:
        case: to route.

    Returns:
        The largest expert's rows as a multiple of the mean, and how many experts have none.
    """
    routing = case.route(linear_gate(case.x, case.gate))
    counts = tokens_per_expert(routing.expert_indices, case.shape.experts)
    return float(counts.max() / counts.double().mean()), int((counts == 0).sum())


def moekit_rows() -> Mapping[str, Build]:
    """List moekit's backends, those that this installation has.

    Products of float32 are exact or by TF32 in all of them as torch's own setting has it.

    Returns:
        Name to what builds the row. Building or running may raise where a backend does not work.

    Example:
        >>> sorted(moekit_rows())[:3]
        ['auto', 'batched, padded', 'fused_cpu']
    """
    plain = {"loop": loop, "grouped": grouped, "triton": _triton}
    rows: dict[str, Build] = {
        name: partial(of_layer, layer=expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=matmul)))
        for name, matmul in plain.items()
    }
    rows["batched, padded"] = _batched
    rows["grouped, compiled"] = partial(_compiled, build=rows["grouped"])
    rows["fused_layer"] = _fused
    rows["fused_layer, everything kept"] = partial(_fused, keep=EVERYTHING)
    rows["fused_layer, inputs kept"] = partial(_fused, keep=INPUTS)
    rows["fused_layer, compiled"] = partial(_compiled, build=_fused)
    rows["fused_layer, tokens rounded"] = _rounded
    rows["fused_layer, capacity 1.25"] = partial(_fused, limit=_LIMIT)
    rows["grouped, capacity 1.25"] = partial(
        of_layer, layer=expert_layer(dispatcher=_LIMIT, experts=partial(swiglu, matmul=grouped)), plan=_LIMIT.plan
    )
    rows["fused_layer, CUDA graph"] = partial(_graphed, build=_fused)
    rows["fused_cpu"] = partial(of_layer, layer=fused_cpu(plan=dropless().plan))
    rows["auto"] = _auto
    return rows


def of_layer(
    case: Case,
    *,
    layer: ExpertLayer,
    route: Router | None = None,
    plan: Callable[[Routing], DispatchPlan] | None = None,
) -> Contender:
    """Build a whole MoE layer around an expert layer: gate, router (the case's unless given), experts, sum.

    Args:
        case: to compute with.
        layer: the expert layer.
        route: the router; None is the case's.
        plan: that ``layer`` makes, if it drops rows, as ``padded(capacity_factor=1.25).plan``: what it drops counts
            neither in TFLOP/s nor in fractions. None drops nothing.

    Returns:
        Contender. With a plan it routes the case once, and waits for the device.

    Example:
        >>> from moekit.dispatch import padded
        >>> case = make_case(LayerShape("", 8, 4, 6, 4, 1), "hot", device="cpu", dtype=torch.float32)
        >>> limit = padded(capacity_factor=1.0)  # 2 of the 8 tokens, which all go to one expert
        >>> layer = expert_layer(dispatcher=limit, experts=swiglu)
        >>> of_layer(case, layer=layer, plan=limit.plan).dropped
        0.75
    """
    router = case.route if route is None else route
    recipe, params = Recipe(linear_gate, router, layer), MoEParams(case.gate, case.experts)
    dropped = 0.0 if plan is None else _dropped(case, router, plan)
    return Contender(lambda: moe_layer(case.x, params, recipe).y, case.leaves, case.grad, dropped=dropped)


@torch.no_grad()
def _dropped(case: Case, route: Router, plan: Callable[[Routing], DispatchPlan]) -> float:
    logits = linear_gate(case.x, case.gate)
    routing = route(logits)
    assert isinstance(routing, Routing)  # slots take every token, and none is dropped
    return float(routing_stats(logits, routing, plan(routing)).drop_rate)


def _batched(case: Case) -> Contender:
    # Just enough room that nothing is dropped: the work of the padding is what this backend pays for a load.
    most = loads_of(case)[0]
    factor = -(-most * 1000 // 1) / 1000
    layer = expert_layer(dispatcher=padded(capacity_factor=factor), experts=partial(swiglu, matmul=batched))
    return of_layer(case, layer=layer)


def _compiled(case: Case, *, build: Build) -> Contender:
    contender = build(case)
    return contender._replace(forward=torch.compile(contender.forward, fullgraph=True))


def _graphed(case: Case, *, build: Build) -> Contender:
    need_cuda(case.x)

    def forward(x: Tensor, gate: Tensor, *experts: Tensor) -> Tensor:
        return build(case._replace(x=x, gate=gate, experts=GatedParams(*experts))).forward()

    graphed: Callable[..., object] = torch.cuda.make_graphed_callables(forward, tuple(case.leaves))
    inference, inferred = _capture(lambda: forward(*case.leaves))

    def replay() -> Tensor:
        if not torch.is_grad_enabled():
            inference.replay()
            return inferred
        y = graphed(*case.leaves)
        assert isinstance(y, Tensor)
        return y

    return Contender(replay, case.leaves, case.grad)


@torch.no_grad()
def _capture(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture a run with gradients off, and return the graph and what it writes."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = run()
    return graph, written


def _fused(case: Case, *, keep: Keep = PREACTIVATION, limit: Dispatcher | None = None) -> Contender:
    need_cuda(case.x)
    layer = fused_layer(keep=keep, precision=float32_products(), tiles=case.tiles)
    if limit is None:
        return of_layer(case, layer=layer)
    return of_layer(case, layer=limited(layer, plan=limit.plan), plan=limit.plan)


def _rounded(case: Case) -> Contender:
    # Another routing than the other rows': every expert's load is a multiple of a tile's rows, so no tile is wasted.
    need_cuda(case.x)
    layer = fused_layer(precision=float32_products(), tiles=case.tiles)
    return of_layer(case, layer=layer, route=token_rounding(case.route, tile=128))


def _auto(case: Case) -> Contender:
    return of_layer(case, layer=auto(tiles=case.tiles))


def _triton(rows: Tensor, groups: Groups, w: Tensor) -> Tensor:
    need_cuda(rows)
    return triton(rows, groups, w, precision=float32_products())


def need_cuda(x: Tensor) -> None:
    """Refuse a tensor that is not on a CUDA device.

    Args:
        x: of a row that runs nowhere else, but Triton's own in its interpreter.

    Raises:
        RuntimeError: if it is elsewhere.

    Example:
        >>> need_cuda(torch.ones(3))
        Traceback (most recent call last):
        RuntimeError: it runs on CUDA devices, not on cpu
    """
    if not x.is_cuda:
        raise RuntimeError(f"it runs on CUDA devices, not on {x.device}")


def try_build(build: Build, case: Case) -> Contender | str:
    """Build a row and run it once, forward and backward, and forward alone, which compiles what has to be.

    Args:
        build: of the row.
        case: to compute with.

    Returns:
        The row, which says so if only the forward alone does not work here; or one line that says why nothing does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            contender = build(case)
            torch.autograd.grad(contender.forward(), contender.leaves, contender.grad)
        except Exception as error:  # whatever a backend or a peer raises here is the answer
            return reason_of(error)
        try:
            with torch.no_grad():
                contender.forward()
        except Exception as error:
            return contender._replace(no_inference=reason_of(error))
    return contender


def reason_of(error: BaseException) -> str:
    """Say in one line why something does not work.

    Args:
        error: that it raised.

    Returns:
        The first line of its message, or what it is; of an error of Dynamo, whose first line names a kind of error
        alone, what the compiled code raised, or else the explanation.

    Example:
        >>> reason_of(ValueError("no.\\nNever.")), reason_of(MemoryError())
        ('no', 'MemoryError')
    """
    of_dynamo = _reason_of_dynamo(error) if type(error).__module__.startswith("torch._dynamo") else ""
    return of_dynamo.rstrip(".") or first_line(error)


def _reason_of_dynamo(error: BaseException) -> str:
    """Return what the last cause of an error says, or its own explanation; "" if there is neither."""
    last = error
    while last.__cause__ is not None:
        last = last.__cause__
    if last is not error and str(last).strip():
        return first_line(last)
    explained = re.search(r"^\s*(?:Explanation:|backend=.* raised:\n)\s*(.+)", str(error), re.MULTILINE)
    return explained[1] if explained else ""
