"""A chat template's text around turns, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from losart.errors import PromptError

from .base_model import Base

_QUESTION, _ANSWER = "\u2980", "\u2981"  # in no template


@dataclass(frozen=True)
class ChatFormat:
    """What stands between the turns of a conversation.

    Attributes
    ----------
    before : list of int
        Before the user's first turn.
    to_answer : list of int
        From a user's turn to the assistant's; begins with the end token.
    to_question : list of int
        From an assistant's turn to the user's; begins with the end token.
    end_id : int
    """

    before: list[int]
    to_answer: list[int]
    to_question: list[int]
    end_id: int

    def conversation(
        self, turns: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> tuple[list[int], list[bool]]:
        """Ids of questions and answers up to the last answer's end token, and which are the assistant's.

        The end token of an answer is the assistant's.
        """
        ids, answers = list(self.before), [False] * len(self.before)
        for number, (question, answer) in enumerate(turns):
            if number:
                ids += self.to_question[1:]
                answers += [False] * (len(self.to_question) - 1)
            ids += [*question, *self.to_answer, *answer, self.end_id]
            answers += [False] * (len(question) + len(self.to_answer)) + [True] * (len(answer) + 1)
        return ids, answers


def chat_format(base: Base) -> ChatFormat:
    """The format of a base model's chat template.

    Raises
    ------
    PromptError
        There is none, or turns don't end with the model's end token.
    """
    if base.chat_template is None:
        raise PromptError(f"{base.directory}: has no chat template")
    turns = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _QUESTION},
    ]
    text = base.chat_template.render(turns)
    pieces = text.replace(_ANSWER, _QUESTION).split(_QUESTION)
    if len(pieces) != 4 or pieces[1] != pieces[3]:
        raise PromptError(f"{base.directory}: the chat template changes what is in the turns")
    before, to_answer, to_question = (base.tokenizer.encode(part, special=False) for part in pieces[:3])
    if to_answer[:1] != [base.end_id] or to_question[:1] != [base.end_id]:
        raise PromptError(f"{base.directory}: turns do not end with the token {base.end_id}")
    return ChatFormat(before, to_answer, to_question, base.end_id)
