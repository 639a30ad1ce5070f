"""The Jinja environment of chat templates, with the names that transformers defines for them.

Imported on the first use of a template, so that nothing else needs jinja2.
"""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

LARGEST_PRODUCT = 1_000_000  # length of a repeated string or list
LARGEST_POWER_BITS = 1024


class MessagesRejected(Exception):
    """A template called raise_exception."""


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks an assistant's text for training; its body is rendered as if unmarked."""

    tags = {"generation"}  # noqa: RUF012, also a set in the base class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """For templates of untrusted checkpoints; also stops the simplest memory bombs."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if (
            operator == "*"
            and (_length(left) * _count(right) + _length(right) * _count(left)) > LARGEST_PRODUCT
        ):
            raise jinja2.exceptions.SecurityError("a repetition is too long")
        if operator == "**" and _count(left).bit_length() * _count(right) > LARGEST_POWER_BITS:
            raise jinja2.exceptions.SecurityError("a power is too large")
        return super().call_binop(context, operator, left, right)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def environment() -> jinja2.Environment:
    """A fresh environment."""
    sandbox = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    sandbox.filters["tojson"] = _tojson
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter would escape HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise MessagesRejected(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
