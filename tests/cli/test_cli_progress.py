"""Progress on standard error: rate and time left, redrawn on a terminal, sparse elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from losart.cli import main
from losart.cli import progress as module
from losart.cli.progress import Progress, Steps


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A list whose only item is the time, in seconds."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def use_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> Terminal:
    # Within the test: pytest puts its own stream there after the fixtures.
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    return stream


def test_a_terminal_has_one_line_that_is_cleared(clock, monkeypatch):
    terminal = use_terminal(monkeypatch)
    progress = Progress("reading the prompt", "tokens")
    clock[0] += 2
    progress(500, 2000)
    assert terminal.getvalue() == "\r\033[Kreading the prompt: 500 of 2000 tokens, 250 a second, 0:06 left"
    clock[0] += 6
    progress(2000, 2000)
    assert terminal.getvalue().endswith("left\r\033[K")


def test_what_is_slow_has_seconds_each_and_hours_left(clock, monkeypatch):
    terminal = use_terminal(monkeypatch)
    progress = Progress("asking", "questions")
    clock[0] += 90
    progress(3, 200)
    assert terminal.getvalue().endswith("asking: 3 of 200 questions, 30 s each, 1:38:30 left")


def test_lines_are_cut_to_the_terminal(clock, monkeypatch):
    terminal = use_terminal(monkeypatch, columns=30)
    Progress("reading the prompt", "tokens")(1, 2000)
    assert terminal.getvalue() == "\r\033[Kreading the prompt: 1 of 2000"


def test_leaving_early_clears_what_was_drawn(clock, monkeypatch):
    terminal = use_terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), Progress("asking", "questions") as progress:
        progress(1, 2)
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith("left\r\033[K")
    before = terminal.getvalue()
    with Progress("asking", "questions"):
        pass
    assert terminal.getvalue() == before


def test_elsewhere_a_line_a_minute(clock, capsys):
    progress = Progress("asking", "questions")
    for done in range(1, 8):
        clock[0] += 25
        progress(done, 8)
    assert capsys.readouterr().err.splitlines() == [
        "asking: 3 of 8 questions, 25 s each, 2:05 left",
        "asking: 6 of 8 questions, 25 s each, 0:50 left",
    ]


def test_steps_are_lines_as_they_begin(clock, capsys):
    with Steps(3) as steps:
        for step in ("writing", "loading", "running"):
            steps.begin(step)
            clock[0] += 10
    assert capsys.readouterr().err.splitlines() == [
        "writing: 0 of 3 steps",
        "loading: 1 of 3 steps, 10 s each, 0:20 left",
        "running: 2 of 3 steps, 10 s each, 0:10 left",
    ]


def test_loading_and_prefill_are_shown(tiny_checkpoint, monkeypatch):
    terminal = use_terminal(monkeypatch)
    arguments = ["--device", "cpu", "--prompt", "x" * 1500, "--max-new-tokens", "4"]
    assert main(["generate", str(tiny_checkpoint), *arguments]) == 0
    lines = terminal.getvalue().split("\r\033[K")
    assert any(line.startswith("loading the weights: 1 of 4 layers, ") for line in lines)
    assert any(line.startswith("reading the prompt: 512 of 1500 tokens, ") for line in lines)
    assert lines[-1] == ""
