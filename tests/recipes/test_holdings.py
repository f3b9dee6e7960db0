import re

import pytest
import torch
from holding_cases import measured_holdings
from torch import nn

from moekit.parallel import Layout, replicated, spread_experts
from moekit.recipes.configuration import parse_settings
from moekit.recipes.holdings import Holding, _expert_elements, _expert_words, _rank_table, holding_table, plan_holdings
from moekit.recipes.language_models import language_model
from moekit.recipes.setup import make_config, make_recipe
from moekit.recipes.train import main

SPREAD = "--moe-expert-model-parallelism"
HYBRID = "--fsdp --fsdp-hybrid --ranks-per-node 4"
EXPERTS = 8 * 2 * 64 * 256  # E experts of two matrices (D, 4 D)
# Embedding and head; attention's four matrices and its norms of queries and keys, in both blocks; a gated MLP of 256
# hidden units; a router; and five norms.
OTHERS = 2 * 512 * 64 + 2 * (4 * 64 * 64 + 2 * 64) + 3 * 64 * 256 + 64 * 8 + 5 * 64


def plan(flags: str, ranks: int) -> dict[str, Holding]:
    settings = parse_settings(["--model", "moekit_tiny", "--precision", "fp32", *flags.split()], prog="test")
    with torch.device("meta"):
        model = language_model(make_config(settings.model), make_recipe(settings.model))
    per_node = settings.parallel.ranks_per_node or 8
    return {row.what: row for row in plan_holdings(model, settings, ranks, ranks_per_node=per_node)}


@pytest.mark.parametrize(
    ("ranks", "flags", "others", "experts"),
    [
        (1, "", (1, "nothing"), (1, "nothing")),
        (1, f"--fsdp {SPREAD}", (1, "nothing"), (1, "nothing")),
        (4, "", (1, "4 copies"), (1, "4 copies")),
        (4, SPREAD, (1, "4 copies"), (4, "4 blocks of experts")),
        (4, "--fsdp", (4, "4 shards"), (4, "4 shards")),
        (8, f"--fsdp {SPREAD}", (8, "8 shards"), (8, "8 blocks of experts")),
        (8, "--moe-weight-parallelism", (1, "8 copies"), (8, "8 shards")),
        (16, "--moe-weight-parallelism", (1, "16 copies"), (16, "16 shards")),  # along another axis than the experts
        (16, SPREAD, (1, "16 copies"), (16, "8 blocks of experts x 2 slices of hidden")),
        (
            16,
            f"{SPREAD} --moe-expert-ranks 2 --moe-weight-parallelism",
            (1, "16 copies"),
            (16, "2 blocks of experts x 8 shards"),
        ),
        (16, f"{SPREAD} --moe-expert-ranks 2", (1, "16 copies"), (2, "2 blocks of experts x 8 copies")),
        (
            16,
            f"{SPREAD} --moe-expert-ranks 2 --moe-hidden-ranks 2",
            (1, "16 copies"),
            (4, "2 blocks of experts x 2 slices of hidden x 4 copies"),
        ),
        (16, HYBRID, (4, "4 shards x 4 copies"), (4, "4 shards x 4 copies")),
        (16, HYBRID.replace("hybrid", "hybrid-o2"), (4, "4 shards x 4 copies"), (4, "4 shards x 4 copies")),
        (
            16,
            f"{HYBRID} {SPREAD} --moe-expert-ranks 2",
            (4, "4 shards x 4 copies"),
            (4, "2 blocks of experts x 2 shards x 4 copies"),
        ),
        (
            16,
            f"{SPREAD} --moe-hierarchical-exchange --ranks-per-node 4",
            (1, "16 copies"),
            (16, "8 blocks of experts x 2 slices of hidden"),
        ),
        # Two blocks for six ranks: the three that hold the same can cut neither of what is left evenly, so they do not.
        (6, f"{SPREAD} --moe-weight-parallelism", (1, "6 copies"), (2, "2 blocks of experts x 3 copies")),
    ],
)
def test_what_ranks_hold(ranks, flags, others, experts):
    rows = plan(flags, ranks)
    assert list(rows) == ["all but experts", "experts", "all"]
    for what, total, (parts, words) in (("all but experts", OTHERS, others), ("experts", EXPERTS, experts)):
        kept = 4 * total // parts
        assert rows[what] == Holding(what, total, kept, kept, 2 * kept, words)
        assert rows[what].bytes == 16 * total // parts
    sums = [sum(columns) for columns in zip(*(rows[what][1:5] for what in list(rows)[:2]), strict=True)]
    assert list(rows["all"][1:5]) == sums


def test_the_fullest_rank_counts_where_shards_are_unequal():
    """Eight experts over three ranks: three, three and two. Embeddings: 171, 171 and 170 rows of 512."""
    rows = plan("--fsdp", 3)
    assert rows["experts"].parameters == 4 * 3 * 2 * 64 * 256
    attention = 2 * (64 * 64 + 22 * 64 + 2 * 22)
    others = 2 * 171 * 64 + attention + 171 * 64 + 22 * 256 + 22 * 8 + 5 * 22
    assert rows["all but experts"].parameters == 4 * others


@pytest.mark.parametrize("precision", ["bf16", "fp16 --eps 1e-4"])
def test_half_precision_halves_everything(precision):
    full, half = plan(f"--fsdp {SPREAD}", 8), plan(f"--fsdp {SPREAD} --precision {precision}", 8)
    for what, row in full.items():
        assert half[what].total == row.total
        assert half[what].bytes * 2 == row.bytes


def test_vectors_of_experts_are_cut_along_the_experts():
    """As FSDP does, which cuts matrices along an axis that has equal parts."""
    layout = Layout(6, replicas=2)
    matrix, vector = torch.empty(3, 4, 8), torch.empty(3, 8)
    assert [_expert_elements(p, layout, 2, ()) for p in (matrix, vector)] == [3 * 4 * 8 // 2, 2 * 8]
    assert _expert_elements(torch.empty(6, 8), Layout(6, replicas=2, experts=2), 2, ()) == 2 * 8


def test_a_dense_model_has_no_experts():
    rows = plan("--moe-freq 0 --fsdp", 4)
    assert list(rows) == ["all but experts", "all"]
    assert rows["all"][1:5] == rows["all but experts"][1:5]


def test_what_is_spread_nowhere_is_refused():
    with pytest.raises(
        ValueError, match=r"expert_ranks \(--moe-expert-ranks\) is 3, which does not divide 8, the experts"
    ):
        plan(f"{SPREAD} --moe-expert-ranks 3", 6)


def test_what_is_held_is_counted():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1).double())
    optimizer = torch.optim.AdamW(model.parameters())
    parameters = 4 * 9 + 8 * 4
    assert measured_holdings(model, optimizer) == (parameters, 0, 0)
    model[0](torch.ones(2)).sum().backward()
    optimizer.step()
    assert measured_holdings(model, optimizer) == (parameters, 4 * 9, 2 * 4 * 9)
    model[1](torch.ones(3).double()).sum().backward()
    optimizer.step()
    assert measured_holdings(model, optimizer) == (parameters, parameters, 2 * parameters)


def test_ranks_that_hold_the_same_are_one_row():
    assert _rank_table(Layout(8, replicas=2, hidden=2, experts=2)) == [
        ("0, 4", "0-3", "1 of 2"),
        ("1, 5", "4-7", "1 of 2"),
        ("2, 6", "0-3", "2 of 2"),
        ("3, 7", "4-7", "2 of 2"),
    ]
    assert _rank_table(spread_experts(4, 4, 64))[-1] == ("3", "3", "all")
    assert _rank_table(replicated(16, 8)) == [("0, 1, ... 15", "0-7", "all")]
    assert _rank_table(Layout(2, replicas=4, experts=2))[1] == ("1, 3, 5, 7", "1", "all")


def test_every_rank_is_in_the_table_once():
    layout = spread_experts(32, 8, 64)
    ranks = [rank for row in _rank_table(layout) for rank in row[0].split(", ")]
    assert sorted(map(int, ranks)) == list(range(32))


@pytest.mark.parametrize(
    ("layout", "shards", "words"),
    [
        (Layout(8), 1, "nothing"),
        (Layout(8, experts=4), 1, "4 blocks of experts"),
        (Layout(8, nodes=2, experts=4), 1, "8 blocks of experts"),
        (Layout(8, hidden=2), 1, "2 slices of hidden"),
        (
            Layout(8, replicas=6, hidden=2, experts=4),
            3,
            "4 blocks of experts x 2 slices of hidden x 3 shards x 2 copies",
        ),
    ],
)
def test_words(layout, shards, words):
    assert _expert_words(layout, shards) == words


def printed(capsys, monkeypatch, flags: str) -> tuple[dict[str, list[str]], list[str]]:
    """Describe a run, and read the last table: its rows, and the lines below it."""
    monkeypatch.setenv("COLUMNS", "160")
    main(["--describe", *flags.split()])
    said = capsys.readouterr().out
    table = said[said.index("bytes per rank") :].splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table if line.startswith("│")]
    below = [line.strip() for line in table[[line.startswith("└") for line in table].index(True) + 1 :]]
    return {table[0].strip(): [], **{row[0]: row[1:] for row in rows}}, below


def test_sixteen_ranks_are_planned_on_one_process(capsys, monkeypatch):
    flags = f"--world-size 16 --model open_lm_41m --fsdp {SPREAD} --precision fp32"
    rows, below = printed(capsys, monkeypatch, flags)
    assert "bytes per rank, 16 ranks" in rows
    experts, others = 6 * 8 * 2 * 288 * 4 * 288, 37_032_480
    for what, total, words in (
        ("experts", experts, "8 blocks of experts x 2 slices of hidden"),
        ("all but experts", others, "16 shards"),
        ("all", experts + others, ""),
    ):
        kept = 4 * total // 16
        assert rows[what] == [f"{number:,}" for number in (total, kept, kept, 2 * kept, 4 * kept)] + [words]
    assert below == [f"rank {rank}: expert {rank % 8}, hidden {rank // 8 + 1} of 2" for rank in range(16)]


def test_many_ranks_are_listed_in_part(capsys, monkeypatch):
    rows, below = printed(capsys, monkeypatch, f"--world-size 1024 --model moekit_tiny {SPREAD}")
    assert "bytes per rank, 1,024 ranks" in rows
    assert rows["experts"][-1] == "8 blocks of experts x 128 slices of hidden"
    assert len(below) == 11
    assert below[7:] == [
        "rank 7: expert 7, hidden 1 of 128",
        "...",
        "rank 1022: expert 6, hidden 128 of 128",
        "rank 1023: expert 7, hidden 128 of 128",
    ]


def test_nothing_is_listed_where_every_rank_holds_all(capsys, monkeypatch):
    rows, below = printed(capsys, monkeypatch, "--world-size 16 --model moekit_tiny")
    assert rows["experts"][-1] == "16 copies"
    assert below == []


def test_no_number_is_cut_in_a_narrow_terminal_or_a_pipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(f"--describe --world-size 64 --model open_lm_160m --fsdp {SPREAD}".split())
    said = capsys.readouterr().out
    assert "360,635,136" in said[said.index("bytes per rank") :]
    assert "…" not in said


def test_a_single_rank(capsys, monkeypatch):
    rows, _ = printed(capsys, monkeypatch, "--world-size 1 --model moekit_tiny")
    assert "bytes per rank, 1 rank" in rows
    assert rows["all"][-1] == ""


def test_without_a_world_size_nothing_is_planned(capsys):
    main(["--describe", "--model", "moekit_tiny"])
    assert "bytes per rank" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            f"--describe --world-size 16 {SPREAD} --moe-expert-ranks 3",
            "expert_ranks (--moe-expert-ranks) is 3, which does not divide 8",
        ),
        (f"--describe --world-size 6 {HYBRID}", "hybrid sharding over 4 ranks; expected a divisor of the 6 ranks"),
    ],
)
def test_plans_that_cannot_be_are_explained(flags, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["--model", "moekit_tiny", *flags.split()])


def test_a_launch_plans_for_no_other_number_of_ranks(capsys):
    with pytest.raises(SystemExit):
        main(["--model", "moekit_tiny", "--world-size", "16"])
    said = " ".join(capsys.readouterr().err.split())
    assert "--world-size plans for --describe; a launch has as many ranks as torchrun starts" in said


def test_the_table_has_a_row_per_group():
    row = Holding("experts", 10, 40, 40, 80, "nothing")
    assert holding_table([row], replicated(2, 8)).row_count == 1


def test_what_a_launch_would_refuse_is_refused_of_a_plan():
    flags = f"{SPREAD} --moe-exchange-chunks 2 --moe-capacity-factor"
    with pytest.raises(ValueError, match="--moe-exchange-chunks 2: a capacity limit would count within each slice"):
        plan(f"{flags} 1.25", 4)
    assert plan(f"{flags} 0", 4)
    with pytest.raises(ValueError, match=r"--moe-exchange-chunks 2 slices .* the router expert_choice .* returns none"):
        plan(f"{SPREAD} --moe-exchange-chunks 2 --recipe expert_choice", 4)
    with pytest.raises(ValueError, match=r"'down_bias' .*Keep the experts whole \(--moe-hidden-ranks 1\)"):
        plan(f"{SPREAD} --recipe gpt_oss", 16)
    assert plan(f"{SPREAD} --recipe gpt_oss --moe-hidden-ranks 1", 16)
