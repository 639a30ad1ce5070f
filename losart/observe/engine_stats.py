"""What an engine tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Figures of an engine at one time.

    Attributes
    ----------
    running, waiting : int
        Generations under way, and those that wait for a place, for memory, or for another's prefill.
    kv_bytes_in_use : int
        Memory of the KV caches of those under way; what they share counts once.
    kv_bytes_held : int
        Memory beside that of prefixes that are held for nobody.
    kv_memory : int or None
        The limit of both, in bytes.
    reused_tokens, prefilled_tokens : int
        Of prompts, so far: those that were found, and those that went through the model, again where a
        generation was set back.
    passes : int
        Over blocks, so far; those of prefill are not among them.
    mean_sequences : float
        That such a pass was of.
    set_back : int
        How often a generation gave its memory up and waited.
    """

    running: int
    waiting: int
    kv_bytes_in_use: int
    kv_bytes_held: int
    kv_memory: int | None
    reused_tokens: int
    prefilled_tokens: int
    passes: int
    mean_sequences: float
    set_back: int
