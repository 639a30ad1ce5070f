"""What an engine tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineStats:
    """Figures of an engine at one time.

    Attributes
    ----------
    running, waiting : int
        Generations under way, and those that wait for a place, for memory, or for another's prefill.
    finished : int
        Generations that ran to their end, so far; those that were cancelled or that an error ended are not
        among them, but count in all that follows.
    kv_bytes_in_use : int
        Memory of the KV caches of those under way; what they share counts once.
    kv_bytes_shared : int
        What they would take beside it if each had all of its own.
    kv_bytes_held : int
        Memory beside that of prefixes that are held for nobody.
    kv_memory : int or None
        The limit of both, in bytes.
    kv : str
        The format in which keys and values are held, as of :class:`losart.Model`.
    matrix_bytes : dict of str to int
        What the model's matrices of each format take, as of :class:`losart.Model`.
    reused_tokens, prefilled_tokens : int
        Of prompts, so far: those that were found, and those that went through the model, again where a
        generation was set back.
    new_tokens : int
        Known so far, of generations under way too.
    decode_seconds : float
        In which passes over blocks ran, each from its launch until its result was there, however many
        generations it was of. Those of prefill are not among them, nor what is done between passes.
    passes : int
        Over blocks, so far; those of prefill are not among them.
    mean_sequences : float
        That such a pass was of.
    density : float or None
        Mean share of the prefix that was read, per kv head, layer, pass and generation, as in
        :class:`losart.Stats`; None when the prefix was always empty.
    experts_used : float or None
        Mean number of experts that a layer of such a pass used, as in :class:`losart.Stats`; None without
        layers that have experts.
    mean_queue_seconds, mean_first_token_seconds : float or None
        Before the first pass, and to the first token that is known, as in :class:`losart.Stats`: means over
        the generations that have come to it, None when none has.
    set_back : int
        How often a generation gave its memory up and waited.
    """

    running: int
    waiting: int
    finished: int
    kv_bytes_in_use: int
    kv_bytes_shared: int
    kv_bytes_held: int
    kv_memory: int | None
    kv: str
    matrix_bytes: dict[str, int] = field(hash=False)
    reused_tokens: int
    prefilled_tokens: int
    new_tokens: int
    decode_seconds: float
    passes: int
    mean_sequences: float
    density: float | None
    experts_used: float | None
    mean_queue_seconds: float | None
    mean_first_token_seconds: float | None
    set_back: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the seconds of passes over blocks, so far."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0
