"""The facts of symbolic documents: keys, values, and the order in which they appear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from losart.eval.tasks import CHAIN_FACTS, TIMES_SET
from losart.eval.vocabulary import SYMBOLS

PARTS = 8  # of the pairs of symbols; evaluation has one of them


@dataclass(frozen=True)
class SymbolFacts:
    """Facts of some documents: key and value, each a pair of symbols, 0..1023.

    Attributes
    ----------
    listed : int64 [rows, facts, 4]
        Chains first, in each of which a value is the next key; then repeated ones, as they are set one
        after the other; then single ones.
    chains, repeated : int
        How many chains, and how many repeated keys, a document has.
    """

    listed: np.ndarray
    chains: int
    repeated: int

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A random order: the rank of each of `listed`, [rows, facts]. Repeated ones keep their order."""
        rows, facts, _ = self.listed.shape
        ranks = rng.permuted(np.tile(np.arange(facts), (rows, 1)), axis=1)
        times = slice(self.first_repeated, self.first_single)
        in_order = np.sort(ranks[:, times].reshape(rows, self.repeated, TIMES_SET), axis=-1)
        ranks[:, times] = in_order.reshape(rows, -1)
        return ranks

    @property
    def first_repeated(self) -> int:
        """Number among `listed` of the first repeated fact."""
        return self.chains * CHAIN_FACTS

    @property
    def first_single(self) -> int:
        """Number among `listed` of the first single fact."""
        return self.first_repeated + self.repeated * TIMES_SET

    @property
    def plain(self) -> np.ndarray:
        """Numbers among `listed` of the facts whose key is set once: [keys]."""
        single = np.arange(self.first_single, self.listed.shape[1])
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
    other_values = [rng.integers(SYMBOLS, size=(rows, n, 2)) for n in (repeated * TIMES_SET, singles)]
    values = np.concatenate([chain_values.reshape(rows, linked, 2), *other_values], axis=1)
    times_set = np.repeat([1, TIMES_SET, 1], [linked, repeated, singles])
    listed = np.concatenate([np.repeat(keys, times_set, axis=1), values], axis=2)
    return SymbolFacts(listed, chains, repeated)


def is_evaluation_key(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether a key of these two symbols (0..1023) is evaluation's; all other keys are training's."""
    return (first + second) % PARTS == 0


def _draw_keys(rng: np.random.Generator, rows: int, count: int, alike: int, split: str) -> np.ndarray:
    """Keys [rows, count, 2], different within a row; the last `alike` begin as the first ones do."""
    keys = np.empty((rows, count, 2), np.int64)
    pending = np.arange(rows)
    while len(pending):
        first = rng.integers(SYMBOLS, size=(len(pending), count))
        first[:, count - alike :] = first[:, :alike]
        # The remainder of the sum says which split has the key (`is_evaluation_key`).
        lowest, parts = (0, 1) if split == "eval" else (1, PARTS - 1)
        remainder = lowest + rng.integers(parts, size=first.shape)
        second = rng.integers(SYMBOLS // PARTS, size=first.shape) * PARTS + (remainder - first) % PARTS
        keys[pending, :, 0], keys[pending, :, 1] = first, second
        codes = np.sort(first * SYMBOLS + second, axis=1)
        pending = pending[(codes[:, 1:] == codes[:, :-1]).any(axis=1)]
    return keys
