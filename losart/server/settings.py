"""What a server lets its clients do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Names, keys and limits.

    Attributes
    ----------
    names : tuple of str
        Of the model.
    api_keys : tuple of str
        Each opens the server; empty: it is open.
    origins : tuple of str
        Whose pages may ask, by CORS.
    queue : int
        Generations that may wait.
    largest_body : int
        Bytes.
    longest_prompt : int or None
        Tokens.
    seconds : float
        For a request, from its headers to the end of its answer.
    body_seconds : float
        For its body to come.
    log_prompts : bool
        Whether the log has prompts and answers.
    options : dict
        Of `Model.generate`, where a request has none.
    """

    names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    queue: int = 64
    largest_body: int = 2 << 20
    longest_prompt: int | None = None
    seconds: float = 600.0
    body_seconds: float = 30.0
    log_prompts: bool = False
    options: dict[str, Any] = field(default_factory=dict)
