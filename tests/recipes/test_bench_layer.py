import io
import json
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from moekit.dispatch import dropless
from moekit.experts import GatedParams, fused_cpu, loop
from moekit.experts.tile_files import layer_tiles, table_text
from moekit.experts.tile_tables import from_table
from moekit.experts.tiles import LayerSize
from moekit.recipes.bench import layer as module
from moekit.recipes.bench import program
from moekit.recipes.bench import rows as row_module
from moekit.recipes.bench.devices import device_of
from moekit.recipes.bench.fused_stages import fused_stages
from moekit.recipes.bench.layer import Report, Row, Table, bench_layer, row_of
from moekit.recipes.bench.peers import peer_rows
from moekit.recipes.bench.rows import Case, Contender, loads_of, make_case, moekit_rows, reason_of, try_build
from moekit.recipes.bench.shapes import CPU_SHAPES, GPU_SHAPES, LOADS, LayerShape, load_offsets, shape_of
from moekit.recipes.bench.stages import Stage, shares
from moekit.recipes.bench.tables import (
    HEADINGS,
    as_json,
    as_markdown,
    notes_of,
    print_report,
    rows_of,
    stages_of,
    title,
)
from moekit.recipes.bench.times import Memory, Round, measure_memory, run_once
from moekit.recipes.cli import main
from moekit.routing import linear_gate
from moekit.segments import tokens_per_expert
from moekit.types import Groups, Routing

SMALL = LayerShape("small", 64, 16, 24, 8, 2)
RUNNING = [
    "loop",
    "grouped",
    "batched, padded",
    "fused_cpu",
    "auto",
    "transformers eager",
    "transformers batched_mm",
    "transformers grouped_mm",
    "transformers moekit",
]


def case(load: str = "uniform", shape: LayerShape = SMALL, **options):
    return make_case(shape, load, **{"device": "cpu", "dtype": torch.float32, **options})


def test_shapes_are_those_of_the_published_models() -> None:
    assert GPU_SHAPES["olmoe-1b-7b"][1:] == (16384, 2048, 1024, 64, 8)
    assert GPU_SHAPES["mixtral-8x7b"][1:] == (8192, 4096, 14336, 8, 2)
    assert GPU_SHAPES["olmoe-1b-7b"].flops == 6 * 16384 * 8 * 2048 * 1024
    assert shape_of("cpu-8") == CPU_SHAPES["cpu-8"]
    assert shape_of("1,2,3,4,2") == LayerShape("1,2,3,4,2", 1, 2, 3, 4, 2)


@pytest.mark.parametrize("text", ["olmo", "1,2,3,4", "1,2,3,4,x", "1.5,2,3,4,2"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is neither T,D,F,E,K, five whole numbers, nor one of olmoe-1b-7b, sonic"):
        shape_of(text)


@pytest.mark.parametrize("text", ["0,2,3,4,2", "1,2,3,4,5"])
def test_impossible_shapes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected positive ones with K <= E"):
        shape_of(text)


def test_loads_are_what_they_are_called() -> None:
    shape = LayerShape("", 2048, 16, 8, 16, 2)
    found = {load: loads_of(case(load, shape)) for load in LOADS}
    assert found["uniform"][0] < 2
    assert found["uniform"][1] == 0
    assert 2.5 < found["zipf"][0] < 8
    assert found["hot"] == (8.0, 0)  # E / K: every token has expert 0 among its choices
    assert found["dead"][1] == 8
    assert load_offsets("dead", LayerShape("", 1, 1, 1, 4, 3)).tolist() == [0, 0, 0, -16]  # K stay alive
    with pytest.raises(ValueError, match=r"load 'cold'; expected one of uniform, zipf, hot, dead"):
        load_offsets("cold", shape)


@pytest.mark.parametrize("load", LOADS)
def test_every_row_computes_the_same_layer(load: str) -> None:
    given = case(load)
    builds = {**moekit_rows(), **peer_rows()}
    results = {name: try_build(builds[name], given) for name in RUNNING}
    assert not {name: why for name, why in results.items() if isinstance(why, str)}
    expected = results["loop"].forward()
    gradient = torch.autograd.grad(expected, results["loop"].leaves, given.grad)[0]
    for name, row in results.items():
        y = row.forward()
        torch.testing.assert_close(y.view_as(expected), expected, rtol=1e-4, atol=1e-5, msg=name)
        found = torch.autograd.grad(y, row.leaves, row.grad)[0].view_as(gradient)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_rows_that_cannot_run_say_why() -> None:
    builds, given = {**moekit_rows(), **peer_rows()}, case()
    assert try_build(builds["scattermoe"], given) == "No module named 'scattermoe'"
    assert try_build(builds["liger"], given) == "No module named 'liger_kernel'"
    assert try_build(builds["fused_layer"], given) == "it runs on CUDA devices, not on cpu"
    large = case(shape=LayerShape("", 4096, 256, 512, 2, 1))
    assert try_build(builds["transformers batched_mm"], large._replace(shape=shape_of("olmoe-1b-7b"))).startswith(
        "it copies an expert for every row, 3072 GiB here"
    )
    assert try_build(lambda case: 1 / 0, given) == "division by zero"


@pytest.mark.parametrize("shape", [LayerShape("", 16, 4, 6, 48, 40), LayerShape("", 16, 4, 6, 1025, 2)])
def test_a_case_that_the_routers_kernel_does_not_take_is_routed_too(shape: LayerShape) -> None:
    report = bench_layer([shape], rounds=1, only=["loop", "fused_cpu"])
    assert [row.skipped for row in report.tables[0].rows] == ["", "", ""]
    given = case(shape=shape)
    logits = given.x @ given.gate
    expected = logits.softmax(-1).topk(shape.k)
    routing = given.route(logits)
    assert torch.equal(routing.expert_indices, expected.indices)
    torch.testing.assert_close(routing.weights, expected.values)


def test_rows_without_a_router_are_kept_where_all_others_fail(monkeypatch) -> None:
    def fail(case: Case) -> Contender:
        raise ValueError("no such layer")

    monkeypatch.setattr(module, "moekit_rows", lambda: {"loop": fail})
    [table] = bench_layer([SMALL], rounds=1, only=["dense", "loop"]).tables
    assert [(row.name, row.skipped) for row in table.rows] == [
        ("dense bound", ""), ("dense expert", ""), ("loop", "no such layer"),
    ]  # fmt: skip


def test_what_cannot_be_routed_fails_before_anything_is_measured(monkeypatch) -> None:
    def fail(case: Case) -> tuple[float, int]:
        raise ValueError("no routing")

    monkeypatch.setattr(module, "loads_of", fail)
    monkeypatch.setattr(module, "run_once", lambda contender: pytest.fail("measured before"))
    with pytest.raises(ValueError, match="no routing"):
        bench_layer([SMALL], rounds=1, only=["dense"])


def test_a_compiled_row_says_what_its_code_raised() -> None:
    given = case()._replace(shape=SMALL._replace(k=9))  # more than there are experts
    why = try_build(moekit_rows()["grouped, compiled"], given)
    told = r"k = 9 experts per token were asked of E = 8 experts; expected 1 <= k <= E"
    assert re.search(told if torch.__version__ >= "2.12" else rf"{told}|ValueError", why)  # 2.11 tells the kind alone


def test_an_error_of_dynamo_without_a_cause_is_explained() -> None:
    def talkative(x: torch.Tensor) -> torch.Tensor:
        print("compiled")
        return x

    def refuse(graph, inputs):
        raise RuntimeError("no such machine.\nmore")

    with pytest.raises(Exception, match="Explanation:") as raised:
        torch.compile(talkative, fullgraph=True, backend="eager")(torch.ones(2))
    assert reason_of(raised.value).startswith("Dynamo does not know how to trace builtin operator `print`")
    with pytest.raises(Exception, match="refuse") as raised:
        torch.compile(lambda x: x * 2, fullgraph=True, backend=refuse)(torch.ones(2))
    assert reason_of(raised.value) == "RuntimeError: no such machine"


def test_a_row_that_fails_with_gradients_off_alone_keeps_its_other_numbers(monkeypatch) -> None:
    def trained_only(case: Case) -> Contender:
        def forward() -> torch.Tensor:
            if not torch.is_grad_enabled():
                raise RuntimeError("it trains.\nmore")
            return case.x * 2

        return Contender(forward, [case.x], case.grad)

    lines = []
    monkeypatch.setattr(module, "moekit_rows", lambda: {"trained": trained_only})
    report = bench_layer([SMALL], rounds=2, only=["trained"], tell=lines.append)
    row = report.tables[0].rows[1]
    assert lines[1] == "  trained: no inference, it trains"
    assert (row.skipped, len(row.both), row.inference, row.inference_fraction) == ("", 2, (), None)
    assert row.fraction > 0
    assert [cell == "-" for cell in rows_of(report.tables[0])[1]] == [i in (3, 7, 9) for i in range(10)]
    assert json.loads(as_json(report))["tables"][0]["rows"][1]["inference"] == []


def test_moekits_row_inside_transformers_is_run_by_moekit(monkeypatch) -> None:
    from moekit.integrations import hf_experts

    seen = []
    module_params = hf_experts.module_params
    monkeypatch.setattr(hf_experts, "module_params", lambda experts: (seen.append(experts), module_params(experts))[1])
    row = try_build(peer_rows()["transformers moekit"], case())
    assert [type(experts).__name__ for experts in seen] == ["OlmoeExperts"] * 2  # with gradients and without
    assert len(row.leaves) == 4  # tokens, router, gate and up in one, down


def test_held_bytes_are_counted_once_and_without_leaves() -> None:
    given = case()
    fused = measure_memory(try_build(moekit_rows()["fused_cpu"], given))
    pre_activations = 2 * 128 * 24 * 4
    assert pre_activations <= fused.held <= pre_activations + 16 * 1024  # and logits, weights, indices
    composed = measure_memory(try_build(moekit_rows()["grouped"], given))
    assert composed.held > fused.held + 128 * 16 * 4
    assert fused.peak is None


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.sin())
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


@pytest.mark.parametrize(
    ("kept", "count", "compiled"),
    [
        (lambda x: x * 2, 0, 0),
        (lambda x: (x.sigmoid().exp(), x * 2)[1], 0, 0),  # what the first two save is gone before the forward returns
        (lambda x: x.sin().exp().sin() * 2, 1, 1),  # x is a leaf; both others save the same numbers
        (lambda x: Kept.apply(x) * 2, 1, 0),  # compiled it is computed again
    ],
)
def test_what_is_held_is_what_autograd_holds_when_the_forward_is_done(kept, count: int, compiled: int) -> None:
    torch._dynamo.reset()
    x = torch.randn(16, 16, requires_grad=True)
    for run, expected in ((kept, count), (torch.compile(kept, backend="aot_eager"), compiled)):
        held = measure_memory(Contender(partial(run, x), [x], torch.ones(16, 16))).held
        assert held == expected * x.nbytes


def test_fractions_compare_the_same_round() -> None:
    rounds = [Round(1.0, 4.0, 2.0), Round(10.0, 40.0, 20.0), Round(1.0, 2.0, 2.0)]
    bound = [Round(0.5, 3.0, 0.5), Round(5.0, 30.0, 5.0), Round(0.5, 1.0, 1.0)]  # a slow second round slows both
    row = row_of("x", rounds, bound, memory=Memory(3, None))
    assert (row.fraction, row.forward_fraction, row.inference_fraction) == (0.75, 0.5, 0.25)
    assert row_of("x", rounds, []).fraction is None
    row = row_of("x", rounds, bound, dropped=0.5)  # half of the bound's useful arithmetic
    assert (row.fraction, row.forward_fraction, row.inference_fraction, row.dropped) == (0.375, 0.25, 0.125, 0.5)


@pytest.mark.parametrize("load", LOADS)
def test_a_row_knows_what_its_capacity_limit_drops(load: str, monkeypatch) -> None:
    monkeypatch.setattr(row_module, "need_cuda", lambda x: None)
    monkeypatch.setattr(row_module, "fused_layer", lambda **_: fused_cpu(plan=dropless().plan))
    given = case(load)
    counts = tokens_per_expert(given.route(linear_gate(given.x, given.gate)).expert_indices, SMALL.experts)
    over = (counts - 20).clamp_min(0).sum().item()  # 1.25 times the mean of 16
    assert over > 20 or load == "uniform"
    for name in ("grouped, capacity 1.25", "fused_layer, capacity 1.25"):
        assert moekit_rows()[name](given).dropped == over / SMALL.rows
    assert {moekit_rows()[name](given).dropped for name in ("grouped", "batched, padded", "fused_layer")} == {0.0}


def test_what_is_dropped_counts_in_no_rate() -> None:
    report = bench_layer([SMALL], loads=("hot",), rounds=3, only=["grouped, cap", "loop"])
    [table] = report.tables
    bound, loop_row, row = table.rows
    assert (loop_row.dropped, bound.dropped) == (0.0, 0.0)
    assert 0.3 < row.dropped < 0.5  # 44 of the 64 rows of the hot expert, of 128 in all, and a few
    kept = 1 - row.dropped
    for fraction, field in (("fraction", "both"), ("forward_fraction", "forward"), ("inference_fraction", "inference")):
        ratio = median(b / t for b, t in zip(getattr(bound, field), getattr(row, field), strict=True))
        assert getattr(row, fraction) == pytest.approx(kept * ratio)
    cells = dict(zip(HEADINGS, rows_of(table)[2], strict=True))
    assert cells["TFLOP/s"] == f"{kept * 3 * SMALL.flops / median(row.both) / 1e12:.4g}"
    told = f"{row.name}: {row.dropped:.1%} of the T K rows are dropped; TFLOP/s and fractions count the others"
    assert notes_of(table) == [told]
    assert f"\n- {told}\n" in as_markdown(report)
    file = io.StringIO()
    print_report(report, Console(file=file, width=120))
    assert f"\n  {told}\n" in file.getvalue()
    assert [each["dropped"] for each in json.loads(as_json(report))["tables"][0]["rows"]] == [0.0, 0.0, row.dropped]


def test_rows_are_measured_in_turn(monkeypatch) -> None:
    order = []
    monkeypatch.setattr(module, "run_once", lambda contender: order.append(id(contender)) or Round(1.0, 2.0, 1.0))
    bench_layer([SMALL], rounds=3, only=["fused_cpu", "loop"])
    first = order[: len(set(order))]
    assert len(first) == 3
    assert order == first * 3


def test_a_table_is_measured_with_its_device_current(monkeypatch) -> None:
    current, seen = ["cuda:0"], []

    @contextmanager
    def device(place: torch.device):
        current.append(str(place))
        yield
        current.pop()

    def at(name, function):
        return lambda *given, **options: (seen.append((name, current[-1])), function(*given, **options))[1]

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # it would look for the devices
    monkeypatch.setattr(module, "describe_machine", lambda device, dtype: {})
    monkeypatch.setattr(module, "make_case", at("drawn", lambda *given, **options: case()))
    for name in ("try_build", "run_once", "measure_memory", "measure_stages"):
        monkeypatch.setattr(module, name, at(name, getattr(module, name)))
    bench_layer([SMALL], device="cuda:1", rounds=1, only=["loop"])
    assert {name for name, _ in seen} == {"drawn", "try_build", "run_once", "measure_memory", "measure_stages"}
    assert {where for _, where in seen} == {"cuda:1"}
    assert current == ["cuda:0"]
    with pytest.raises(ValueError, match=r"bench_layer: device = cuda:2, and torch finds 2 CUDA devices"):
        bench_layer([SMALL], device="cuda:2")


def test_every_table_is_compiled_for_its_own_sizes(monkeypatch) -> None:
    compile, inputs_of = torch.compile, []

    def backend(graph, inputs):
        inputs_of.append(inputs)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda forward, **options: compile(forward, backend=backend, **options))
    bench_layer([SMALL, SMALL._replace(tokens=96), SMALL._replace(tokens=80)], rounds=1, only=["grouped, compiled"])
    assert len(inputs_of) >= 3
    # What was compiled for one table is not taken for the next one of other sizes, which would be compiled for any.
    assert not any(isinstance(each, torch.SymInt) for inputs in inputs_of for each in inputs)


def test_inference_is_measured_with_gradients_off() -> None:
    given, modes = case(), []
    row = Contender(lambda: (modes.append(torch.is_grad_enabled()), given.x * 2)[1], [given.x], given.grad)
    assert all(seconds > 0 for seconds in run_once(row))
    assert modes == [True, False]


@pytest.fixture(scope="module")
def report() -> Report:
    lines = []
    only = ["loop", "auto", "megablocks", "dense"]
    found = bench_layer([SMALL], loads=("uniform", "hot"), rounds=2, only=only, tell=lines.append)
    assert lines[0] == "small, uniform: 5 rows, 2 rounds"
    assert "  megablocks: skipped, No module named 'megablocks'" in lines
    return found


def test_a_report_has_a_table_for_each_load(report: Report) -> None:
    assert [(table.load, table.imbalance) for table in report.tables][1] == ("hot", 4.0)
    for table in report.tables:
        assert [row.name for row in table.rows] == ["dense bound", "dense expert", "loop", "auto", "megablocks"]
        assert table.rows[0].fraction == 1.0
        assert all(len(row.inference) == 2 for row in table.rows[:4])
        assert all(0 < f < b for row in table.rows[:4] for f, b in zip(row.forward, row.both, strict=True))
        (stages,) = table.stages.values()  # for the kernels of fused_layer do not run here
        assert [stage.name for stage in stages] == ["gate", "route", "plan", "dispatch", "experts", "combine"]
        assert sum(shares(stages)) == pytest.approx(1)
        assert stages[0].nbytes == (64 * 16 + 16 * 8 + 64 * 8) * 4  # the gate's matrix is read, too
        assert stages[4].teraflops == pytest.approx(SMALL.flops / min(stages[4].seconds) / 1e12)
        assert stages[5].gigabytes_per_second == pytest.approx(3 * 64 * 16 * 4 / min(stages[5].seconds) / 1e9)


def test_rows_of_ones_own_are_measured_like_the_others() -> None:
    seen, lines = [], []

    def layer(x: Tensor, routing: Routing, params: GatedParams) -> Tensor:
        seen.append(x.shape)
        return fused_cpu(plan=dropless().plan)(x, routing, params)

    def broken(case: Case) -> Contender:
        raise NotImplementedError("not written yet.")

    mine = {"mine": partial(row_module.of_layer, layer=layer), "mine, broken": broken}
    report = bench_layer([SMALL], rounds=2, only=["loop", "mine"], rows=mine, tell=lines.append)
    assert lines == ["small, uniform: 4 rows, 2 rounds", "  mine, broken: skipped, not written yet"]
    assert set(seen) == {(64, 16)}
    rows = json.loads(as_json(report))["tables"][0]["rows"]
    assert [row["name"] for row in rows] == ["dense bound", "loop", "mine", "mine, broken"]
    bound, found = rows[0], rows[2]
    assert found["fraction"] == median(b / t for b, t in zip(bound["both"], found["both"], strict=True)) > 0
    assert found["memory"]["held"] > 0
    text = as_markdown(report)
    assert f"| mine | {' | '.join(rows_of(report.tables[0])[2][1:])} |" in text
    assert "- mine, broken: not written yet" in text
    assert [row.name for row in bench_layer([SMALL], rounds=1, only=["loop"], rows=mine).tables[0].rows][1:] == ["loop"]


@pytest.mark.parametrize("name", ["dense bound", "dense expert", "fused_cpu", "scattermoe"])
def test_rows_of_ones_own_do_not_take_the_place_of_others(name: str) -> None:
    with pytest.raises(ValueError, match=rf"bench_layer: rows = \['{name}'\], which there are already; give rows"):
        bench_layer([SMALL], rows={name: partial(row_module.of_layer, layer=None), "mine": None})


def test_json_and_markdown_say_the_same(report: Report) -> None:
    read = json.loads(as_json(report))
    assert read["machine"]["auto"].startswith("fused_cpu (the CPU")
    row = read["tables"][0]["rows"][3]
    assert row["name"] == "auto"
    assert len(row["both"]) == 2
    assert row["memory"]["held"] > 0
    text = as_markdown(report)
    assert "## small (T 64, D 16, F 24, E 8, K 2), cpu float32, hot: largest load 4.00 of the mean" in text
    assert "- megablocks: No module named 'megablocks'" in text
    assert f"| auto | {' | '.join(rows_of(report.tables[0])[3][1:])} |" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {11, 6}
    stage = read["tables"][0]["stages"]["grouped, forward"][4]
    assert (stage["name"], stage["flops"]) == ("experts", SMALL.flops)
    assert f"| experts | {median(stage['seconds']) * 1e3:.3f} | " in text
    assert f" | {stage['GB/s']:.4g} | {stage['TFLOP/s']:.4g} |" in text


def test_the_program_prints_and_writes(tmp_path, capsys) -> None:
    files = tmp_path / "a.json", tmp_path / "a.md"
    main(
        f"bench layer --device cpu --shape 32,8,8,4,2 --shape 16,8,8,4,2 8,8,8,4,2 --rounds 1 --only loop "
        f"--load uniform zipf --json {files[0]} --markdown {files[1]}".split()
    )
    shown = capsys.readouterr().out
    assert "32,8,8,4,2 (T 32, D 8, F 8, E 4, K 2), cpu float32, zipf" in shown
    tables = json.loads(files[0].read_text())["tables"]
    assert tables[1]["load"] == "zipf"
    assert [table["tokens"] for table in tables] == [32, 32, 16, 16, 8, 8]
    assert "| dense bound |" in files[1].read_text()


def test_a_shape_or_load_that_is_given_twice_is_measured_once(monkeypatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(program, "bench_layer", lambda shapes, **options: found.append((shapes, options["loads"])))
    words = "--shape 8,8,8,2,1 cpu-8 --shape 8,8,8,2,1 cpu-8 --load zipf uniform zipf"
    main(f"bench layer --device cpu {words}".split())
    assert found == [([shape_of("8,8,8,2,1"), CPU_SHAPES["cpu-8"]], ("zipf", "uniform"))]


@pytest.mark.parametrize("seconds", [1e-5, 98.7654321])
def test_nothing_is_cut_at_120_columns(seconds: float) -> None:
    shape = LayerShape("x", 64, 16, 8, 8, 2) if seconds < 1 else GPU_SHAPES["sonic-default"]
    rows = [
        Row("fused_layer, everything kept", *[[seconds]] * 3, Memory(130 * 2**30, 130 * 2**30), *[0.12] * 3),
        Row("auto", *[[14 * seconds]] * 2, fraction=12.34, forward_fraction=1.0),
        Row("sonicmoe", skipped="no module"),
    ]
    stages = {"grouped, forward": [Stage("gradients of gate and up", [seconds], 12345, shape.flops)]}
    table = Table(shape, "uniform", "cpu", "bfloat16", 1.0, 0, rows, stages)
    file = io.StringIO()
    print_report(Report({}, [table]), Console(file=file, width=120))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines[2:])) <= 120  # but the title, a line that a terminal may wrap
    assert "…" not in file.getvalue()
    laid_out = [tuple(re.split(" {2,}", line.strip())) for line in lines]
    assert all(cells in laid_out for cells in rows_of(table))
    words = set(" ".join(lines[3:5]).split())
    assert words == set(" ".join(HEADINGS).split())  # of which units are in a line of their own


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bench", None),
        ("bench train", r"moekit bench: nothing to measure is called 'train'; expected: layer"),
        ("bench layer --shape 1,2", r"shape '1,2' is neither"),
        pytest.param(
            "bench layer --device cuda",
            r"--device cuda, and torch finds no CUDA device here; use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (f"bench layer --shape {10**20},8,8,4,2", r"a tensor of it has 1,\S+ numbers; expected fewer than 1,152,921,"),
        (
            f"bench layer --device cpu --shape {2**50},64,8,4,2",
            r"tokens and experts alone take 536,870,912.0 GiB, which this",
        ),
        ("bench layer --load cold", r"--load cold; expected some of uniform, zipf, hot, dead"),
        (
            "bench layer --only loop moe --shape 8,8,8,2,1",
            r"only = \['moe'\], the beginning of no row; rows are dense bound; dense expert; loop",
        ),
        ("bench layer --rounds 0 --shape 8,8,8,2,1", r"rounds = 0; expected at least 1"),
        ("bench layer --json nowhere/a.json", r"nowhere/a.json: there is no folder nowhere; make it first"),
        ("bench layer --markdown /", r"/: it is a folder; give the name of a file"),
        ("bench layer --json /dev/null", r"/dev/null: it is a device or a pipe, .* give the name of a file"),
        ("bench layer --load --rounds 1", r"--load has nothing after it; expected some of uniform, "),
        (
            "bench layer --json a.md --markdown a.md",
            r"--json and --markdown are both a.md; give each a file of its own",
        ),
        (
            "bench layer --device cpu --precision tf32",
            r"--precision tf32 with float32 on cpu; it is of float32 products on CUDA alone\. Leave it out, or give",
        ),
        (
            "bench layer --device cpu --tiles t.json",
            r"--tiles t\.json on cpu; they are of fused_layer's kernels, which run on CUDA alone\. Leave it out, or",
        ),
        ("bench layer --device mps", r"--device mps; expected cpu, cuda, or one of several as cuda:1"),
        ("bench layer --device cuda:x", r"layer: --device cuda:x; expected cpu, cuda, or one of several as cuda:1"),
        ("bench layer --device gpu", r"--device gpu; expected cpu, cuda, or one of several as cuda:1"),
    ],
)
def test_the_program_refuses_what_makes_no_sense(words: str, message: str | None, capsys) -> None:
    if message is None:
        main(words.split())
        assert "usage: moekit bench layer" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit, match=message):
        main(words.split())


def test_a_link_to_the_other_file_is_refused(tmp_path) -> None:
    file, link = tmp_path / "a.json", tmp_path / "link.json"
    link.symlink_to(file)
    words = f"bench layer --device cpu --shape 8,8,8,2,1 --rounds 1 --only dense --json {file} --markdown {link}"
    with pytest.raises(SystemExit, match=rf"--json and --markdown are both {file}; give each a file of its own"):
        main(words.split())
    assert not file.exists()


@pytest.mark.parametrize(("count", "found"), [(1, "1 CUDA device, cuda:0"), (2, "2 CUDA devices, cuda:0 to cuda:1")])
def test_a_device_that_is_not_there_is_refused(count: int, found: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name in ("cuda:9", "cuda:256"):  # of which torch makes cuda:0
        with pytest.raises(SystemExit, match=f"moekit bench layer: --device {name}, and torch finds {found}; take one"):
            main(["bench", "layer", "--device", name])
    assert device_of(f"cuda:{count - 1}") == torch.device("cuda", count - 1)
    assert device_of("cuda") == torch.device("cuda")


@pytest.mark.parametrize(
    ("words", "expected"), [("--precision tf32", "high"), ("--precision ieee", "highest"), ("", "medium")]
)
@pytest.mark.parametrize("fails", [False, True])
def test_the_program_multiplies_float32_as_it_is_told(words: str, expected: str, fails: bool, monkeypatch) -> None:
    found = []

    def measure(shapes: list[LayerShape], **options: Any) -> None:
        found.append((options["dtype"], torch.get_float32_matmul_precision()))
        if fails:
            raise ValueError("no")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(program, "bench_layer", measure)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(SystemExit, match="no") if fails else nullcontext():
            main(f"bench layer --device cuda --dtype float32 {words}".split())
        assert found == [(torch.float32, expected)]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    with pytest.raises(
        SystemExit, match="--precision ieee with bfloat16 on cuda; it is of float32 products on CUDA al"
    ):
        main(["bench", "layer", "--device", "cuda", "--precision", "ieee"])


def test_rows_of_kernels_multiply_float32_as_torch_is_set(monkeypatch) -> None:
    asked = []

    def layer(**options: Any) -> Any:
        asked.append(options["precision"])
        return fused_cpu(plan=dropless().plan)

    def matmul(rows: Tensor, groups: Groups, w: Tensor, *, precision: str) -> Tensor:
        asked.append(precision)
        return loop(rows, groups, w)

    monkeypatch.setattr(row_module, "need_cuda", lambda x: None)
    monkeypatch.setattr(row_module, "fused_layer", layer)
    monkeypatch.setattr(row_module, "triton", matmul)
    monkeypatch.setattr(row_module, "float32_products", lambda: "some")
    builds = moekit_rows()
    for name in ("fused_layer", "fused_layer, inputs kept", "fused_layer, tokens rounded", "triton"):
        assert not isinstance(try_build(builds[name], case()), str)
        assert set(asked) == {"some"}, name
        asked.clear()


@pytest.fixture
def two_devices(monkeypatch) -> None:
    """Let torch find two CUDA devices, of which nothing is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_devices")
def test_a_file_of_tiles_is_read_before_anything_is_measured(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(program, "bench_layer", lambda *given, **options: pytest.fail("measured"))
    path = tmp_path / "tiles.json"
    words = ["bench", "layer", "--device", "cuda", "--tiles", str(path)]
    with pytest.raises(SystemExit, match=r"^moekit bench layer: --tiles \S+: No such file .*, or leave --tiles out"):
        main(words)
    path.write_text('{"format": 3}')
    with pytest.raises(SystemExit, match=r"^moekit bench layer: --tiles \S+: no field 'entries'; expected the fields"):
        main(words)


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("flags", [True, False])
def test_the_program_hands_its_tiles_on_and_reports_them(flags: bool, tmp_path, monkeypatch) -> None:
    given, path, file = [], tmp_path / "tiles.json", tmp_path / "a.json"

    def measure(shapes: list[LayerShape], *, done: Any, tiles: Any, **options: Any) -> None:
        given.append(tiles)
        done(Report({"device": "a card"}, []))

    monkeypatch.setattr(program, "bench_layer", measure)
    path.write_text(table_text([]))
    main(f"bench layer --device cuda --json {file} {f'--tiles {path}' if flags else ''}".split())
    machine = json.loads(file.read_text())["machine"]
    if flags:
        assert given[0].func is from_table([]).func
        assert given[0].args[0].args[0] == ()  # the table
        assert machine["tiles"] == str(path)
    else:
        assert (given, "tiles" in machine) == ([layer_tiles], False)


def test_kernels_are_cut_into_the_tiles_that_are_given(monkeypatch) -> None:
    asked, mine = [], lambda size: None

    def layer(**options: Any) -> Any:
        asked.append(options["tiles"])
        return fused_cpu(plan=dropless().plan)

    monkeypatch.setattr(row_module, "need_cuda", lambda x: None)
    monkeypatch.setattr(row_module, "fused_layer", layer)
    monkeypatch.setattr(row_module, "auto", layer)
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    monkeypatch.setattr(row_module, "_graphed", lambda case, *, build: build(case))  # else it is built for each capture
    monkeypatch.setattr(module, "measure_stages", lambda case, rounds, **options: asked.append(case.tiles) or {})
    names = [name for name in moekit_rows() if name.startswith(("fused_layer", "auto"))]
    for options, tiles in (({"tiles": mine}, mine), ({}, layer_tiles)):
        table = bench_layer([SMALL], rounds=1, only=["fused_layer", "auto"], **options).tables[0]
        ran = [row.name for row in table.rows[1:] if not row.skipped]
        assert ran == names
        assert asked == [tiles] * (len(ran) + 1)  # and the stages
        asked.clear()


def test_stages_of_kernels_ask_for_the_tiles_that_are_given() -> None:
    pytest.importorskip("triton")

    def mine(size: LayerSize) -> Any:
        raise RuntimeError(f"asked for {size.assignments} rows of {size.dim}")

    with pytest.raises(RuntimeError, match="asked for 128 rows of 16"):
        fused_stages(case()._replace(tiles=mine))


def test_what_was_measured_before_a_failure_is_written_and_printed(tmp_path, capsys, monkeypatch) -> None:
    def drawn(shape: LayerShape, load: str, **options: Any) -> Case:
        if shape.tokens == 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make_case(shape, load, **options)

    monkeypatch.setattr(module, "make_case", drawn)
    file = tmp_path / "a.json"
    with pytest.raises(SystemExit, match="moekit bench layer: CUDA out of memory"):
        main(f"bench layer --shape 8,8,8,2,1 16,8,8,4,2 --rounds 1 --only loop --json {file}".split())
    assert [table["tokens"] for table in json.loads(file.read_text())["tables"]] == [8]
    assert "8,8,8,2,1 (T 8," in capsys.readouterr().out


def test_the_bound_may_be_measured_alone() -> None:
    [table] = bench_layer([SMALL], rounds=1, only=["dense bound"]).tables
    assert [row.name for row in table.rows] == ["dense bound"]


WITHOUT = """
import sys
for name in ("rich", "tyro", "triton", "transformers", "torchdata"):
    sys.modules[name] = None
from moekit.recipes.bench.layer import bench_layer
from moekit.recipes.bench.shapes import shape_of
from moekit.recipes.bench.tables import as_json, as_markdown
report = bench_layer([shape_of("16,8,8,4,2")], rounds=1, only=["auto", "transformers eager"])
print([row.skipped for row in report.tables[0].rows], len(as_json(report)) > 100, len(as_markdown(report)) > 100)
"""


def test_the_benchmark_needs_torch_alone() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "['', '', 'import of transformers halted" in result.stdout
    assert result.stdout.endswith("True True\n")


def test_a_row_s_cells_are_in_the_units_of_their_headings() -> None:
    shape = LayerShape("", 1000, 100, 100, 8, 2)
    row = Row("x", [0.001], [0.004], [0.0005], Memory(2**20, 3 * 2**20), 0.25, 0.5, 0.75)
    table = Table(shape, "uniform", "cpu", "float32", 1.0, 0, [row], {})
    assert ", cpu float32, uniform" in title(table)
    assert ", cpu float32 by TF32, uniform" in title(table._replace(precision="tf32"))
    read = json.loads(as_json(Report({}, [table, table._replace(precision="tf32")])))
    assert [each["precision"] for each in read["tables"]] == ["", "tf32"]
    assert bench_layer([SMALL], rounds=1, only=["dense bound"]).tables[0].precision == ""
    assert dict(zip(HEADINGS, rows_of(table)[0], strict=True)) == {
        "": "x",
        "forward ms": "1.00",
        "fwd + bwd ms": "4.00",
        "inference ms": "0.50",
        "TFLOP/s": "0.09",
        "of the bound": "0.25",
        "forward": "0.50",
        "inference": "0.75",
        "held MiB": "1.0",
        "peak MiB": "3.0",
    }  # 18 T K D F operations in 4 ms
    stages = [Stage("gate", [0.001], 10**6, 0), Stage("experts", [0.003, 0.003, 0.001], 10**6, 10**9)]
    assert stages_of(stages) == [("gate", "1.000", "25%", "1", ""), ("experts", "3.000", "75%", "1", "1")]
