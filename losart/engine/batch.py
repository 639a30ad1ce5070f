"""What one forward pass works on, rows of one or more sequences, and what it gives."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, groupby, pairwise
from typing import Any, NamedTuple

import numpy as np

from losart.config.options import GenerationConfig
from losart.engine.kv_cache import PagedKVCache
from losart.engine.sampling import Proposals
from losart.observe.step import ObservedLayer


class PassKind(enum.Enum):
    """What a pass is for."""

    PREFILL = "prefill"  # whole blocks of the prompt, block-causal, into the cache
    FIRST = "first"  # a block's first denoising pass
    LATER = "later"  # its other denoising passes
    COMMIT = "commit"  # a finished block into the cache

    def __init__(self, value: str) -> None:
        self.denoises = value in ("first", "later")
        self.rank = ("prefill", "commit", "first", "later").index(value)


FIRST_RANK = PassKind.FIRST.rank


@dataclass(eq=False, slots=True)  # not frozen: its sequence makes the block's next pass of it
class SequencePass:
    """One sequence's rows of a pass. Its lists and arrays are not changed, but replaced by those of the next.

    Attributes
    ----------
    kind : PassKind
    ids : sequence of int
        The block, the mask token where it is masked; whole blocks of the prompt for prefill.
    prefix_length : int
        Committed positions before the first row.
    options : GenerationConfig
    cache : PagedKVCache
        The prefix; prefill and commit write the rows' keys and values after it.
    slot : optional
        The backend's, for results that a pass over the block stores for later ones. A commit that rides has
        none.
    masked : sequence of int
        Rows that are masked and may be fixed, ascending; none but in denoising passes.
    uniforms : float64 [tokens], optional
        Random numbers in [0, 1), one per row, in denoising passes that draw tokens.
    count : int, optional
        How many of them remasking fixes at least; None: all.
    known : sequence of int
        Rows whose tokens may be changed, ascending.
    proposed : sequence of int, optional
        Rows whose logits propose tokens, ascending: one for each of `masked` and `known` together, or the one
        whose token follows the block. None: those of `masked`.
    causal : bool
        Whether each row of a commit sees only those before it.
    keeps_logits : bool
        Whether the logits of `proposed` come to the host with the proposals.
    """

    kind: PassKind
    ids: Sequence[int] | np.ndarray
    prefix_length: int
    options: GenerationConfig
    cache: PagedKVCache
    slot: Any = None
    masked: Sequence[int] | np.ndarray = ()
    uniforms: np.ndarray | None = None
    count: int | None = None
    known: Sequence[int] = ()
    proposed: Sequence[int] | np.ndarray = None  # type: ignore[assignment]  # never after __post_init__
    causal: bool = False
    keeps_logits: bool = False

    def __post_init__(self) -> None:
        if self.proposed is None:
            self.proposed = self.masked

    @property
    def temperature(self) -> float:
        """0 where the most probable tokens are proposed."""
        return 0.0 if self.uniforms is None else self.options.temperature

    @property
    def targets(self) -> list[int]:
        """Rows of the block that the proposals are for, ascending; its length for the token after it."""
        return sorted([*self.masked, *self.known]) or [len(self.ids)] * len(self.proposed)

    @property
    def pages(self) -> int:
        """Pages of the prefix, the last one perhaps part full."""
        return -(-self.prefix_length // self.cache.page_size)


def operations_key(unit: Sequence[SequencePass], alike: bool = False) -> tuple[Any, ...]:
    """Equal for passes whose attention can be done by the same operations.

    `unit` is one sequence's pass, or two where its commit rides. Pieces of prompts differ in length. Dense
    passes with and without a commit can share operations, unless all must be `alike`.
    """
    first = unit[0]
    options, rank, count = first.options, first.kind.rank, len(unit)
    attention: Any = options.attention
    rows = len(first.ids)
    if first.kind is PassKind.PREFILL or first.causal:
        rows, attention = options.block_length, first.cache
    elif attention.method == "dense" and unit[-1].kind.denoises:
        rank, count = FIRST_RANK, count if alike else 0  # dense attention does the same in all of them
    return rank, count, rows, first.cache.positions_per_chunk, attention


@dataclass(frozen=True, eq=False)
class PassBatch:
    """Rows of one or more sequences that go through the model together.

    They share all that is done for each row by itself; attention is done for groups of them. A commit can
    ride with the first pass over the same sequence's next block, which follows it and sees what it writes.
    Pieces of prompts are not mixed with other passes.

    Attributes
    ----------
    sequences : tuple of SequencePass
        In the order of their rows.
    alike : bool
        Whether those whose commit rides are a group of their own: how attention is divided, and so how sums
        are rounded, may depend on the rows that a group's caches have at most.
    one_group : bool
        Whether all are known to agree in what attention does.
    """

    sequences: tuple[SequencePass, ...]
    alike: bool = False
    one_group: bool = False

    @property
    def kind(self) -> PassKind:
        """What a group's pass is for: commits that ride aside."""
        return self.sequences[-1].kind

    @cached_property
    def rides(self) -> bool:
        """Whether commits of a group ride: of dense attention those of its first sequences."""
        return any(one.cache is after.cache for one, after in pairwise(self.sequences))

    @property
    def causal(self) -> bool:
        """Whether a group's rows are attended to as a prompt's are, one sequence by itself."""
        return self.sequences[0].causal

    @property
    def options(self) -> GenerationConfig:
        """The options that a group's sequences agree in: block length and attention."""
        return self.sequences[0].options

    @property
    def proposes(self) -> bool:
        """Whether the pass proposes tokens."""
        return any(len(one.proposed) > 0 for one in self.sequences)

    @property
    def samples(self) -> bool:
        """Whether tokens of some sequence are drawn, and not the most probable ones."""
        return any(one.temperature > 0 for one in self.sequences)

    @property
    def keeps_logits(self) -> bool:
        """Whether logits of some sequence come to the host."""
        return any(one.keeps_logits and len(one.proposed) for one in self.sequences)

    @property
    def tokens(self) -> int:
        """Rows in all."""
        return sum(len(sequence.ids) for sequence in self.sequences)

    def groups(self) -> list[tuple[PassBatch, slice]]:
        """Neighbours that agree in what attention does (`operations_key`), with their rows."""
        return self._groups or [(self, slice(0, self.tokens))]

    @cached_property
    def _groups(self) -> list[tuple[PassBatch, slice]]:
        """Empty for a single one, which is the batch itself: a cycle would keep caches alive."""
        if self.one_group or len(self.sequences) == 1:
            return []
        units: list[tuple[SequencePass, ...]] = []
        for one in self.sequences:
            if units and units[-1][0].cache is one.cache:
                units[-1] += (one,)
            else:
                units.append((one,))
        keyed = groupby(units, partial(operations_key, alike=self.alike))
        of_groups = [tuple(chain.from_iterable(of_group)) for _, of_group in keyed]
        if len(of_groups) == 1:
            return []
        groups, first = [], 0
        for sequences in of_groups:
            group = PassBatch(sequences, self.alike)
            groups.append((group, slice(first, first + group.tokens)))
            first += group.tokens
        return groups

    def rows(self) -> Iterator[tuple[SequencePass, slice]]:
        """Each sequence with its rows."""
        first = 0
        for sequence in self.sequences:
            yield sequence, slice(first, first + len(sequence.ids))
            first += len(sequence.ids)


class PassReads(NamedTuple):
    """What a pass over a block read of a sequence's prefix.

    Attributes
    ----------
    sparse : bool
        Whether the attention method reads sparsely in such a pass.
    dense_layers, sparse_layers : int
        Layers in which all tokens read the whole prefix, and the others.
    positions : int
        That sparse layers read, summed over them and kv heads.
    tokens : int
        That read in sparse layers, summed over them.
    """

    sparse: bool
    dense_layers: int
    sparse_layers: int
    positions: int
    tokens: int


@dataclass(frozen=True, eq=False)
class PassResult:
    """What a pass gave, per sequence.

    Attributes
    ----------
    proposals : Proposals, optional
        Of the rows that propose tokens of all sequences, one after the other; None where there are none.
    reads : sequence of PassReads
        Empty for prefill.
    layers : sequence of tuple of ObservedLayer
        Empty where nobody observes.
    experts_used : float, optional
        By the tokens of all sequences: mean over the layers that have experts. None without such layers, and
        for prefill.
    """

    proposals: Proposals | None = None
    reads: Sequence[PassReads] = ()
    layers: Sequence[tuple[ObservedLayer, ...]] = ()
    experts_used: float | None = None
