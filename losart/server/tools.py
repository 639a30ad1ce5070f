"""Calls of tools: those that an answer makes in the format of Qwen's and Hermes' templates.

<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any, NamedTuple

from losart.loaders import ChatTemplate
from losart.server.errors import unsupported

BEGIN, END = "<tool_call>", "</tool_call>"
_CALL = re.compile(f"{BEGIN}(.*?)(?:{END}|$)", re.DOTALL)


class Call(NamedTuple):
    """A call; its arguments are JSON."""

    name: str
    arguments: str


class Said(NamedTuple):
    """An answer so far, apart from its calls, and the calls."""

    content: str
    calls: list[Call]


def check_template(template: ChatTemplate | None) -> None:
    """See that a template says which tools there are, and how they are called."""
    if template is None or not template.takes_tools:
        raise unsupported("tools", "the checkpoint's chat template knows of no tools")
    if BEGIN not in template.source:
        message = f"the checkpoint's chat template has calls in another format than {BEGIN}"
        raise unsupported("tools", f"{message}, the one that losart reads")


def said(text: str, finished: bool) -> Said:
    """What an answer says and calls; of one that grows, so that both only grow.

    What is no call stays text.
    """
    content, end, calls = "", 0, list[Call]()
    for found in _CALL.finditer(text):
        closed = found[0].endswith(END)
        if not closed and not finished:
            return Said((content + text[end : found.start()]).rstrip(), calls)
        content += text[end : found.start()]
        end = found.end()
        call = _call(found[1])
        if call is None:
            content += found[0]
        else:
            calls.append(call)
    content += text[end:]
    if not finished:
        content = content[: len(content) - _begun(content)]
    return Said(content if finished and not calls else content.rstrip(), calls)


def call_object(call: Call, index: int | None = None) -> dict[str, Any]:
    """A call as OpenAI's API has it, in a chunk with its index."""
    function = {"name": call.name, "arguments": call.arguments}
    numbered = {} if index is None else {"index": index}
    return {**numbered, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _call(text: str) -> Call | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        return None
    arguments = values.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return Call(values["name"], json.dumps(arguments, ensure_ascii=False))


def _begun(text: str) -> int:
    """Length of the longest end of `text` that begins a call."""
    return next((n for n in range(len(BEGIN) - 1, 0, -1) if text.endswith(BEGIN[:n])), 0)
