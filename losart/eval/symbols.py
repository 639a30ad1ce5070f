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

from losart.checks import is_int, require
from losart.errors import OptionError
from losart.eval.tasks import CHAIN_FACTS, TASKS, TIMES_SET, Task
from losart.eval.vocabulary import ASK, EARLIER, END, FIRST_FILLER, FIRST_SYMBOL, HOP, PAD, SYMBOLS, token_id

BLOCK = 16  # tokens of a question, and of an answer
FACT = 4  # tokens of a fact
SHORTEST = 128  # tokens of a prompt
MOST_FACTS = 256
TOKENS_PER_FACT = 20
SPLITS = ("train", "eval")
_PARTS = 8  # of the pairs of symbols; one of them is evaluation's


@dataclass(frozen=True)
class SymbolBatch:
    """Documents with questions.

    Attributes
    ----------
    documents : int32 [rows, tokens]
    questions, answers : int32 [rows, questions, 16]
    tasks : int32 [rows, questions]
        Indices into `list(TASKS)`.
    """

    documents: np.ndarray
    questions: np.ndarray
    answers: np.ndarray
    tasks: np.ndarray


def pair_split(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether a key of these two symbols (0..1023) is evaluation's; all other keys are training's."""
    return (first + second) % _PARTS == 0


def fact_count(tokens: int) -> int:
    """Facts of a document of that many tokens."""
    return min(MOST_FACTS, max(tokens // TOKENS_PER_FACT, 12))


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
        Weights of the tasks by name; default: all alike.
    questions : int
        To each document.
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
        require(name in TASKS, OptionError, f"tasks must be among {', '.join(TASKS)}, not {name!r}")

    chains, repeated = max(3, facts // 8), max(1, facts // 16)
    singles = facts - chains * CHAIN_FACTS - repeated * TIMES_SET
    keys = _keys(rng, rows, chains * CHAIN_FACTS + repeated + singles, singles // 4, split)
    chain_keys = keys[:, : chains * CHAIN_FACTS].reshape(rows, chains, CHAIN_FACTS, 2)
    repeated_keys = keys[:, chains * CHAIN_FACTS :][:, :repeated]
    single_keys = keys[:, chains * CHAIN_FACTS + repeated :]

    chain_values = rng.integers(SYMBOLS, size=chain_keys.shape)
    chain_values[:, :, :-1] = chain_keys[:, :, 1:]
    repeated_values = rng.integers(SYMBOLS, size=(rows, repeated, TIMES_SET, 2))
    single_values = rng.integers(SYMBOLS, size=single_keys.shape)
    pairs = np.concatenate(
        [
            np.concatenate([chain_keys, chain_values], axis=-1).reshape(rows, -1, FACT),
            np.concatenate(
                [np.repeat(repeated_keys[:, :, None], TIMES_SET, axis=2), repeated_values], axis=-1
            ).reshape(rows, -1, FACT),
            np.concatenate([single_keys, single_values], axis=-1),
        ],
        axis=1,
    )
    # Each fact's place among the facts; a key's values are set in their order.
    order = rng.permuted(np.tile(np.arange(facts), (rows, 1)), axis=1)
    times = slice(chains * CHAIN_FACTS, chains * CHAIN_FACTS + repeated * TIMES_SET)
    order[:, times] = np.sort(order[:, times].reshape(rows, repeated, TIMES_SET), axis=-1).reshape(rows, -1)
    documents = _documents(rng, tokens, pairs, order)

    plain_keys = np.concatenate([chain_keys.reshape(rows, -1, 2), single_keys], axis=1)
    plain_values = np.concatenate([chain_values.reshape(rows, -1, 2), single_values], axis=1)
    weights = np.array([wanted.get(name, 0.0) for name in TASKS])
    drawn = rng.choice(len(TASKS), size=(rows, questions), p=weights / weights.sum()).astype(np.int32)
    asked = np.full((rows, questions, BLOCK), token_id(ASK), np.int32)
    answers = np.full((rows, questions, BLOCK), token_id(PAD), np.int32)
    for index, task in enumerate(TASKS.values()):
        row, column = np.nonzero(drawn == index)
        if len(row) == 0:
            continue
        if task.overwritten:
            chosen = rng.integers(repeated, size=(len(row), 1))
            key = repeated_keys[row[:, None], chosen]
            value = repeated_values[row[:, None], chosen][:, :, ::-1][:, :, : task.values]
        elif task.hops > 1:
            chosen = _distinct(rng, len(row), chains, task.keys)
            start = rng.integers(CHAIN_FACTS - task.hops + 1, size=chosen.shape)
            hops = start[..., None] + np.arange(task.hops)
            key = chain_keys[row[:, None], chosen, start]
            value = chain_values[row[:, None, None], chosen[..., None], hops]
        else:
            chosen = _distinct(rng, len(row), plain_keys.shape[1], task.keys)
            key = plain_keys[row[:, None], chosen]
            value = plain_values[row[:, None], chosen][:, :, None]
        asked[row, column], answers[row, column] = _blocks(task, key, value)
    return SymbolBatch(documents, asked, answers, drawn)


def _check(length: int, facts: int, split: str) -> None:
    require(
        is_int(length) and length >= SHORTEST and length % BLOCK == 0,
        OptionError,
        f"lengths of symbolic prompts must be multiples of {BLOCK}, {SHORTEST} or more, not {length!r}",
    )
    require(
        is_int(facts) and 12 <= facts <= (length - BLOCK) // FACT,
        OptionError,
        f"facts must be an integer from 12 to {(length - BLOCK) // FACT} here, not {facts!r}",
    )
    require(split in SPLITS, OptionError, f"split must be {' or '.join(SPLITS)}, not {split!r}")


def _keys(rng: np.random.Generator, rows: int, count: int, alike: int, split: str) -> np.ndarray:
    """Pairs of symbols [rows, count, 2], different within a row; the last `alike` begin as others do."""
    keys = np.empty((rows, count, 2), np.int64)
    todo = np.arange(rows)
    while len(todo):
        first = rng.integers(SYMBOLS, size=(len(todo), count))
        if alike:
            first[:, count - alike :] = first[:, :alike]
        # The remainder of the sum says whose the pair is.
        lowest, parts = (0, 1) if split == "eval" else (1, _PARTS - 1)
        remainder = lowest + rng.integers(parts, size=first.shape)
        second = rng.integers(SYMBOLS // _PARTS, size=first.shape) * _PARTS + (remainder - first) % _PARTS
        keys[todo, :, 0], keys[todo, :, 1] = first, second
        codes = np.sort(first * SYMBOLS + second, axis=1)
        todo = todo[(codes[:, 1:] == codes[:, :-1]).any(axis=1)]
    return keys


def _documents(rng: np.random.Generator, tokens: int, pairs: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Facts [rows, facts, 4] in their order at random places among filler: ids [rows, tokens]."""
    rows, facts = order.shape
    documents = rng.integers(FIRST_FILLER, FIRST_SYMBOL, size=(rows, tokens), dtype=np.int32)
    room = tokens - (FACT - 1) * facts  # a fact takes one place here, and opens three more
    places = np.argpartition(rng.random((rows, room), dtype=np.float32), facts - 1, axis=1)[:, :facts]
    starts = np.sort(places, axis=1) + (FACT - 1) * np.arange(facts)
    starts = np.take_along_axis(starts, order, axis=1)
    where = starts[:, :, None] + np.arange(FACT)
    documents[np.arange(rows)[:, None, None], where] = FIRST_SYMBOL + pairs
    return documents


def _distinct(rng: np.random.Generator, rows: int, high: int, count: int) -> np.ndarray:
    """`count` different numbers below `high` a row."""
    return np.argsort(rng.random((rows, high), dtype=np.float32), axis=1)[:, :count]


def _blocks(task: Task, key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Questions and answers [n, 16] of keys [n, keys, 2] and their values [n, keys, values or hops, 2]."""
    n, width = len(key), 2 * task.pairs
    question = np.full((n, BLOCK), token_id(ASK), np.int32)
    answer = np.full((n, BLOCK), token_id(PAD), np.int32)
    mark = token_id(HOP if task.hops > 1 else EARLIER)
    slots = np.full((n, task.keys, width // task.keys), mark, np.int32)
    slots[:, :, :2] = FIRST_SYMBOL + key
    question[:, :width] = slots.reshape(n, width)
    answer[:, :width] = FIRST_SYMBOL + value.reshape(n, width)
    answer[:, width] = token_id(END)
    return question, answer
