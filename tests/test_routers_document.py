"""docs/routers.md: its Python runs, and its table names what the library has."""

import re
from functools import partial
from pathlib import Path

from moekit import dispatch, experts, parallel, routing
from moekit.recipes.audits import audit
from moekit.recipes.names import find_recipe

TEXT = (Path(__file__).parents[1] / "docs/routers.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `")]
HELPERS = {
    "token_choice",
    "weights_at",
    "hash_table",
    "expert_capacity",
    "round_tokens",
    "moved_mass",
    "without_simple",
}


def test_its_python_runs():
    scope: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/routers.md", "exec"), scope)


def test_its_names_exist_and_no_router_is_missing():
    named = {name for row in ROWS for name in re.findall(r"`(\w+)`", row[0])}
    assert all(hasattr(routing, name) for name in named)
    start, end = routing.__all__.index("top_k"), routing.__all__.index("load_balance_loss")
    scores = {"softmax", "sigmoid", "sqrt_softplus", "softmax_over_tokens", "mask_tokens", "mask_soft"}
    assert set(routing.__all__[start:end]) - named <= scores | HELPERS


def test_every_stage_says_whether_it_is_causal_waits_and_is_deterministic():
    """Contract 12 of the design: of routers, plans, dispatchers, matmuls, expert layers and strategies."""
    rows = {name for row in ROWS for name in re.findall(r"`(\w+)`", row[0])}
    of_routing = [getattr(routing, name) for name in sorted(rows | {"mask_tokens", "mask_soft"})]
    plans = [dispatch.by_position, dispatch.by_choice, dispatch.by_weight, dispatch.padded_plan, dispatch.dropless_plan]
    strategies = [parallel.all_to_all, parallel.static_all_to_all, parallel.all_gather, parallel.tensor_parallel]
    strategies += [parallel.chunked, parallel.in_order, parallel.plan_together, parallel.static_routing]
    silent = [
        (stage.__name__, word)
        for stage in [*of_routing, *plans, experts.fused_layer, *strategies]
        for word in ("ausal", "ynchronis|waits|Reads the device", "eterministic")
        if not re.search(word, stage.__doc__ or "")
    ]
    assert not silent
    knowing_no_tokens = (experts.loop, experts.batched, experts.grouped, experts.triton)
    for each in (*knowing_no_tokens, dispatch.gather_rows, dispatch.scatter_rows):
        assert re.search(r"ynchronis.*eterministic", each.__doc__ or "", re.DOTALL), each.__name__


def test_its_word_on_causality_is_what_interventions_find():
    by_name = {re.findall(r"`(\w+)`", row[0])[0]: row[3] == "yes" for row in ROWS if "behind" not in row[0]}
    routes = {
        "expert_choice": partial(routing.expert_choice, capacity_factor=2.0),
        "group_limited": partial(routing.group_limited, k=2, num_groups=4, groups_kept=2),
        "relu_choice": routing.relu_choice,
        "token_rounding": routing.token_rounding(partial(routing.top_k, k=2), tile=8),
        "top_p": partial(routing.top_p, p=0.5),
        "threshold": partial(routing.threshold, threshold=0.6),
        "topology_limited": partial(routing.topology_limited, k=2, num_nodes=2, node=0),
    }
    audited = {name: routes.get(name) or partial(getattr(routing, name), k=2) for name in by_name if name[:4] != "hash"}
    audited = {name: route for name, route in audited.items() if name != "random_choice"}
    assert len(audited) > 9
    for name, route in audited.items():
        assert routing.causality(route, num_experts=8).leaks != by_name[name], name
    assert not audit(find_recipe("hash_layer", vocab_size=64), 8).leaks
    assert by_name["hash_choice"]
