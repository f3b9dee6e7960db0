"""The program ``moekit traffic``: its tables, its messages, and that the page shows what it prints."""

import re
from pathlib import Path

import pytest

from moekit.parallel.link_times import h100_machine
from moekit.parallel.payloads import Sent
from moekit.recipes.cli import main as moekit
from moekit.recipes.traffic import TrafficSettings, machine_of, main, predict, shape_of, strategies
from moekit.recipes.traffic_tables import Prediction, cheapest, cheapest_lines

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")


def tables(text):
    """Read the tables of a text: first cell of a row to its other cells."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if cells and cells[0] == "GPUs":
            found.append({})
        if cells:
            found[-1][cells[0]] = cells[1:]
    return found


def test_every_strategy_has_a_row_for_2_to_1024_gpus(capsys):
    moekit(["traffic"])
    text = capsys.readouterr().out
    times, inside, network = tables(text)
    assert times["GPUs"] == ["2", "4", "8", "16", "32", "64", "128", "256", "512", "1,024"]
    names = set(strategies(TrafficSettings(), 8))
    assert names | {"GPUs", "the experts' compute", "cheapest, chunked x 4"} == set(times)
    assert names | {"GPUs"} == set(inside) == set(network)
    assert all(len(cells) == 10 for table in (times, inside, network) for cells in table.values())
    assert inside["all_to_all"][0] != "0"
    assert network["all_to_all"][:4] == ["0", "0", "0", "457"]
    assert "cheapest on 4, 8 GPUs: all_to_all\n" in text
    assert "8 GPUs in a node: 450 GB/s and 0.6 us inside, 50 GB/s and 2.7 us between nodes; 6.6 us to start" in text


def test_defaults_are_those_of_the_machine_in_numbers_that_can_be_read(capsys):
    ours, machine = machine_of(TrafficSettings()), h100_machine()
    assert (ours.node, ours.network) == (machine.node, machine.network)
    assert ours.start == pytest.approx(machine.start, rel=1e-12)
    with pytest.raises(SystemExit):
        moekit(["traffic", "--help"])
    defaults = re.findall(r"\(default: ([\d.]+)\)", capsys.readouterr().out)
    assert {"0.6", "2.7", "6.6"} <= set(defaults)
    assert max(map(len, defaults)) < 7


def test_little_that_is_sent_is_not_nothing(capsys):
    small = "--tokens 128 --width 64 --hidden 32 --experts 16 --top-k 4 --gpus 4 --gpus-per-node 2"
    moekit(["traffic", *small.split()])
    _, inside, network = tables(capsys.readouterr().out)
    assert 0 < float(inside["all_to_all"][0]) < float(network["all_to_all"][0]) < 1


def test_flags_change_the_shape_and_the_links(capsys):
    words = "--tokens 1024 --width 512 --hidden 256 --experts 8 --top-k 2 --element-bytes 4 --matrices 2 --gpus 8 16"
    main([*words.split(), "--network-bandwidth", "25", "--gpus-per-node", "4", "--chunks", "2"])
    text = capsys.readouterr().out
    assert "T 1,024 on each GPU, D 512, F 256, E 8, K 2, 4 bytes per element; a token is 2,048 bytes" in text
    assert "4 GPUs in a node" in text
    assert "cheapest, chunked x 2" in text
    assert tables(text)[0]["GPUs"] == ["8", "16"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-k", "65"], r"--top-k is 65; expected 1 to 64, the number of experts"),
        (["--tokens", "0"], r"--tokens is 0; expected a finite number above 0"),
        (["--tokens", f"1{'0' * 320}"], r"--tokens is 10+; expected a finite number above 0, below 2\^63"),
        (["--hidden", str(2**63)], r"--hidden is 9223372036854775808; expected a finite number above 0, below 2\^63"),
        (["--gpus", "8", f"1{'0' * 320}"], r"--gpus is 8 10+; expected numbers of GPUs, each once and .*below 2\^63"),
        (["--gpus", "8", "-1"], r"--gpus is 8 -1; expected numbers of GPUs, each once and more than 0"),
        (["--gpus", "4", "2", "4"], r"--gpus is 4 2 4; expected numbers of GPUs, each once"),
        (["--gpus"], r"--gpus is given no numbers; expected numbers of GPUs"),
        (["--network-bandwidth", "0"], r"--network-bandwidth is 0.0; expected a finite number above 0"),
        (["--teraflops", "nan"], r"--teraflops is nan; expected a finite number above 0"),
        (["--start", "inf"], r"--start is inf; expected a finite number, 0 or more"),
        (["--start", "-1"], r"--start is -1.0; expected a finite number, 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(words, message):
    with pytest.raises(SystemExit, match=f"moekit traffic: {message}"):
        moekit(["traffic", *words])


def test_twice_the_bandwidth_halves_what_is_not_latency():
    none = {"node_latency": 0.0, "network_latency": 0.0, "start": 0.0, "gpus": (16,)}
    slow = predict(TrafficSettings(**none))
    fast = predict(TrafficSettings(**none, node_bandwidth=900.0, network_bandwidth=100.0))
    for name in slow:
        if slow[name][0] is not None:
            assert slow[name][0].seconds == pytest.approx(2 * fast[name][0].seconds)


def test_replicas_pay_for_their_parameters():
    sent = strategies(TrafficSettings(experts=8, top_k=2), 16)
    assert [entry.name for entry in sent["all_to_all"][:3]] == ["parameters", "parameters", "gradients"]
    assert all(
        entry.name not in ("parameters", "gradients") for entry in strategies(TrafficSettings(), 64)["all_to_all"]
    )


def test_strategies_that_would_be_another_are_left_out():
    settings = TrafficSettings()
    missing = {
        size: {name for name, sent in strategies(settings, size).items() if sent is None} for size in (1, 8, 16, 128)
    }
    assert missing[1] == set(strategies(settings, 1)) - {"FSDP, no exchange"}
    assert missing[8] == {"all_to_all in a node", "hierarchical", "all_to_all x tensor_parallel"}
    assert missing[16] == {"all_to_all x tensor_parallel"}
    assert missing[128] == set()


def test_settings_become_shape_and_machine():
    settings = TrafficSettings(tokens=1, width=2, hidden=3, experts=4, top_k=2, element_bytes=5, matrices=6)
    assert shape_of(settings) == (1, 2, 3, 4, 2, 5, 6)
    machine = machine_of(
        TrafficSettings(node_bandwidth=1, network_bandwidth=2, node_latency=3, network_latency=4, start=5)
    )
    assert machine == ((1e9, 3e-6), (2e9, 4e-6), 5e-6, 8)


def test_the_cheapest_takes_the_least_time():
    zero = Sent("total", False, 0, 0, 0, 0, 0)
    made = {
        "a": [Prediction(2.0, zero), Prediction(1.0, zero)],
        "b": [None, Prediction(1.5, zero)],
        "c": [Prediction(1.0, zero), None],
    }
    assert [cheapest(made, column) for column in range(2)] == ["c", "a"]
    assert cheapest_lines([8, 1024], made) == ["cheapest on 8 GPUs: c", "cheapest on 1,024 GPUs: a"]


def test_the_page_shows_what_the_program_prints(capsys):
    shown = re.search(r"```console\n\$ moekit traffic\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    moekit(["traffic"])
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line.rstrip() for line in shown[1].splitlines()] == printed
