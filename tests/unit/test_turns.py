"""Threads have turns one at a time, in order, and an interrupt gives a turn back."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest

import losart.engine.turns
from losart.engine.turns import Turns


def test_threads_have_turns_in_the_order_in_which_they_ask():
    turns, had = Turns(), list[int]()

    def have(number: int) -> None:
        with turns.turn(), turns.turn():  # one within it is the same
            had.append(number)

    threads = [threading.Thread(target=have, args=(number,)) for number in range(5)]
    with turns.turn():
        for count, thread in enumerate(threads, 1):
            thread.start()
            while len(turns._asking) < count:
                time.sleep(0.001)
        with turns.turn():
            pass
        assert not had
    for thread in threads:
        thread.join()
    assert had == list(range(5)) and not turns._asking


@pytest.mark.parametrize("line", range(9))  # the next one is the end of `with`, where Python takes none
def test_an_interrupt_while_a_turn_is_taken_gives_it_back(line):
    turns, lines = Turns(), 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != losart.engine.turns.__file__:
            return None
        if event == "line":
            if lines == line:
                lines += 1
                raise KeyboardInterrupt
            lines += 1
        return trace

    interrupted = False
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with turns.turn():
            sys.settrace(before)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        sys.settrace(before)
    assert interrupted
    other = threading.Thread(target=lambda: turns.turn().__enter__(), daemon=True)
    other.start()
    other.join(5)
    assert not other.is_alive(), "another thread waits for a turn that nobody has"
