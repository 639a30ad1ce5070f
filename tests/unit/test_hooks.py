"""Hooks of a sequence see its logits, and may propose something else, before any token is fixed."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv import model_config
from scripted import Cache, Scripted

from losart.config.options import generation_config
from losart.engine.batch import PassBatch, PassKind, PassReads, PassResult, SequencePass
from losart.engine.engine import Engine
from losart.engine.hooks import revised
from losart.engine.output import Output
from losart.engine.remasking import remask
from losart.engine.run import Run
from losart.engine.sampling import LEFT_OPEN, Proposals, propose
from losart.engine.sequence import Sequence
from losart.observe.step import Step

BLOCK, MASK, VOCAB = 4, 63, 64
MODEL = model_config(1, 1, 16)


def logits_of(one: SequencePass) -> np.ndarray:
    """Of a pass's proposing rows: each differs from every other pass's."""
    rng = np.random.default_rng([one.cache.name, one.prefix_length, *one.ids])
    logits = rng.standard_normal((len(one.ids), VOCAB)).astype(np.float32)[list(one.proposed)]
    logits[:, MASK] = -np.inf
    return logits


@dataclass(kw_only=True)
class Runner(Scripted):
    """Proposes from logits, and gives those to whom they belong."""

    config: Any = MODEL
    batch_rows: int = 64
    prefill_tokens: int = 8
    beside_tokens: int = 4
    kept: list[int] = field(default_factory=list)  # rows of logits that each pass has given
    fails: set[int] = field(default_factory=set)

    def forward(self, batch: PassBatch, observe: bool = False) -> PassResult:
        if batch.kind is PassKind.PREFILL:
            return PassResult()
        parts = []
        for one in batch.sequences:
            if len(one.proposed):
                logits = logits_of(one)
                how = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "with_entropy": True}
                part = propose(logits.copy(), None, **how)
                if one.cache.name in self.fails:
                    part = Proposals.not_finite(len(logits))
                parts.append(replace(part, logits=logits) if one.keeps_logits else part)
        reads = [PassReads(False, 1, 0, 0, 0)] * len(batch.sequences)
        proposals = Proposals.joined(parts) if parts else None
        kept = None if proposals is None else proposals.logits
        self.kept.append(0 if kept is None else len(kept))
        return PassResult(proposals, reads)


class Noting:
    """Notes what it is given, and changes nothing."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], Proposals]] = []

    def revise(self, asked: SequencePass, proposals: Proposals) -> Proposals:
        np.testing.assert_array_equal(proposals.logits, logits_of(asked))
        assert len(asked.targets) == len(proposals.tokens) == len(asked.proposed)
        self.seen.append((asked.targets, proposals))
        return proposals


class Counting:
    """Proposes the numbers of its rows, and lets only the last one be fixed."""

    def revise(self, asked: SequencePass, proposals: Proposals) -> Proposals:
        decided = np.zeros(len(proposals.tokens), np.int8)
        decided[-1] = 1
        return replace(proposals, tokens=np.array(asked.targets), logits=None, decided=decided)


class Raising:
    def revise(self, asked: SequencePass, proposals: Proposals) -> Proposals:
        raise ValueError("no such grammar")


def sequence(name: int, *hooks: Any, new: int = 2 * BLOCK, **options: Any) -> Sequence:
    given = {"mask_token_id": MASK, "stop_token_ids": [], "block_length": BLOCK, "denoising_steps": 2}
    cache = Cache()
    cache.name = name
    config = generation_config(MODEL, given | {"remasking": "sequential"} | options)
    return Sequence([1] * BLOCK, config, Output(new), cache, 8, hooks=hooks)


def together(*sequences: Sequence, **runner: Any) -> tuple[list[list[Step]], list[Any], Runner]:
    """The sequences' steps and errors in passes that they share."""
    engine = Engine(runs_of := Runner(**runner), 16)
    runs = [Run(one) for one in sequences]
    for run in runs:
        engine._join(run)
    while engine.step():
        pass
    return [list(run.steps) for run in runs], [run.error for run in runs], runs_of


def test_only_logits_of_those_that_have_hooks_are_kept():
    noting = Noting()
    steps, errors, runner = together(sequence(0), sequence(1, noting), sequence(2))
    assert errors == [None] * 3
    assert runner.kept == [4, 2, 0, 4, 2, 0][: len(runner.kept)] and sum(runner.kept) == 12
    assert [targets for targets, _ in noting.seen] == [[0, 1, 2, 3], [2, 3]] * 2
    expected, _, alone = together(sequence(0), sequence(1), sequence(2))
    assert [[step.block for step in one] for one in steps] == [
        [step.block for step in one] for one in expected
    ]
    assert not any(alone.kept)


@pytest.mark.parametrize("order", [1, -1])
def test_hooks_are_active_together(order):
    """One proposes and decides, the other still sees the model's logits, and what is proposed."""
    noting = Noting()
    (steps, other), errors, _ = together(sequence(0, *(Counting(), noting)[::order], new=4), sequence(1))
    assert errors == [None, None]
    assert [step.fixed for step in steps] == [[3], [2], [1], [0]]
    assert steps[-1].block == [0, 1, 2, 3]
    assert [targets for targets, _ in noting.seen] == [[0, 1, 2, 3], [0, 1, 2], [0, 1], [0]]
    assert all((seen.tokens == targets).all() == (order == 1) for targets, seen in noting.seen[:2])
    assert [step.fixed for step in other] == [[0, 1], [2, 3]] * 2


def test_log_probabilities_are_the_model_s_of_what_others_have_decided():
    (steps, plain), _, _ = together(sequence(0, Counting(), new=4, logprobs=1), sequence(1, logprobs=0))
    result, before = steps[-1].result, [MASK] * 4
    assert result.token_ids == [one.token for one in result.logprobs] == [0, 1, 2, 3]
    assert [one.pass_number for one in result.logprobs] == [4, 3, 2, 1]
    for number, row in enumerate([3, 2, 1, 0]):
        cache = Cache()
        cache.name = 0
        asked = SequencePass(PassKind.FIRST, list(before), 4, None, cache, masked=list(range(row + 1)))
        logits = logits_of(asked)[row].astype(np.float64)
        expected = logits - np.logaddexp.reduce(logits)
        one = result.logprobs[row]
        assert one.logprob == pytest.approx(expected[row], abs=1e-9)
        assert one.top[0] == (expected.argmax(), pytest.approx(expected.max(), abs=1e-9))
        before[row] = row
        assert steps[number].logprobs == (result.logprobs if number == 3 else [])  # no gap before
    assert all(one.logprob <= 0 and one.top == () for one in plain[-1].result.logprobs)


def test_what_a_hook_raises_ends_its_sequence_alone():
    steps, errors, _ = together(sequence(0), sequence(1, Raising()), sequence(2, Noting()))
    assert errors[0] is None and errors[2] is None and steps[1] == []
    assert isinstance(errors[1], ValueError) and str(errors[1]) == "no such grammar"
    assert steps[0][-1].result is not None and steps[2][-1].result is not None


def test_hooks_are_not_told_of_logits_that_are_not_finite():
    noting, other = Noting(), Noting()
    _, errors, _ = together(sequence(0, noting), sequence(1, other), fails={0})
    assert "not finite" in str(errors[0]) and errors[1] is None
    assert not noting.seen and len(other.seen) == 4


@given(st.lists(st.sampled_from([LEFT_OPEN, 0, 1]), min_size=4, max_size=4), st.integers(1, 4))
def test_what_is_decided_goes_before_remasking(decided, count):
    asked = sequence(0).next_pass()  # of the prompt
    one = SequencePass(
        *(PassKind.FIRST, [MASK] * 4, 4, asked[0].options, Cache()), masked=[0, 1, 2, 3], count=count
    )
    ones = np.ones(4, np.float32)
    proposals = Proposals(np.arange(4), ones, ones, decided=np.array(decided, np.int8))
    ((block, left),) = remask(proposals, [one])
    fixed = [row < count if value == LEFT_OPEN else value == 1 for row, value in enumerate(decided)]
    assert left == [row for row in range(4) if not fixed[row]]
    assert block == [row if fixed[row] else MASK for row in range(4)]


def test_proposals_are_not_written_to():
    one = sequence(0, Counting())
    one.next_pass(), one.apply()
    (asked,) = one.next_pass()
    tokens, ones = np.full(4, 9), np.ones(4, np.float32)
    for array in (tokens, ones):
        array.flags.writeable = False
    result, errors = revised(Proposals(tokens, ones, ones, logits=logits_of(asked)), [(one, asked)])
    assert not errors and result.tokens.tolist() == [0, 1, 2, 3] and result.decided.tolist() == [0, 0, 0, 1]
