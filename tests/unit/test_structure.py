"""Which proposals are fixed under a grammar: here a table of states, beside which every answer is held."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv import at_most, model_config
from scripted import Cache, Scripted

from losart.config.decoding import Decoding
from losart.config.options import generation_config
from losart.engine.batch import PassBatch, PassKind, PassReads, PassResult, SequencePass
from losart.engine.engine import Engine
from losart.engine.output import Output
from losart.engine.remasking import choose
from losart.engine.sampling import STRATEGIES, Proposals, propose
from losart.engine.structure import Structure
from losart.errors import LosartError, OptionError

BLOCK, VOCAB, MASK, END = 4, 12, 11, 10
MODEL = model_config(1, 1, 16, vocab_size=VOCAB, end_token_ids=(END,))
Table = dict[int, dict[int, int]]  # from state and token to state; there is none after `LAST`
LAST = -1


class Automaton:
    """A grammar whose texts are those that a table of states accepts; `END` leads to `LAST`."""

    end_token_ids = (END,)

    def __init__(self, table: Table) -> None:
        self.table, self.state = table, 0

    @property
    def complete(self) -> bool:
        return self.state == LAST

    def accepts(self, token: int) -> bool:
        return token in self.table.get(self.state, {})

    def consume(self, tokens: Ids[int]) -> int:
        for taken, token in enumerate(tokens):
            if not self.accepts(token):
                return taken
            self.state = self.table[self.state][token]
        return len(tokens)

    def allowed(self) -> np.ndarray:
        return np.array(sorted(self.table.get(self.state, {})), np.int64)

    def forced(self) -> list[int]:
        state, forced = self.state, list[int]()
        while state != LAST and len(choices := self.table[state]) == 1 and len(forced) < 9:
            ((token, state),) = choices.items()
            forced.append(token)
        return forced


def random_table(seed: int, choices: int = 3) -> Table:
    """Of a few states, from each of which the end can be reached."""
    rng = np.random.default_rng(seed)
    states = int(rng.integers(2, 7))
    table: Table = {}
    for state in range(states):
        tokens = rng.choice(END, int(rng.integers(1, choices + 1)), replace=False)
        table[state] = {int(token): int(rng.integers(states)) for token in tokens}
        table[state][int(tokens[0])] = state + 1  # the way to the end
    table[states] = {END: LAST} if seed % 2 else {0: LAST, 1: LAST}
    return table


@dataclass(kw_only=True)
class Runner(Scripted):
    """Logits by chance, the same for the same block after the same prefix."""

    config: Any = MODEL
    batch_rows: int = 256
    prefill_tokens: int = 8
    beside_tokens: int = 8
    scale: float = 2.0
    asked: list[SequencePass] = field(default_factory=list)

    def forward(self, batch: PassBatch, observe: bool = False) -> PassResult:
        if batch.kind is PassKind.PREFILL:
            return PassResult()
        parts = []
        for one in batch.sequences:
            self.asked.append(one)
            if not len(one.proposed):
                continue
            rng = np.random.default_rng([one.prefix_length, *one.ids])
            logits = self.scale * rng.standard_normal((len(one.ids), VOCAB)).astype(np.float32)
            logits = logits[list(one.proposed)]
            logits[:, MASK] = -np.inf
            options = one.options
            part = propose(
                logits.copy(),
                None if one.uniforms is None else one.uniforms[list(one.proposed)],
                temperature=one.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                with_entropy=True,
            )
            parts.append(replace(part, logits=logits) if one.keeps_logits else part)
        reads = [PassReads(False, 1, 0, 0, 0)] * len(batch.sequences)
        return PassResult(Proposals.joined(parts) if parts else None, reads)


def decoded(requests: Ids[tuple[Table | None, dict[str, Any]]], **runner: Any) -> list[Any]:
    """What each gives, in passes that they share."""
    engine = Engine(Runner(**runner), 16)
    streams = []
    for number, (table, options) in enumerate(requests):
        given = {"mask_token_id": MASK, "block_length": BLOCK, "stop_token_ids": [END]} | options
        config = generation_config(engine.runner.config, given)
        grammar = None if table is None else Automaton(table)
        streams.append(engine.submit([1 + number] * 5, config, grammar=grammar))
    for stream in streams:
        stream.start()
    return [stream.result() for stream in streams]


def state_after(table: Table, tokens: Ids[int]) -> int:
    automaton = Automaton(table)
    assert automaton.consume(tokens) == len(tokens), tokens
    return automaton.state


DECODINGS = [
    Decoding(),
    Decoding(shifted=True, seeds=True),
    Decoding(causal=True, seeds=True, spreads_masked=True),
    Decoding(ends_short=True),
]


@at_most(60)
@given(
    seeds=st.lists(st.integers(0, 1 << 20), min_size=1, max_size=4),
    decoding=st.sampled_from(DECODINGS),
    new=st.integers(1, 30),
    options=st.fixed_dictionaries(
        {
            "block_length": st.sampled_from([1, 4, 7]),
            "denoising_steps": st.integers(1, 5),
            "remasking": st.sampled_from(STRATEGIES),
            "confidence_threshold": st.sampled_from([0.1, 0.5, 1.0]),
            "temperature": st.sampled_from([0.0, 1.0]),
            "top_k": st.sampled_from([0, 2]),
            "top_p": st.sampled_from([1.0, 0.6]),
            "sub_block_length": st.sampled_from([None, 2]),
        }
    ),
)
def test_every_answer_follows_its_grammar(seeds, decoding, new, options):
    """Also beside one without a grammar, which gives what it gives alone."""
    runner = {"config": replace(MODEL, decoding=decoding), "rides": not decoding.seeds}
    options |= {"max_new_tokens": new, "seed": 3}
    requests = [(random_table(seed), options) for seed in seeds]
    *found, free = decoded([*requests, (None, options)], **runner)
    for (table, _), result in zip(requests, found, strict=True):
        state = state_after(table, result.token_ids)
        assert result.finish_reason == ("stop" if state == LAST else "length")
        assert state == LAST or len(result.token_ids) == new
    alone = [
        decoded([(None, options)] * index + [request], **runner)[-1] for index, request in enumerate(requests)
    ]
    assert [one.token_ids for one in alone] == [one.token_ids for one in found]
    assert free.token_ids == decoded([(None, options)] * (len(seeds) + 1), **runner)[-1].token_ids


def fixed_by(
    table: Table, logits: np.ndarray, count: int | None = None, **options: Any
) -> tuple[list[int], Proposals, Output]:
    """The run that a pass over masked rows fixes, the revised proposals, and the output that was told."""
    given = {"mask_token_id": MASK, "block_length": len(logits), "remasking": "sequential"}
    config = generation_config(MODEL, given | options)
    rows, uniforms = list(range(len(logits))), None
    if config.temperature:
        uniforms = np.random.default_rng(config.seed).random(len(logits))
    asked = SequencePass(
        PassKind.FIRST, [MASK] * len(rows), 0, config, Cache(), masked=rows, uniforms=uniforms, count=count
    )
    drawn = propose(
        logits.copy(),
        uniforms,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        with_entropy=True,
    )
    structure = Structure(Automaton(table), output := Output(100))
    revised = structure.revise(asked, replace(drawn, logits=logits))
    chosen = choose(revised, [asked])
    run = int(chosen.sum())
    assert chosen[:run].all()  # from the left
    return revised.tokens[:run].tolist(), revised, output


def logits_for(*tokens: int, second: int = 5) -> np.ndarray:
    """Of which the first of each row is almost certain, and the second the next."""
    logits = np.zeros((len(tokens), VOCAB), np.float32)
    logits[np.arange(len(tokens)), tokens] = 9
    logits[:, second] = 4
    logits[:, MASK] = -np.inf
    return logits


ANY = dict.fromkeys(range(END + 1), 0) | {END: LAST}
EVEN: Table = {0: {0: 1, 2: 1, 4: 1, 6: 1}, 1: {1: 0, 3: 0, 5: 0, END: LAST}}  # alternating with odd ones


def test_a_run_is_fixed_as_far_as_the_grammar_accepts_it():
    assert fixed_by(EVEN, logits_for(2, 3, 4, 4, 3))[0] == [2, 3, 4]


def test_the_first_token_is_the_most_probable_one_that_the_grammar_allows():
    assert fixed_by(EVEN, logits_for(3, 3, 3, second=6))[0] == [6, 3]
    logits = logits_for(3, 3, second=6)
    logits[0, 5] = 8  # odd, too
    assert fixed_by(EVEN, logits)[0] == [6, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_remasking_says_how_far_the_run_may_come(count):
    assert fixed_by({0: ANY}, logits_for(2, 2, 2, 2), count)[0] == [2] * count


def test_what_remasking_leaves_out_ends_the_run():
    logits = logits_for(2, 3, 2, 3)
    logits[1] /= 9  # of which it is not sure
    options = {"remasking": "low_confidence_dynamic", "confidence_threshold": 0.9}
    assert fixed_by({0: ANY}, logits, 1, **options)[0] == [2]
    logits[0] /= 9  # but the leftmost is fixed all the same
    assert fixed_by({0: ANY}, logits, 1, **options)[0] == [2]


def test_what_the_grammar_leaves_no_choice_of_is_fixed_whatever_is_proposed():
    table: Table = {0: {3: 1}, 1: {4: 2}, 2: {5: 3, 6: 3}, 3: {7: 4}, 4: {8: LAST}}
    assert fixed_by(table, logits_for(0, 0, 6, 0, 0), 5)[0] == [3, 4, 6, 7, 8]
    assert fixed_by(table, logits_for(0, 0, 6, 0, 0), 1)[0] == [3, 4]  # remasking wants none of the third
    assert fixed_by(table, logits_for(0, 0, 0, 0, 0), 5)[0] == [3, 4]  # a pass later: 5 or 6 from its row
    assert fixed_by(table, logits_for(0), 5)[0] == [3]


def test_the_output_is_told_where_the_grammar_ends():
    table: Table = {0: {3: 1}, 1: {4: LAST}}
    tokens, _, output = fixed_by(table, logits_for(0, 0, 0))
    assert tokens == [3, 4] and output.complete_at == 2
    output.extend([3, 4, 4])
    assert output.tokens == [3, 4] and output.finish_reason == "stop"


def test_an_end_at_the_last_token_that_fits_is_no_cut():
    table: Table = {0: {3: 1}, 1: {4: LAST}}
    assert [decoded([(table, {"max_new_tokens": new})])[0].finish_reason for new in (1, 2)] == [
        "length",
        "stop",
    ]


@pytest.mark.parametrize("table", [{0: {MASK: 1}, 1: {END: LAST}}, {0: {MASK: 1, 3: 1}, 1: {END: LAST}}])
def test_tokens_that_the_model_has_not_are_never_fixed(table):
    logits = logits_for(0, 0)
    logits[:, 3] = -np.inf
    with pytest.raises(LosartError, match="nothing that the model's tokens can spell"):
        fixed_by(table, logits)


def test_with_a_temperature_the_first_token_is_drawn_under_the_grammar():
    """With the row's own number; and as often as its probability says."""
    logits = np.random.default_rng(2).standard_normal((2, VOCAB)).astype(np.float32)
    logits[:, MASK] = -np.inf
    allowed = np.array([0, 2, 4, 6])
    weights = np.exp(logits[0, allowed] / 0.7)
    cumulative = np.cumsum(weights / weights.sum())
    drawn = np.zeros(VOCAB)
    for seed in range(400):
        first = fixed_by(EVEN, logits, 1, temperature=0.7, seed=seed)[0][0]
        number = np.random.default_rng(seed).random(2)[0]
        assert first == allowed[np.searchsorted(cumulative, number, side="right")]
        drawn[first] += 1
    np.testing.assert_allclose(drawn[allowed] / 400, weights / weights.sum(), atol=0.08)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "a", "grammar": "start: A"}, "grammar cannot be given beside regex"),
        ({"regex": 3}, "regex must be a string"),
        ({"json_schema": "{"}, "json_schema must be JSON"),
        ({"json_schema": [1]}, "json_schema must be an object"),
        ({"json_schema": {"a": {1}}}, "json_schema must be JSON"),
        ({"regex": "a" * 65537}, "regex must have 65536 characters at most"),
        ({"regex": "a", "editing_threshold": 0.5}, "editing_threshold must be 1 beside regex"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        generation_config(MODEL, {"mask_token_id": MASK} | options)


def test_tokens_of_a_family_that_edits_stay_as_they_are():
    model = replace(MODEL, decoding=Decoding(defaults=(("editing_threshold", 0.5),)))
    assert generation_config(model, {"mask_token_id": MASK}).edits
    assert not generation_config(model, {"mask_token_id": MASK, "json_schema": {}}).edits
