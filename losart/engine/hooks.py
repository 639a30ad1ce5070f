"""What takes part in a sequence's proposals before any of them is fixed."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import replace
from typing import Protocol

import numpy as np

from losart.engine.batch import SequencePass
from losart.engine.sampling import LEFT_OPEN, Proposals


class ProposalHook(Protocol):
    """Is told what each pass proposes for a sequence, with logits, and may propose something else."""

    def revise(self, asked: SequencePass, proposals: Proposals) -> Proposals:
        """The proposals from which remasking fixes some.

        Not called for proposals whose logits are not finite. What it raises ends this sequence alone.

        Parameters
        ----------
        asked : SequencePass
            The sequence's pass. `asked.targets` says where in the block the proposals belong.
        proposals : Proposals
            Of this sequence alone, with `logits`: those of the model, whatever other hooks propose. Its
            arrays are not to be written to.

        Returns
        -------
        Proposals
            The same, or others for the same rows. With `decided`, remasking is overruled.
        """


class Hooked(Protocol):
    """A sequence, as far as its proposals go."""

    @property
    def hooks(self) -> Ids[ProposalHook]:
        """In the order in which they revise."""


def revised(
    proposals: Proposals, proposing: Ids[tuple[Hooked, SequencePass]]
) -> tuple[Proposals, dict[int, Exception]]:
    """Proposals after the hooks of their sequences, and what hooks raised, by the index of the sequence.

    Parameters
    ----------
    proposals : Proposals
        With `logits`.
    proposing : sequence of tuple of Hooked and SequencePass
        Whose they are, one after the other.
    """
    assert proposals.logits is not None
    result = replace(
        proposals,
        tokens=proposals.tokens.copy(),
        confidence=proposals.confidence.copy(),
        entropy=proposals.entropy.copy(),
    )
    decided = np.full(len(proposals.tokens), LEFT_OPEN, np.int8)
    errors, last, last_kept = dict[int, Exception](), 0, 0
    for index, (sequence, asked) in enumerate(proposing):
        first, last = last, last + len(asked.proposed)
        if not asked.keeps_logits:
            continue
        rows, kept = slice(first, last), slice(last_kept, last_kept + last - first)
        last_kept = kept.stop
        if proposals.finite is not None and not proposals.finite[rows].all():
            continue
        one = Proposals(
            proposals.tokens[rows],
            proposals.confidence[rows],
            proposals.entropy[rows],
            logits=proposals.logits[kept],
        )
        try:
            for hook in sequence.hooks:
                one = replace(hook.revise(asked, one), logits=one.logits)
        except Exception as error:
            errors[index] = error
            continue
        result.tokens[rows], result.confidence[rows], result.entropy[rows] = (
            one.tokens,
            one.confidence,
            one.entropy,
        )
        if one.decided is not None:
            decided[rows] = one.decided
    return replace(result, decided=decided) if (decided != LEFT_OPEN).any() else result, errors
