"""The picture of an ablation."""

import pytest
from matplotlib import image

from moekit.lm.ablation_plots import Dots, _mean, _panel, plot_ablation, shown_range
from moekit.lm.plots import matplotlib_parts


def test_it_draws_a_picture_that_depends_on_the_numbers(tmp_path):
    first = [Dots("a", {"prose": [4.0, 4.1]}), Dots("b", {"prose": [4.2, 4.3]})]
    other = [first[0], Dots("b", {"prose": [4.2, 4.3]}, comparable=False)]
    pictures = [
        image.imread(plot_ablation(tmp_path / f"{name}.png", dots, sets=["prose"], baseline=None))
        for name, dots in (("first", first), ("other", other), ("again", first))
    ]
    assert all(picture.std() > 0.05 for picture in pictures)
    assert (pictures[0] == pictures[2]).all()
    assert (pictures[0] != pictures[1]).any()


def test_more_rows_and_more_sets_make_a_larger_picture(tmp_path):
    few = [Dots("a", {"prose": [4.0], "code": [3.0]})]
    many = [Dots(str(number), {"prose": [4.0 + number], "code": [3.0]}) for number in range(30)]
    shapes = [
        image.imread(plot_ablation(tmp_path / f"{name}.png", dots, sets=sets, baseline=None)).shape
        for name, dots, sets in (("a", few, ["prose"]), ("b", many, ["prose"]), ("c", few, ["prose", "code"]))
    ]
    assert shapes[1][0] > shapes[0][0]
    assert shapes[2][1] > shapes[0][1]


@pytest.mark.parametrize("losses", [[4.0], [4.0, 4.0], [3.0, 4.0, 5.0]])
def test_all_is_shown_where_nothing_is_far(losses):
    low, high = shown_range([[loss] for loss in losses])
    assert low < min(losses) <= max(losses) < high


def test_what_is_far_from_the_middle_half_is_left_out():
    low, high = shown_range([[1.0, 1.1], *([4.0 + 0.01 * n] for n in range(20)), [30.0]])
    assert 3.9 < low < 4.0
    assert 4.19 < high < 4.3


def test_a_row_is_shown_with_all_its_seeds():
    low, high = shown_range([[4.0, 5.0], [4.5, 4.5], [4.4, 4.6], [2.0, 7.0]])
    assert low < 2.0
    assert high > 7.0


def test_routers_are_in_the_order_of_their_losses_over_all_sets():
    assert _mean(Dots("a", {"x": [1.0, 2.0], "y": [3.0]}), ["x", "y"]) == 4.5


def test_a_row_is_at_the_edge_unless_all_its_seeds_are_shown():
    """The mean of the last one lies in the margin of what the others take."""
    rows = [[14.0], [14.0], [9.0, 21.0], [19.6, 23.0]]
    dots = [Dots(str(number), {"prose": losses}) for number, losses in enumerate(rows)]
    axis = matplotlib_parts()[0]().subplots()
    _panel(axis, dots, "prose", baseline=None)
    low, high = axis.get_xlim()
    assert 21.3 < high < 23.0
    assert [text.get_text() for text in axis.texts] == ["21.30 ▸"]
    shown = [x for collection in axis.collections for x, _ in collection.get_offsets()]
    assert sorted(shown) == [9.0, 14.0, 14.0, 21.0]
    assert low < 9.0
