"""Other projects' MoE layers as rows of the benchmark. None is needed: a row says why it is missing.

Peers are imported by name when they are measured; nothing else of moekit knows of them.
"""

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moekit.recipes.bench.rows import Build, Case, Contender, need_cuda
from moekit.routing import linear_gate


def peer_rows() -> Mapping[str, Build]:
    """List the peers.

    Returns:
        Name to what builds the row, which raises if the peer is not installed or does not run here.

    Example:
        >>> list(peer_rows())[0]
        'transformers eager'
    """
    rows: dict[str, Build] = {
        f"transformers {name}": partial(_transformers, implementation=name)
        for name in ("eager", "batched_mm", "grouped_mm", "moekit")
    }
    return {**rows, "scattermoe": _scattermoe, "megablocks": _megablocks, "sonicmoe": _sonicmoe, "liger": _liger}


_BATCHED_LIMIT = 4 * 2**30  # bytes of copied experts; beyond, a round takes minutes, or does not fit
_OURS = "moekit benchmark"  # in transformers' table, so that a user's own "moekit" stays what it is


def _transformers(case: Case, *, implementation: str) -> Contender:
    shape = case.shape
    copies = 3 * shape.rows * shape.dim * shape.hidden * case.x.element_size()
    if implementation == "batched_mm" and copies > _BATCHED_LIMIT:
        raise RuntimeError(f"it copies an expert for every row, {copies / 2**30:.0f} GiB here")
    importlib.import_module("transformers")  # whose absence is then the message, not that of a part
    if implementation == "moekit":
        implementation = _OURS
        importlib.import_module("moekit.integrations.transformers").register(_OURS)  # by name, as every peer
    modeling = importlib.import_module("transformers.models.olmoe.modeling_olmoe")
    configuration = importlib.import_module("transformers.models.olmoe.configuration_olmoe")
    config = configuration.OlmoeConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.k,
        norm_topk_prob=False,
    )
    config._experts_implementation = implementation
    with torch.device(case.x.device):
        block = modeling.OlmoeSparseMoeBlock(config).to(case.x.dtype)
    gate, up, down = (w.detach().transpose(1, 2) for w in case.experts)
    with torch.no_grad():
        block.gate.weight.copy_(case.gate.T)
        block.experts.gate_up_proj.copy_(torch.cat([gate, up], 1))
        block.experts.down_proj.copy_(down)
    block.gate.register_forward_hook(partial(_load, case=case))
    x = case.x.detach().unsqueeze(0).requires_grad_()
    return Contender(lambda: block(x), [x, *block.parameters()], case.grad.unsqueeze(0))


def _load(gate: Any, inputs: tuple[Tensor, ...], output: Any, *, case: Case) -> Any:
    """Give a peer's router the load of the case; a uniform load leaves it as it is."""
    if case.load == "uniform":
        return output
    logits, _, _ = output
    weights, experts = (logits.float() + case.offsets).softmax(-1).topk(case.shape.k, dim=-1)
    return logits, weights.to(logits.dtype), experts


def _scattermoe(case: Case) -> Contender:
    mlp = importlib.import_module("scattermoe.mlp")
    need_cuda(case.x)
    s = case.shape
    with torch.device(case.x.device):
        layer = mlp.GLUMLP(s.dim, s.hidden, s.experts, s.k, activation=torch.nn.SiLU()).to(case.x.dtype)
    return _routed(case, lambda x, weights, experts: layer(x, weights, experts), list(layer.parameters()))


def _megablocks(case: Case) -> Contender:
    layers = importlib.import_module("megablocks.layers.dmoe")
    arguments = importlib.import_module("megablocks.layers.arguments")
    need_cuda(case.x)
    _need_uniform(case)
    s = case.shape
    settings = arguments.Arguments(
        hidden_size=s.dim,
        ffn_hidden_size=s.hidden,
        moe_num_experts=s.experts,
        moe_top_k=s.k,
        activation_fn=torch.nn.functional.silu,
        mlp_type="glu",
        mlp_impl="grouped",
        bias=False,
        return_bias=False,
        device=case.x.device,
    )
    layer = layers.dMoE(settings).to(case.x.dtype)
    x = case.x.detach().unsqueeze(1).requires_grad_()
    return Contender(lambda: layer(x)[0], [x, *layer.parameters()], case.grad.unsqueeze(1))


def _sonicmoe(case: Case) -> Contender:
    package = importlib.import_module("sonicmoe")
    enums = importlib.import_module("sonicmoe.enums")
    need_cuda(case.x)
    _need_uniform(case)
    s = case.shape
    layer = package.MoE(
        num_experts=s.experts,
        num_experts_per_tok=s.k,
        hidden_size=s.dim,
        intermediate_size=s.hidden,
        activation_function=enums.ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    ).to(case.x)
    x = case.x.detach().requires_grad_()
    return Contender(lambda: layer(x)[0], [x, *layer.parameters()], case.grad)


def _liger(case: Case) -> Contender:
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    need_cuda(case.x)
    gate, up, down = (w.detach().transpose(1, 2) for w in case.experts)
    gate_up, down = torch.cat([gate, up], 1).requires_grad_(), down.contiguous().requires_grad_()
    return _routed(
        case,
        lambda x, weights, experts: function.apply(x, gate_up, down, experts.to(torch.int32), weights),
        [gate_up, down],
    )


def _routed(case: Case, experts: Any, parameters: list[Tensor]) -> Contender:
    """Put moekit's gate and router before a peer that has experts alone."""
    x, gate = case.x, case.gate

    def forward() -> Tensor:
        routing = case.route(linear_gate(x, gate))
        y: Tensor = experts(x, routing.weights.to(x.dtype), routing.expert_indices)
        return y

    return Contender(forward, [x, gate, *parameters], case.grad)


def _need_uniform(case: Case) -> None:
    if case.load != "uniform":
        raise RuntimeError(f"it routes by itself, and a load cannot be given to it: {case.load}")
