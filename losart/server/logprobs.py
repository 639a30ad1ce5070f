"""Log-probabilities of an answer's tokens, as OpenAI's API has them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from losart.engine.output import INCOMPLETE, Output
from losart.loaders import Tokenizer
from losart.observe.step import TokenLogprob

ENDLESS = 2**63


class Placed(NamedTuple):
    """A token, and how many characters of the answer are known before it."""

    offset: int
    of: TokenLogprob


class ChoiceLogprobs:
    """Those of one choice, whole or in pieces that follow each other.

    A token has an entry where the text holds some of it: an end token has none, nor has one of a stop string.

    Parameters
    ----------
    chat : bool
        Whether they are a chat's, else a text's.
    tokenizer : Tokenizer
    """

    def __init__(self, chat: bool, tokenizer: Tokenizer) -> None:
        self._made: Callable[[list[Placed]], dict[str, Any]] = self._of_chat if chat else self._of_text
        self._tokenizer = tokenizer
        self._output = Output(ENDLESS, decode=tokenizer.decode)  # of the tokens so far
        self._waiting = deque[Placed]()  # for their text

    def whole(self, found: Iterable[TokenLogprob], characters: int) -> dict[str, Any]:
        """The object of an answer, of all its tokens and of so many characters."""
        return self._made(self._following(found, characters))

    def next(self, found: Iterable[TokenLogprob], characters: int) -> dict[str, Any] | None:
        """The object of a stream's next chunk; None: it has none.

        Parameters
        ----------
        found : iterable of TokenLogprob
            Of the tokens that have become known.
        characters : int
            Of the text so far; tokens whose text is held back wait for it.
        """
        entries = self._following(found, characters)
        return self._made(entries) if entries else None

    def _following(self, found: Iterable[TokenLogprob], characters: int) -> list[Placed]:
        for one in found:
            self._waiting.append(Placed(len(self._output.text), one))
            self._output.extend([one.token])
        shown = list[Placed]()
        while self._waiting and self._waiting[0].offset < characters:
            placed = self._waiting.popleft()
            if self._tokenizer.decode([placed.of.token]):
                shown.append(placed)
        return shown

    def _of_chat(self, entries: list[Placed]) -> dict[str, Any]:
        content = [
            {
                **self._entry(one.token, one.logprob),
                "top_logprobs": [self._entry(*other) for other in one.top],
            }
            for _, one in entries
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, known = self._spelled(token, "")
        return {"token": text, "logprob": logprob, "bytes": None if known is None else list(known)}

    def _of_text(self, entries: list[Placed]) -> dict[str, Any]:
        return {
            "tokens": [self._text(one.token) for _, one in entries],
            "token_logprobs": [one.logprob for _, one in entries],
            "top_logprobs": [self._by_text(one) for _, one in entries],
            "text_offset": [offset for offset, _ in entries],
        }

    def _by_text(self, one: TokenLogprob) -> dict[str, float]:
        """Of the most probable tokens and of the one itself; of those whose texts are alike the first."""
        found = dict[str, float]()
        for token, logprob in (*one.top, (one.token, one.logprob)):
            found.setdefault(self._text(token), logprob)
        return found

    def _text(self, token: int) -> str:
        return self._spelled(token, "bytes:")[0]

    def _spelled(self, token: int, before: str) -> tuple[str, bytes | None]:
        r"""A token's text, or of a part of a character its bytes: \xe2\x80 after `before`; and the bytes."""
        known = self._tokenizer.token_bytes(token)
        if known is None:
            text = self._tokenizer.decode([token], skip_special=False)
            return text, None if INCOMPLETE in text else text.encode()
        try:
            return known.decode(), known
        except UnicodeDecodeError:
            return before + "".join(f"\\x{byte:02x}" for byte in known), known
