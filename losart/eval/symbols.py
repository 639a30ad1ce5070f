"""The symbolic tasks as arrays of token ids: documents of facts among filler, questions, answers.

A fact is `k1 k2 v1 v2`, four symbols. A question is a block of 16 tokens, its answer the next block:
each token of the answer answers the one 16 before it.

========= ==================== =====================
task      question             answer
========= ==================== =====================
key       k1 k2 ? ? ...        v1 v2 end pad ...
keys-2    k1 k2 l1 l2 ? ...    v1 v2 w1 w2 end ...
values    k1 k2 + + + + ? ...  newest, the one before, the first, end ...
chain-2   k1 k2 > > ? ...      m1 m2 v1 v2 end ...
========= ==================== =====================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from losart.config.checks import is_int
from losart.errors import OptionError
from losart.eval.symbol_facts import SymbolFacts, draw_facts
from losart.eval.tasks import CHAIN_FACTS, TASKS, TIMES_SET, Task, find_task
from losart.eval.vocabulary import ASK, EARLIER, END, FIRST_FILLER, FIRST_SYMBOL, HOP, PAD, token_id

BLOCK = 16  # tokens of a question, and of an answer
FACT = 4  # tokens of a fact
SHORTEST = 128  # tokens of a prompt
MAX_FACTS = 256
TOKENS_PER_FACT = 20
SPLITS = ("train", "eval")


@dataclass(frozen=True)
class SymbolBatch:
    """Documents with questions.

    Attributes
    ----------
    documents : int32 [rows, tokens]
    questions, answers : int32 [rows, questions, 16]
    tasks : int32 [rows, questions]
        Indices into `list(TASKS)`.
    sources : int32 [rows, questions, 16]
        Position in the document of the token that each of `answers` repeats; -1 for `end` and `pad`.
    """

    documents: np.ndarray
    questions: np.ndarray
    answers: np.ndarray
    tasks: np.ndarray
    sources: np.ndarray


def fact_count(tokens: int) -> int:
    """Facts of a document of that many tokens."""
    return min(MAX_FACTS, max(tokens // TOKENS_PER_FACT, 12))


def make_batch(
    rng: np.random.Generator,
    rows: int,
    length: int,
    tasks: Mapping[str, float] | None = None,
    *,
    questions: int = 1,
    facts: int | None = None,
    split: str = "train",
) -> SymbolBatch:
    """Random documents with questions of random tasks.

    Parameters
    ----------
    rng : numpy.random.Generator
        Equal states give equal batches.
    rows : int
        Documents.
    length : int
        Tokens of a prompt, that is of a document and one question; a multiple of 16, 128 or more.
    tasks : mapping of str to float, optional
        Weights of the tasks by name; default: equal ones.
    questions : int
        Per document.
    facts : int, optional
        Of a document, 12 or more; default: `fact_count`. Of these an eighth begins a chain of three,
        and a sixteenth sets a key for the first of three times. A quarter of the single facts share
        the first symbol of their key with another key.
    split : {"train", "eval"}
        Whose keys. No key of one is in the other.

    Raises
    ------
    OptionError
        When the length or the number of facts does not fit, or a task is unknown.
    """
    tokens = length - BLOCK
    facts = fact_count(tokens) if facts is None else facts
    _check(length, facts, split)
    wanted = dict.fromkeys(TASKS, 1.0) if tasks is None else dict(tasks)
    for name in wanted:
        find_task(name)

    drawn_facts = draw_facts(rng, rows, facts, split)
    documents, starts = _documents(rng, tokens, drawn_facts)
    weights = np.array([wanted.get(name, 0.0) for name in TASKS])
    drawn = rng.choice(len(TASKS), size=(rows, questions), p=weights / weights.sum()).astype(np.int32)
    asked, answers, sources = (np.empty((rows, questions, BLOCK), np.int32) for _ in range(3))
    for index, task in enumerate(TASKS.values()):
        row, column = np.nonzero(drawn == index)
        if len(row):
            number = _ask(rng, task, drawn_facts, len(row))
            which = row[:, None, None], number
            asked[row, column], answers[row, column], sources[row, column] = _blocks(
                task, drawn_facts.listed[which], starts[which]
            )
    return SymbolBatch(documents, asked, answers, drawn, sources)


def _check(length: int, facts: int, split: str) -> None:
    if not (is_int(length) and length >= SHORTEST and length % BLOCK == 0):
        raise OptionError(
            f"lengths of symbolic prompts must be multiples of {BLOCK}, {SHORTEST} or more, not {length!r}"
        )
    if not (is_int(facts) and 12 <= facts <= (length - BLOCK) // FACT):
        raise OptionError(
            f"facts must be an integer from 12 to {(length - BLOCK) // FACT} here, not {facts!r}"
        )
    if split not in SPLITS:
        raise OptionError(f"split must be {' or '.join(SPLITS)}, not {split!r}")


def _documents(rng: np.random.Generator, tokens: int, facts: SymbolFacts) -> tuple[np.ndarray, np.ndarray]:
    """Facts in a random order, at random positions among filler.

    Ids [rows, tokens], and where each fact starts [rows, facts].
    """
    order = facts.order(rng)
    rows, count = order.shape
    documents = rng.integers(FIRST_FILLER, FIRST_SYMBOL, size=(rows, tokens), dtype=np.int32)
    room = tokens - (FACT - 1) * count  # a fact takes one position here, and adds three
    positions = np.argpartition(rng.random((rows, room), dtype=np.float32), count - 1, axis=1)[:, :count]
    in_order = np.sort(positions, axis=1) + (FACT - 1) * np.arange(count)
    row = np.arange(rows)[:, None]
    starts = in_order[row, order]
    documents[row[:, :, None], starts[:, :, None] + np.arange(FACT)] = FIRST_SYMBOL + facts.listed
    return documents, starts


def _ask(rng: np.random.Generator, task: Task, facts: SymbolFacts, count: int) -> np.ndarray:
    """Numbers among the listed facts that `count` questions ask for, [count, keys, values or hops]."""
    if task.overwritten:
        chosen = rng.integers(facts.repeated, size=(count, 1, 1))
        newest_first = TIMES_SET - 1 - np.arange(task.values)
        return facts.first_repeated + chosen * TIMES_SET + newest_first
    if task.hops > 1:
        chosen = _distinct(rng, count, facts.chains, task.keys)
        start = rng.integers(CHAIN_FACTS - task.hops + 1, size=chosen.shape)
        return (chosen * CHAIN_FACTS + start)[..., None] + np.arange(task.hops)
    return facts.plain[_distinct(rng, count, len(facts.plain), task.keys)][..., None]


def _distinct(rng: np.random.Generator, rows: int, high: int, count: int) -> np.ndarray:
    """`count` different numbers below `high` per row."""
    return np.argsort(rng.random((rows, high), dtype=np.float32), axis=1)[:, :count]


def _blocks(task: Task, facts: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Questions, answers and their sources, each [n, 16].

    Of facts [n, keys, values or hops, 4], and where in the document they start [n, keys, values or hops].
    """
    n, width = len(facts), 2 * task.pairs
    question = np.full((n, BLOCK), token_id(ASK), np.int32)
    answer = np.full((n, BLOCK), token_id(PAD), np.int32)
    source = np.full((n, BLOCK), -1, np.int32)
    mark = token_id(HOP if task.hops > 1 else EARLIER)
    slots = np.full((n, task.keys, width // task.keys), mark, np.int32)
    slots[:, :, :2] = FIRST_SYMBOL + facts[:, :, 0, :2]
    question[:, :width] = slots.reshape(n, width)
    answer[:, :width] = FIRST_SYMBOL + facts[..., 2:].reshape(n, width)
    answer[:, width] = token_id(END)
    source[:, :width] = (starts[..., None] + (2, 3)).reshape(n, width)
    return question, answer, source
