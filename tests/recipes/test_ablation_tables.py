"""The table of an ablation, from made-up runs whose numbers can be added up by hand."""

from typing import Any

import pytest

from moekit.lm import ablation_plots
from moekit.recipes.ablation_summaries import dead_experts, loads, spread, summaries
from moekit.recipes.ablation_tables import cells, draw, headings, markdown, notes


def scores(
    loss: float, *layers: list[float], assignments: int = 200, unigram: float = 9.0, simple: int = 0
) -> dict[str, Any]:
    counts = {"assignments": assignments, "tokens": 100, "simple_experts": simple}
    return {
        "loss": loss,
        "tokens": 100,
        "unigram": unigram,
        "layers": [{"layer": 2 * index, "load": load, **counts} for index, load in enumerate(layers)],
    }


EVEN = [0.25] * 4


def line(router: str, seed: int, prose: float, code: float, **changes: Any) -> dict[str, Any]:
    return {
        "router": router,
        "seed": seed,
        "validation": {"prose": scores(prose, EVEN, EVEN), "code": scores(code, EVEN, EVEN)},
        "experts_per_token": 2.0,
        "drop_rate": 0.0,
        "tokens": 1000,
        "seconds": 2.0,
        "leaks": {"training": False, "evaluation": False},
        **changes,
    }


def test_losses_are_means_with_half_the_range_and_differences_are_paired_by_seed():
    # The seeds differ by 1, the routers by 0.1 and 0.3: unpaired, that would drown.
    lines = [line("a", 0, 4.0, 6.0), line("b", 0, 4.1, 6.1), line("a", 1, 5.0, 7.0), line("b", 1, 5.3, 7.3)]
    a, b = summaries(lines)
    assert (a.label, b.label) == ("a", "b")
    assert a.losses["prose"] == spread([4.0, 5.0])
    assert a.against is None
    assert b.against.mean == pytest.approx(0.2)
    assert b.against.half_range == pytest.approx(0.1)
    assert cells(b, [a, b])[:4] == ["b", "4.700 ± 0.600", "6.700 ± 0.600", "+0.200 ± 0.100"]
    assert cells(a, [a, b])[3:] == ["-", "2.00", "0.00", "0", "0.0%", "500", "yes", "trains"]


def test_a_seed_that_the_first_lacks_is_not_compared():
    a, b = summaries([line("a", 0, 4.0, 4.0), line("b", 0, 4.5, 4.5), line("b", 1, 9.0, 8.0)])
    assert b.against == spread([0.5])
    assert cells(b, [a, b])[3] == "+0.500 (1 of 2)"
    assert summaries([line("a", 0, 4.0, 4.0), line("b", 1, 4.5, 4.5)])[1].against is None
    assert a.losses["prose"].half_range == 0


def test_loads_add_up_over_validation_sets_by_their_assignments_and_layers_stay_apart():
    validation = {  # of equally many tokens, of which those of prose have three times as many experts
        "prose": scores(4.0, [1.0, 0.0], [0.5, 0.5], assignments=300),
        "code": scores(4.0, [0.0, 1.0], [0.5, 0.5], assignments=100),
    }
    whole = line("a", 0, 0, 0, validation=validation)
    assert loads(whole) == [[0.75, 0.25], [0.5, 0.5]]
    assert dead_experts(whole) == 0  # each expert is dead for one set, and none for both
    assert summaries([whole])[0].max_violation == pytest.approx(0.5)  # of the worst layer
    assert summaries([whole])[0].verdict == "trains"


def test_a_layer_that_sends_no_token_anywhere_is_dead_and_not_uneven():
    nobody = {"prose": scores(4.0, [0.0] * 4, assignments=0), "code": scores(4.0, [0.0] * 4, assignments=0)}
    [row] = summaries([line("a", 0, 0, 0, validation=nobody)])
    assert (row.max_violation, row.dead_experts, row.verdict) == (0.0, 4.0, "collapsed: 4 dead")


def test_a_run_of_an_older_version_is_read_and_told():
    """It has the assignments of no set: a set counts by its tokens, which the table says."""
    old = line("old", 0, 4.0, 4.0, validation={"prose": scores(4.0, [1.0, 0.0]), "code": scores(4.0, [0.0, 1.0])})
    for each, tokens in zip(old["validation"].values(), (300, 100), strict=True):
        each["tokens"] = tokens
        each["layers"] = [{name: layer[name] for name in ("layer", "load")} for layer in each["layers"]]
    assert loads(old) == [[0.75, 0.25]]
    rows = summaries([line("new", 0, 4.0, 4.0), old, line("lost", 0, 4.0, 4.0, failed="x")])
    assert [row.older for row in rows] == [False, True, False]
    told, counting = (note for note in notes(rows) if "older version" in note)
    assert told.startswith("old: with runs of an older version, whose experts/token are of the first batch of each set")
    assert counting.startswith("old: ")
    assert told in markdown(rows)
    assert not any("older version" in note for note in notes(rows[:1]))


def test_simple_experts_are_not_counted_and_a_run_that_counted_them_is_told():
    """Of the four experts the last two are simple: one takes half of the assignments, and one takes none."""
    validation = {name: scores(4.0, [0.125, 0.375, 0.5, 0.0], simple=2) for name in ("prose", "code")}
    new = line("new", 0, 0, 0, validation=validation)
    assert loads(new) == [[0.125, 0.375]]
    old = line("old", 0, 0, 0, validation={name: scores(4.0, [0.125, 0.375, 0.5, 0.0]) for name in validation})
    for each in old["validation"].values():
        del each["layers"][0]["simple_experts"]
    rows = summaries([new, old])
    assert [(row.max_violation, row.dead_experts, row.verdict) for row in rows] == [
        (0.5, 0.0, "trains"),
        (1.0, 1.0, "collapsed: 1 dead"),
    ]
    assert [(row.older, row.counts_all) for row in rows] == [(False, False), (False, True)]
    [told] = [note for note in notes(rows) if "older version" in note]
    assert told.startswith(
        "old: with runs of an older version, whose experts/token, max violation and dead count simple"
    )
    assert not any("older version" in note for note in notes(rows[:1]))


def test_it_says_which_routers_collapsed():
    dead = {"prose": scores(4.0, [0.5, 0.5, 0.0, 0.0], EVEN), "code": scores(4.0, [0.5, 0.5, 0.0, 0.0], EVEN)}
    blind = {"prose": scores(4.0, EVEN), "code": scores(9.0, EVEN, unigram=9.0)}
    rows = summaries(
        [
            line("even", 0, 4.0, 4.0),
            line("dead", 0, 4.0, 4.0),
            line("dead", 1, 0, 0, validation=dead),
            line("blind", 0, 0, 0, validation=blind),
            {"router": "lost", "seed": 0, "failed": "the loss is not finite at step 3"},
            line("half", 0, 4.0, 4.0),
            {"router": "half", "seed": 1, "failed": "the loss is not finite at step 3"},
        ]
    )
    assert {row.label: row.verdict for row in rows} == {
        "even": "trains",
        "dead": "collapsed: 2 dead",  # the worst seed
        "blind": "collapsed: unigram",
        "lost": "collapsed: not finite",
        "half": "collapsed: not finite",
    }
    assert rows[1].dead_experts == 1.0  # the mean
    assert cells(rows[3], rows) == ["lost", *["-"] * 9, "collapsed: not finite"]
    assert cells(rows[4], rows)[1] == "4.000 (1 of 2)"


def test_a_loss_that_sees_its_targets_has_a_star_and_a_note():
    sees = line("sees", 0, 1.0, 1.0, leaks={"training": True, "evaluation": True})
    trained = line("trained", 0, 4.0, 4.0, leaks={"training": True, "evaluation": False})
    rows = summaries([line("a", 0, 4.0, 4.0), sees, trained])
    assert cells(rows[1], rows)[1:4] == ["1.000*", "1.000*", "-3.000*"]
    assert [cells(row, rows)[-2] for row in rows] == ["yes", "no", "evaluation"]
    assert any("not comparable" in note for note in notes(rows))
    assert any(note.startswith("causal in evaluation") for note in notes(rows))
    assert len(notes(rows[:1])) == 3
    text = markdown(rows)
    assert r"| sees | 1.000\* | 1.000\* | -3.000\* |" in text
    assert r"\* not comparable" in text


def test_every_row_has_as_many_cells_as_there_are_headings():
    rows = summaries([line("a", 0, 4.0, 4.0), {"router": "b", "seed": 0, "failed": "x"}])
    assert headings(rows)[:4] == ["router", "prose", "code", "vs a"]
    assert {len(cells(row, rows)) for row in rows} == {len(headings(rows))}
    lengths = {row.count("|") for row in markdown(rows).splitlines() if row.startswith("|")}
    assert lengths == {len(headings(rows)) + 1}


def test_a_table_of_failures_alone_is_a_table(tmp_path):
    rows = summaries([{"router": "a", "seed": 0, "failed": "x"}])
    assert "| a | - |" in markdown(rows)
    assert not any("seeds" in note and "±" in note for note in notes(rows)), "there is no mean over 0 seeds"
    assert draw(tmp_path / "a.png", rows).stat().st_size > 0


def test_columns_are_means_over_seeds_of_the_worst_layer_and_tell_of_any_leak():
    uneven = {"prose": scores(1.0, [0.5, 0.5], [0.75, 0.25])}
    leaky = {"training": True, "evaluation": True}
    other = {"drop_rate": 0.5, "experts_per_token": 3.0, "leaks": leaky}
    lines = [line("a", seed, 1.0, 1.0, validation=uneven, seconds=0.5, **(other if seed else {})) for seed in (0, 1)]
    [row] = summaries(lines)
    assert (row.max_violation, row.drop_rate, row.experts_per_token) == (0.5, 0.25, 2.5)
    assert (row.leaks_training, row.leaks_evaluation, row.tokens_per_second) == (True, True, 2000)


def test_a_seed_that_failed_in_the_first_router_is_not_compared():
    lost = {"router": "a", "seed": 1, "failed": "not finite"}
    lines = [line("a", 0, 4.0, 4.0), lost, line("b", 0, 4.5, 4.5), line("b", 1, 5.0, 5.0)]
    assert summaries(lines)[1].against == spread([0.5])


def lost(router: str, seed: int) -> dict[str, Any]:
    return {"router": router, "seed": seed, "failed": "the loss is not finite at step 3"}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # one seed of the only router is left
        ([lost("a", 0), line("a", 1, 4.5, 4.6)], [["4.500 (1 of 2)", "4.600 (1 of 2)", "-"]]),
        # each router has one seed left, and not the same
        (
            [lost("a", 0), line("b", 0, 4.0, 4.0), line("a", 1, 4.5, 4.5), lost("b", 1)],
            [["4.500 (1 of 2)", "4.500 (1 of 2)", "-"], ["4.000 (1 of 2)", "4.000 (1 of 2)", "-"]],
        ),
        # the second seed of b is not done: b is worse, and its mean is less
        (
            [line("a", 0, 4.0, 4.0), line("b", 0, 4.2, 4.2), line("a", 1, 6.0, 6.0)],
            [["5.000 ± 1.000", "5.000 ± 1.000", "-"], ["4.200 (1 of 2)", "4.200 (1 of 2)", "+0.200 (1 of 2)"]],
        ),
        # b has both seeds, and its difference has not
        (
            [line("a", 0, 4.0, 4.0), line("b", 0, 4.2, 4.2), lost("a", 1), line("b", 1, 4.4, 4.4)],
            [["4.000 (1 of 2)", "4.000 (1 of 2)", "-"], ["4.300 ± 0.100", "4.300 ± 0.100", "+0.200 (1 of 2)"]],
        ),
    ],
)
def test_numbers_of_fewer_seeds_than_the_ablation_has_say_so(lines, expected, figures, tmp_path):
    rows = summaries(lines)
    assert [cells(row, rows)[1:4] for row in rows] == expected
    text = " ".join(notes(rows))
    assert "over 2 seeds" in text
    assert "(n of 2): over n seeds alone" in text
    draw(tmp_path / "a.png", rows)
    labels = {each.get_text() for each in figures[0].axes[0].get_yticklabels()}
    few = {row.label: "(1 of 2)" in cells(row, rows)[1] for row in rows}
    assert labels == {f"{label} (1 of 2 seeds)" if missing else label for label, missing in few.items()}


def test_nothing_is_said_of_missing_seeds_where_none_is_missing():
    assert " of 2)" not in markdown(summaries([line(router, seed, 4.0, 4.0) for seed in (0, 1) for router in "ab"]))


def test_a_number_of_fewer_seeds_keeps_its_range_and_its_star():
    sees = {"leaks": {"training": True, "evaluation": True}}
    rows = summaries([line("a", seed, 4.0 + seed, 4.0, **sees) for seed in (0, 1)] + [lost("a", 2)])
    assert cells(rows[0], rows)[1] == "4.500 ± 0.500* (2 of 3)"


@pytest.fixture
def figures(monkeypatch) -> list[Any]:
    """Collect the figures of pictures that are drawn."""
    kept, save = [], ablation_plots.save_figure

    def keep(path, figure):
        kept.append(figure)
        return save(path, figure)

    monkeypatch.setattr(ablation_plots, "save_figure", keep)
    return kept


def dashed(figure: Any) -> list[list[float]]:
    """Where each panel has a line of the baseline."""
    return [[at.get_xdata()[0] for at in axis.get_lines() if at.get_linestyle() == "--"] for axis in figure.axes]


def test_the_line_of_the_picture_is_the_mean_of_the_first_router_and_of_no_other(figures, tmp_path):
    lost = [{"router": "a", "seed": seed, "failed": "not finite"} for seed in (0, 1)]
    others = [line("b", 0, 4.0, 5.0), line("b", 1, 4.2, 5.2)]
    draw(tmp_path / "whole.png", summaries([line("a", 0, 3.0, 4.0), line("a", 1, 4.0, 5.0), *others]))
    draw(tmp_path / "lost.png", summaries([*lost, *others]))
    assert [dashed(figure) for figure in figures] == [[[3.5], [4.5]], [[], []]]


def test_a_difference_from_a_router_that_sees_its_targets_has_a_star_and_the_picture_no_line(figures, tmp_path):
    sees = {"leaks": {"training": True, "evaluation": True}}
    rows = summaries([line("sees", 0, 4.0, 4.0, **sees), line("a", 0, 3.9, 4.0), line("b", 0, 3.9, 3.9, **sees)])
    assert [row.split(" | ")[1:4] for row in markdown(rows).splitlines()[2:5]] == [
        [r"4.000\*", r"4.000\*", "-"],
        ["3.900", "4.000", r"-0.050\*"],
        [r"3.900\*", r"3.900\*", r"-0.100\*"],
    ]
    assert any(note.endswith("That of sees does, so no difference from it is comparable.") for note in notes(rows))
    assert not any("no difference" in note for note in notes(rows[1:]))
    draw(tmp_path / "a.png", rows)
    assert dashed(figures[0]) == [[], []]


def test_notes_tell_that_what_is_dropped_is_of_logged_steps():
    told = " ".join(notes(summaries([line("a", 0, 4.0, 4.0)])))
    assert "dropped: in training, the mean of the steps that were logged." in told
