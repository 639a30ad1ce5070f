"""A prompt of any kind to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from losart.config.model import ModelConfig
from losart.errors import PromptError
from losart.loaders import ChatTemplate, Tokenizer

Prompt = str | Sequence[int] | Sequence[dict[str, str]]


def prompt_ids(
    prompt: Any, config: ModelConfig, tokenizer: Tokenizer | None, template: ChatTemplate | None
) -> list[int]:
    """Token ids of one prompt.

    Parameters
    ----------
    prompt : str, list of dict, or list of int
        Text, chat messages, or token ids.
    config : ModelConfig
    tokenizer : Tokenizer or None
    template : ChatTemplate or None

    Raises
    ------
    PromptError
        The prompt is empty, too long, out of the vocabulary, or needs a tokenizer or template that
        is not there.
    """
    if isinstance(prompt, str):
        ids = _required(tokenizer, "a string").encode(prompt)
    elif _is_list(prompt) and len(prompt) > 0 and all(isinstance(item, dict) for item in prompt):
        encode = _required(tokenizer, "chat messages").encode
        if template is None:
            raise PromptError("the checkpoint has no chat template; give a string or token ids")
        ids = encode(template.render(prompt), special=False)
    elif _is_list(prompt) and all(_is_id(token) for token in prompt):
        ids = [int(token) for token in prompt]
    else:
        raise PromptError("a prompt is a string, a list of chat messages, or a list of token ids")
    if not ids:
        raise PromptError("the prompt is empty")
    for place, token in enumerate(ids):
        if not 0 <= token < config.vocab_size:
            raise PromptError(
                f"token id {token} at place {place} of the prompt is outside the vocabulary of "
                f"{config.vocab_size}"
            )
    if len(ids) >= config.max_positions:
        raise PromptError(
            f"the prompt has {len(ids)} tokens; the model has {config.max_positions} positions for it "
            f"and the answer"
        )
    return ids


def is_batch(prompt: Any) -> bool:
    """Whether this is a list of prompts, not one prompt."""
    return (
        _is_list(prompt)
        and len(prompt) > 0
        and all(isinstance(item, str) or _is_list(item) for item in prompt)
    )


def _required(tokenizer: Tokenizer | None, what: str) -> Tokenizer:
    if tokenizer is None:
        raise PromptError(f"the checkpoint has no tokenizer.json for {what}; give token ids")
    return tokenizer


def _is_id(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)
