"""Each family's recipe against its formulas, as loops in float64: output, losses, every gradient; and its numbers."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import reference
import torch
from torch import Tensor

from moekit.experts import batched
from moekit.recipes import MoE, Recipe, weighted_sum
from moekit.recipes.families import dbrx, gpt_oss, granite_moe, jamba, phi_moe, qwen2_moe, qwen3_moe
from moekit.recipes.sigmoid_families import deepseek_v2, deepseek_v3, ernie_moe, llama4, longcat_flash, nemotron_moe

B, S, D, F, E = 2, 9, 7, 5, 6
T = B * S


def limited(scores: Tensor, k: int, *, groups: int, kept: int, top: int) -> list[int]:
    """DeepSeek's choice: groups by the sum of their ``top`` best, then the best experts of the best groups."""
    size = len(scores) // groups
    members = [list(range(j * size, (j + 1) * size)) for j in range(groups)]
    worth = [sum(sorted((float(scores[e]) for e in experts), reverse=True)[:top]) for experts in members]
    best = sorted(range(groups), key=lambda j: -worth[j])[:kept]
    return sorted((e for j in best for e in members[j]), key=lambda e: -float(scores[e]))[:k]


def stands_out(z: Tensor, taken: list[int], eps: float) -> tuple[list[int], int]:
    """SparseMixer-v2's mask: which experts stay in the next choice, and the best of them."""
    left = [e for e in range(len(z)) if e not in taken]
    best = max(left, key=lambda e: float(z[e]))
    m = float(z[best])
    return [e for e in left if (m - float(z[e])) / max(abs(float(z[e])), m) <= 2 * eps], best


def mixer_choice(z: Tensor, k: int, *, eps: float) -> list[int]:
    taken: list[int] = []
    for _ in range(k):
        taken.append(stands_out(z, taken, eps)[1])
    return taken


def mixer_weights(z: Tensor, experts: list[int], *, eps: float) -> list[Tensor]:
    weights = []
    for i, e in enumerate(experts):
        stay, _ = stands_out(z.detach(), experts[:i], eps)
        weights.append(torch.exp(z[e]) / sum(torch.exp(z[j]) for j in stay))
    return weights


def clamped_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
    a, u = x @ gate + biases[0][0], x @ up + biases[1][0]
    a = torch.where(a > 0.9, 0.9, a)
    u = torch.where(u.abs() > 0.9, 0.9 * u.sign(), u)
    return (a * reference.sigmoid(1.5 * a) * (u + 1)) @ down + biases[2][0]


def outside(weight: Tensor, x: Tensor, ffn: Callable, params: list[Tensor]) -> Tensor:
    return weight * ffn(x, *params)


def inside(weight: Tensor, x: Tensor, ffn: Callable, params: list[Tensor]) -> Tensor:
    return ffn(weight * x, *params)


def hugging_face_balance(logits: Tensor, routed: list[reference.Assignment], *, k: int) -> Tensor:
    return k * reference.load_balance(logits, routed)


def of_sequences(logits: Tensor, routed: list[reference.Assignment], *, score: Callable = reference.softmax) -> Tensor:
    losses = []
    for b in range(B):
        own = [a for a in routed if a.token // S == b]
        losses.append(reference.load_balance(logits[b * S : (b + 1) * S], own, score=score))
    return sum(losses) / B


class Method(NamedTuple):
    """The formulas of a family: its choice from (scores, bias), its weights, and what it does with them."""

    recipe: Recipe
    k: int
    weigh: Callable
    balance: Callable
    coefficients: dict[str, float]
    choose: Callable = staticmethod(lambda z, bias, k: reference.best(z, k))
    ffn: Callable = reference.swiglu
    apply: Callable = outside


def sums_to(scale: float, score: Callable = reference.softmax) -> Callable:
    return partial(reference.weights_at, score=score, normalize=True, scale=scale)


def biased_sigmoid(z: Tensor, bias: Tensor, k: int, **groups: int) -> list[int]:
    return limited(reference.sigmoid(z) + bias, k, **groups)


HF = {"load_balance": 0.001}
NO_LIMIT = {"groups": 1, "kept": 1, "top": 2}
METHODS = {
    "qwen2_moe": Method(qwen2_moe(k=3, num_shared=2), 3, reference.weights_at, partial(hugging_face_balance, k=3), HF),
    "qwen2_moe normalized, ungated": Method(
        qwen2_moe(k=3, num_shared=1, normalize=True, shared_gated=False),
        3,
        sums_to(1.0),
        partial(hugging_face_balance, k=3),
        HF,
    ),
    "qwen3_moe": Method(qwen3_moe(k=4), 4, sums_to(1.0), partial(hugging_face_balance, k=4), HF),
    "gpt_oss": Method(
        gpt_oss(k=3, alpha=1.5, limit=0.9),
        3,
        reference.softmax_over_chosen,
        partial(hugging_face_balance, k=3),
        HF,
        ffn=clamped_swiglu,
    ),
    "granite_moe": Method(granite_moe(k=3), 3, reference.softmax_over_chosen, partial(hugging_face_balance, k=3), HF),
    "granite_moe shared": Method(
        granite_moe(k=2, num_shared=2), 2, reference.softmax_over_chosen, partial(hugging_face_balance, k=2), HF
    ),
    "phi_moe": Method(
        phi_moe(eps=0.3, training=False),
        2,
        partial(mixer_weights, eps=0.3),
        partial(hugging_face_balance, k=2),
        HF,
        choose=lambda z, bias, k: mixer_choice(z, k, eps=0.3),
    ),
    "jamba": Method(jamba(), 2, reference.weights_at, partial(hugging_face_balance, k=2), HF),
    "dbrx": Method(dbrx(), 4, sums_to(1.0), partial(hugging_face_balance, k=4), {"load_balance": 0.01}),
    "deepseek_v2": Method(
        deepseek_v2(k=2, num_groups=3, groups_kept=2, num_shared=2, scale=16.0),
        2,
        partial(reference.weights_at, scale=16.0),
        of_sequences,
        {"load_balance": 0.003},
        choose=lambda z, bias, k: limited(z, k, groups=3, kept=2, top=1),
    ),
    "deepseek_v3": Method(
        deepseek_v3(k=3, num_groups=3, groups_kept=2),
        3,
        sums_to(2.5, reference.sigmoid),
        partial(of_sequences, score=reference.sigmoid),
        {"load_balance": 0.0001},
        choose=partial(biased_sigmoid, groups=3, kept=2, top=2),
    ),
    "llama4": Method(
        llama4(),
        1,
        partial(reference.weights_at, score=reference.sigmoid),
        partial(hugging_face_balance, k=1),
        HF,
        apply=inside,
    ),
    "ernie_moe": Method(
        ernie_moe(k=3),
        3,
        sums_to(1.0),
        reference.load_balance,
        {},
        choose=lambda z, bias, k: reference.best(reference.softmax(z) + bias, k),
    ),
    "longcat_flash": Method(
        longcat_flash(k=3, zero_experts=4),
        3,
        partial(reference.weights_at, scale=6.0),
        reference.load_balance,
        {},
        choose=lambda z, bias, k: reference.best(reference.softmax(z) + bias, k),
    ),
    "nemotron_moe": Method(
        nemotron_moe(k=3),
        3,
        sums_to(2.5, reference.sigmoid),
        partial(of_sequences, score=reference.sigmoid),
        {"load_balance": 0.0001},
        choose=partial(biased_sigmoid, **NO_LIMIT),
        ffn=reference.relu2,
    ),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def build(recipe: Recipe) -> MoE:
    moe = MoE(D, E, recipe, hidden=F, dtype=torch.float64)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-2] ** -0.5 if parameter.ndim > 1 else 0.5)
    if moe.state is not None:
        moe.bias = 0.1 * torch.randn_like(moe.state, dtype=torch.float64)
    return moe


def by_the_formulas(method: Method, moe: MoE, x: Tensor) -> tuple[Tensor, Tensor, list[reference.Assignment]]:
    params, tokens = moe.params(), x.flatten(0, 1)
    logits = tokens @ params.gate if isinstance(params.gate, Tensor) else tokens @ params.gate.w + params.gate.b
    choose = lambda z, t: method.choose(z.detach(), moe.state, method.k)  # noqa: E731
    routed = reference.route(logits, choose, method.weigh)
    y = [torch.zeros(D, dtype=x.dtype) for _ in tokens]
    for a in routed:
        token = tokens[a.token]
        own = [w[a.expert] for w in params.experts] if a.expert < E else None
        part = a.weight * token if own is None else method.apply(a.weight, token, method.ffn, own)
        y[a.token] = y[a.token] + part
    if params.shared is not None:
        for t, token in enumerate(tokens):
            gate = 1.0 if params.shared_gate is None else reference.sigmoid(token @ params.shared_gate)
            y[t] = y[t] + gate * method.ffn(token, *(w[0] for w in params.shared))
    return torch.stack(y).view_as(x), method.balance(logits, routed), routed


@pytest.mark.usefixtures("poison")
@every_method
def test_output_losses_and_gradients_follow_the_formulas(method: Method) -> None:
    moe, x = build(method.recipe), torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    output = moe(x)
    y, balance, routed = by_the_formulas(method, moe, x)
    assert output.routing.expert_indices.flatten().tolist() == [a.expert for a in routed]
    torch.testing.assert_close(output.y, y)
    assert set(output.losses) == {"load_balance"}
    torch.testing.assert_close(output.losses["load_balance"], balance)
    assert dict(method.recipe.coefficients) == method.coefficients
    leaves = {"x": x, **dict(moe.named_parameters())}
    cotangent, weight = torch.randn_like(x), method.coefficients.get("load_balance", 0.0)
    total = (output.y * cotangent).sum() + weighted_sum(output.losses, method.recipe.coefficients)
    grads = torch.autograd.grad(total, list(leaves.values()))
    wanted = torch.autograd.grad((y * cotangent).sum() + weight * balance, list(leaves.values()))
    for name, grad, want in zip(leaves, grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, msg=lambda text, n=name: f"{n}\n{text}")


@every_method
def test_nothing_before_a_changed_token_changes(method: Method) -> None:
    assert method.recipe.causal
    for seed in range(5):
        torch.default_generator.manual_seed(seed)
        moe, x = build(method.recipe), torch.randn(1, T, D, dtype=torch.float64)
        changed = torch.cat([x[:, : 2 + seed], 3 * torch.randn(1, T - 2 - seed, D, dtype=torch.float64)], 1)
        before, after = (moe(tokens).y[:, : 2 + seed] for tokens in (x, changed))
        torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@every_method
def test_balancing_loss_when_all_logits_are_equal(method: Method) -> None:
    moe = build(method.recipe)
    with torch.no_grad():
        for tensor in [moe.gate] if isinstance(moe.gate, Tensor) else moe.gate.values():
            tensor.zero_()
    per_token = getattr(method.recipe.losses["load_balance"], "keywords", {}).get("per_token")
    loss = moe(torch.randn(B, S, D, dtype=torch.float64)).losses["load_balance"].item()
    assert loss == pytest.approx(1.0 if per_token is None else method.k)


def test_phi_draws_in_training_and_not_in_evaluation() -> None:
    x = torch.randn(B, S, D, dtype=torch.float64)
    evaluating, drawing = build(phi_moe(eps=0.5, training=False)), build(phi_moe(eps=0.5))
    assert torch.equal(evaluating(x).routing.expert_indices, evaluating(x).routing.expert_indices)
    assert not torch.equal(drawing(x).routing.expert_indices, drawing(x).routing.expert_indices)


def test_defaults_are_those_of_the_papers() -> None:
    for recipe, k in (
        (qwen2_moe(), 8),
        (qwen3_moe(), 8),
        (gpt_oss(), 4),
        (granite_moe(), 8),
        (jamba(), 2),
        (dbrx(), 4),
    ):
        assert recipe.route.keywords["k"] == k
    assert deepseek_v2().route.keywords["num_groups"] == 8
    assert deepseek_v2().route.keywords["groups_kept"] == 3
    assert deepseek_v2().shared.number == 2
    assert deepseek_v3().route.keywords["groups_kept"] == 4
    assert deepseek_v3().state.update.keywords["rate"] == 0.001
    assert longcat_flash().simple.number == 256


@pytest.mark.parametrize("make", [deepseek_v3, ernie_moe, longcat_flash, nemotron_moe])
def test_without_a_rate_there_is_no_state(make: Callable[..., Recipe]) -> None:
    assert make(bias_rate=0.0).state is None
    assert make(bias_rate=0.25).state.update.keywords["rate"] == 0.25


@pytest.mark.parametrize("make", [qwen2_moe, granite_moe, deepseek_v2, deepseek_v3, llama4, ernie_moe, nemotron_moe])
def test_shared_experts_can_be_left_out(make: Callable[..., Recipe]) -> None:
    recipe = make(num_shared=0)
    assert recipe.shared is None
    assert MoE(D, E, recipe, hidden=F).params().shared is None


def test_qwen_weighs_its_shared_experts() -> None:
    assert MoE(D, E, qwen2_moe(), hidden=F).params().shared_gate.shape == (D, 1)
    assert MoE(D, E, qwen2_moe(shared_gated=False), hidden=F).params().shared_gate is None


def test_longcat_without_zero_experts_has_none() -> None:
    assert longcat_flash(zero_experts=0).simple is None


@pytest.mark.parametrize(
    "make", [qwen2_moe, qwen3_moe, gpt_oss, granite_moe, phi_moe, jamba, dbrx, llama4, ernie_moe, nemotron_moe]
)
def test_the_backend_reaches_the_experts(make: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match="no common capacity"):
        build(make(k=2, matmul=batched))(torch.randn(T, D, dtype=torch.float64))
