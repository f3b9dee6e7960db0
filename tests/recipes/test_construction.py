"""A model is built for any recipe; what ranks need to know of it is asked where there are ranks."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moekit.parallel import one_process
from moekit.recipes import Recipe
from moekit.recipes.configuration import parse_settings
from moekit.recipes.construction import make_model
from moekit.recipes.expert_parameters import hidden_axes
from moekit.routing import linear_gate, top_k


class ScaleParams(NamedTuple):
    scale: Tensor


def init_scale(num_experts, dim, hidden=None, *, generator=None, device=None, dtype=None):
    return ScaleParams(torch.ones(num_experts, dim, 1, device=device, dtype=dtype))


def scaled() -> Recipe:
    """Compose experts that have no hidden dimension: each multiplies a token by a vector."""

    def route(logits, *, bias=None):
        return top_k(logits, k=1)

    def layer(x, routing, params):
        return x * params.scale[routing.expert_indices[:, 0], :, 0] * routing.weights

    return Recipe(linear_gate, route, layer, init=init_scale)


def test_experts_without_a_hidden_axis_train_on_one_process():
    words = ["--model", "moekit_tiny", "--precision", "fp32", "--recipe", f"{__file__}:scaled"]
    model, _, _ = make_model(parse_settings(words, prog="test"), one_process())
    model(torch.zeros(1, 4, dtype=torch.int64)).logits.logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_ranks_cannot_share_experts_without_a_hidden_axis():
    with pytest.raises(ValueError, match=r"'scale' has shape \(1, 64, 1\) .* expected exactly one axis"):
        hidden_axes(init_scale, 64, 1)
