"""A sequence on its way through the engine, and a pass that it shared."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import NamedTuple

from losart.engine.batch import PassKind, PassReads
from losart.engine.kv_pool import Prefix
from losart.engine.sequence import Sequence
from losart.observe.step import Observer, Progress, Step


@dataclass(eq=False)
class Run:
    """A sequence in the engine.

    Attributes
    ----------
    sequence : Sequence
    observer, progress : callable, optional
    each_step : bool
        Whether its stream gives a step per denoising pass, and not the last one alone.
    steps : deque of Step
        That nobody has asked for yet.
    error : Exception or None
        Which ended it.
    left : bool
        Whether its stream was closed.
    last_pass : int
        Number of its last pass; 0 before the first.
    joined : float
        When it was queued, by `time.perf_counter`.
    kept : list of Prefix, optional
        Takes what is held of it when it has ended.
    logprobs_told : int
        New tokens whose log-probabilities its steps have.
    spoilt : bool
        Whether a pass that failed may have changed what it found stored.
    """

    sequence: Sequence
    observer: Observer | None = None
    progress: Progress | None = None
    each_step: bool = True
    steps: deque[Step] = field(default_factory=deque)
    error: Exception | None = None
    left: bool = False
    last_pass: int = 0
    joined: float = 0.0
    kept: list[Prefix] | None = None
    logprobs_told: int = 0
    spoilt: bool = False

    @property
    def ended(self) -> bool:
        """Whether no pass follows."""
        return self.left or self.error is not None or self.sequence.finished

    @property
    def commits(self) -> bool:
        """Whether a commit by itself is next."""
        return self.sequence.next_kind is PassKind.COMMIT and not self.sequence.rides_next

    @property
    def prefills(self) -> bool:
        """Whether a piece of the prompt is next."""
        return self.sequence.prefilling


class Done(NamedTuple):
    """A pass that has been run.

    Attributes
    ----------
    reads : sequence of PassReads
        Of all its sequences.
    sequences : int
        That shared it, commits that ride aside.
    seconds : float
    ended : float
        By `time.perf_counter`.
    experts_used : float or None
        As of `PassResult`.
    """

    reads: Ids[PassReads]
    sequences: int
    seconds: float
    ended: float
    experts_used: float | None
