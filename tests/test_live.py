"""The displays of ``record``, fed by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from gradprobe.cli.console import sparkline
from gradprobe.cli.progress import Display, LiveDisplay, make_display
from gradprobe.rows import Header, Row
from gradprobe.trainers.settings import Settings


def feed(display: Display, epochs=2, steps=6):
    display.begin(3, steps, 0)
    display.start(Header(("det", "cls"), ("a", "b"), np.array([10, 20]), np.ones((2, 2), bool)))
    gram = np.array([[[9.0, -3.0], [-3.0, 4.0]], [[7.0, -1.0], [-1.0, 5.0]]])
    for epoch in range(epochs):
        display.phase("training")
        for step in range(epoch * steps, (epoch + 1) * steps):
            display.write(Row(step, epoch, 1.0, np.array([0.25, 0.75]), np.array([1.2, 0.8]), gram))
            display.stepped(epoch, step, {"det": 0.25, "cls": 0.75})
        display.evaluated(epoch, {"mAP50": 0.5 + epoch / 10, "accuracy": float("nan")})


def shown(display: LiveDisplay, width=120) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(display._render())
    return console.file.getvalue()


def test_the_live_display_shows_what_is_promised():
    display = LiveDisplay(Settings())
    feed(display)
    text = shown(display)
    assert "12/18" in text  # steps done
    assert "left" in text
    for number in ("0.250", "0.750", "1.200", "0.800", "4.000", "3.000"):  # losses, weights, norms sqrt(16), sqrt(9)
        assert number in text, number
    assert "det|cls -0.33" in text  # -4 / (4 * 3)
    assert "0.500" in text
    assert "0.600" in text
    assert "mAP50-95" in text


def test_the_live_display_fits_a_narrow_terminal():
    display = LiveDisplay(Settings())
    feed(display)
    assert max(len(line) for line in shown(display, 60).splitlines()) <= 60


@pytest.mark.parametrize("width", [60, 80])
def test_the_numbers_can_be_read_in_a_narrow_terminal(width):
    display = LiveDisplay(Settings())
    feed(display)
    text = shown(display, width)
    for number in ("0.250", "0.750", "1.200", "0.800", "4.000", "3.000", "det|cls -0.33"):
        assert number in text, number


def test_the_epoch_shown_is_the_one_that_runs():
    display = LiveDisplay(Settings())
    display.begin(10, 6, 36)
    display.phase("evaluating")
    assert "epoch 7/10 evaluating" in shown(display)
    for epoch in range(6, 10):
        display.stepped(epoch, epoch * 6, {"det": 1.0, "cls": 1.0})
        display.evaluated(epoch, {})
    display.phase("testing")
    assert "epoch" not in shown(display).splitlines()[0]


def test_rows_may_arrive_while_the_terminal_is_drawn():
    import sys
    import threading

    display, failures, done = LiveDisplay(Settings()), [], threading.Event()
    feed(display)
    gram = np.tile(np.eye(2), (2, 1, 1))

    def draw():
        try:
            while not done.is_set():
                display._task_table()
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for step in range(3000):
            display.write(Row(step, 0, 1.0, np.ones(2), np.ones(2), gram))
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not failures


def test_before_anything_is_known_there_is_a_bar_alone():
    assert "starting" in shown(LiveDisplay(Settings()))


def test_a_resumed_training_counts_the_steps_it_has_behind_it():
    display = LiveDisplay(Settings())
    display.begin(3, 6, 6)
    assert "6/18" in shown(display)


def test_plain_lines(capsys):
    display = Display(Settings())
    display.line_seconds = 0.0
    feed(display, epochs=1)
    display.result("recorded: x.h5")
    out, err = capsys.readouterr()
    assert out == "recorded: x.h5\n"
    assert "2 shared layers, 30 parameters" in err
    assert "epoch 1/3 on val: mAP50 0.500" in err
    assert "accuracy -" in err


def test_without_a_terminal_the_plain_form_is_taken(monkeypatch):
    assert type(make_display(Settings())) is Display
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert type(make_display(Settings())) is LiveDisplay
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_display(Settings())) is Display


@pytest.mark.parametrize(("values", "text"), [([-1, 0, 1, float("nan")], "▁▅█ "), ([], "")])
def test_sparkline(values, text):
    from collections import deque

    assert sparkline(deque(values)) == text
