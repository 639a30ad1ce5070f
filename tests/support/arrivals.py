"""Generations that come to an engine and leave it at random, each of which gives what it gives alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hypothesis import strategies as st

import losart
from losart.engine.stream import Stream

Request = tuple[int, int, int, int, int | None]


def requests(prompts: int, options: int) -> st.SearchStrategy[Request]:
    """Numbers of a prompt and of options, new tokens, and when the generation comes and is cancelled."""
    return st.tuples(
        st.integers(0, prompts - 1),
        st.integers(0, options - 1),
        st.sampled_from([1, 5, 16, 30]),
        st.integers(0, 12),  # steps of others before it comes
        st.one_of(st.none(), st.integers(0, 3)),  # own steps before it is cancelled
    )


def check_arrivals(
    asked: list[Request],
    random: Any,
    submit: Callable[[int, int, int], Stream],
    check: Callable[[losart.GenerationResult, int, int, int], None],
    ends: tuple[type[Exception], ...] = (),
) -> int:
    """Submit by prompt, options and new tokens, ask streams for steps at random, and check each result.

    Returns how many came to a result; errors that are `ends` may end others.
    """
    coming = sorted(enumerate(asked), key=lambda one: one[1][3])
    streams: dict[int, Stream] = {}
    taken = dict.fromkeys(range(len(asked)), 0)
    steps = results = 0
    while coming or streams:
        while coming and (not streams or coming[0][1][3] <= steps):
            index, (*request, _, _) = coming.pop(0)
            with suppress(*ends):
                streams[index] = submit(*request)
        if not streams:
            continue
        index = random.choice(list(streams))
        *request, _, cancelled = asked[index]
        if taken[index] == cancelled:
            streams.pop(index).cancel()
            continue
        try:
            step = next(streams[index])
        except ends:
            del streams[index]
            continue
        steps, taken[index] = steps + 1, taken[index] + 1
        if step.result is not None:
            check(step.result, *request)
            results += 1
            del streams[index]
    return results
