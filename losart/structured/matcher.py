"""Where one generation is in its grammar."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from losart.errors import OptionError

if TYPE_CHECKING:
    import llguidance


class Matcher:
    """A grammar, and how far the tokens of one generation have come in it.

    Parameters
    ----------
    option : str
        Which one the grammar is of, for errors.
    matcher : llguidance.LLMatcher
        At the beginning of its grammar.
    vocab_size : int
        Tokens that a model proposes; the grammar's tokenizer may have more.
    end_token_ids : tuple of int
        Each ends an answer that the grammar accepts.
    """

    def __init__(
        self, option: str, matcher: llguidance.LLMatcher, vocab_size: int, end_token_ids: tuple[int, ...]
    ) -> None:
        self.end_token_ids = end_token_ids
        self._option = option
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._forced: list[int] = []  # and not consumed yet: to find them again may take long

    @property
    def complete(self) -> bool:
        """Whether nothing may follow, not even an end token."""
        return self._matcher.is_stopped()

    def accepts(self, token: int) -> bool:
        """Whether a token may come next."""
        return self._matcher.validate_tokens([token]) == 1

    def consume(self, tokens: Sequence[int]) -> int:
        """Take tokens while the grammar accepts them; returns how many it took.

        Raises
        ------
        OptionError
            The grammar is too complex to be followed further.
        """
        taken = self._matcher.try_consume_tokens(list(tokens))
        self._check()
        same = taken <= len(self._forced) and self._forced[:taken] == list(tokens[:taken])
        self._forced = self._forced[taken:] if same else []
        return taken

    def allowed(self) -> np.ndarray:
        """Tokens that may come next, ascending: int64, of those that the model proposes.

        Raises
        ------
        OptionError
            As `consume`.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.flatnonzero(np.unpackbits(bits, count=self._vocab_size, bitorder="little"))

    def forced(self) -> list[int]:
        """Tokens that come next whatever a model proposes; empty where there is a choice."""
        if not self._forced and not self.complete:
            forced = self._matcher.compute_ff_tokens()
            self._check()
            self._forced = list(takewhile(lambda token: token < self._vocab_size, forced))
        return self._forced

    def _check(self) -> None:
        if self._matcher.is_error():
            raise OptionError(f"{self._option}: {shortened(self._matcher.get_error())}")


def shortened(message: str) -> str:
    """What llguidance says, without a repetition of the grammar."""
    reason = re.search(r"^error: (.*)", message, re.MULTILINE)  # of a regular expression's parser
    line = reason[1] if reason else message.partition("\n")[0]
    return line if len(line) <= 300 else f"{line[:300]}..."
