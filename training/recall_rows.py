"""Rows to train on: the symbolic tasks of losart.eval, with keys that evaluation never has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from row_layout import Layout
from torch import Tensor

from losart.eval.symbols import BLOCK, SymbolBatch, make_batch
from losart.eval.tasks import TASKS
from losart.eval.vocabulary import END, FIRST_SYMBOL, HOP, MASK, PAD, token_id

SPECIAL = {"mask": token_id(MASK), "end": token_id(END), "pad": token_id(PAD)}
NOT_COUNTED = len(TASKS)


@dataclass(frozen=True)
class Rows:
    """What one step trains on. Places are those of all rows' tokens, one row after the other.

    Attributes
    ----------
    ids : int64 [rows, tokens]
        In their layout, some of the answers' tokens masked.
    masked, targets : int64 [masked]
        Places of the masked tokens, and the tokens that belong there.
    tasks : int64 [masked]
        Index into TASKS of each masked symbol that can be known from what is shown, else NOT_COUNTED.
    looking, sources : int64 [rows, samples]
        Some of the answers' tokens, masked or shown, by their places in the row, and the position in
        the document of the token that each of them repeats.
    """

    ids: Tensor
    masked: Tensor
    targets: Tensor
    tasks: Tensor
    looking: Tensor
    sources: Tensor

    def pinned(self) -> Rows:
        """In pinned memory, from which copies to a GPU are asynchronous."""
        return Rows(*(getattr(self, part.name).pin_memory() for part in fields(self)))

    def to(self, device: torch.device) -> Rows:
        """On a device; copies may still be in flight."""
        return Rows(*(getattr(self, part.name).to(device, non_blocking=True) for part in fields(self)))


def layout(prompt: int, questions: int, device: torch.device) -> Layout:
    """The layout of rows of that many tokens a prompt, and questions."""
    return Layout(prompt - BLOCK, questions, BLOCK, BLOCK, device)


def make_rows(
    rng: np.random.Generator,
    count: int,
    prompt: int,
    questions: int,
    weights: Mapping[str, float] | None = None,
    samples: int = 256,
) -> Rows:
    """Some rows; `weights` are of the tasks, `samples` tokens of all rows together, one a row at least."""
    batch = make_batch(rng, count, prompt, weights, questions=questions)
    hidden = mask_some(rng, batch.answers)
    shown = np.where(hidden, SPECIAL["mask"], batch.answers)
    groups = np.concatenate([batch.questions, shown], axis=2)
    ids = np.concatenate([batch.documents, groups.reshape(count, -1)], axis=1)
    starts = batch.documents.shape[1] + np.arange(questions) * groups.shape[2] + BLOCK
    in_row = np.broadcast_to(starts[:, None] + np.arange(BLOCK), batch.answers.shape)
    places = in_row + np.arange(count)[:, None, None] * ids.shape[1]
    counted = np.where(_known(batch, hidden), batch.tasks[..., None], NOT_COUNTED)
    chosen = np.stack(
        [rng.choice(np.flatnonzero(of_row >= 0), max(1, samples // count)) for of_row in batch.sources]
    )
    parts = (
        ids,
        places[hidden],
        batch.answers[hidden],
        counted[hidden],
        np.take_along_axis(in_row.reshape(count, -1), chosen, axis=1),
        np.take_along_axis(batch.sources.reshape(count, -1), chosen, axis=1),
    )
    return Rows(*(torch.from_numpy(part.astype(np.int64)) for part in parts))


def mask_some(rng: np.random.Generator, answers: np.ndarray) -> np.ndarray:
    """Which tokens of each answer are masked: all of them in a third, else a share drawn for each."""
    of_answer = (*answers.shape[:2], 1)
    share = np.where(rng.random(of_answer) < 1 / 3, 1.0, rng.random(of_answer))
    masked = rng.random(answers.shape) < share
    masked[..., 0] |= ~masked.any(-1)
    return masked


def _known(batch: SymbolBatch, masked: np.ndarray) -> np.ndarray:
    """Which symbols of the answers can be known: those past a hop need the pair before them shown."""
    pair_shown = ~masked.reshape(*masked.shape[:2], -1, 2).any(-1)
    before = np.repeat(np.roll(pair_shown, 1, axis=-1), 2, axis=-1)
    return (batch.answers >= FIRST_SYMBOL) & ((batch.questions != token_id(HOP)) | before)


def recall(right: Tensor, tasks: Tensor) -> dict[str, float]:
    """Share of the counted symbols that came out right, by task.

    Parameters
    ----------
    right : bool [masked]
    tasks : int64 [masked]
        As in `Rows`.
    """
    totals, found = (
        torch.bincount(of_task, minlength=NOT_COUNTED + 1)[:NOT_COUNTED].tolist()
        for of_task in (tasks, tasks[right])
    )
    return {name: a / b for name, a, b in zip(TASKS, found, totals, strict=True) if b}
