"""The schematics of docs/parallelism.md can be drawn again, and say what the plans say."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def drawings():
    sys.path.insert(0, str(DOCS))
    try:
        import draw_parallelism
        from drawings import routed, schedules, shapes
    finally:
        sys.path.remove(str(DOCS))
    return {"all": draw_parallelism.DRAWINGS, "routed": routed, "schedules": schedules, "shapes": shapes}


def words(figure):
    return " ".join(text.get_text() for text in figure.axes[0].texts)


def test_every_picture_of_the_page_is_drawn_and_small(drawings, tmp_path):
    page = (DOCS / "parallelism.md").read_text(encoding="utf-8")
    shown = re.findall(r"\(images/parallel_(\w+)\.png\)", page)
    assert sorted(shown) == sorted(drawings["all"])
    for name, draw in drawings["all"].items():
        assert (DOCS / "images" / f"parallel_{name}.png").stat().st_size < 60_000
        assert drawings["shapes"].save(draw(), tmp_path / f"{name}.png").stat().st_size < 60_000


def test_the_numbers_in_a_picture_are_those_of_its_routing(drawings):
    case = drawings["routed"].routed(ranks=4, tokens=4, experts=8, k=2, seed=21)
    pairs = {(token, expert // 2) for token, experts in enumerate(case.choices) for expert in experts}
    own = sum(token // 4 == rank for token, rank in pairs)
    assert sum(map(sum, case.rows(blocks=4))) == len(pairs)
    said = words(drawings["all"]["all_to_all"]())
    assert f"only {len(pairs)} rows" in said
    assert f"{own} of the rows stay on their rank (dashed), {len(pairs) - own} cross a link" in said
    assert f"48 in all, where all_to_all lets {len(pairs) - own} cross" in words(drawings["all"]["all_gather"]())


@pytest.mark.parametrize("num_chunks", [1, 2, 4])
def test_a_time_line_does_one_thing_at_a_time_and_in_order(drawings, num_chunks):
    jobs = drawings["schedules"].simulate(num_chunks)
    assert len(jobs) == 3 * num_chunks
    for lane in ("link", "GPU"):
        there = sorted((job for job in jobs if job.lane == lane), key=lambda job: job.start)
        assert all(a.end <= b.start for a, b in pairwise(there))
    for chunk in range(num_chunks):
        steps = sorted((job for job in jobs if job.chunk == chunk), key=lambda job: job.start)
        assert [job.kind for job in steps] == ["there", "experts", "back"]
        assert all(a.end <= b.start for a, b in pairwise(steps))


def test_chunks_take_less_time(drawings):
    ends = [max(job.end for job in drawings["schedules"].simulate(n)) for n in (1, 2, 4)]
    assert ends == sorted(ends, reverse=True)
