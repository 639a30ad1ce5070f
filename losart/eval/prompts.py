"""Prompts of measures that need no answers: the tasks' questions, or pieces of a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from losart.errors import DataError
from losart.eval.evaluation import EvalConfig
from losart.eval.questions import make_questions
from losart.eval.tasks import TASKS
from losart.loaders.tokenizer import prompt_ids


def make_prompts(
    model: Any, config: EvalConfig, style: str, length: int, text: Path | None
) -> Iterator[list[int]]:
    """Token ids of prompts of a length, as many as `count_prompts` says.

    Parameters
    ----------
    model : Model
    config : EvalConfig
        Its samples are used, without a text its tasks and seed, too.
    style : str
        Of the questions.
    length : int
    text : Path, optional
        A file of text whose pieces, from its beginning, are the prompts in place of the tasks' questions.

    Raises
    ------
    DataError
        The file is no text, or has too few tokens.
    """
    if text is None:
        for name in config.tasks:
            for question in make_questions(model, TASKS[name], length, config.samples, config.seed, style):
                yield prompt_ids(question.prompt, model.config, model.tokenizer, model.chat_template)
        return
    ids = model.tokenizer.encode_file(text, config.samples * length)
    if len(ids) < config.samples * length:
        raise DataError(f"{text}: has {len(ids)} tokens, not {config.samples} times {length}")
    for first in range(0, config.samples * length, length):
        yield ids[first : first + length]


def count_prompts(config: EvalConfig, text: Path | None) -> int:
    """How many prompts there are of all lengths."""
    return len(config.lengths) * (len(config.tasks) if text is None else 1) * config.samples
