"""FLOP counters know moekit's operators: every one with products has a formula."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moekit
from moekit import MoE
from moekit.dispatch import dropless
from moekit.experts import loop, swiglu
from moekit.integrations.flop_counter import _FORMULAS, register
from moekit.recipes import expert_layer, mixtral
from moekit.recipes.backends import auto
from moekit.routing import _half_gates, linear_gate

WITHOUT_PRODUCTS = {
    "fused_plan", "fused_top_k", "fused_top_k_backward", "heaviest", "besides",
    "copied_rows", "summed_rows", "weigh_rows_backward",
    "counting_sort", "tokens_per_expert", "first_of_groups", "rows_of_assignments",
}  # fmt: skip


def test_every_operator_has_a_formula_or_no_products() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(moekit.__file__).parent.rglob("*.py")]
    declared = re.compile(r'^@(?:operator\("|torch\.library\.custom_op\("moekit::)(\w+)"', re.MULTILINE)
    names = {name for source in sources for name in declared.findall(source)}
    assert len(names) > 15
    assert names == WITHOUT_PRODUCTS | _FORMULAS.keys()


def test_a_formula_that_somebody_else_has_registered_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = {torch.ops.moekit.fused_cpu: "theirs"}
    monkeypatch.setattr(torch.utils.flop_counter, "flop_registry", registry)
    register()
    register()
    assert registry[torch.ops.moekit.fused_cpu] == "theirs"
    assert torch.ops.moekit.fused_cpu_backward in registry


def test_nothing_is_registered_by_an_import_alone() -> None:
    program = (
        "import moekit.integrations.flop_counter, torch.utils.flop_counter as counter\n"
        "import torch; assert torch.ops.moekit.fused_cpu not in counter.flop_registry"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_torchs_grouped_product_is_counted_too() -> None:
    register()
    rows, w = torch.ones(16, 32, dtype=torch.bfloat16), torch.ones(3, 32, 24, dtype=torch.bfloat16)
    ends, out = torch.tensor([4, 8, 16], dtype=torch.int32), torch.ones(16, 24, dtype=torch.bfloat16)
    for left, right in ((rows, w), (rows.T.contiguous(), out), (w.transpose(1, 2), rows.T)):
        with FlopCounterMode(display=False) as counter:
            torch._grouped_mm(left, right, offs=ends)
        assert counter.get_total_flops() == 2 * 16 * 32 * 24
    sizes = torch.tensor([4, 4, 8])  # as compiled in dtypes that compilers refuse
    for left, right in ((rows.float(), w.float()), (rows.float().T, out.float())):
        with FlopCounterMode(display=False) as counter:
            torch.ops.moekit.grouped_mm(left, right, sizes)
        assert counter.get_total_flops() == 2 * 16 * 32 * 24


def test_a_whole_layer_counts_what_the_loop_does() -> None:
    register()
    layers = auto(), expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=loop))
    found = []
    for layer in layers:
        moe = MoE(8, 4, mixtral(k=2)._replace(layer=layer), hidden=16)
        with FlopCounterMode(display=False) as counter:
            moe(torch.ones(6, 8, requires_grad=True)).y.sum().backward()
        found.append(counter.get_total_flops())
    assert found == [18 * 6 * 2 * 8 * 16 + 6 * 6 * 8 * 4] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_for_bfloat16_counts_as_one_of_float32(dtype: torch.dtype) -> None:
    register()
    found = []
    for gate, kind in ((_half_gates.logits, torch.bfloat16), (linear_gate, torch.float32)):
        x, w = torch.ones(6, 8, dtype=kind, requires_grad=True), torch.ones(8, 4, dtype=dtype, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            z = gate(x, w)
        with FlopCounterMode(display=False) as backward:
            z.sum().backward()
        found.append((forward.get_total_flops(), backward.get_total_flops()))
    assert found == [(2 * 6 * 8 * 4, 4 * 6 * 8 * 4)] * 2
