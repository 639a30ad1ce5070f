"""The facts of symbolic documents: keys, values, and the order in which they appear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from losart.eval.tasks import CHAIN_FACTS, TIMES_SET
from losart.eval.vocabulary import SYMBOLS

PARTS = 8  # of the pairs of symbols; evaluation has one of them


@dataclass(frozen=True)
class SymbolFacts:
    """Facts of some documents. Keys and values are pairs of symbols, 0..1023.

    Attributes
    ----------
    chain_keys, chain_values : int64 [rows, chains, 3, 2]
        A value is the next key.
    repeated_keys : int64 [rows, repeated, 2]
    repeated_values : int64 [rows, repeated, 3, 2]
        As they are set, one after the other.
    single_keys, single_values : int64 [rows, singles, 2]
    """

    chain_keys: np.ndarray
    chain_values: np.ndarray
    repeated_keys: np.ndarray
    repeated_values: np.ndarray
    single_keys: np.ndarray
    single_values: np.ndarray

    @property
    def listed(self) -> np.ndarray:
        """All facts, key and value: [rows, facts, 4]. Chains first, then repeated ones, then single ones."""
        rows = len(self.chain_keys)
        keys = [
            self.chain_keys,
            np.repeat(self.repeated_keys[:, :, None], TIMES_SET, axis=2),
            self.single_keys,
        ]
        values = [self.chain_values, self.repeated_values, self.single_values]
        return np.concatenate(
            [
                np.concatenate([key, value], axis=-1).reshape(rows, -1, 4)
                for key, value in zip(keys, values, strict=True)
            ],
            axis=1,
        )

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A random order: the rank of each of `listed`, [rows, facts]. Repeated ones keep their order."""
        rows, repeated = self.repeated_keys.shape[:2]
        facts = self.first_single + self.single_keys.shape[1]
        ranks = rng.permuted(np.tile(np.arange(facts), (rows, 1)), axis=1)
        times = slice(self.first_repeated, self.first_single)
        in_order = np.sort(ranks[:, times].reshape(rows, repeated, TIMES_SET), axis=-1)
        ranks[:, times] = in_order.reshape(rows, -1)
        return ranks

    @property
    def first_repeated(self) -> int:
        """Number among `listed` of the first repeated fact."""
        return self.chain_keys.shape[1] * CHAIN_FACTS

    @property
    def first_single(self) -> int:
        """Number among `listed` of the first single fact."""
        return self.first_repeated + self.repeated_keys.shape[1] * TIMES_SET

    @property
    def plain(self) -> np.ndarray:
        """Numbers among `listed` of the facts whose key is set once: [keys]."""
        single = self.first_single + np.arange(self.single_keys.shape[1])
        return np.concatenate([np.arange(self.first_repeated), single])


def draw_facts(rng: np.random.Generator, rows: int, count: int, split: str) -> SymbolFacts:
    """`count` facts, 12 or more, for each of `rows` documents, with keys of a split."""
    chains, repeated = max(3, count // 8), max(1, count // 16)
    linked = chains * CHAIN_FACTS
    singles = count - linked - repeated * TIMES_SET
    keys = _draw_keys(rng, rows, linked + repeated + singles, singles // 4, split)
    chain_keys = keys[:, :linked].reshape(rows, chains, CHAIN_FACTS, 2)
    chain_values = rng.integers(SYMBOLS, size=chain_keys.shape)
    chain_values[:, :, :-1] = chain_keys[:, :, 1:]
    return SymbolFacts(
        chain_keys=chain_keys,
        chain_values=chain_values,
        repeated_keys=keys[:, linked : linked + repeated],
        repeated_values=rng.integers(SYMBOLS, size=(rows, repeated, TIMES_SET, 2)),
        single_keys=keys[:, linked + repeated :],
        single_values=rng.integers(SYMBOLS, size=(rows, singles, 2)),
    )


def is_evaluation_key(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether a key of these two symbols (0..1023) is evaluation's; all other keys are training's."""
    return (first + second) % PARTS == 0


def _draw_keys(rng: np.random.Generator, rows: int, count: int, alike: int, split: str) -> np.ndarray:
    """Keys [rows, count, 2], different within a row; the last `alike` begin as the first ones do."""
    keys = np.empty((rows, count, 2), np.int64)
    pending = np.arange(rows)
    while len(pending):
        first = rng.integers(SYMBOLS, size=(len(pending), count))
        if alike:
            first[:, count - alike :] = first[:, :alike]
        # The remainder of the sum says which split has the key (`is_evaluation_key`).
        lowest, parts = (0, 1) if split == "eval" else (1, PARTS - 1)
        remainder = lowest + rng.integers(parts, size=first.shape)
        second = rng.integers(SYMBOLS // PARTS, size=first.shape) * PARTS + (remainder - first) % PARTS
        keys[pending, :, 0], keys[pending, :, 1] = first, second
        codes = np.sort(first * SYMBOLS + second, axis=1)
        pending = pending[(codes[:, 1:] == codes[:, :-1]).any(axis=1)]
    return keys
