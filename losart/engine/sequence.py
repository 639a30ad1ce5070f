"""One generation by block diffusion between its passes, without a transformer."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import replace
from typing import Any

import numpy as np

from losart.config.decoding import Decoding
from losart.config.options import AttentionConfig, GenerationConfig
from losart.engine.batch import PassKind, PassReads, SequencePass
from losart.engine.hooks import ProposalHook
from losart.engine.kv_cache import PagedKVCache
from losart.engine.logprobs import LogprobRecorder
from losart.engine.output import Output
from losart.engine.sampling import transfer_counts
from losart.observe.step import GenerationResult, Stats, Step, TokenLogprob

SDAR_DECODING = Decoding()  # arXiv 2510.06303


class Sequence:
    """What pass comes next, and what its result changes.

    The prompt's whole blocks are prefilled; what is left of it is the known head of the first decoded block.
    A block's masked positions are fixed pass by pass; a block without a masked position is committed. When
    the output ends within a block, the rest is left as it is: nothing would read it.

    Where a family's blocks begin with a seed, the prompt's last tokens are committed as a block is, and a
    commit gives the first token of the next block. Where fixed tokens may be changed, the output takes those
    of committed blocks alone, and a commit that changes some is none: another follows.

    Parameters
    ----------
    prompt : sequence of int
    options : GenerationConfig
    output : Output
        Takes the new tokens that are known without a gap, and says when they end.
    cache : PagedKVCache
        Holds the first of the prompt's blocks: none, or whole blocks.
    prefill_tokens : int
        Of the prompt that go through the model at a time, about.
    commits_ride : bool
        Whether a finished block is committed in the same pass as the next block is first denoised.
    deterministic : bool
        Whether keys and values that prefill gives to rounding are not enough for others: those of the answer.
    decoding : Decoding, optional
        The family's.
    hooks : sequence of ProposalHook
        Each is given what every pass proposes, with its logits, one after the other.

    Attributes
    ----------
    ids : list of int
        The prompt and all finished blocks: what the cache holds, and perhaps more.
    pending : bool
        Whether a pass has been asked for and its result not been applied.
    slot : optional
        The backend's, for stored results; for the engine to set.
    reads : ReadLog
    prefix : int64 [positions]
        What prefill takes into the cache.
    awaited : tuple of Sequence and int, optional
        Whose prefill it waits for, and of how many positions.
    found : int
        Positions that the cache held when prefill began.
    reused : int
        Of the prompt, those that it held at first.
    prefilled : int
        Positions that prefill has taken into a cache, in all.
    room : int
        Positions that the cache is known to have room for; for the engine to set.
    prefill_tokens : int
        For the engine to change.
    queue_seconds, prefill_seconds, decode_seconds : float
        For the engine to add to.
    first_token_seconds : float or None
        For the engine to set.
    shared : int
        Sequences of the passes over blocks, this one counted, in all; for the engine to add to.
    experts_used : Mean
        By those passes in a layer; for the engine to add to.
    """

    def __init__(
        self,
        prompt: Ids[int],
        options: GenerationConfig,
        output: Output,
        cache: PagedKVCache,
        prefill_tokens: int,
        commits_ride: bool = False,
        deterministic: bool = False,
        decoding: Decoding = SDAR_DECODING,
        hooks: Ids[ProposalHook] = (),
    ) -> None:
        length = options.block_length
        self.options = options
        self.decoding = decoding
        self._logprobs = None if options.logprobs is None else LogprobRecorder(options.logprobs)
        self.hooks = (*hooks, *([] if self._logprobs is None else [self._logprobs]))
        self.output = output
        self.cache = cache
        self.slot: Any = None
        self.ids = list(prompt)
        self.awaited: tuple[Sequence, int] | None = None
        self.found = self.reused = cache.length
        # A seed comes from a pass over the last tokens, of which there must be one.
        whole = (len(self.ids) - decoding.seeds) // length * length
        self.prefix = np.array(self.ids[:whole], np.int64)
        self.prefilled = 0
        self.room = 0
        self.pending = False
        self.commits_ride = commits_ride
        self.denoising_passes = 0
        self.commit_passes = 0
        self._rode = 0  # commits
        self.queue_seconds = 0.0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.first_token_seconds: float | None = None
        self.shared = 0
        self.experts_used = Mean()
        self.reads = ReadLog(length)
        self._prompt_tokens = len(self.ids)
        self._prompt_end = len(self.prefix)
        self._deterministic = deterministic
        self.prefill_tokens = prefill_tokens
        self._kind = PassKind.PREFILL  # of the pass that is under way
        self._piece = 0  # tokens of the prompt in it
        self._committed: tuple[int, list[int], str] | None = None  # start, tokens, text
        # Kind, start, what was masked, and what was changed.
        self._denoised: tuple[PassKind, int, list[int], list[int]] | None = None
        self._own_pass: tuple[SequencePass] | None = None  # that denoised last, to be made the next
        # Passes so far that denoise the block, where they store something: kind, ids, masked, uniforms.
        self._asked: list[tuple[Any, ...]] = []
        # Whether passes propose tokens of other rows than all masked ones.
        self._special = decoding.shifted or options.edits or options.sub_block_length is not None
        self._rng = np.random.default_rng(options.seed) if options.temperature > 0 else None
        self._begin_block(self.prefill_end, self.ids[self.prefill_end :])

    def _begin_block(self, start: int, known: list[int]) -> None:
        # Passes have these lists: they are made anew, and never changed.
        self._block, self._masked, self._counts = self._new_block(start, known)
        self._passes = 0  # over this block
        self._post_passes = 0  # without a masked row, that proposed what to change
        self._known = len(known)  # tokens before the first masked one
        self._given = len(known)  # those that cannot be changed

    def _new_block(self, start: int, known: list[int]) -> tuple[list[int], list[int], list[int]]:
        """A block's ids, what is masked, and how many each pass but the last fixes at least."""
        options, decoding = self.options, self.decoding
        length, masked = options.block_length, options.block_length - len(known)
        if decoding.ends_short:
            masked = min(masked, self._prompt_tokens + self.output.limit - start - len(known))
        if decoding.causal and decoding.seeds and not self.commit_passes:
            masked = 0  # it waits for the prompt's seed
        of = masked if decoding.spreads_masked and masked else length
        # Every pass fixes one position at least: there are never more passes than positions.
        counts = transfer_counts(of, min(of, options.denoising_steps))
        block = known + [options.mask_token_id] * masked
        return block, list(range(len(known), len(block))), counts[:-1]

    @property
    def finished(self) -> bool:
        """Whether no pass follows."""
        return self.output.finish_reason is not None and self.cache.length >= self.prefill_end

    @property
    def prefill_end(self) -> int:
        """Positions that prefill takes into the cache."""
        return len(self.prefix)

    @property
    def prompt(self) -> list[int]:
        """The prompt's ids."""
        return self.ids[: self._prompt_tokens]

    @property
    def begun(self) -> bool:
        """Whether a pass has been applied."""
        return self.prefilled > 0 or self.denoising_passes > 0

    @property
    def checked(self) -> bool:
        """Whether logits have come of all that the cache holds."""
        return self._passes > 0

    @property
    def replaceable(self) -> bool:
        """Whether prefill gives what the cache holds, and `set_back` may be called."""
        return not self.pending and len(self.shareable()) == self.cache.length

    def set_back(self, cache: PagedKVCache) -> None:
        """Go on with an empty cache, which prefill fills again; all else stays as it is."""
        if self.cache.length > self.prefill_end:
            self.prefix = np.array(self.ids[: self.cache.length], np.int64)
        self.cache = cache
        self.room = self.found = 0
        self._own_pass = None

    def release(self) -> None:
        """Give up the slot, and what holds the cache beside `cache`: no pass follows."""
        self.slot = self._own_pass = None

    def shareable(self) -> np.ndarray:
        """Ids of the positions in the cache whose keys and values are those that prefill gives."""
        answer = self.options.attention.commit == "dense" and not self._deterministic
        return np.array(self.ids[: self.cache.length if answer else self._prompt_end][: self.cache.length])

    @property
    def end(self) -> int:
        """Positions that the cache has room for in the end, at most."""
        length, before = self.options.block_length, self._prompt_tokens if self.decoding.causal else 0
        return before + -(-(self._prompt_tokens + self.output.limit - before) // length) * length

    @property
    def next_end(self) -> int:
        """Positions that the cache must have room for before the next pass."""
        if self.prefilling:
            return len(self.prefix)
        next_block = self.options.block_length if not self._masked and self._rides else 0
        return self.cache.length + len(self._block) + next_block

    @property
    def prefilling(self) -> bool:
        """Whether the next pass takes a piece of the prompt into the cache."""
        return self.cache.length < len(self.prefix)

    @property
    def next_kind(self) -> PassKind:
        """What the next pass is for, unless the sequence is finished."""
        if self.prefilling:
            return PassKind.PREFILL
        if not self._masked:
            return PassKind.COMMIT
        return PassKind.LATER if self._passes else PassKind.FIRST

    @property
    def _rides(self) -> bool:
        """Whether a commit that is next rides: blocks that do are equally long."""
        after = self.cache.length + len(self._block)
        return self.commits_ride and (
            not self.decoding.ends_short or len(self._new_block(after, [])[0]) == len(self._block)
        )

    @property
    def rides_next(self) -> bool:
        """Whether the next pass is two: a commit, and the first pass over the next block."""
        return self.next_kind is PassKind.COMMIT and self._rides

    def next_pass(self) -> tuple[SequencePass, ...]:
        """The pass that the sequence wants next; `apply` takes its result.

        Two, where the first pass over the next block rides with the commit of the block before it.
        """
        self.pending = True
        if self._passes and self._masked and self._own_pass is not None:  # as most passes
            self._kind = PassKind.LATER
            return self._denoise_again(self._own_pass)
        kind, start = self.next_kind, self.cache.length
        self._kind = kind
        if kind is PassKind.PREFILL:
            length = self.options.block_length
            step = -(-self.prefill_tokens // length) * length
            piece = np.array(self.ids[start : min(start + step, self.prefill_end)], np.int64)
            self._piece = len(piece)
            return (SequencePass(kind, piece, start, self.options, self.cache, self.slot),)
        if kind is not PassKind.COMMIT:
            return self._denoising(kind, self._block, self._masked, start, self._counts)
        where = start, self.options, self.cache
        if not self._rides:
            return (self._commit(),)
        after = start + len(self._block)
        block, masked, counts = self._new_block(after, [])
        commit = SequencePass(kind, self._block, *where)
        return commit, *self._denoising(PassKind.FIRST, block, masked, after, counts)

    def _commit(self) -> SequencePass:
        """A pass over a block whose tokens are known: it may give the one that follows, or change some."""
        start, options, block, known = self.cache.length, self.options, self._block, list[int]()
        if self.commit_passes == 0 and self.decoding.seeds:  # of the prompt's end nothing is stored
            dense = AttentionConfig(page_size=options.attention.page_size)
            options, slot = replace(options, attention=dense), None
        else:
            slot = self.slot
        uniforms, proposed = None, [len(block) - 1] if self.decoding.seeds else known
        if options.edits and self._post_passes < options.max_post_steps:
            known = proposed = list(range(self._given, len(block)))
            uniforms = None if self._rng is None else self._rng.random(len(block))
        return SequencePass(
            *(PassKind.COMMIT, block, start, options, self.cache, slot, [], uniforms),
            known=known,
            proposed=proposed,
            causal=self.decoding.causal,
            keeps_logits=bool(self.hooks and proposed),
        )

    def _rows(self, masked: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Of a pass over the block: rows that may be fixed, those that may be changed, and those read."""
        length = self.options.sub_block_length
        if length is not None:
            end = (masked[0] // length + 1) * length
            masked = [row for row in masked if row < end]
        known = list[int]()
        if self.options.edits:
            known = [row for row in range(self._given, len(self._block)) if row not in self._masked]
        proposed = sorted(masked + known) if known else masked
        return masked, known, [row - 1 for row in proposed] if self.decoding.shifted else proposed

    def _denoising(
        self, kind: PassKind, block: list[int], masked: list[int], start: int, counts: list[int]
    ) -> tuple[SequencePass]:
        """A pass over a block: its first one, or the first after the sequence was set back."""
        where = start, self.options, self.cache, self.slot
        uniforms, count = self._sampled(kind, block, masked, counts)
        masked, known, proposed = self._rows(masked) if self._special else (masked, [], masked)
        keeps = bool(self.hooks)
        own = SequencePass(kind, block, *where, masked, uniforms, count, known, proposed, keeps_logits=keeps)
        self._own_pass = (own,)
        return self._own_pass

    def _denoise_again(self, before: tuple[SequencePass]) -> tuple[SequencePass]:
        """The pass before, made the next one: a new one would take several times as long."""
        again, kind, block, masked = before[0], PassKind.LATER, self._block, self._masked
        again.uniforms, again.count = self._sampled(kind, block, masked, self._counts)
        if self._special:
            masked, again.known, again.proposed = self._rows(masked)
        else:
            again.proposed = masked
        again.kind, again.ids, again.masked = kind, block, masked
        return before

    def _sampled(
        self, kind: PassKind, block: list[int], masked: list[int], counts: list[int]
    ) -> tuple[np.ndarray | None, int | None]:
        """Random numbers for the block, and how many tokens are fixed at least."""
        # One number per position and pass, so that a draw does not depend on what else is masked.
        uniforms = None if self._rng is None else self._rng.random(len(block))
        if self.slot is not None:
            if kind is PassKind.FIRST:
                self._asked.clear()
            self._asked.append((kind, block, masked, uniforms))
        passes = self._passes if kind is PassKind.LATER else 0
        return uniforms, counts[passes] if passes < len(counts) else None

    def passes_before(self, asked: SequencePass) -> list[SequencePass]:
        """What stored, in this order, what the pass that was asked for last finds stored, and may change."""
        if asked.slot is None or asked.kind is PassKind.PREFILL:
            return []
        before = self._asked[:-1] if asked.kind.denoises else self._asked
        again = replace(asked, known=(), keeps_logits=False)
        return [replace(again, kind=k, ids=i, masked=m, uniforms=u, proposed=m) for k, i, m, u in before]

    def apply(
        self,
        block: list[int] | None = None,
        masked: list[int] | None = None,
        seed: int | None = None,
        edited: Ids[int] = (),
    ) -> None:
        """Take a pass's result; `steps` tells what it did.

        Parameters
        ----------
        block, masked : list of int, optional
            The block after a pass that proposes tokens, and where it is still masked.
        seed : int, optional
            The token after the block.
        edited : sequence of int
            Rows of the block that were changed.
        """
        kind, start = self._kind, self.cache.length
        self._committed = self._denoised = None
        if kind is PassKind.PREFILL:
            self.cache.advance(self._piece)
            self.prefilled += self._piece
        elif kind is PassKind.COMMIT and not edited:
            rides = self._rides
            self._apply_commit(seed)
            self._rode += rides
            block = block if rides else None
            kind, start = PassKind.FIRST, self.cache.length
        if block is not None and masked is not None:
            if kind is PassKind.COMMIT:
                kind = PassKind.LATER
                self._post_passes += 1
            if self.options.sub_block_length is not None:
                open_rows = self._own_pass[0].masked if self._own_pass is not None else ()
                masked = masked + [row for row in self._masked if row not in open_rows]
            self._denoised = kind, start, self._masked, list(edited)
            self._passes += 1
            self.denoising_passes += 1
            if self._logprobs is not None:
                fixed = [row for row in (*self._masked, *edited) if row not in masked]
                self._logprobs.fixed(start, [(row, block[row]) for row in fixed], self.denoising_passes)
            self._block, self._masked = block, masked
            gap = masked[0] if masked else len(block)
            if gap > self._known and not self.options.edits:
                self.output.extend(block[self._known : gap])
                self._known = gap
        self.pending = False

    def _apply_commit(self, seed: int | None) -> None:
        start, block = self.cache.length, self._block
        self.ids[start:] = block
        self.cache.advance(len(block))
        self.commit_passes += 1
        if self.options.edits:
            self.output.extend(block[self._given :])
        self._committed = start, block, self.output.known_text
        if seed is not None:
            if self._logprobs is not None:
                self._logprobs.fixed(start, [(len(block), seed)], self.denoising_passes)
            self.ids.append(seed)
            self.output.extend([seed])
        self._begin_block(self.cache.length, [] if seed is None else [seed])

    def steps(self) -> list[Step]:
        """What the last pass did, until the next is applied: a step for each of `next_pass`.

        None for a piece of the prompt. A commit before a step over the next block has the text that was asked
        for before.
        """
        steps = []
        if self._committed is not None:
            start, tokens, text = self._committed
            if self._denoised is None:  # it may have given the answer's last token
                text = self.output.text
            steps.append(Step(PassKind.COMMIT.value, start, list(tokens), [], text))
        if self._denoised is not None:
            kind, start, masked, edited = self._denoised
            block: list[int | None] = list(self._block)
            for row in self._masked:
                block[row] = None
            fixed = [row for row in masked if block[row] is not None]
            steps.append(Step(kind.value, start, block, fixed, self.output.text, edited=edited))
        return steps

    def logprobs(self, first: int = 0) -> list[TokenLogprob] | None:
        """Of the new tokens that are known, from the `first` on; None unless they are recorded."""
        if self._logprobs is None:
            return None
        return self._logprobs.of(self._prompt_tokens + first, len(self.output.tokens) - first)

    def result(self) -> GenerationResult:
        """What the finished sequence gave."""
        output, reads = self.output, self.reads
        assert output.finish_reason is not None
        stats = Stats(
            prompt_tokens=self._prompt_tokens,
            new_tokens=len(output.tokens),
            reused_tokens=self.reused,
            prefilled_tokens=self._prompt_end - self.reused,
            denoising_passes=self.denoising_passes,
            commit_passes=self.commit_passes,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            active_fraction=reads.active_fraction,
            sparse_density=reads.sparse_density,
            density=reads.density,
            rides=self._rode,
            queue_seconds=self.queue_seconds,
            first_token_seconds=self.first_token_seconds,
            mean_sequences=self.shared / (self.denoising_passes + self.commit_passes - self._rode),
            kv_bytes=self.cache.nbytes,
            kv_bytes_shared=self.cache.shared_bytes,
            experts_used=self.experts_used.value,
        )
        logprobs = self.logprobs()
        return GenerationResult(output.text, list(output.tokens), output.finish_reason, stats, logprobs)


class ReadLog:
    """Density as the LoSA paper has it (arXiv 2604.12056): positions read over the prefix length.

    It is taken per kv head, layer and pass, and averaged; a pass over an empty prefix does not count.

    Parameters
    ----------
    block_length : int
        Of the passes that are added here.
    """

    def __init__(self, block_length: int = 0) -> None:
        self._block_length = block_length
        self._all = Mean()
        self._sparse = Mean()
        self._active = Mean()

    def add(self, reads: PassReads, prefix_length: int, kv_heads: int) -> None:
        """Count a pass."""
        layers = reads.dense_layers + reads.sparse_layers
        self._active.add(reads.tokens / self._block_length, reads.sparse_layers)
        if prefix_length:
            total = reads.dense_layers + reads.positions / (kv_heads * prefix_length)
            self._all.add(total, layers)
            if reads.sparse:
                self._sparse.add(total, layers)

    def include(self, other: ReadLog) -> None:
        """Count the passes that another log has, too."""
        self._all.include(other._all)
        self._sparse.include(other._sparse)
        self._active.include(other._active)

    @property
    def density(self) -> float | None:
        """Mean over all passes, dense ones included; None before any read."""
        return self._all.value

    @property
    def sparse_density(self) -> float | None:
        """Mean over the passes that the method reads sparsely; None without one."""
        return self._sparse.value

    @property
    def active_fraction(self) -> float | None:
        """Mean share of the block's tokens that were recomputed in sparse reads; None without one."""
        return self._active.value


class Mean:
    """The mean of what is added."""

    def __init__(self) -> None:
        self._total = 0.0
        self._count = 0

    def add(self, total: float, count: int) -> None:
        """Add so many values by their sum."""
        self._total += total
        self._count += count

    def include(self, other: Mean) -> None:
        """Add what another one has."""
        self.add(other._total, other._count)

    @property
    def value(self) -> float | None:
        """None without values."""
        return self._total / self._count if self._count else None
