"""What a backend must offer: the one place where machines differ.

Arrays are the backend's own. The block that a pass works on begins at `cache.length`; a backend
takes positions and the length of the prefix from the cache, never from the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from losart.config.options import GenerationConfig
from losart.engine.kv_cache import PagedKVCache
from losart.engine.sampling import Proposals

Array = Any
Matrix = Any  # a weight [out, in], or several joined along `out`, as the backend holds them
Product = Any  # a matrix product, for the operation that follows it
Pages = Any  # that each kv head reads: a PageList, or what else the backend makes of them
Prefix = Any  # o [tokens, heads, head_dim] and log-sum-exp [tokens, heads], for block_attention


def _nothing() -> np.ndarray:
    return np.empty(0)


@dataclass(eq=False)
class Memory:
    """What passes over a block leave for later ones, in one generation at a time.

    Attributes
    ----------
    key : hashable
        Of the arrays' places: passes may be replayed for others with the same key.
    arrays : dict
        What was kept, by name: the backend's own.
    """

    key: Hashable = None
    arrays: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PassInputs:
    """What the host gives to a pass over a block.

    Attributes
    ----------
    ids : int64 [tokens]
        The block, the mask token where it is masked.
    rows : int64 [any]
        Masked positions, rising.
    uniforms : float64 [tokens]
        Random numbers in [0, 1), one a position.
    """

    ids: np.ndarray
    rows: np.ndarray = field(default_factory=_nothing)
    uniforms: np.ndarray = field(default_factory=_nothing)


class Backend(Protocol):
    """Operations of the transformer, of dense attention and of sampling."""

    name: str
    dtype: str
    prefill_tokens: int  # of the prompt that go through the model at a time

    # -- weights and cache

    def upload(self, *tensors: Any) -> Matrix:
        """A checkpoint's tensors [out_i, in] as one matrix [sum of out_i, in], in the backend's dtype."""

    def upload_vector(self, *tensors: Any) -> Array:
        """A norm gain or a bias in float32; several tensors one after the other."""

    def new_cache(self, page_size: int, expected: int | None = None) -> PagedKVCache:
        """An empty KV cache, expected to hold so many positions in the end."""

    # -- running

    def run_pass(
        self, shape: Hashable, inputs: PassInputs, cache: PagedKVCache, body: Callable[[Array], Any]
    ) -> tuple[Any, int]:
        """Run one pass over the block after the cache's prefix: `body` of the block's ids.

        Returns what `body` gave, and the positions that sparse attention read, summed over kv heads
        and layers.

        Parameters
        ----------
        shape : hashable
            Passes of equal shape launch the same operations: one may be replayed for another.
        inputs : PassInputs
        cache : PagedKVCache
        body : callable
            Block's ids, as `embed` takes them, to what the pass gives.
        """

    def run_prefill(self, ids: np.ndarray, cache: PagedKVCache, body: Callable[[Array], Any]) -> None:
        """Run `body` on the ids of a piece of the prompt that follows the cache's prefix."""

    # -- transformer

    def embed(self, table: Matrix, ids: Array) -> Array:
        """Rows of the embedding table: float32 [tokens, hidden]."""

    def linear(self, x: Array, matrix: Matrix, bias: Array | None = None) -> Product:
        """x [tokens, in] times the matrix: [tokens, out]."""

    def add_rms_norm(self, x: Array, delta: Product | None, gain: Array) -> tuple[Array, Array]:
        """The residual stream x + delta, and its RMS norm times gain."""

    def split_heads(
        self, qkv: Product, q_norm: Array, k_norm: Array, cache: PagedKVCache
    ) -> tuple[Array, Array, Array]:
        """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] from joined projections.

        q and k are RMS-normed per head and rotated to the positions of the block.
        """

    def silu_gate(self, gate_up: Product) -> Array:
        """silu(gate) * up from the joined projections [tokens, 2 * ffn]."""

    # -- attention

    def causal_attention(self, q: Array, cache: PagedKVCache, layer: int, block_length: int) -> Array:
        """Block-causal attention of a piece of the prompt whose keys and values were just written.

        Returns o [tokens, heads, head_dim].
        """

    def prefix_attention(self, q: Array, cache: PagedKVCache, layer: int) -> Prefix:
        """Dense attention over the prefix."""

    def block_attention(self, q: Array, k: Array, v: Array, prefix: Prefix) -> Array:
        """Attention of the block's tokens over the block, merged with that over the prefix."""

    # -- sampling

    def propose(self, hidden: Array, inputs: PassInputs, head: Matrix, config: GenerationConfig) -> Proposals:
        """A token for each masked row of hidden [tokens, hidden], with its confidence."""


class SparseBackend(Backend, Protocol):
    """A backend on which the sparse attention policies run."""

    def to_host(self, array: Array) -> np.ndarray:
        """An array of the last pass as it is when the pass has ended; only observers ask for it."""

    def page_lists(self, pages: Pages) -> list[np.ndarray]:
        """Page ids of each kv head, rising, as `to_host`."""

    def planned(self, planner: str) -> Any:
        """The backend as a policy talks to it whose tokens and pages are selected where `planner` says."""

    def new_memory(self, purpose: Hashable) -> Memory:
        """A memory for one generation; of equal purpose, arrays of equal names have equal shapes."""

    def keep(self, memory: Memory, name: Hashable, array: Array) -> None:
        """Later passes find this array's values in the memory under that name."""

    def keep_prefix(self, memory: Memory, name: Hashable, prefix: Prefix) -> None:
        """As `keep`, of o and log-sum-exp of all tokens, which are kept as a pair."""

    def keep_masses(
        self, memory: Memory, name: Hashable, masses: Array, cache: PagedKVCache, count: int, summed: bool
    ) -> None:
        """As `keep`, of what selecting the top `count` pages by mass needs.

        `summed`: by the mass summed over the block's tokens, instead of for each of them.
        """

    def prefix_attention_and_masses(self, q: Array, cache: PagedKVCache, layer: int) -> tuple[Prefix, Array]:
        """As `prefix_attention`, and each page's probability mass [kv_heads, tokens, group, pages]."""

    def sparse_prefix_attention(
        self,
        q: Array,
        tokens: Array | None,
        pages: Pages,
        cache: PagedKVCache,
        layer: int,
        into: tuple[Array, Array] | None = None,
    ) -> Prefix:
        """Attention of some tokens (None: all) over listed pages.

        With `into`, the tokens' rows of o and log-sum-exp are written there, and the others stay as
        they are; it may be the `block_attention` that is given the result which writes them, so that the
        result must not be dropped. Without, there must be all tokens.
        """

    def select_active(
        self,
        q: Array,
        previous: Array,
        count: int,
        candidates: np.ndarray | None = None,
        keep: bool = False,
    ) -> Array:
        """The `count` tokens whose queries changed most, rising.

        With `candidates`, rising positions of the block, only these; all of them where there are
        fewer than `count`. With `keep`, q is written over `previous` then.
        """
        # Candidates, the masked positions, differ between passes of equal shape. A backend that
        # replays passes must take them from its own copy of the pass's inputs (PassInputs.rows), and
        # always give `count` places: those past the last active token hold -1, which select_pages,
        # select_pages_by_mass, sparse_prefix_attention and copy_tokens then pass over.

    def copy_tokens(self, source: Array, tokens: Array, into: Array) -> None:
        """Copy the rows `tokens` of source [all tokens, ...] into the same rows of another array."""

    def select_pages(
        self, q: Array, tokens: Array | None, cache: PagedKVCache, layer: int, count: int
    ) -> Pages:
        """Top `count` pages of each query of `tokens` (None: all) by QUEST's bound, united per kv head."""

    def select_pages_by_mass(
        self, masses: Array, tokens: Array | None, cache: PagedKVCache, count: int
    ) -> Pages:
        """Top `count` pages of each query of `tokens` (None: all) by mass, united per kv head.

        `masses` are what `keep_masses` kept, for the same count.
        """
