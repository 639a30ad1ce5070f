"""The logits of a runner's passes, whatever asks for the passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from losart.engine.batch import PassBatch, PassKind, PassResult


class Seen(NamedTuple):
    """What a pass over one sequence's block has proposed from."""

    start: int
    ids: list[int]
    proposed: list[int]
    kind: PassKind
    logits: NDArray[np.float32]


@contextmanager
def kept_logits(runner: Any) -> Iterator[list[Seen]]:
    """A list that takes what each pass of the runner proposes from, until the end of the context."""
    seen, original = list[Seen](), runner.begin

    def begin(batch: PassBatch, observe: bool = False) -> Callable[[], PassResult]:
        proposing = [one for one in batch.sequences if len(one.proposed)]
        for one in proposing:
            one.keeps_logits = True
        noted = [(one.prefix_length, list(one.ids), list(one.proposed), one.kind) for one in proposing]
        finish = original(batch, observe)

        def finish_and_note() -> PassResult:
            result = finish()
            if result.proposals is not None:
                logits, first = result.proposals.logits, 0
                for one in noted:
                    seen.append(Seen(*one, logits[first : first + len(one[2])]))
                    first += len(one[2])
                assert first == len(logits)
            return result

        return finish_and_note

    runner.begin = begin
    try:
        yield seen
    finally:
        del runner.begin
