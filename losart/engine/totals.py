"""What an engine's generations have come to so far."""

from __future__ import annotations

from losart.engine.sequence import Mean, ReadLog, Sequence


class Totals:
    """Sums over sequences, those under way as far as they have come.

    Attributes
    ----------
    finished : int
        For the engine to count.
    new_tokens : int
    reads : ReadLog
    queued, first_token : Mean
        Seconds until the first pass, and until the first token is known, of those that have come to it.
    """

    def __init__(self) -> None:
        self.finished = 0
        self.new_tokens = 0
        self.reads = ReadLog()
        self.queued = Mean()
        self.first_token = Mean()

    def add(self, sequence: Sequence) -> None:
        """Count a sequence."""
        self.new_tokens += len(sequence.output.tokens)
        self.reads.include(sequence.reads)
        if sequence.begun:
            self.queued.add(sequence.queue_seconds, 1)
        if sequence.first_token_seconds is not None:
            self.first_token.add(sequence.first_token_seconds, 1)

    def include(self, other: Totals) -> None:
        """Add what another one has."""
        self.finished += other.finished
        self.new_tokens += other.new_tokens
        self.reads.include(other.reads)
        self.queued.include(other.queued)
        self.first_token.include(other.first_token)
