"""Gated and two-matrix experts with biases against loops over rows: output and every gradient by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.experts import batched, grouped, init_biased_gated, loop
from moekit.experts.biased import BiasedMlpParams, biased_gated, biased_mlp, init_biased_mlp
from moekit.types import Groups

EXPERTS, DIM, HIDDEN = 4, 6, 7
EQUAL = Groups(torch.full((EXPERTS,), 3, dtype=torch.int32), 3)
UNEQUAL = Groups(torch.tensor([4, 0, 1, 7], dtype=torch.int32), None)


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def gated_row(x: Tensor, params: Any, e: int, f: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = x @ params.gate[e] + params.gate_bias[e, 0], x @ params.up[e] + params.up_bias[e, 0]
    return (f(gate) * up) @ params.down[e] + params.down_bias[e, 0]


def mlp_row(x: Tensor, params: Any, e: int, f: Callable[[Tensor], Tensor]) -> Tensor:
    return f(x @ params.up[e] + params.up_bias[e, 0]) @ params.down[e] + params.down_bias[e, 0]


NETWORKS = {
    "swiglu": (biased_gated, gated_row, lambda a: a / (1 + torch.exp(-a)), init_biased_gated),
    "geglu": (partial(biased_gated, activation=F.gelu), gated_row, F.gelu, init_biased_gated),
    "gelu": (biased_mlp, mlp_row, partial(F.gelu, approximate="tanh"), init_biased_mlp),
    "relu2": (partial(biased_mlp, activation=squared_relu), mlp_row, squared_relu, init_biased_mlp),
}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("groups", "matmul"), [(EQUAL, batched), (EQUAL, grouped), (UNEQUAL, loop), (UNEQUAL, grouped)]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_output_and_gradients_are_those_of_the_loop(name: str, groups: Groups, matmul: Any) -> None:
    network, row, f, init = NETWORKS[name]
    params = init(EXPERTS, DIM, HIDDEN, dtype=torch.float64)
    params = type(params)(*(torch.randn_like(p).requires_grad_() for p in params))
    owners = torch.arange(EXPERTS).repeat_interleave(groups.sizes).tolist()
    rows = torch.randn(len(owners), DIM, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([row(x, params, e, f) for x, e in zip(rows, owners, strict=True)])
    y = network(rows, groups, params, matmul=matmul)
    torch.testing.assert_close(y, expected)
    leaves, cotangent = [rows, *params], torch.randn_like(y)
    found, wanted = (torch.autograd.grad(each, leaves, cotangent) for each in (y, expected))
    for part, one, other in zip(("rows", *params._fields), found, wanted, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, part=part: f"{part}\n{text}")


def test_init_draws_matrices_and_zeroes_biases() -> None:
    params, again = (init_biased_mlp(3, 64, std=0.5, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert [tuple(p.shape) for p in params] == [(3, 64, 256), (3, 256, 64), (3, 1, 256), (3, 1, 64)]
    for name, p, same in zip(params._fields, params, again, strict=True):
        assert torch.equal(p, same)
        assert p.std().item() == (0 if name.endswith("bias") else pytest.approx(0.5, rel=0.05)), name


def test_a_bias_of_another_shape_says_how_to_mend_it() -> None:
    params = init_biased_mlp(EXPERTS, DIM, HIDDEN)
    unfit = BiasedMlpParams(*params[:2], params.up_bias.squeeze(1), params.down_bias)
    with pytest.raises(ValueError, match=r"bias \(4, 7\); expected \(E, D, F\) and \(E, 1, F\).*bias.unsqueeze\(1\)"):
        biased_mlp(torch.zeros(12, DIM), EQUAL, unfit, matmul=loop)
