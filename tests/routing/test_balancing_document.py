"""docs/balancing.md: its Python runs, and its tables say what the code does."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch

from moekit.routing import (
    coefficients,
    heterogeneous,
    importance_losses,
    losses,
    pooled_losses,
    quantile_bias,
    regularizers,
    round_robin,
    sequence_losses,
    top_k,
)
from moekit.routing.coefficients import LossForm, fastmoe_gshard, value_at_balance
from moekit.types import NoisyLogits

TEXT = (Path(__file__).parents[2] / "docs/balancing.md").read_text(encoding="utf-8")
FUNCTIONS = {
    name: function
    for module in (losses, sequence_losses, pooled_losses, heterogeneous, importance_losses, regularizers)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if name.endswith("_loss")
}
K, E, L, W, T = 2, 4, 3, 2, 8


def rows_of(heading: str) -> list[list[str]]:
    section = TEXT.split(f"## {heading}", 1)[1].split("\n## ")[0]
    table = re.search(r"\| (?:function|form) .*\n\| ---.*\n((?:\|.*\n)+)", section)
    assert table
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table[1].splitlines()]


def number(text: str, *, k: int = K) -> float:
    """Read a cell such as ``L / E²``."""
    text = re.sub(r"\b(\w) (\w)\b", r"\1 * \2", text.replace("²", "**2").replace("−", "-"))  # noqa: RUF001
    return eval(
        text.replace("ln E", "log(E)").replace("ln * E", "log(E)"),
        {"log": math.log, "K": k, "E": E, "L": L, "W": W, "η": 1},
    )


def losses_on(name: str, logits: torch.Tensor, k: int) -> float:
    """Compute the loss that a cell such as ``load_balance_loss(choices=1)`` names."""
    function, arguments = re.fullmatch(r"`(\w+)(?:\((.*)\))?`", name).groups()
    routing = top_k(logits, k=k)
    keywords = {"choices=1": {"choices": 1}, "per_token=1": {"per_token": 1}}.get(arguments, {})
    if function == "pooled_balance_loss":
        return FUNCTIONS[function]([logits] * L, [routing] * L).item()
    if function == "weighted_l1_loss":
        routing, keywords = routing._replace(weights=torch.full((T, k), 0.5)), {"k": k}
    seen = NoisyLogits(logits, logits, torch.full_like(logits, 0.1)) if function == "load_loss" else logits
    if arguments == "tokens_per_expert=counts":
        keywords = {"tokens_per_expert": 3 * torch.bincount(routing.expert_indices.flatten(), minlength=E)}
    if function == "sequence_balance_loss":
        keywords = {"sequence_length": E}
    if function == "heterogeneous_balance_loss":
        keywords = {"num_simple": 1, "tau": 0.5}
    return FUNCTIONS[function](seen, routing, **keywords).item()


def test_its_python_runs() -> None:
    blocks, scope = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL), {}
    assert len(blocks) >= 6
    for block in blocks:
        exec(compile(block, "balancing.md", "exec"), scope)


def test_what_depends_on_how_a_step_is_cut_up_is_listed() -> None:
    listed = TEXT.split("**Does the gradient depend", 1)[1].split("**Padding**")[0]
    logits, state = torch.randn(6, E), quantile_bias(k=1)
    halves = logits.chunk(2)
    assert not round_robin(logits, k=1).expert_indices.equal(torch.cat([round_robin(z, k=1)[1] for z in halves]))
    assert "`round_robin`" in listed
    start = state.init(E)
    whole, cut = (sum(state.observe(z, None, start) for z in parts) for parts in ([logits], halves))
    assert not torch.allclose(state.update(start, whole), state.update(start, cut))
    assert "`quantile_bias` (`quantile_moe`, `router:quantile`)" in listed


def test_every_loss_is_in_the_table() -> None:
    named = {re.match(r"`(\w+)", row[0])[1] for row in rows_of("The losses")}
    assert named == set(FUNCTIONS)


@pytest.mark.parametrize("row", rows_of("The losses"), ids=lambda row: row[0])
def test_values_at_balance_and_at_collapse(row: list[str]) -> None:
    # Every token is sure of its first choice and leaves the second to the next expert; loads are equal.
    balanced = (40.0 * torch.eye(E) + 20.0 * torch.eye(E).roll(1, 1)).repeat(T // E, 1)
    k = 1 if "load_loss" in row[0] else K
    if row[0] == "`z_loss`":
        assert losses_on(row[0], torch.zeros(T, E), K) == pytest.approx(math.log(E) ** 2)
        assert row[2] == "(ln E)² at z = 0"
        return
    at_balance = losses_on(row[0], balanced, k)
    if row[0] == "`weighted_l1_loss`":
        assert at_balance == pytest.approx(0.5 * K)  # mean of sum_e g_te
        assert row[2] == "mean of Σ_e g_te"
    elif row[2] == "mean of η":
        assert at_balance == pytest.approx((E - 1 + 0.5) / E)  # one simple expert, tau = 0.5
    else:
        assert at_balance == pytest.approx(number(row[2].split(",")[0]), abs=1e-5)
    collapsed = torch.tensor([[90.0, 40.0, 0.0, 0.0]]).repeat(T, 1)
    for chosen in (1, 2):
        at_collapse = losses_on(row[0], collapsed, chosen)
        if row[0] == "`weighted_l1_loss`":
            assert at_collapse == pytest.approx(E / chosen * (0.5 * chosen))
            assert row[3] == "E / k times that"
        else:
            assert at_collapse == pytest.approx(number(row[3], k=chosen), abs=1e-5)


@pytest.mark.parametrize("row", rows_of("Coefficients"), ids=lambda row: row[1])
def test_forms_at_balance(row: list[str]) -> None:
    name = row[1].strip("`")
    form = fastmoe_gshard(W) if name == "fastmoe_gshard(W)" else getattr(coefficients, name)
    assert value_at_balance(form, k=K, num_experts=E) == pytest.approx(number(row[2]))
    assert value_at_balance(form, k=K, num_experts=E, num_layers=L) == pytest.approx(number(row[3]))


def test_every_form_is_in_the_table() -> None:
    named = {row[1].strip("`") for row in rows_of("Coefficients")}
    forms = {name for name, value in vars(coefficients).items() if isinstance(value, LossForm)}
    assert named == forms | {"fastmoe_gshard(W)"}
