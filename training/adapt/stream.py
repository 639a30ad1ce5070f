"""What one step trains on: texts one after the other, and after them blocks of theirs with masked tokens.

That is the training layout of block diffusion (arXiv 2503.09573), [clean; noisy], for many texts of any
lengths at once. A clean token sees the tokens of its own and of earlier blocks of its text; a noisy block
sees itself and the clean blocks before it. So each token sees at most one stretch of the clean part and one
of the noisy part. All steps have the same number of tokens, whatever their texts' lengths: one compilation
serves them all.

Texts begin at multiples of `SLOT` tokens, and noisy tokens come in slots of so many, each a copy of one slot
of a text. Only slots that have something to predict are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

SLOT = 16  # tokens: the longest block

Text = tuple[NDArray[np.int32], NDArray[np.bool_]]


@dataclass(frozen=True)
class Sizes:
    """Tokens of a step: clean, noisy, and predicted ones. The first two are multiples of 128."""

    clean: int
    noisy: int
    targets: int

    @property
    def tokens(self) -> int:
        """All that go through the model."""
        return self.clean + self.noisy


@dataclass(frozen=True)
class Noise:
    """How tokens are masked, and what their predictions count.

    Attributes
    ----------
    mask_id, end_id : int
    shifted : bool
        Whether the row before a token predicts it. A block's first token is then predicted by the clean row
        before the block, and never masked.
    suffix : float
        Share of blocks of which the first tokens stay and all others are masked, as in decoding from left to
        right; in the other blocks tokens are masked at random, at a rate drawn for each.
    decay : float
        A token counts by this to the power of the tokens between it and the nearest shown one before it.
    exactly : int, optional
        Of each block so many tokens, drawn at random, are predicted, and masked unless a clean row predicts
        them; for measuring.
    """

    mask_id: int
    end_id: int
    shifted: bool = True
    suffix: float = 0.5
    decay: float = 1.0
    exactly: int | None = None


@dataclass(frozen=True)
class Stream:
    """One step.

    Attributes
    ----------
    ids, positions : int64 [tokens]
        Positions are those in a token's text.
    clean_from, clean_to, noisy_from, noisy_to : int32 [tokens]
        The two stretches of the stream that each token sees.
    rows : int64 [targets]
        Where in the stream the predictions stand.
    targets : int64 [targets]
    weights : float32 [targets]
        0 for those that only fill up.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    clean_from: torch.Tensor
    clean_to: torch.Tensor
    noisy_from: torch.Tensor
    noisy_to: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> Stream:
        """On a device; copies may still be in flight."""
        parts = (getattr(self, part.name) for part in fields(self))
        if device.type == "cuda":
            return Stream(*(part.pin_memory().to(device, non_blocking=True) for part in parts))
        return Stream(*(part.to(device) for part in parts))


def slots(tokens: int) -> int:
    """Tokens of a text with what fills up its last slot."""
    return -(-tokens // SLOT) * SLOT


def whole_slots(text: Text, end_id: int) -> Text:
    """A text without the last tokens if it was cut short, so that nothing follows them."""
    ids, answers = text
    count = len(ids) if len(ids) and ids[-1] == end_id else len(ids) // SLOT * SLOT
    return ids[:count], answers[:count]


def make_stream(
    rng: np.random.Generator, texts: Sequence[Text], blocks: Sequence[int], sizes: Sizes, noise: Noise
) -> Stream:
    """The stream of some texts, each with its block length, a divisor of SLOT.

    A text is filled up with end tokens. In the last block they are to be predicted too if the text ends with
    an answer's: that is what follows an answer in its block. Texts that end otherwise must fill their slots
    (see `whole_slots`).

    Raises
    ------
    ValueError
        The texts have more tokens than there is room for.
    """
    clean = _clean_part(texts, blocks, sizes, noise)
    chosen = _choose_slots(rng, clean.predicted.reshape(-1, SLOT).any(1), sizes.noisy // SLOT)
    places = (chosen[:, None] * SLOT + np.arange(SLOT)).ravel()  # of noisy tokens, in the clean part
    position, block = clean.positions[places], clean.blocks[places]
    first = position % block == 0
    maskable = clean.predicted[places] & ~first if noise.shifted else clean.predicted[places]
    leads = clean.predicted[places] & first & (position > 0) if noise.shifted else np.zeros_like(first)
    if noise.exactly is None:
        drawn = _drawn_masks(rng, maskable, block, noise.suffix)
    else:
        drawn = _so_many(rng, block, noise.exactly)
        leads &= drawn
    masked = maskable & drawn
    shown_before = _shown_before(masked, block)
    own_block = sizes.clean + np.arange(sizes.noisy) // block * block
    starts = clean.starts[places]

    at = np.flatnonzero(masked)
    rows = sizes.clean + at - (1 if noise.shifted else 0)
    targets, weights = clean.expected[places[at]], noise.decay ** shown_before[at]
    if noise.shifted:
        leading = np.unique(places[leads])
        rows = np.concatenate([leading - 1, rows])
        targets = np.concatenate([clean.expected[leading], targets])
        weights = np.concatenate([np.ones(len(leading)), weights])
    picked = rng.permutation(len(rows))[: sizes.targets]
    missing = sizes.targets - len(picked)

    def filled(values: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([values[picked], np.zeros(missing, values.dtype)]))

    def whole(of_clean: NDArray[np.generic], of_noisy: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([of_clean, of_noisy]))

    none = np.zeros(sizes.clean, np.int32)
    ends = clean.starts + (clean.positions // clean.blocks + 1) * clean.blocks
    noisy = np.where(masked, noise.mask_id, clean.expected[places])
    return Stream(
        ids=whole(clean.ids, noisy).long(),
        positions=whole(clean.positions, position).long(),
        clean_from=whole(clean.starts, starts).int(),
        clean_to=whole(ends, starts + position // block * block).int(),
        noisy_from=whole(none, own_block).int(),
        noisy_to=whole(none, own_block + block).int(),
        rows=filled(rows).long(),
        targets=filled(targets).long(),
        weights=filled(weights).float(),
    )


@dataclass(frozen=True)
class _Clean:
    """The clean part, [tokens] each; `expected` is what a noisy copy has at a place if it is not masked."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    starts: NDArray[np.int64]
    blocks: NDArray[np.int64]
    expected: NDArray[np.int64]
    predicted: NDArray[np.bool_]


def _clean_part(texts: Sequence[Text], blocks: Sequence[int], sizes: Sizes, noise: Noise) -> _Clean:
    if sum(slots(len(ids)) for ids, _ in texts) > sizes.clean:
        raise ValueError(f"texts have more than {sizes.clean} tokens")
    places = np.arange(sizes.clean)
    ids = np.full(sizes.clean, noise.end_id, np.int64)
    positions, starts = places % SLOT, places // SLOT * SLOT  # of what no text fills
    block_of, predicted = np.full(sizes.clean, SLOT), np.zeros(sizes.clean, bool)
    start = 0
    for (text, answers), block in zip(texts, blocks, strict=True):
        end, last = start + slots(len(text)), start + len(text)
        ids[start:last], predicted[start:last] = text, answers
        predicted[last : start + -(-len(text) // block) * block] = answers[-1]
        positions[start:end], starts[start:end], block_of[start:end] = np.arange(end - start), start, block
        start = end
    # In a block in which an answer ends, end tokens follow it, whatever comes after it in the text.
    ending = predicted & (ids == noise.end_id)
    ended = np.cumsum(ending) - ending
    block_start = places - positions % block_of
    after = ended > ended[block_start]
    return _Clean(ids, positions, starts, block_of, np.where(after, noise.end_id, ids), predicted | after)


def _choose_slots(rng: np.random.Generator, useful: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Slots to copy, each useful one before any twice."""
    found = np.flatnonzero(useful)
    if not len(found):
        return np.zeros(count, np.int64)
    rounds = [rng.permutation(found) for _ in range(-(-count // len(found)))]
    return np.sort(np.concatenate(rounds)[:count])  # so that neighbours see much the same


def _drawn_masks(
    rng: np.random.Generator, maskable: NDArray[np.bool_], block: NDArray[np.int64], suffix: float
) -> NDArray[np.bool_]:
    """Which tokens to mask: of each block all from some maskable token on, or each at the block's rate."""
    number = np.arange(len(maskable)) // block * block  # the place of a block's first token names it
    before = np.cumsum(maskable) - maskable
    rank = before - before[number]
    count = np.bincount(number, maskable, len(maskable)).astype(np.int64)[number]
    of_block = rng.random((3, len(maskable)))[:, number]
    keeps = (of_block[0] * count).astype(np.int64)
    at_random = rng.random(len(maskable)) < 0.1 + 0.9 * of_block[1]
    return np.where(of_block[2] < suffix, rank >= keeps, at_random)


def _so_many(rng: np.random.Generator, block: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """`count` tokens of each block."""
    places = np.arange(len(block))
    order = np.lexsort((rng.random(len(block)), places // block * block))
    rank = np.empty_like(order)
    rank[order] = places % block
    return rank < count


def _shown_before(masked: NDArray[np.bool_], block: NDArray[np.int64]) -> NDArray[np.int64]:
    """Masked tokens between each token and the last shown one before it; the clean blocks are shown."""
    places = np.arange(len(masked))
    last_shown = np.maximum.accumulate(np.where(masked, -1, places))
    before = np.concatenate([[-1], last_shown[:-1]])
    return places - 1 - np.maximum(before, places // block * block - 1)
