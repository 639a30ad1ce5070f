"""The chat template of a checkpoint, which turns messages into the text of a prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losart.errors import CheckpointError, PromptError
from losart.loaders.json_files import read_optional_json_object, read_text

if TYPE_CHECKING:
    import jinja2

LARGEST_OUTPUT = 2**26  # characters; stops templates that never end


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template that turns messages into a prompt.

    Attributes
    ----------
    source : str
        The template.
    file : Path
        The file that holds it.
    special_tokens : mapping of str to str
        Variables that the template sees, such as "bos_token".
    """

    source: str = field(repr=False)
    file: Path
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template says which tools there are."""
        import jinja2.meta

        from losart.loaders.jinja_sandbox import environment

        with self._errors_of_jinja():
            return "tools" in jinja2.meta.find_undeclared_variables(environment().parse(self.source))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt of a conversation.

        Parameters
        ----------
        messages : list of dict
            Each with the strings "role" and "content"; other keys may hold JSON data.
        add_generation_prompt : bool
            Whether to begin the assistant's next turn.
        tools : list of dict, optional
            That the model may call, as JSON data; a template that does not know of tools ignores them.

        Raises
        ------
        PromptError
            If the messages are not as above, or the template rejects them.
        CheckpointError
            If the template is broken or tries to leave its sandbox.
        """
        from losart.loaders.jinja_sandbox import MessagesRejected

        plain = _plain_messages(messages)
        offered = None if tools is None else _plain(list(tools))
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(
                **self.special_tokens,
                messages=plain,
                tools=offered,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            ):
                parts.append(part)
                length += len(part)
                if length > LARGEST_OUTPUT:
                    raise CheckpointError(f"{self.file}: the chat template's output does not end")
        except MessagesRejected as error:
            raise PromptError(f"{self.file}: the chat template rejects the messages: {error}") from None
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.file}: the chat template fails: {error}") from error
        return "".join(parts)

    @cached_property
    def _template(self) -> jinja2.Template:
        from losart.loaders.jinja_sandbox import environment

        with self._errors_of_jinja():
            return environment().from_string(self.source)

    @contextmanager
    def _errors_of_jinja(self) -> Iterator[None]:
        import jinja2

        try:
            yield
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            raise CheckpointError(f"{self.file}: the chat template is not valid Jinja: {error}") from error


def read_chat_template(directory: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The chat template of the checkpoint in `directory`, None where there is none.

    chat_template.jinja takes precedence over `chat_template` of tokenizer_config.json; of several
    named templates there, "default" is used.

    Raises
    ------
    CheckpointError
        If a file is unreadable or holds anything but a template.
    """
    file = directory / "chat_template.jinja"
    if file.exists():
        return ChatTemplate(read_text(file), file, special_tokens)
    config = read_optional_json_object(directory / "tokenizer_config.json")
    source = config.get("chat_template")
    if isinstance(source, list):
        if not all(isinstance(entry, dict) for entry in source):
            raise CheckpointError(f"{config.file}: chat_template must be a list of named templates")
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{config.file}: chat_template must be a string or a list of named templates")
    return ChatTemplate(source, config.file, special_tokens)


def _plain_messages(messages: object) -> list[dict[str, Any]]:
    """A copy of plain JSON types, so that templates cannot call methods of other objects."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise PromptError("messages must be a list of dicts with role and content, and not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(f"messages[{i}] must be a dict with role and content, not {message!r}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise PromptError(f"messages[{i}][{key!r}] must be a string, not {message.get(key)!r}")
    return _plain([dict(message) for message in messages])


def _plain(values: list[Any]) -> list[Any]:
    try:
        return json.loads(json.dumps(values))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"messages and tools must hold only JSON data: {error}") from error
