"""What eight gloo ranks hand to their collectives is what the formulas say, strategy by strategy."""

import json
import runpy
from pathlib import Path

import pytest
from ranks import run_ranks

from moekit.parallel import costs
from moekit.parallel.payloads import Peers, there_and_back, total

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("traffic_program.py")
NODE, RANKS, SHAPE = map(runpy.run_path(str(PROGRAM)).get, ("NODE", "RANKS", "SHAPE"))
PAGE = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
EVEN = ["static_all_to_all", "all_gather", "tensor_parallel", "FSDP, no exchange"]  # whatever the routing
UNEVEN = ["all_to_all", "chunked, 2 slices", "hierarchical", "all_to_all x tensor_parallel"]


@pytest.fixture(scope="module")
def measured():
    [said, *_] = run_ranks("launches:run_file", RANKS, str(PROGRAM), "json", limit=120)
    lines = [line.removeprefix("measured ") for line in said.splitlines() if line.startswith("measured ")]
    return {found["strategy"]: found for found in map(json.loads, lines)}


def test_every_strategy_is_measured(measured):
    assert sorted(measured) == sorted(EVEN + UNEVEN)


def test_all_to_all_sends_distinct_pairs(measured):
    found = measured["all_to_all"]
    assert found["rows"] == [found["pairs"]] * 4  # tokens, outputs, and the gradients of both
    assert found["pairs"] < 0.7 * RANKS * SHAPE.tokens * SHAPE.top_k
    expected = costs.distinct_blocks(SHAPE.top_k, SHAPE.experts, RANKS)
    assert found["pairs"] / (RANKS * SHAPE.tokens) == pytest.approx(expected, rel=0.01)


def test_all_to_all_sends_exactly_what_its_rows_need(measured):
    found = measured["all_to_all"]
    exact = total(there_and_back(SHAPE, Peers(RANKS, NODE), found["pairs"] / RANKS, positions=False))
    assert found["own"] + found["others"] == exact.own + exact.others


def test_hierarchical_crosses_the_network_once_per_node(measured):
    found = measured["hierarchical"]
    assert found["rows"] == [found["node_pairs"], found["pairs"], found["pairs"], found["node_pairs"]] * 2
    assert found["network"] < 0.5 * measured["all_to_all"]["network"]


@pytest.mark.parametrize("name", EVEN)
def test_even_strategies_send_exactly_their_formula(measured, name):
    found = measured[name]
    assert (found["others"], found["own"]) == (found["others_formula"], found["own_formula"])


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_strategies_send_their_formula_but_for_chance(measured, name):
    found = measured[name]
    assert found["others"] == pytest.approx(found["others_formula"], rel=0.01)
    assert found["own"] == pytest.approx(found["own_formula"], rel=0.03)


@pytest.mark.parametrize("name", ["all_to_all", "static_all_to_all", "chunked, 2 slices", "hierarchical"])
def test_bytes_that_leave_the_node(measured, name):
    assert measured[name]["network"] == pytest.approx(measured[name]["network_formula"], rel=0.01)


@pytest.mark.parametrize("name", EVEN + UNEVEN)
def test_collectives_are_counted_too(measured, name):
    assert measured[name]["calls"] == measured[name]["calls_formula"]


@pytest.mark.parametrize("name", EVEN + UNEVEN)
def test_the_page_shows_what_was_measured(measured, name):
    found = measured[name]
    numbers = [f"{found[key]:,.0f}" for key in ("others", "others_formula", "own", "own_formula")]
    rows = [line.removeprefix(name).split() for line in PAGE.splitlines() if line.startswith(f"{name}  ")]
    assert rows == [[*numbers, str(found["calls"]), str(found["calls_formula"])]]


def test_the_page_shows_the_rows(measured):
    found = measured["all_to_all"]
    assert f"**Measured** (E = 64, K = 8, X = 8): {found['pairs']:,} rows for 2,048 tokens." in PAGE
