"""What a model recalls: the English tasks of losart.eval, answered by whatever decodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from losart.eval.questions import make_questions
from losart.eval.tasks import find_task

from .base_model import Base

ANSWER_TOKENS = 64  # as in losart.eval
TOKENS_AT_ONCE = 1 << 16

Answers = Callable[[Sequence[Sequence[int]], int], list[list[int]]]


def recall(
    base: Base, answers: Answers, tasks: Sequence[str], lengths: Sequence[int], samples: int, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Share of right answers of each task and length, as losart.eval counts them.

    Parameters
    ----------
    base : Base
        Of which tokenizer and template are used.
    answers : callable
        From prompts, and the most tokens that an answer may have, to answers.
    tasks, lengths, samples, seed
        As in losart.eval.
    """
    for length in lengths:
        for task in tasks:
            questions = list(make_questions(base, find_task(task), length, samples, seed, "english"))
            texts = [base.chat_template.render(one.prompt) for one in questions]
            prompts = [base.tokenizer.encode(text, special=False) for text in texts]
            given: list[str] = []
            at_once = max(1, TOKENS_AT_ONCE // length)
            for start in range(0, samples, at_once):
                rows = answers(prompts[start : start + at_once], ANSWER_TOKENS)
                given += [base.tokenizer.decode(row) for row in rows]
            right = sum(one.is_right(text) for one, text in zip(questions, given, strict=True))
            yield {"task": task, "length": length, "right": right, "samples": samples, "answers": given[:3]}
