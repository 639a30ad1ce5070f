"""What a generation gives: the result with its figures, and the steps on the way."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Figures of one generation.

    Attributes
    ----------
    prompt_tokens, new_tokens : int
    reused_tokens, prefilled_tokens : int
        Of the prompt: those whose keys and values a session held already, and those that went
        through the model. Less than a block is left, which is decoded with the first new tokens.
    denoising_passes, commit_passes : int
        Forward passes over a block; those of prefill are not among them.
    prefill_seconds, decode_seconds : float
    active_fraction : float or None
        Mean share of a block's tokens recomputed in sparse prefix attention.
    sparse_density : float or None
        Mean share of the prefix that was read, per kv head, layer and pass, over the passes that
        the attention method reads sparsely (arXiv 2604.12056); None without such a pass.
    density : float or None
        The same over all passes; None when the prefix was always empty.
    """

    prompt_tokens: int
    new_tokens: int
    reused_tokens: int
    prefilled_tokens: int
    denoising_passes: int
    commit_passes: int
    prefill_seconds: float
    decode_seconds: float
    active_fraction: float | None
    sparse_density: float | None
    density: float | None

    @property
    def forward_passes(self) -> int:
        """Denoising and commit passes."""
        return self.denoising_passes + self.commit_passes

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the seconds of decoding."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class GenerationResult:
    """What a generation gave.

    Attributes
    ----------
    text : str
        The new text, without special tokens, cut before a stop string. Empty for a checkpoint
        without a tokenizer.
    token_ids : list of int
        The new tokens, up to and including the one that stopped.
    finish_reason : {"stop", "length"}
        Ended by an end token or stop string, or by the number of tokens.
    stats : Stats
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Step:
    """One denoising pass of a stream.

    Attributes
    ----------
    block_start : int
        Position of the block in the sequence, prompt included.
    block : list of int or None
        Tokens of the block after this pass; None where still masked.
    positions : list of int
        Positions within the block that this pass fixed, rising.
    text : str
        The new text so far, up to the first masked position.
    result : GenerationResult or None
        In the last step.
    """

    block_start: int
    block: list[int | None]
    positions: list[int]
    text: str
    result: GenerationResult | None = None
