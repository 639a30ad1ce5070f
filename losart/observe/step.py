"""What a generation tells on its way: a step per pass, and the result in the last one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Stats:
    """Figures of one generation.

    Attributes
    ----------
    prompt_tokens, new_tokens : int
    reused_tokens, prefilled_tokens : int
        Of the prompt: those whose keys and values a session or an engine held already, and those that
        went through the model. Less than a block is left, which is decoded with the first new tokens.
    denoising_passes, commit_passes : int
        Passes over a block; those of prefill are not among them.
    prefill_seconds, decode_seconds : float
        Of its passes, each counted whole whatever shared it.
    active_fraction : float or None
        Mean share of a block's tokens recomputed in sparse prefix attention.
    sparse_density : float or None
        Mean share of the prefix that was read, per kv head, layer and pass, over the passes that
        the attention method reads sparsely (arXiv 2604.12056); None without such a pass.
    density : float or None
        The same over all passes; None when the prefix was always empty.
    rides : int
        Commit passes that shared a forward pass with the first denoising pass over the next block.
    queue_seconds : float
        Before the first pass, from when the generation was started or first asked for a step.
    first_token_seconds : float or None
        From then to the first token that is known.
    mean_sequences : float
        That shared a forward pass over a block with this one, itself counted, on average.
    kv_bytes, kv_bytes_shared : int
        Memory of its KV cache in the end, in whole chunks; and of that what another generation's cache had
        when this one began.
    experts_used : float or None
        Experts that the tokens of a forward pass over a block went to, those of other generations in it
        included and shared experts not: mean over passes and layers that have experts. None without such.
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
    rides: int = 0
    queue_seconds: float = 0.0
    first_token_seconds: float | None = None
    mean_sequences: float = 1.0
    kv_bytes: int = 0
    kv_bytes_shared: int = 0
    experts_used: float | None = None

    @property
    def forward_passes(self) -> int:
        """Denoising and commit passes, those that ride together counted once."""
        return self.denoising_passes + self.commit_passes - self.rides

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the seconds of decoding."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """How probable a new token was in the pass that fixed it, or that changed it last.

    Log-probabilities are natural logarithms of the model's own distribution there: the softmax of the logits
    at temperature 1 over all tokens but the mask token, whatever `temperature`, `top_k` and `top_p` say.

    Attributes
    ----------
    token : int
    logprob : float
    top : tuple of (int, float)
        The most probable tokens with their log-probabilities, the highest first.
    pass_number : int
        Of the denoising pass, from 1. A token that a finished block gives for the next one has the number of
        the last pass before it, which is 0 where it follows the prompt.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    pass_number: int


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
        Ended by an end token, a stop string or the end of a grammar, or by the number of tokens.
    stats : Stats
    logprobs : list of TokenLogprob or None
        Of each of `token_ids`; None without the option `logprobs`.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats
    logprobs: list[TokenLogprob] | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class ObservedLayer:
    """What one layer of a pass read of the prefix.

    Attributes
    ----------
    active : int [any]
        Positions within the block whose prefix attention was computed, ascending; the others reused
        their stored results.
    pages : tuple of int [any]
        For each kv head the pages that were read, ascending; page i begins at position i * page_size.
    density : float or None
        Positions in those pages over the prefix length, a mean over kv heads (arXiv 2604.12056);
        None when the prefix is empty.
    dense : bool
        All tokens read all pages because the layer was dense.
    change : float32 [block_length] or None
        By how much each token's query had changed, where active tokens were selected by that: with
        `active="auto"` relative to the query's square, and active are those above the threshold.
    """

    active: np.ndarray
    pages: tuple[np.ndarray, ...]
    density: float | None
    dense: bool
    change: np.ndarray | None = None


@dataclass(frozen=True)
class Step:
    """One pass over a block.

    Streams give one per denoising pass, observers get one per pass, with its layers.

    Attributes
    ----------
    kind : {"first", "later", "commit"}
    block_start : int
        Position in the sequence of the block's first token, prompt included: the length of the prefix.
    block : list of int or None
        Tokens of the block after the pass; None where still masked.
    fixed : list of int
        Positions within the block that the pass fixed, ascending; none in a commit pass.
    text : str
        The new text so far, up to the first masked position.
    layers : tuple of ObservedLayer
        Empty where nobody observes.
    result : GenerationResult or None
        In the last step.
    edited : list of int
        Positions within the block whose tokens the pass has changed, ascending: only where fixed tokens may
        be (`editing_threshold`).
    logprobs : list of TokenLogprob or None
        In a stream with the option `logprobs`: of the new tokens that have come to be known without a gap
        since the step before. Those of all steps, one after the other, are the result's, and perhaps some
        that a stop string has cut off.
    """

    kind: str
    block_start: int
    block: list[int | None]
    fixed: list[int]
    text: str = ""
    layers: tuple[ObservedLayer, ...] = ()
    result: GenerationResult | None = None
    edited: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None

    @property
    def positions(self) -> list[int]:
        """The same as `fixed`."""
        return self.fixed

    @property
    def density(self) -> float | None:
        """Mean over the layers; None when the prefix is empty."""
        known = [layer.density for layer in self.layers if layer.density is not None]
        return sum(known) / len(known) if known else None


Observer = Callable[[Step], None]
Progress = Callable[[int, int], None]  # done, in all: prompt tokens, layers of the weights, questions
