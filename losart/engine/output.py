"""The new tokens of a generation: their text as it grows, and where they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

TAIL_TOKENS = 64  # decoded anew whenever tokens come
CONTEXT_TOKENS = 8  # decoded with the tail, so that what depends on neighbours comes out right
INCOMPLETE = "\ufffd"  # what a token that ends within a character decodes to


class Output:
    """Collects new tokens until a stop.

    Parameters
    ----------
    limit : int
        New tokens at most; 0 for a prompt that is prefilled and no more.
    stop_token_ids : sequence of int
        Each ends the generation and is the last token kept.
    stop_strings : sequence of str
        Each ends the generation: the text is cut before it, the tokens after the one that
        completes it.
    decode : callable or None
        Token ids to text; without it there is no text, and no stop string is found.

    Attributes
    ----------
    limit : int
    tokens : list of int
        Kept so far.
    finish_reason : {"stop", "length"} or None
        None while the generation goes on.
    complete_at : int or None
        Tokens after which nothing may follow, where somebody knows; who does sets it.
    """

    def __init__(
        self,
        limit: int,
        stop_token_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        decode: Decode | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self.finish_reason: str | None = None if limit else "length"
        self.limit = limit
        self.complete_at: int | None = None
        self._stop_token_ids = frozenset(stop_token_ids)
        self._stop_strings = tuple(stop_strings)
        self._decode = decode
        self._text = ""
        self._texted = 0  # tokens that the text is of
        self._settled = 0, ""  # tokens, and their text

    @property
    def text(self) -> str:
        """Text of the tokens.

        While there are more to come it only grows: a character cut in two, and the beginning of
        what may become a stop string, are held back.
        """
        self._update_text()
        return self.known_text

    @property
    def known_text(self) -> str:
        """The text as it was when it was last asked for, or cut at a stop string."""
        if self.finish_reason is not None or not self._text:
            return self._text
        text = self._text.rstrip(INCOMPLETE)
        return text[: len(text) - max((_overlap(text, stop) for stop in self._stop_strings), default=0)]

    def extend(self, tokens: Sequence[int]) -> None:
        """Take the next tokens, up to a stop; sets `finish_reason` at one."""
        for token in tokens:
            if self.finish_reason is not None:
                break
            self.tokens.append(token)
            if token in self._stop_token_ids or len(self.tokens) == self.complete_at:
                self.finish_reason = "stop"
            elif len(self.tokens) == self.limit:
                self.finish_reason = "length"
        if self._decode is not None and tokens and self._stop_strings:
            searched = len(self._text.rstrip(INCOMPLETE))
            self._update_text()
            self._stop_at_string(self._decode, searched)

    def _update_text(self) -> None:
        """Decode what has come since it was last asked for."""
        decode, count = self._decode, len(self.tokens)
        if decode is None or self._texted == count:
            return
        if self.finish_reason is not None:
            text = decode(self.tokens)
        else:
            settled, settled_text = self._settled
            context = max(0, settled - CONTEXT_TOKENS)
            known = decode(self.tokens[context:settled])
            text = settled_text + decode(self.tokens[context:])[len(known) :]
            if count - settled >= TAIL_TOKENS and not text.endswith(INCOMPLETE):
                self._settled = count, text
        # In this order: another thread may ask meanwhile, or an interrupt come.
        self._text = text
        self._texted = count

    def _stop_at_string(self, decode: Decode, searched: int) -> None:
        overlap = max(map(len, self._stop_strings))
        if self._find_stop(self._text, searched - overlap) is None:
            return
        # The fewest tokens whose text holds a stop string.
        low, high = 1, len(self.tokens)
        while low < high:
            middle = (low + high) // 2
            if self._find_stop(decode(self.tokens[:middle])) is None:
                low = middle + 1
            else:
                high = middle
        self.tokens = self.tokens[:low]
        self._texted = low
        text = decode(self.tokens)
        self._text = text[: self._find_stop(text)]
        self.finish_reason = "stop"

    def _find_stop(self, text: str, start: int = 0) -> int | None:
        places = [place for stop in self._stop_strings if (place := text.find(stop, max(0, start))) >= 0]
        return min(places, default=None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
