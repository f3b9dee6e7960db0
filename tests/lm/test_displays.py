import math
import re
import sys
from io import StringIO

import pytest
from rich.console import Console

from moekit.lm.displays import LayerLoad, StepReport, _worst, load_bar, show_training

LAYERS = [
    LayerLoad(0, [0.5, 0.25, 0.25, 0.0], 1.0, 0.125, 1.25, 1, 8, 4),
    LayerLoad(2, [0.25] * 4, 0.0, 0.0, 1.39, 0, 8, 4),
]


def report(step, **changes):
    return StepReport(step, 40, 3.25, 1.02, 2.5e-3, 12345.6, LAYERS)._replace(**changes)


def plain(**options):
    return Console(file=StringIO(), width=60, force_terminal=False, **options)


def terminal(**options):
    colors = {"color_system": "truecolor", "_environ": {}}
    return Console(file=StringIO(), width=110, height=30, force_terminal=True, **colors, **options)


def without_escapes(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.mark.parametrize(
    ("load", "bar"),
    [
        ([0.25] * 4, "▄▄▄▄"),
        ([1.0, 0.0, 0.0, 0.0], "█   "),
        ([0.5, 0.5, 0.0, 0.0], "██  "),
        ([0.125, 0.125, 0.375, 0.375], "▂▂▆▆"),
        ([0.999, 0.001], "█▁"),  # a little is not nothing
        ([1.0], "▄"),
        ([], ""),
    ],
)
def test_load_bar(load, bar):
    assert load_bar(load) == bar


def test_load_bar_has_one_character_per_expert():
    assert load_bar([1 / 64] * 64) == "▄" * 64


def test_without_a_terminal_every_step_is_one_plain_line():
    console = plain()
    with show_training(console, 40) as display:
        display.update(report(10))
        display.say("[bold]saved[/bold]")
        display.update(report(40))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 3, "longer than the console is wide, and still one line each"
    assert "\x1b" not in console.file.getvalue()
    assert lines[0].startswith("step    10/40  loss 3.250  balance 1.02  12,346 tokens/s  left ")
    assert lines[0].endswith("L0 █▄▄   L2 ▄▄▄▄  max violation 1.00  dropped 12.5%  dead 1"), "of the worst layer"
    assert lines[1] == "[bold]saved[/bold]"
    assert "left 0 s" in lines[2]


@pytest.mark.parametrize(
    ("seconds", "plainly", "live"),
    [(0.0, "left 0 s", "left 0:00:00"), (5.0, "left 3 s", "left 0:00:03"), (1500.0, "left 1000 s", "left 0:16:40")],
)
def test_the_time_left_counts_the_steps_of_this_launch_alone(seconds, plainly, live):
    """However long a step takes: of what is older than 30 s, rich's own column knows nothing."""
    for make_console, expected in ((plain, plainly), (terminal, live)):
        now = [1000.0]
        console = make_console(get_time=lambda now=now: now[0])
        with show_training(console, 40, done=20) as display:
            for step in (30, 35):
                now[0] += seconds
                display.update(report(step))
        text = without_escapes(console.file.getvalue())
        assert expected in " ".join(text[text.rindex("35/40") :].split())


def test_before_the_first_step_the_time_left_is_open():
    console = terminal()
    with show_training(console, 40):
        pass
    assert "left -:--:--" in " ".join(without_escapes(console.file.getvalue()).split())


def test_a_dense_model_has_no_loads_to_show():
    console = plain()
    with show_training(console, 40) as display:
        display.update(report(10, layers=[], balance=None))
    assert console.file.getvalue().rstrip().endswith(" s")


@pytest.mark.parametrize("make_console", [plain, terminal])
def test_the_share_of_the_peak_is_shown_where_it_is_known(make_console):
    for mfu, shown in ((0.4137, True), (None, False)):
        console = make_console()
        with show_training(console, 40) as display:
            display.update(report(10, mfu=mfu))
        assert ("41.4%" in without_escapes(console.file.getvalue())) == shown


@pytest.mark.parametrize("make_console", [plain, terminal])
def test_without_a_balancing_loss_there_is_no_word_of_it_and_one_that_is_no_number_is_shown(make_console):
    said = []
    for balance in (None, math.nan):
        console = make_console()
        with show_training(console, 40) as display:
            display.update(report(10, balance=balance))
        said.append(without_escapes(console.file.getvalue()))
    assert "balance" not in said[0]
    assert "loss 3.250" in said[0]
    assert "balance nan" in said[1]


def test_on_a_terminal_there_is_a_live_panel():
    console = terminal()
    with show_training(console, 40) as display:
        display.update(report(10))
        display.update(report(30, loss=2.5))
    raw = console.file.getvalue()
    assert "\x1b[?25l" in raw, "the cursor is hidden while the panel is live"
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l"), "and shown again"
    text = without_escapes(raw)
    last = text[text.rindex("training") :]
    assert "30/40" in last
    assert "75%" in last
    assert "loss 2.500" in last
    assert "balance 1.02" in last
    assert "lr 2.5e-03" in last
    assert "tokens/s 12,346" in last
    for heading in ("MoE layer", "expert load", "max violation", "dropped", "router entropy", "dead"):
        assert heading in last
    rows = [line.split() for line in last.splitlines() if "▄" in line]
    assert rows == [["0", "█▄▄", "1.00", "12.5%", "1.25", "1"], ["2", "▄▄▄▄", "0.00", "0.0%", "1.39", "0"]]


def test_a_resumed_run_starts_where_it_was():
    console = terminal()
    with show_training(console, 40, done=20):
        pass
    assert "50%" in without_escapes(console.file.getvalue())


def test_a_line_said_on_a_terminal_stays_above_the_panel():
    console = terminal()
    with show_training(console, 40) as display:
        display.update(report(10))
        display.say("[bold]saved[/bold]")
    text = without_escapes(console.file.getvalue())
    assert "[bold]saved[/bold]" in text
    assert text.rindex("training") > text.index("saved")


def test_a_quiet_terminal_keeps_no_warning_back(capsys):
    with show_training(terminal(quiet=True), 40) as display:
        display.update(report(10))
        print("a warning", file=sys.stderr)
    assert capsys.readouterr().err == "a warning\n"


def test_the_cursor_comes_back_after_an_error():
    console = terminal()
    with pytest.raises(ValueError, match="mine"), show_training(console, 40):
        raise ValueError("mine")
    raw = console.file.getvalue()
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")


def test_dead_experts_of_all_layers_are_told():
    one = LayerLoad(0, [1.0, 0.0], 1.0, 0.0, 0.0, 1, 8, 4)
    assert _worst([one, one._replace(layer=1)]).endswith("dead 2")
