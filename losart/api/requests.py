"""Many prompts, each with options of its own, answered together in order: for files and tables of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from losart.api.engine import Engine
from losart.config.options import OPTIONS
from losart.engine.stream import Stream
from losart.errors import DataError, LosartError
from losart.observe.step import GenerationResult

Tag = TypeVar("Tag")

AHEAD = 4  # times as many requests are read as can be under way


def message(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def request(
    values: Mapping[str, Any],
    prompt: str = "prompt",
    options: Iterable[str] = OPTIONS,
    chat: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """The prompt and the options of a line or a row.

    Parameters
    ----------
    values : mapping
        By name.
    prompt : str
        The name of the prompt.
    options : iterable of str
        Names of options; what else there is, is not one.
    chat : bool
        Take text as a user's message.

    Raises
    ------
    DataError
        There is no prompt.
    """
    if prompt not in values:
        raise DataError(f'it has no "{prompt}"')
    found = values[prompt]
    if chat and isinstance(found, str):
        found = message(found)
    return found, {name: values[name] for name in options if name in values}


def answers(
    engine: Engine, requests: Iterable[tuple[Tag, Any, dict[str, Any]]]
) -> Iterator[tuple[Tag, GenerationResult | LosartError]]:
    """What each request gives, in order: a result, or the error that is its own.

    Parameters
    ----------
    engine : Engine
    requests : iterable of (tag, prompt, options)
        Read as far ahead as the engine needs; the tag comes back with the answer.
    """
    under_way: deque[tuple[Tag, Stream | LosartError]] = deque()

    def first() -> tuple[Tag, GenerationResult | LosartError]:
        tag, begun = under_way.popleft()
        try:
            return tag, begun if isinstance(begun, LosartError) else begun.result()
        except LosartError as error:
            return tag, error

    for tag, prompt, options in requests:
        try:
            under_way.append((tag, engine.submit(prompt, each_step=False, **options)))
        except LosartError as error:
            under_way.append((tag, error))
        if len(under_way) > AHEAD * engine.max_sequences:
            yield first()
    while under_way:
        yield first()
