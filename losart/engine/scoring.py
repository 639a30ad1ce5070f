"""How probable given tokens are: a hook that has a generation fix them one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from losart.engine.batch import SequencePass
from losart.engine.logprobs import log_softmax
from losart.engine.sampling import Proposals


class GivenTokens:
    """Fixes one of some given tokens in each pass, and notes how probable the pass finds it.

    Positions after the last of them are masked in all passes.

    Parameters
    ----------
    tokens : list of int
    first : int
        Position of the first of them.
    order : float64 [tokens], optional
        Of the masked ones in a block that with the lowest number is fixed first. None: from left to right.

    Attributes
    ----------
    tokens : list of int
    logprobs : float64 [tokens]
    greedy : bool
        Whether each token so far was the most probable one in its pass.
    """

    def __init__(self, tokens: list[int], first: int, order: np.ndarray | None = None) -> None:
        self.tokens = tokens
        self._first = first
        self._order = np.arange(len(tokens)) if order is None else order
        self._left = len(tokens)
        self.logprobs = np.zeros(len(tokens))
        self.greedy = True

    def revise(self, asked: SequencePass, proposals: Proposals) -> Proposals:
        """Propose a given token, and let no other be fixed."""
        assert proposals.logits is not None
        places = [asked.prefix_length + target - self._first for target in asked.targets]
        rows = [row for row, place in enumerate(places) if place < len(self.tokens)]
        if not rows:  # of a part of the block that comes after all of them
            return replace(proposals, decided=np.ones(len(places), np.int8))
        row = min(rows, key=lambda row: float(self._order[places[row]]))
        place = places[row]
        token = self.tokens[place]
        self.logprobs[place] = log_softmax(proposals.logits[row])[token]
        self.greedy &= bool(proposals.tokens[row] == token)
        self._left -= 1
        tokens = proposals.tokens.copy()
        tokens[row] = token
        decided = np.full(len(places), self._left == 0, np.int8)  # nobody asks for what follows
        decided[row] = 1
        return replace(proposals, tokens=tokens, decided=decided)
