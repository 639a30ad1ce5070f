"""The block-diffusion loop: prefill, denoising passes, commit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from losart.attention import AttentionPolicy
from losart.attention.policy import PassKind
from losart.backends.base import PassInputs
from losart.config.options import GenerationConfig
from losart.engine.kv_cache import PagedKVCache
from losart.engine.output import Output
from losart.engine.remasking import strategy, transfer_counts
from losart.models.transformer import Observed, Transformer
from losart.observe.observation import ObservedPass, Observer, Progress


@dataclass(frozen=True)
class DenoisingPass:
    """What one denoising pass did.

    Attributes
    ----------
    block_start : int
        Position in the sequence of the block's first token.
    ids : int64 [block_length]
        The block after the pass; masked positions hold the mask token.
    masked : bool [block_length]
        Positions that are still masked.
    fixed : int64 [any]
        Positions within the block that this pass fixed, rising.
    """

    block_start: int
    ids: np.ndarray
    masked: np.ndarray
    fixed: np.ndarray


def block_tokens(ids: np.ndarray, masked: np.ndarray) -> list[int | None]:
    """A block's tokens, None where it is masked."""
    return [None if hidden else token for token, hidden in zip(ids.tolist(), masked.tolist(), strict=True)]


def prefill(
    transformer: Transformer,
    ids: np.ndarray,
    cache: PagedKVCache,
    block_length: int,
    progress: Progress | None = None,
) -> None:
    """Take whole blocks into the cache, in pieces as large as the backend takes them at a time.

    Parameters
    ----------
    transformer : Transformer
    ids : int64 [whole blocks]
    cache : PagedKVCache
    block_length : int
    progress : callable, optional
        Called after each piece with the tokens done and in all.
    """
    step = -(-transformer.prefill_tokens // block_length) * block_length
    cache.reserve(cache.length + len(ids))
    for start in range(0, len(ids), step):
        transformer.prefill(ids[start : start + step], cache, block_length)
        if progress is not None:
            progress(min(start + step, len(ids)), len(ids))


class BlockDecoder:
    """One generation by block diffusion (SDAR, arXiv 2510.06303).

    Parameters
    ----------
    transformer : Transformer
    config : GenerationConfig
    policy : AttentionPolicy
    cache : PagedKVCache
        Holds what comes before the prompt: nothing, or whole blocks.
    output : Output
        Takes the new tokens that are known without a gap, and says when they end.
    observer : callable, optional
        Called after each denoising and commit pass with an `ObservedPass`.

    Attributes
    ----------
    denoising_passes, commit_passes : int
    prefill_seconds, decode_seconds : float
    """

    def __init__(
        self,
        transformer: Transformer,
        config: GenerationConfig,
        policy: AttentionPolicy,
        cache: PagedKVCache,
        output: Output,
        observer: Observer | None = None,
    ) -> None:
        self.transformer = transformer
        self.config = config
        self.policy = policy
        self.cache = cache
        self.output = output
        self.observer = observer
        self.denoising_passes = 0
        self.commit_passes = 0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._select = strategy(config.remasking)
        self._rng = np.random.default_rng(config.seed)

    def run(self, prompt: Sequence[int], progress: Progress | None = None) -> Iterator[DenoisingPass]:
        """Decode until the output ends; one event per denoising pass.

        Parameters
        ----------
        prompt : sequence of int
            What follows the cache's prefix; at least one token where that is empty. Its whole blocks
            are prefilled; the rest is the known head of the first decoded block.
        progress : callable, optional
            Called after each prefilled piece with prompt tokens done and in all.
        """
        length = self.config.block_length
        whole = len(prompt) - len(prompt) % length
        began = time.perf_counter()
        prefill(self.transformer, np.asarray(prompt[:whole], np.int64), self.cache, length, progress)
        self.prefill_seconds += time.perf_counter() - began
        known = np.asarray(prompt[whole:], np.int64)
        while self.output.finish_reason is None:
            yield from self._decode_block(known)
            known = known[:0]

    def _decode_block(self, known: np.ndarray) -> Iterator[DenoisingPass]:
        """Fix the masked positions after the known head pass by pass, then commit the block.

        When the output ends within the block the rest is left as it is: nothing would read it.
        """
        length, start = self.config.block_length, self.cache.length
        ids = np.full(length, self.config.mask_token_id, np.int64)
        ids[: len(known)] = known
        masked = np.arange(length) >= len(known)
        handed_on = len(known)
        self.policy.begin_block()
        # Each pass fixes one position at least: more passes than positions are never made.
        counts = transfer_counts(length, min(length, self.config.denoising_steps))
        for step, count in enumerate(counts):
            began = time.perf_counter()
            kind = PassKind.LATER if step else PassKind.FIRST
            self.policy.begin_pass(kind, start, np.flatnonzero(masked))
            # The last pass that is allowed leaves nothing masked.
            fixed = self._denoise(ids, masked, None if step == len(counts) - 1 else count)
            gap = int(masked.argmax()) if masked.any() else length
            self.output.extend(ids[handed_on:gap].tolist())
            handed_on = gap
            if gap == length and self.output.finish_reason is None:
                self._commit(ids)
            self.decode_seconds += time.perf_counter() - began
            yield DenoisingPass(start, ids.copy(), masked.copy(), fixed)
            if gap == length or self.output.finish_reason is not None:
                return

    def _denoise(self, ids: np.ndarray, masked: np.ndarray, count: int | None) -> np.ndarray:
        """One pass: fix `count` of the masked positions or what the strategy says, None: all of them.

        Returns those positions, rising.
        """
        rows = np.flatnonzero(masked)
        # One number a position and pass, so that a draw does not depend on what else is masked.
        inputs = PassInputs(ids, rows, self._rng.random(len(ids)))
        proposals, observed = self.transformer.denoise(
            inputs, self.cache, self.policy, self.config, self.observer is not None
        )
        chosen = np.arange(len(rows))
        if count is not None:
            chosen = np.sort(self._select(proposals, count, self.config))
        fixed = rows[chosen]
        ids[fixed] = proposals.tokens[chosen]
        masked[fixed] = False
        self.denoising_passes += 1
        self._tell(self.cache.length, ids, masked, fixed, observed)
        return fixed

    def _commit(self, ids: np.ndarray) -> None:
        start = self.cache.length
        self.policy.begin_pass(PassKind.COMMIT, start)
        observed = self.transformer.commit(ids, self.cache, self.policy, self.observer is not None)
        self.commit_passes += 1
        self._tell(start, ids, np.zeros(len(ids), bool), ids[:0], observed)

    def _tell(
        self, start: int, ids: np.ndarray, masked: np.ndarray, fixed: np.ndarray, observed: Observed
    ) -> None:
        if self.observer is not None and observed is not None:
            kind = self.policy.kind.value
            self.observer(ObservedPass(kind, start, block_tokens(ids, masked), fixed.tolist(), observed))
