"""What each rank does in the test of transformers' expert parallelism on moekit's experts."""

from typing import Any

import torch
from hf_families import Family, deviations, experts_of, families, run, tiny_model
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers.distributed.expert_parallel import apply_expert_parallelism

from moekit.integrations.transformers import register, track_routing


def compare(world: Any, names: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Spread the experts of families over the ranks, which all hold the same batch, and compare with one process."""
    register()
    by_name = {family.name: family for family in families()}
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("ep",))
    return {name: _compare_ways(by_name[name], mesh) for name in names}


def _compare_ways(family: Family, mesh: DeviceMesh) -> dict[str, dict[str, Any]]:
    expected = run(tiny_model(family), family, "eager")
    return {way: _compare(family, mesh, way, expected) for way in ("all_reduce", "all_to_all")}


def _compare(family: Family, mesh: DeviceMesh, way: str, expected: dict[str, Tensor]) -> dict[str, Any]:
    model = tiny_model(family)
    modules = experts_of(model, family)
    parameters = [f"{path}.{leaf}" for path, module in modules.items() for leaf, _ in module.named_parameters()]
    plan = {**dict.fromkeys(parameters, "grouped_gemm"), **dict.fromkeys(modules, "ep_dispatch_experts")}
    apply_expert_parallelism(model, mesh, mesh, plan, way)
    with track_routing(model) as recorder:
        actual = {key: _whole(value) for key, value in run(model, family, "moekit").items()}
    return {
        "worst": max(deviations(actual, expected).values()),
        "own": [module.num_experts for module in modules.values()],
        "experts": recorder.traces()["expert_indices"].unique().tolist(),
    }


def _whole(value: Tensor) -> Tensor:
    whole = getattr(value, "full_tensor", None)  # a DTensor's
    return torch.as_tensor(value if whole is None else whole())
