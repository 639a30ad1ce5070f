"""Log-probabilities of an answer's tokens, as OpenAI's API has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from losart.loaders import Tokenizer
from losart.observe.step import TokenLogprob

INCOMPLETE = "\ufffd"  # of a token that is a part of a character


class ChoiceLogprobs:
    """Those of one choice, whole or in pieces that follow each other.

    Tokens without a text, such as end tokens, have no entry.

    Parameters
    ----------
    chat : bool
        Whether they are a chat's, else a text's.
    tokenizer : Tokenizer
    """

    def __init__(self, chat: bool, tokenizer: Tokenizer) -> None:
        self._made: Callable[[list[TokenLogprob]], dict[str, Any]] = self._of_chat if chat else self._of_text
        self._tokenizer = tokenizer
        self._taken = 0  # tokens
        self._characters = 0

    def next(self, found: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        """The object of tokens that follow those before; None: none has a text."""
        given = list(found)
        self._taken += len(given)
        entries = [one for one in given if self._tokenizer.decode([one.token])]
        return self._made(entries) if entries else None

    def rest(self, found: list[TokenLogprob]) -> dict[str, Any] | None:
        """The same of those that all of the answer's have beyond the ones before."""
        return self.next(found[self._taken :])

    def _of_chat(self, entries: list[TokenLogprob]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._text(token)
            known = None if INCOMPLETE in text else list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": known}

        content = [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(*other) for other in one.top]}
            for one in entries
        ]
        return {"content": content, "refusal": None}

    def _of_text(self, entries: list[TokenLogprob]) -> dict[str, Any]:
        tokens, offsets = [self._text(one.token) for one in entries], []
        for text in tokens:
            offsets.append(self._characters)
            self._characters += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in entries],
            "top_logprobs": [self._by_text(one) for one in entries],
            "text_offset": offsets,
        }

    def _by_text(self, one: TokenLogprob) -> dict[str, float]:
        """Of the most probable tokens and of the one itself; of those whose texts are alike the first."""
        found = dict[str, float]()
        for token, logprob in (*one.top, (one.token, one.logprob)):
            found.setdefault(self._text(token), logprob)
        return found

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special=False)
