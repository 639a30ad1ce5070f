"""A question with its prompt and its answer, in either style, for the checkpoint at hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from losart.errors import OptionError
from losart.eval import english, symbol_text, symbols
from losart.eval.tasks import TASKS, Task
from losart.eval.vocabulary import FIRST_SYMBOL, vocabulary

STYLES = ("auto", "symbols", "english")
QUESTIONS_PER_DOCUMENT = 8  # at most; of symbols


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes
    ----------
    prompt : str or list of dict
        Text, or chat messages.
    answer : str
    normalise : callable
        Text of an answer to what has to be equal.
    """

    prompt: Any
    answer: str
    normalise: Callable[[str], str]

    def is_right(self, text: str) -> bool:
        """Whether a model's text is the answer."""
        return self.normalise(text) == self.normalise(self.answer)


def find_style(model: Any, style: str = "auto") -> str:
    """The style of a checkpoint's questions, one of `STYLES`, with "auto" resolved.

    "auto" is English for a checkpoint with a chat template, or whose tokenizer does not know the symbols.

    Raises
    ------
    OptionError
        The style needs a tokenizer that the checkpoint lacks.
    """
    if model.tokenizer is None:
        raise OptionError("the checkpoint has no tokenizer.json: its questions cannot be written")
    knows = model.tokenizer.token_to_id(vocabulary()[FIRST_SYMBOL]) == FIRST_SYMBOL
    if style == "symbols" and not knows:
        raise OptionError("style 'symbols' needs a checkpoint with the vocabulary of the symbolic tasks")
    if style == "auto":
        return "symbols" if knows and model.chat_template is None else "english"
    return style


def make_questions(
    model: Any, task: Task, length: int, samples: int, seed: int, style: str
) -> Iterator[Question]:
    """Questions: in "symbols" up to 8 in a row about one document, in "english" each about its own.

    Parameters
    ----------
    model : Model
        Its tokenizer and chat template are used.
    task : Task
    length : int
        Tokens of a prompt: exactly so many in "symbols", less by at most a sentence in "english".
    samples, seed : int
        With more samples the first questions stay the same.
    style : {"symbols", "english"}
    """
    documents = (
        np.random.default_rng([seed, list(TASKS).index(task.name), length, number])
        for number in itertools.count()
    )
    if style == "symbols":
        questions = (question for rng in documents for question in _symbolic(rng, task, length))
    else:
        questions = (_english(rng, task, length, model) for rng in documents)
    return itertools.islice(questions, samples)


def _symbolic(rng: np.random.Generator, task: Task, length: int) -> Iterator[Question]:
    """Questions about a document that share no fact, so that one that is hard to find counts only once."""
    batch = symbols.make_batch(
        rng, 1, length, {task.name: 1.0}, questions=QUESTIONS_PER_DOCUMENT, split="eval"
    )
    asked: set[tuple[int, ...]] = set()
    for question, answer in zip(batch.questions[0], batch.answers[0], strict=True):
        pairs = np.concatenate([question, answer]).reshape(-1, 2)
        names = set(map(tuple, pairs[(pairs >= FIRST_SYMBOL).all(axis=1)].tolist()))
        if asked.isdisjoint(names):
            asked |= names
            prompt = symbol_text.prompt_text(batch.documents[0], question)
            yield Question(prompt, symbol_text.answer_text(answer), _words)


def _words(text: str) -> str:
    return " ".join(text.split())


def _english(rng: np.random.Generator, task: Task, length: int, model: Any) -> Question:
    def prompt(text: str) -> Any:
        if model.chat_template is None:
            return f"{text}\nAnswer:"
        return [{"role": "user", "content": text}]

    def tokens(text: str) -> int:
        if model.chat_template is None:
            return len(model.tokenizer.encode(prompt(text)))
        return len(model.tokenizer.encode(model.chat_template.render(prompt(text)), special=False))

    text, answer = english.make_text(rng, task, length, tokens)
    return Question(prompt(text), answer, english.numbers)
