"""Tokens that a grammar accepts, of those that a pass proposes."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import replace
from typing import Protocol

import numpy as np

from losart.engine.batch import SequencePass
from losart.engine.output import Output
from losart.engine.remasking import choose
from losart.engine.sampling import Proposals, propose
from losart.errors import LosartError


class Grammar(Protocol):
    """Where a generation is in its grammar: `losart.structured.matcher.Matcher`."""

    end_token_ids: tuple[int, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing may follow, not even an end token."""

    def accepts(self, token: int) -> bool:
        """Whether a token may come next."""

    def consume(self, tokens: Ids[int]) -> int:
        """Take tokens while the grammar accepts them; returns how many it took."""

    def allowed(self) -> np.ndarray:
        """Tokens that may come next, ascending: int64."""

    def forced(self) -> list[int]:
        """Tokens that come next whatever a model proposes; empty where there is a choice."""


class Structure:
    """Fixes a run of tokens from the left that the grammar accepts, and no others.

    Each pass fixes the leftmost masked token at least: the proposal, if the grammar accepts it and it is the
    most probable token; else one that is taken from the row's logits in the same way among those which the
    grammar allows. Proposals that follow are fixed as long as the grammar accepts them and remasking would
    fix them. Tokens to which the grammar leaves no choice are fixed too, whatever was proposed.

    With a temperature a proposal that the grammar does not accept is drawn anew in a later pass, among the
    tokens that it allows. Without `top_k` and `top_p` that is rejection sampling from the distribution under
    the grammar.

    Parameters
    ----------
    grammar : Grammar
    output : Output
        Is told where the grammar ends.
    """

    def __init__(self, grammar: Grammar, output: Output) -> None:
        self._grammar = grammar
        self._output = output
        self._taken = 0  # tokens

    def revise(self, asked: SequencePass, proposals: Proposals) -> Proposals:
        """Proposals of which the run is decided, and all others not to be fixed.

        Raises
        ------
        LosartError
            The grammar goes on with tokens that the model has not, or is too complex to be followed; or the
            pass before was not applied.
        """
        if self._taken != len(self._output.tokens):
            raise LosartError("a pass under a grammar cannot be taken twice")
        grammar, chosen, tokens = self._grammar, choose(proposals, [asked]), proposals.tokens.copy()
        row = 0
        while row < len(tokens) and not grammar.complete:
            forced = grammar.forced()[: len(tokens) - row]
            if forced and asked.options.mask_token_id not in forced:
                tokens[row : row + len(forced)] = forced
                run = row + len(forced)
            else:
                if row == 0 and (asked.temperature > 0 or not grammar.accepts(int(tokens[0]))):
                    tokens[0] = self._under_mask(asked, proposals)
                run = row + (row == 0)
                while run < len(tokens) and chosen[run]:
                    run += 1
            taken = grammar.consume(tokens[row:run].tolist())
            row += taken
            if not taken:
                break
        if not row:  # passes would go on for ever
            raise LosartError("the grammar takes none of the tokens that it allows")
        self._taken += row
        if grammar.complete:
            self._output.complete_at = self._taken
        decided = (np.arange(len(tokens)) < row).astype(np.int8)
        return replace(proposals, tokens=tokens, decided=decided)

    def _under_mask(self, asked: SequencePass, proposals: Proposals) -> int:
        """A token of the first row, among those that the grammar allows."""
        assert proposals.logits is not None
        allowed, logits, options = self._grammar.allowed(), proposals.logits[0], asked.options
        allowed = allowed[logits[allowed] > -np.inf]
        if not len(allowed):
            raise LosartError("the grammar goes on with nothing that the model's tokens can spell")
        uniforms = None if asked.uniforms is None else asked.uniforms[asked.proposed[:1]]
        drawn = propose(
            logits[None, allowed],
            uniforms,
            temperature=asked.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            with_entropy=False,
        )
        return int(allowed[drawn.tokens[0]])
