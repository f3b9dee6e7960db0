from functools import partial

import pytest
import torch
from torch import Tensor

from moekit.routing import sigmoid, softmax, top_k
from moekit.routing.group_limited import group_limited
from moekit.types import NoisyLogits

T, E, J = 19, 12, 4
FORMS = {
    "DeepSeek-V3": {"k": 4, "groups_kept": 2, "group_top": 2, "score": sigmoid, "normalize": True, "scale": 2.5},
    "Hugging Face": {"k": 4, "groups_kept": 2, "masked": 0.0, "score": sigmoid, "normalize": True, "scale": 2.5},
    "Megatron-LM": {"k": 3, "groups_kept": 3, "group_top": 1, "score": sigmoid, "normalize": True},
    "DeepSeek-V2": {"k": 5, "groups_kept": 3, "group_top": 1, "masked": 0.0, "score": softmax},
    "all of the kept": {"k": 6, "groups_kept": 2, "group_top": 3, "score": sigmoid},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def reference(
    logits: Tensor,
    bias: Tensor,
    *,
    k: int,
    groups_kept: int,
    group_top: int = 2,
    masked: float = -torch.inf,
    score=softmax,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[list[list[int]], Tensor]:
    chosen, weights, size = [], [], E // J
    for z in logits.unbind(0):
        s = torch.exp(z) / torch.exp(z).sum() if score is softmax else 1 / (1 + torch.exp(-z))
        value = (s + bias).tolist()
        group_value = [sum(sorted(value[j * size : (j + 1) * size])[-group_top:]) for j in range(J)]
        best = sorted(range(J), key=lambda j: -group_value[j])[:groups_kept]
        value = [v if e // size in best else masked for e, v in enumerate(value)]
        experts = sorted(range(E), key=lambda e: -value[e])[:k]
        total = sum(s[e] for e in experts) if normalize else 1.0
        chosen.append(experts)
        weights.append(torch.stack([scale * s[e] / total for e in experts]))
    return chosen, torch.stack(weights)


@every_form
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_every_form_follows_its_formula(form: dict, spread: float) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    # Above -0.05 a biased sigmoid of these logits stays positive, so that no tie at a masked 0 can matter.
    bias = torch.rand(E, dtype=torch.float64) * spread
    routing = group_limited(logits, num_groups=J, bias=bias, **form)
    experts, weights = reference(logits, bias, **form)
    assert routing.expert_indices.tolist() == experts
    torch.testing.assert_close(routing.weights, weights, rtol=1e-12, atol=1e-14)
    cotangent = torch.randn(T, form["k"], dtype=torch.float64)
    grads = [torch.autograd.grad((w * cotangent).sum(), logits)[0] for w in (routing.weights, weights)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@every_form
def test_no_more_groups_than_kept(form: dict) -> None:
    used = group_limited(torch.randn(T, E), num_groups=J, **form).expert_indices // (E // J)
    counts = [len(set(row)) for row in used.tolist()]
    assert max(counts) == form["groups_kept"]
    plain = top_k(torch.randn(T, E), k=form["k"]).expert_indices // (E // J)
    assert max(len(set(row)) for row in plain.tolist()) > form["groups_kept"] or form["groups_kept"] == 3


def test_a_negative_bias_lets_a_masked_expert_win_at_zero_and_not_at_minus_infinity() -> None:
    """Experts 0 and 1 are the kept group; the second is worth -0.2 after its bias, less than a masked 0."""
    logits = torch.tensor([[0.9, 0.3, 0.2, 0.2]]).logit()
    bias = torch.tensor([0.0, -0.5, -0.5, -0.5])
    options = {"k": 2, "num_groups": 2, "groups_kept": 1, "score": sigmoid, "bias": bias}
    assert group_limited(logits, **options).expert_indices.tolist() == [[0, 1]]
    assert group_limited(logits, masked=0.0, **options).expert_indices[0, 1] >= 2


def test_what_speaks_for_a_group_matters() -> None:
    logits = torch.tensor([[0.9, 0.1, 0.6, 0.6]]).logit()
    options = {"k": 1, "num_groups": 2, "groups_kept": 1, "score": sigmoid}
    assert group_limited(logits, group_top=1, **options).expert_indices.item() == 0
    assert group_limited(logits, group_top=2, **options).expert_indices.item() in (2, 3)


@pytest.mark.parametrize("k", [1, 3, E])
@pytest.mark.parametrize(("num_groups", "groups_kept"), [(1, 1), (J, J)])
@pytest.mark.parametrize("score", [softmax, sigmoid])
def test_one_group_or_all_of_them_equal_top_k(k: int, num_groups: int, groups_kept: int, score) -> None:
    logits, bias = torch.randn(T, E), torch.randn(E)
    options = {"k": k, "score": score, "normalize": True, "scale": 1.7, "bias": bias}
    limited = group_limited(logits, num_groups=num_groups, groups_kept=groups_kept, **options)
    plain = top_k(logits, **options)
    assert torch.equal(limited.expert_indices, plain.expert_indices)
    assert torch.equal(limited.weights, plain.weights)


def test_every_expert_equals_the_dense_mixture() -> None:
    logits = torch.randn(T, E)
    routing = group_limited(logits, k=E, num_groups=J, groups_kept=J)
    assert torch.equal(torch.zeros_like(logits).scatter(1, routing.expert_indices, routing.weights), softmax(logits))


def test_bias_shifts_the_selection_and_never_the_weights() -> None:
    logits = torch.randn(T, E, requires_grad=True)
    bias = torch.zeros(E).index_fill(0, torch.tensor(E - 1), 100.0).requires_grad_()
    routing = group_limited(logits, k=2, num_groups=J, groups_kept=1, score=sigmoid, bias=bias)
    assert (routing.expert_indices[:, 0] == E - 1).all()
    assert (routing.expert_indices >= E - E // J).all()
    assert torch.equal(routing.weights, sigmoid(logits).gather(1, routing.expert_indices))
    assert torch.autograd.grad(routing.weights.sum(), bias, allow_unused=True) == (None,)


@every_form
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite(form: dict, extreme: float) -> None:
    logits = torch.randn(T, E)
    logits[:, 1] = extreme
    logits[3] = extreme
    logits.requires_grad_()
    routing = group_limited(logits, num_groups=J, **form)
    assert routing.weights.isfinite().all()
    (grad,) = torch.autograd.grad((routing.weights * torch.randn_like(routing.weights)).sum(), logits)
    assert grad.isfinite().all()


@every_form
def test_no_tokens_ties_and_autocast(form: dict) -> None:
    assert group_limited(torch.zeros(0, E), num_groups=J, **form).weights.shape == (0, form["k"])
    for logits in (torch.zeros(T, E), torch.randn(T, E)):
        expected = group_limited(logits, num_groups=J, **form)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = group_limited(logits, num_groups=J, **form)
        assert actual.weights.dtype == torch.float32
        assert torch.equal(actual.expert_indices, expected.expert_indices)
        assert torch.equal(actual.weights, expected.weights)
        assert all(len(set(row)) == form["k"] for row in actual.expert_indices.tolist())


def test_noise_decides() -> None:
    logits, noise = torch.randn(T, E), torch.randn(T, E)
    route = partial(group_limited, k=2, num_groups=J, groups_kept=2)
    noisy = route(NoisyLogits(logits + noise, logits, torch.ones(T, E)))
    assert torch.equal(noisy.weights, route(logits + noise).weights)


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    route = partial(group_limited, num_groups=J, **FORMS["DeepSeek-V3"])
    logits, bias = torch.randn(T, E, requires_grad=True), torch.randn(E)
    expected = route(logits, bias=bias)
    actual = torch.compile(route, fullgraph=True, backend="aot_eager")(logits, bias=bias)
    for a, b in zip(actual[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(r.weights.square().sum(), logits)[0] for r in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_groups": 5},
            r"groups_kept = 2 of num_groups = 5 groups of E = 12 experts; expected num_groups to divide",
        ),
        ({"groups_kept": 5}, r"groups_kept = 5 of num_groups = 4 .*1 <= groups_kept <= num_groups"),
        ({"groups_kept": 0}, r"groups_kept = 0 of num_groups = 4"),
        ({"group_top": 4}, r"group_top = 4 and k = 2, but a group has 3 experts .*1 <= group_top <= 3"),
        (
            {"k": 7},
            r"k = 7, but a group has 3 experts and 2 groups are kept; .*k <= 6. Lower them, .* to 16 or more",
        ),
        ({"k": 13}, r"group_limited: k = 13 experts per token were asked of E = 12"),
    ],
)
def test_errors_say_what_was_given(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_limited(torch.zeros(T, E), **{"k": 2, "num_groups": J, "groups_kept": 2, **options})
