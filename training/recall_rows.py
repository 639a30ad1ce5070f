"""Rows to train on: the symbolic tasks of losart.eval, with keys that evaluation never has."""

from __future__ import annotations

import numpy as np
import torch
from row_layout import Layout
from torch import Tensor

from losart.eval.symbols import BLOCK, make_batch
from losart.eval.tasks import TASKS
from losart.eval.vocabulary import END, FIRST_SYMBOL, MASK, PAD, token_id

SPECIAL = {"mask": token_id(MASK), "end": token_id(END), "pad": token_id(PAD)}


def layout(prompt: int, questions: int, device: torch.device) -> Layout:
    """The layout of rows of that many tokens a prompt, and questions."""
    return Layout(prompt - BLOCK, questions, BLOCK, BLOCK, device)


def rows(rng: np.random.Generator, count: int, prompt: int, questions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows in their layout.

    Returns
    -------
    ids : int64 [count, tokens]
        With the answers in their places.
    answers : int64 [count, questions, block]
    tasks : int64 [count, questions]
        Indices into TASKS.
    """
    batch = make_batch(rng, count, prompt, questions=questions)
    groups = np.concatenate([batch.questions, batch.answers], axis=2).reshape(count, -1)
    ids = np.concatenate([batch.documents, groups], axis=1)
    ids, answers, tasks = (
        torch.from_numpy(part.astype(np.int64)) for part in (ids, batch.answers, batch.tasks)
    )
    return ids, answers, tasks


def mask_some(answers: Tensor) -> Tensor:
    """Which tokens of each answer are masked: all of them in a third, else a share drawn for each."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, device=answers.device)

    of_answer = (*answers.shape[:2], 1)
    share = torch.where(draw(*of_answer) < 1 / 3, 1.0, draw(*of_answer))
    masked = draw(*answers.shape) < share
    masked[..., 0] |= ~masked.any(-1)
    return masked


def recall(right: Tensor, masked: Tensor, answers: Tensor, tasks: Tensor) -> dict[str, float]:
    """Share of the masked symbols that came out right, by task.

    Parameters
    ----------
    right : bool [masked tokens]
    masked : bool [rows, questions, block]
    answers : int64 [rows, questions, block]
    tasks : int64 [rows, questions]
    """
    of_task = tasks[..., None].expand_as(answers)[masked]
    symbols = answers[masked] >= FIRST_SYMBOL
    totals, found = (
        torch.bincount(of_task[chosen], minlength=len(TASKS)).tolist()
        for chosen in (symbols, symbols & right)
    )
    return {name: a / b for name, a, b in zip(TASKS, found, totals, strict=True) if b}
