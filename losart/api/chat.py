"""A conversation with a model: who said what, over a session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from losart.api.model import Model
from losart.engine.stream import Stream
from losart.errors import PromptError
from losart.observe.step import GenerationResult, Observer, Progress, Step


class Chat:
    """Turns of a user and a model, through the checkpoint's chat template.

    chat = losart.Chat(model, attention="losa")
    print(chat.say("Why is the sky blue?"))
    print(chat.say("And at sunset?"))

    Parameters
    ----------
    model : Model
    system : str, optional
        The system message.
    **options
        As :meth:`losart.Model.generate`'s.

    Attributes
    ----------
    system : str or None
        May be set at any time, for the turns that follow.
    messages : list of dict
        What was said, without the system message. While an answer is streamed, and when its stream
        is left, the last message is as much of it as has come; a question that has had no text of
        an answer is not kept.

    Raises
    ------
    OptionError
        An option is unknown or out of range.
    PromptError
        The checkpoint has no tokenizer or no chat template.
    """

    def __init__(self, model: Model, system: str | None = None, **options: Any) -> None:
        for part, name in ((model.tokenizer, "tokenizer"), (model.chat_template, "chat template")):
            if part is None:
                raise PromptError(f"a chat needs a {name}, and the checkpoint has none")
        self.system = system
        self.messages: list[dict[str, str]] = []
        self._session = model.session(**options)

    def say(
        self, text: str, *, progress: Progress | None = None, observer: Observer | None = None
    ) -> GenerationResult:
        """Say something, and have the whole answer.

        Raises
        ------
        PromptError
            The conversation is longer than the model's positions, or the template rejects it; it
            stays as it was before.
        """
        return self.stream(text, progress=progress, observer=observer).result()

    def stream(
        self, text: str, *, progress: Progress | None = None, observer: Observer | None = None
    ) -> Stream:
        """As `say`, giving a `Step` after each denoising pass; see :meth:`losart.Session.stream`."""
        question = {"role": "user", "content": text}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        prompt = [*system, *self.messages, question]
        steps = self._session.stream(prompt, progress=progress, observer=observer)
        return Stream(self._noted(question, steps), close=steps.close)

    def _noted(self, question: dict[str, str], steps: Iterator[Step]) -> Iterator[Step]:
        messages, answer = self.messages, {"role": "assistant", "content": ""}
        for step in steps:
            if not answer["content"] and (step.text or step.result):
                messages += [question, answer]
            answer["content"] = step.text
            yield step

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages = []
