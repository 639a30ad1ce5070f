"""Sequences and the engine, without a transformer: what holds for the passes of any generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv import model_config
from scripted import Cache, Scripted

from losart.config.options import GenerationConfig, generation_config
from losart.engine.batch import PassBatch, PassKind, PassReads, PassResult
from losart.engine.engine import Engine
from losart.engine.sampling import STRATEGIES, propose, transfer_counts
from losart.observe.step import Step

VOCAB, MASK = 64, 63
MODEL = model_config(1, 1, 16, vocab_size=VOCAB, max_positions=1 << 16)
PREFILL_TOKENS = 512


@dataclass(kw_only=True)
class Runner(Scripted):
    """Notes what it is asked, and answers with logits that depend on the block."""

    config: Any = MODEL
    batch_rows: int = 0
    prefill_tokens: int = PREFILL_TOKENS
    beside_tokens: int = PREFILL_TOKENS
    logits: np.ndarray | None = None
    prefilled: list[list[int]] = field(default_factory=list)
    passes: list[tuple[PassKind, list[int]]] = field(default_factory=list)

    def forward(self, batch: PassBatch, observe: bool = False) -> PassResult:
        sequence = batch.sequences[-1]
        ids, cache, config = list(sequence.ids), sequence.cache, sequence.options
        if len(batch.sequences) > 1:
            (commit, _), length = batch.sequences, cache.length
            assert self.rides
            assert (commit.kind, sequence.kind) == (PassKind.COMMIT, PassKind.FIRST)
            assert commit.prefix_length == length and sequence.prefix_length == length + len(commit.ids)
            committed = self.forward(PassBatch((commit,)))
            cache.length += len(commit.ids)  # as if it were taken into the prefix
            first = self.forward(PassBatch((sequence,)))
            cache.length = length
            return PassResult(first.proposals, [*committed.reads, *first.reads])
        assert sequence.prefix_length == cache.length
        assert cache.reserved >= cache.length + len(ids)
        if batch.kind is PassKind.PREFILL:
            assert len(ids) % config.block_length == 0 and cache.length % config.block_length == 0
            self.prefilled.append(ids)
            return PassResult()
        self.passes.append((batch.kind, ids))
        reads = [PassReads(False, 1, 0, 0, 0)]
        if batch.kind is PassKind.COMMIT:
            assert not sequence.masked
            return PassResult(reads=reads)
        if self.logits is not None:
            logits = np.tile(self.logits, (len(ids), 1))
        else:
            rng = np.random.default_rng([cache.length, *ids])
            logits = 2 * rng.standard_normal((len(ids), VOCAB), np.float32)
        logits = logits[sequence.masked]
        logits[:, config.mask_token_id] = -np.inf
        proposals = propose(
            logits,
            sequence.uniforms[sequence.masked] if config.temperature else None,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            with_entropy=config.remasking == "entropy_bounded",
        )
        return PassResult(proposals, reads)


class Event:
    """A step, with arrays."""

    def __init__(self, step: Step) -> None:
        self.block_start = step.block_start
        self.masked = np.array([token is None for token in step.block])
        self.ids = np.array([MASK if token is None else token for token in step.block])
        self.fixed = np.array(step.fixed, np.int64)


class Decoder:
    """An engine with one sequence."""

    def __init__(self, transformer: Runner, options: GenerationConfig) -> None:
        self.engine, self.options = Engine(transformer), options

    def run(self, prompt: list[int], progress: Any = None) -> Iterator[Event]:
        self.sequence = self.engine.sequence(prompt, self.options, Cache())
        return map(Event, self.engine.steps(self.sequence, progress=progress))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sequence, name)


def decoder_of(transformer: Runner, stop_token_ids: tuple[int, ...] = (), **options: Any) -> Decoder:
    options = {"mask_token_id": MASK, "stop_token_ids": list(stop_token_ids), **options}
    return Decoder(transformer, generation_config(MODEL, options))


def tokens_of(prompt: list[int], **options: Any) -> list[int]:
    decoder = decoder_of(Runner(), **options)
    for _ in decoder.run(prompt):
        pass
    return decoder.output.tokens


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40),
    new=st.integers(1, 50),
    block_length=st.integers(1, 17),
    steps=st.integers(1, 20),
    remasking=st.sampled_from(list(STRATEGIES)),
    confidence_threshold=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([0.0, 1.0]),
    stop_tokens=st.sets(st.integers(0, VOCAB - 1), max_size=2),
)
def test_what_holds_for_every_generation(prompt, new, block_length, steps, stop_tokens, **options):
    transformer = Runner()
    decoder = decoder_of(
        transformer,
        tuple(stop_tokens),
        max_new_tokens=new,
        block_length=block_length,
        denoising_steps=steps,
        seed=1,
        **options,
    )
    whole = len(prompt) // block_length * block_length
    sequence = list(prompt)  # with the tokens that are known without a gap
    block: list[int | None] = []
    events = list(decoder.run(prompt))
    position, passes = whole - block_length, 0
    for event in events:
        if event.block_start != position:  # a new block
            assert None not in block
            position, passes = position + block_length, 0
            assert event.block_start == position
            block = [*prompt[position:], *[None] * block_length][:block_length]
        passes += 1
        # Positions are fixed in order, once, where a mask was; nothing else changes.
        assert event.fixed.tolist() == sorted(set(event.fixed.tolist())) and len(event.fixed)
        for place in event.fixed:
            assert block[place] is None
            block[place] = int(event.ids[place])
            assert block[place] != MASK
        assert event.masked.tolist() == [token is None for token in block]
        assert event.ids.tolist() == [MASK if token is None else token for token in block]
        # No pass fixes fewer than its share, and the last allowed one leaves nothing.
        assert passes <= steps
        left = sum(token is None for token in block)
        if options["remasking"] != "entropy_bounded":
            assert len(event.fixed) >= min(transfer_counts(block_length, steps)[passes - 1], left)
        assert left == 0 or passes < steps
        sequence[position:] = list(block[: (*block, None).index(None)])

    # Tokens end after the limit or the first stop token, and events with them.
    answer = sequence[len(prompt) :]
    stops = [i for i, token in enumerate(answer) if token in stop_tokens]
    end = min([new, *(i + 1 for i in stops)])
    assert decoder.output.tokens == answer[:end] and len(answer) >= end
    assert decoder.output.finish_reason == ("stop" if stops and stops[0] < end else "length")

    # Each block but the last is committed once, whole, after its passes; the prompt's are prefilled.
    assert [token for piece in transformer.prefilled for token in piece] == prompt[:whole]
    committed = [ids for kind, ids in transformer.passes if kind is PassKind.COMMIT]
    assert decoder.commit_passes == len(committed) == (position - whole) // block_length
    assert [token for ids in committed for token in ids] == [*prompt, *answer][whole:position]
    assert decoder.denoising_passes == len(events) == len(transformer.passes) - len(committed)


def test_kinds_of_passes_in_their_order():
    transformer = Runner()
    options = {"block_length": 3, "remasking": "sequential", "max_new_tokens": 7}
    list(decoder_of(transformer, **options).run([1, 2, 3, 4, 5]))
    first, later, commit = PassKind.FIRST, PassKind.LATER, PassKind.COMMIT
    kinds = [kind for kind, _ in transformer.passes]
    assert kinds == [first, commit, first, later, later, commit, first, later, later]


@pytest.mark.parametrize(
    ("steps", "passes"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (8, 8), (9, 8), (10**12, 8)]
)
@pytest.mark.parametrize("remasking", ["sequential", "low_confidence_static"])
def test_a_block_takes_its_steps(steps, passes, remasking):
    decoder = decoder_of(
        Runner(), block_length=8, denoising_steps=steps, remasking=remasking, max_new_tokens=8
    )
    fixed = [len(event.fixed) for event in decoder.run([0] * 8)]
    assert len(fixed) <= passes and fixed == transfer_counts(8, passes)[: len(fixed)]
    assert sum(fixed) == 8 or remasking == "sequential"


def test_a_sure_model_needs_one_pass_a_block():
    logits = np.full(VOCAB, -30, np.float32)
    logits[5] = 0
    for options in ({"remasking": "low_confidence_dynamic"}, {"remasking": "entropy_bounded"}):
        decoder = decoder_of(Runner(logits=logits), block_length=8, max_new_tokens=24, **options)
        assert [event.fixed.tolist() for event in decoder.run([1])] == [
            list(range(1, 8)),
            *[list(range(8))] * 3,
        ][:4]
        assert decoder.output.tokens == [5] * 24


@pytest.mark.parametrize("length", [1, 3, PREFILL_TOKENS - 1, PREFILL_TOKENS, PREFILL_TOKENS + 5, 1300])
@pytest.mark.parametrize("block_length", [1, 7, 32])
def test_prefill_goes_in_pieces_of_whole_blocks_and_reports(length, block_length):
    prompt = np.random.default_rng(0).integers(0, VOCAB, length).tolist()
    transformer, reports = Runner(), []
    decoder = decoder_of(transformer, block_length=block_length, max_new_tokens=1)
    list(decoder.run(prompt, lambda done, total: reports.append((done, total))))
    whole = length // block_length * block_length
    assert list(chain.from_iterable(transformer.prefilled)) == prompt[:whole]
    assert max(map(len, transformer.prefilled), default=0) < PREFILL_TOKENS + block_length
    assert reports == [
        (done, whole) for done in np.cumsum([len(piece) for piece in transformer.prefilled]).tolist()
    ]


# Chance


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others():
    options = {"temperature": 1.0, "block_length": 8, "max_new_tokens": 64}
    first = tokens_of([1, 2, 3], seed=4, **options)
    assert tokens_of([1, 2, 3], seed=4, **options) == first
    assert tokens_of([1, 2, 3], seed=5, **options) != first
    unseeded = {tuple(tokens_of([1, 2, 3], **options)) for _ in range(3)}
    assert len(unseeded) == 3


def test_greedy_needs_no_seed():
    options = {"block_length": 8, "max_new_tokens": 64}
    assert tokens_of([1], seed=1, **options) == tokens_of([1], seed=2, **options) == tokens_of([1], **options)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("remasking", ["sequential", "low_confidence_dynamic"])
def test_tokens_are_as_frequent_as_their_probability(temperature, remasking):
    """With every position fixed in the pass that proposes it, so that the choice of positions has no say."""
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[3, 9, 20, 33, 62]] = [0.0, 1.0, -1.0, 2.0, 0.5]
    logits[MASK] = 9.0  # never drawn
    decoder = decoder_of(
        Runner(logits=logits),
        temperature=temperature,
        remasking=remasking,
        block_length=64,
        denoising_steps=1,
        max_new_tokens=19_200,
        seed=0,
    )
    for _ in decoder.run([1] * 64):
        pass
    logits[MASK] = -np.inf
    p = np.exp(logits / temperature)
    expected = 19_200 * p / p.sum()
    counts = np.bincount(decoder.output.tokens, minlength=VOCAB)
    likely = expected > 0
    assert counts.sum() == 19_200 and not counts[~likely].any()
    assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() < 18.5  # 99.9% of 4 degrees of freedom
