"""Prompts from the command line."""

from __future__ import annotations

import sys
from pathlib import Path

from losart.errors import PromptError


def read_prompt(file: str) -> str:
    """A file's text; - is standard input.

    Raises
    ------
    PromptError
        The file cannot be read, or is not UTF-8.
    """
    if file == "-" and sys.stdin.isatty():
        print("the prompt is read from standard input, to its end (Ctrl-D)", file=sys.stderr)
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{file}: the prompt is not UTF-8 text: {error}") from error
    except OSError as error:
        raise PromptError(f"{file}: cannot be read: {error.strerror or error}") from error
