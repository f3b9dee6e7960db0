import signal
import subprocess
import sys
import threading

import pytest

from moekit.lm.signals import StopRequest, exit_on_sigterm, stop_on_signals

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def handlers():
    """Return the handlers that a program has in a terminal; in the background, a shell lets it ignore Ctrl-C."""
    before = [signal.getsignal(number) for number in SIGNALS]
    usual = [signal.default_int_handler, signal.SIG_DFL]
    for number, handler in zip(SIGNALS, usual, strict=True):
        signal.signal(number, handler)
    yield usual
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def current():
    return [signal.getsignal(number) for number in SIGNALS]


def test_nobody_asked_at_first(handlers):
    with stop_on_signals() as stop:
        assert not stop
        assert stop.name is None
        assert current() != handlers
    assert current() == handlers


@pytest.mark.parametrize("number", SIGNALS)
def test_what_a_run_answers_is_heard_around_it(handlers, number):
    with stop_on_signals() as around:
        with stop_on_signals() as stop:
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)
        assert stop.name == around.name == number.name
        with stop_on_signals() as later:
            assert later.name == number.name
    with stop_on_signals() as another:
        assert not another
    assert current() == handlers


def test_a_second_ctrl_c_acts_at_once_however_many_were_around(handlers):
    with stop_on_signals() as around:
        with stop_on_signals():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert around.name == "SIGINT"
    assert current() == handlers


def test_a_program_that_ends_because_of_a_signal_heeds_no_sigterm_on_its_way(handlers):
    with stop_on_signals() as around:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGTERM)
            stop.ends_process = True
        assert current()[1] == signal.SIG_IGN
        assert not around.ends_process
    assert current() == handlers


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_becomes_a_request(handlers, number):
    done = 0
    with stop_on_signals() as stop:
        while not stop and done < 10:
            done += 1
            if done == 3:
                signal.raise_signal(number)
    assert done == 3
    assert stop.name == number.name
    assert current() == handlers


def test_the_second_ctrl_c_acts_at_once(handlers):
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert current() == handlers


def test_a_second_sigterm_still_waits_for_the_loop(handlers):
    with stop_on_signals() as stop:
        for _ in range(3):  # a scheduler, its launcher, and the process group
            signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGTERM"
    assert current() == handlers


def test_a_ctrl_c_after_a_sigterm_acts_at_once(handlers):
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGTERM"


def test_handlers_come_back_after_an_error(handlers):
    with pytest.raises(ValueError, match="mine"), stop_on_signals():
        raise ValueError("mine")
    assert current() == handlers


def test_a_handler_of_the_callers_comes_back(handlers):
    called = []
    signal.signal(signal.SIGINT, lambda number, frame: called.append(number))
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop
        assert called == []
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert called == [signal.SIGINT, signal.SIGINT]


def test_outside_the_main_thread_nobody_asks_and_handlers_stay(handlers):
    found = []

    def run():
        with stop_on_signals() as stop:
            found.append((stop.name, current()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(None, handlers)]
    assert current() == handlers


def test_a_second_sigterm_does_not_cut_short_what_the_first_has_cleaned_up(handlers):
    cleaned = []

    def program():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)

    with pytest.raises(SystemExit, match="143"), exit_on_sigterm():
        program()
    assert cleaned
    assert current() == handlers


def test_a_request_is_false_until_it_has_a_name():
    request = StopRequest()
    assert not request
    request.name = "SIGTERM"
    assert request


def test_a_process_that_is_told_to_terminate_comes_to_its_end():
    program = """
import time
from moekit.lm.signals import stop_on_signals
with stop_on_signals() as stop:
    print("ready", flush=True)
    for _ in range(3000):
        if stop:
            break
        time.sleep(0.01)
print("saved after", stop.name, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        out, _ = process.communicate(timeout=30)
    assert out == "saved after SIGTERM\n"
    assert process.returncode == 0
