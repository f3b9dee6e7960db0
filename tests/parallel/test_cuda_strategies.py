"""On CUDA, through NCCL, in a group of one rank: strategies, streams, compilation, and no reading of the device."""

import pytest
import torch
import torch.distributed as dist
from waiting import nothing_waits

from moekit.experts import init_gated
from moekit.parallel import all_gather, all_to_all, chunked, static_all_to_all, tensor_parallel
from moekit.recipes import mixtral, openlm
from moekit.routing import top_k

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
T, D, F, E, K = 517, 64, 96, 8, 3


@pytest.fixture(scope="module")
def groups():
    """Two NCCL groups of this process alone: a message to oneself takes the same way as one to others."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD, dist.new_group([0])
    dist.destroy_process_group()


STRATEGIES = {
    "all_to_all": lambda layer, a, b: all_to_all(layer, group=a, return_group=b),
    "static": lambda layer, a, b: static_all_to_all(layer, group=a, capacity_factor=1.0, return_group=b),
    "all_gather": lambda layer, a, b: all_gather(layer, group=a),
    "all_gather, equal": lambda layer, a, b: all_gather(layer, group=a, equal=True),
    "tensor_parallel, equal": lambda layer, a, b: tensor_parallel(layer, group=a, equal=True),
    "ep_tp": lambda layer, a, b: all_to_all(tensor_parallel(layer, group=b), group=a),
    "chunked": lambda layer, a, b: chunked(all_to_all(layer, group=a, return_group=b), num_chunks=2),
    "chunked in 5": lambda layer, a, b: chunked(all_to_all(layer, group=a, return_group=b), num_chunks=5),
    "chunked static": lambda layer, a, b: chunked(
        static_all_to_all(layer, group=a, capacity_factor=1.0, return_group=b), num_chunks=2
    ),
}


def leaves(dtype: torch.dtype) -> list[torch.Tensor]:
    """Draw tokens, logits and parameters."""
    generator = torch.Generator("cuda").manual_seed(0)
    params = init_gated(E, D, F, generator=generator, device="cuda", dtype=dtype)
    drawn = [torch.randn(T, width, device="cuda", generator=generator) for width in (D, E)]
    return [tensor.detach().requires_grad_() for tensor in (drawn[0].to(dtype), drawn[1], *params)]


def outcome(layer, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run a layer and return its output and every gradient."""
    x, logits, *params = (tensor.detach().clone().requires_grad_() for tensor in tensors)
    y = layer(x, top_k(logits, k=K), type(init_gated(1, 1))(*params))
    (y.float() * torch.linspace(-1, 1, D, device="cuda")).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in (x, logits, *params))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_equal_the_plain_layer(groups, name, dtype):
    plain, tensors = mixtral(k=K).layer, leaves(dtype)
    expected = outcome(plain, tensors)
    for _ in range(3):  # memory that a stream gave away too early would come back with other contents
        found = outcome(STRATEGIES[name](plain, *groups), tensors)
        for ours, theirs in zip(found, expected, strict=True):
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            assert error < (2e-2 if dtype == torch.bfloat16 else 2e-3)
            torch.empty(4096, 4096, device="cuda").fill_(torch.nan)


@pytest.mark.parametrize("name", ["static", "all_gather, equal", "tensor_parallel, equal"])
@pytest.mark.parametrize("recipe", [mixtral(k=K), openlm(k=K)], ids=["dropless", "capacity"])
def test_nothing_reads_the_device(groups, name, recipe):
    layer, tensors = STRATEGIES[name](recipe.layer, *groups), leaves(torch.bfloat16)
    params = recipe.init(E, D, F, device="cuda", dtype=torch.bfloat16)
    routing = top_k(tensors[1], k=K)
    layer(tensors[0], routing, params).float().sum().backward()  # the first call may set libraries up
    routing = top_k(tensors[1], k=K)
    with nothing_waits():
        layer(tensors[0], routing, params).float().sum().backward()


def test_the_static_exchange_compiles_into_one_graph(groups):
    torch.compiler.reset()
    plain, tensors = mixtral(k=K).layer, leaves(torch.bfloat16)
    expected = outcome(plain, tensors)
    compiled = torch.compile(STRATEGIES["static"](plain, *groups), fullgraph=True)
    found = outcome(compiled, tensors)
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 4e-2


def test_slices_take_two_streams_in_turn(groups):
    used = []

    def layer(x, routing, params):
        used.append(torch.cuda.current_stream().cuda_stream)
        return x

    x, routing = torch.ones(T, D, device="cuda"), top_k(torch.zeros(T, E, device="cuda"), k=K)
    y = chunked(layer, num_chunks=4)(x, routing, None)
    assert used[0] == used[2] != used[1] == used[3]
    assert torch.cuda.current_stream().cuda_stream not in used
    assert torch.equal(y, x)
