"""What a backend must offer: the one place where machines differ.

Arrays are the backend's own. `batch` is the pass: what `begin` hands to its body, a PassBatch or what the
backend made of one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from losart.config.model import ExpertsConfig, ModelConfig
from losart.config.precision import Precision
from losart.engine.batch import PassBatch
from losart.engine.kv_cache import PagedKVCache
from losart.engine.sampling import Proposals

Array = Any
Batch = Any  # a PassBatch, as the backend hands it to the body of a pass
Weight = Any  # matrices [out_i, in], joined along `out`
Experts = Any  # such matrices of each expert, all alike
Stack = Sequence[tuple[Any, ...]]  # the tensors of each
Matmul = Any  # the result of a matmul, for the operation that follows it
Prefix = Any  # o [tokens, heads, head_dim] and log-sum-exp [tokens, heads], for block_attention
Slot = Any  # a sequence's stored results


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """A layer's mixture of experts.

    Attributes
    ----------
    config : ExpertsConfig
    router : Weight
        [experts, hidden]
    bias : float32 [experts], optional
        The backend's own.
    gate_up : Experts
        [2 * width, hidden] of each expert, the shared ones last.
    down : Experts
        [hidden, width] of each.
    """

    config: ExpertsConfig
    router: Weight
    bias: Array | None
    gate_up: Experts
    down: Experts


@dataclass(frozen=True)
class ActiveRule:
    """Which tokens of a block are active in a layer.

    Attributes
    ----------
    count : int
        At most so many: those whose queries changed most against the stored ones, of equals the earlier.
    threshold : float or None
        Only those whose change, relative to the square of the stored query, is above this. None: all.
    masked_only : bool
        Only masked ones.
    follow : bool
        Whether all queries are stored, for the change in the next pass.
    """

    count: int
    threshold: float | None = None
    masked_only: bool = False
    follow: bool = True


@dataclass(frozen=True)
class StoredResults:
    """What passes over a block store for later ones, in each layer.

    Attributes
    ----------
    tokens : int
        Of a block.
    attention : bool
        Queries, and results of attention over the prefix.
    top_pages : int
        Pages of highest mass per row; 0 for none.
    top_pages_rows : int
        Rows per kv head that rank pages: the query heads that share it, once for the block or for each token.
    """

    tokens: int
    attention: bool = False
    top_pages: int = 0
    top_pages_rows: int = 0


@dataclass(frozen=True, eq=False)
class ActiveTokens:
    """Active tokens of the blocks in a layer.

    Attributes
    ----------
    tokens : Any
        Rows, ascending; the backend's own.
    change : Any
        What each token's query has changed by: float32, the backend's own.
    """

    tokens: Any
    change: Any


@dataclass(frozen=True, eq=False)
class Selection:
    """What a sparse layer reads of the prefix.

    Attributes
    ----------
    tokens : Any
        Rows whose queries read, ascending; the backend's own. None: all.
    pages : Any
        That each kv head reads; the backend's own.
    change : Any
        By which the rows were selected; the backend's own. None: they were not.
    """

    tokens: Any
    pages: Any
    change: Any = None


@dataclass(frozen=True, eq=False)
class HostSelection:
    """A selection of one sequence on the host.

    Attributes
    ----------
    tokens : int [any]
        Positions within the block.
    pages : list of int [any]
        Of each kv head.
    change : float32 [tokens of the block] or None
    """

    tokens: np.ndarray
    pages: list[np.ndarray]
    change: np.ndarray | None


@dataclass(frozen=True, eq=False)
class PassOutput:
    """What a pass gave.

    Attributes
    ----------
    proposals : Proposals, optional
        Of the rows that propose tokens of all sequences, one after the other; None where there are none.
    positions : sequence of int
        Prefix positions that sparse attention read, summed over kv heads and layers, per sequence.
    tokens : sequence of int
        Tokens that read them, summed over layers, per sequence.
    reads : sequence of sequence of Selection or None
        Per group of the batch, per layer; None: dense. Empty but for passes that are observed.
    experts_used : float, optional
        Experts that tokens of the pass went to, shared ones not counted: mean over the layers that have
        experts. None without such layers, and for prefill.
    """

    proposals: Proposals | None
    positions: Sequence[int]
    tokens: Sequence[int]
    reads: Sequence[Sequence[Selection | None]]
    experts_used: float | None = None


@dataclass(frozen=True, eq=False)
class PassBody:
    """What a pass launches.

    Attributes
    ----------
    launch : callable
        The batch to what the pass proposes (`propose`, or None), and what each of its groups read in each
        layer.
    key : hashable
        Passes of equal keys, numbers of rows and page sizes launch the same operations: one may be
        replayed for another. None: the pass is run by itself.
    """

    launch: Callable[[Batch], tuple[Any, list[list[Selection | None]]]]
    key: Hashable = None


class Selector(Protocol):
    """Selects active tokens, and the pages that queries read.

    Selected pages are united per kv head.
    """

    def select_active(self, layer: int, q: Array, batch: Batch, rule: ActiveRule) -> ActiveTokens:
        """The active tokens of each block."""

    def select_pages(
        self,
        layer: int,
        q: Array,
        active: ActiveTokens | None,
        batch: Batch,
        count: int,
        *,
        with_stored: bool = False,
    ) -> Selection:
        """The `count` pages of highest QUEST bound for each query of some tokens (None: of all).

        With `with_stored` those of `select_stored_pages` too, of which some may be the same.
        """

    def select_stored_pages(self, layer: int, active: ActiveTokens | None, batch: Batch) -> Selection:
        """The pages that `store_top_pages` stored for some tokens' queries (None: for all)."""


class Backend(Protocol):
    """A machine that transformers run on."""

    name: str
    config: ModelConfig
    precision: Precision
    prefill_tokens: int  # of a prompt that go through the model at a time
    beside_tokens: int  # the same while other sequences wait for their passes
    riding_blocks: Container[int]  # lengths of blocks whose commits may ride
    deterministic: bool  # whether sums must not depend on what else a pass has
    same_sums: bool  # whether those of passes over blocks must not
    float8_activations: bool  # whether many tokens' are rounded to E4M3 for weights that are held so
    max_sequences: int  # that share passes, unless somebody says otherwise
    batch_rows: int  # that a pass over several sequences may have; 0: a pass has one sequence

    @property
    def selectors(self) -> Mapping[str, Selector]:
        """What selects tokens and pages, by `AttentionConfig.planner`."""

    # -- weights, cache and stored results

    def free_bytes(self) -> int | None:
        """Memory that weights and caches can be given; None where nobody says."""

    def upload(self, *tensors: Any) -> Weight:
        """A checkpoint's tensors [out_i, in] as one matrix [sum of out_i, in], in the format of weights."""

    def upload_experts(self, gate_up: Stack, down: Stack) -> tuple[Experts, Experts]:
        """The tensors of each expert's matrices, which `upload` would take."""

    def held(self, *tensors: Any) -> dict[str, int]:
        """In which formats matrices are held that are uploaded as one, and the bytes of each."""

    def held_experts(self, gate_up: Stack, down: Stack) -> dict[str, int]:
        """The same of experts."""

    def upload_vector(self, *tensors: Any) -> Array:
        """A norm gain or a bias in float32; several tensors one after the other."""

    def new_cache(self, page_size: int, expected: int | None = None) -> PagedKVCache:
        """An empty KV cache, expected to hold so many positions in the end."""

    def new_slot(self, stored: StoredResults) -> Slot:
        """Room for one sequence's stored results: freed with the last reference to it, and not yet valid."""

    # -- running

    def begin(self, batch: PassBatch, body: PassBody, observe: bool = False) -> Callable[[], PassOutput]:
        """Run one pass, or launch it: the function returned waits for it, and must be called before the next.

        With `observe` its output has what each layer read.
        """

    def on_host(self, selection: Selection, batch: PassBatch) -> list[HostSelection]:
        """What each sequence of a group read, of the pass that was run last."""

    # -- transformer

    def join(self, arrays: Sequence[Array]) -> Array:
        """Rows of some arrays, one after the other."""

    def embed(self, table: Weight, batch: Batch) -> Array:
        """The rows' embeddings: float32 [tokens, hidden]."""

    def linear(self, x: Array, weight: Weight, bias: Array | None = None) -> Matmul:
        """x [tokens, in] times the transposed weight: [tokens, out]."""

    def prefill_linear(self, x: Array, weight: Weight, bias: Array | None = None) -> Matmul:
        """As `linear`, of many tokens: it may use a vendor's library, which cannot be captured."""

    def add_rms_norm(self, x: Array, delta: Matmul | None, gain: Array) -> tuple[Array, Array]:
        """The residual stream x + delta, and its RMS norm times gain."""

    def split_heads(
        self, qkv: Matmul, q_norm: Array | None, k_norm: Array | None, batch: Batch
    ) -> tuple[Array, Array, Array]:
        """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] from joined projections.

        q and k are RMS-normed per head, where there are gains, and rotated to the rows' positions.
        """

    def gated_linear(self, x: Array, gate_up: Weight, prefill: bool) -> Array:
        """silu(gate) * up, [tokens, ffn], of x times the joined projections [2 * ffn, in]."""

    def experts(self, x: Array, layer: ExpertWeights, batch: Batch) -> Matmul:
        """Each token's weighted sum of its experts' feed-forwards, [tokens, hidden].

        Router logits, scores and weights are float32.
        """

    def write_kv(self, layer: int, k: Array, v: Array, batch: Batch) -> None:
        """Keys and values of the rows that are not denoised into the cache, after each sequence's prefix."""

    # -- attention

    def causal_attention(self, layer: int, q: Array, batch: Batch) -> Array:
        """Block-causal attention of a piece of the prompt whose keys and values were just written.

        Causal token by token, also of a finished block, where the model is.

        Returns o [tokens, heads, head_dim].
        """

    def prefix_attention(self, layer: int, q: Array, batch: Batch) -> Prefix:
        """Dense attention over each sequence's prefix, to which what a commit has just written belongs."""

    def prefix_attention_and_masses(self, layer: int, q: Array, batch: Batch) -> tuple[Prefix, Array]:
        """As `prefix_attention`, and for `store_top_pages` each page's probability mass.

        For queries of sequences that have a slot: not of commits that ride.
        """

    def sparse_prefix_attention(self, layer: int, q: Array, selection: Selection, batch: Batch) -> Prefix:
        """Attention of all tokens over selected pages."""

    def refresh_prefix_attention(
        self, layer: int, q: Array, selection: Selection, batch: Batch, *, store_queries: bool
    ) -> Prefix:
        """Attention of the selected tokens over selected pages, and the stored results of the others.

        The new results, and with `store_queries` the queries that they are of, are stored, by the
        `block_attention` that is given them at the latest.
        """

    def block_attention(self, q: Array, k: Array, v: Array, prefix: Prefix, batch: Batch) -> Array:
        """Attention of each block's tokens over their block, merged with that over the prefix."""

    # -- stored results

    def store_attention(self, layer: int, q: Array, prefix: Prefix, batch: Batch) -> Prefix:
        """Store queries and results of attention over the prefix, of all rows that have a slot.

        Returns the results; all is stored by the `block_attention` that is given them at the latest.
        """

    def store_top_pages(self, layer: int, masses: Array, batch: Batch, count: int, *, summed: bool) -> None:
        """Store the `count` pages of highest mass per query, with `summed` per query head for the block."""

    # -- sampling

    def propose(self, hidden: Array, head: Weight, batch: Batch) -> Any:
        """A token of each proposing row of hidden [tokens, hidden], with its confidence.

        And the logits of the rows of those sequences that keep them: `Proposals.logits`.
        """
