"""What the runtime must compute, in float64 NumPy: clear, literal and slow.

Written from the papers: LoSA (arXiv 2604.12056), QUEST (arXiv 2406.10774), SparseD (arXiv
2509.24014), SDAR (arXiv 2510.06303). Nothing here knows of the runtime.

Shapes: q [T, H, D]; prefix k, v [P, KVH, D]; block k, v [T, KVH, D]. Query head h reads kv head
h // (H // KVH). Pages start at position 0 of the prefix; the last one may be part full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def _float64(x: ArrayLike) -> Floats:
    return np.asarray(x, dtype=np.float64)


def _largest(values: ArrayLike, count: int) -> Indices:
    """Sorted indices of the `count` largest values; of equal ones the lower index comes first."""
    order = np.argsort(-_float64(values), kind="stable")
    return np.sort(order[:count])


# Attention


def softmax_attention(q: ArrayLike, k: ArrayLike, v: ArrayLike) -> tuple[Floats, Floats]:
    """Attention without a mask: output [T, H, D] and natural log-sum-exp [T, H] of the scores.

    Over no keys at all the output is 0 and the log-sum-exp -inf.
    """
    q, k, v = _float64(q), _float64(k), _float64(v)
    tokens, heads, width = q.shape
    group = heads // k.shape[1]
    o, lse = np.zeros(q.shape), np.full((tokens, heads), -np.inf)
    if k.shape[0] == 0:
        return o, lse
    for h in range(heads):
        scores = q[:, h] @ k[:, h // group].T / math.sqrt(width)
        highest = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - highest)
        total = weights.sum(axis=1, keepdims=True)
        o[:, h] = weights / total @ v[:, h // group]
        lse[:, h] = (highest + np.log(total))[:, 0]
    return o, lse


def merge(o_p: ArrayLike, lse_p: ArrayLike, o_b: ArrayLike, lse_b: ArrayLike) -> Floats:
    """Attention over prefix and block together, from the attention over each (LoSA, 2604.12056).

    o = (e^Lp o_p + e^Lb o_b) / (e^Lp + e^Lb), with the larger L subtracted from both first.
    """
    o_p, lse_p, o_b, lse_b = _float64(o_p), _float64(lse_p), _float64(o_b), _float64(lse_b)
    highest = np.maximum(lse_p, lse_b)
    w_p, w_b = np.exp(lse_p - highest)[..., None], np.exp(lse_b - highest)[..., None]
    return (w_p * o_p + w_b * o_b) / (w_p + w_b)


def page_positions(page: int, page_size: int, prefix_length: int) -> Indices:
    """The prefix positions of a page."""
    return np.arange(page * page_size, min((page + 1) * page_size, prefix_length))


def positions_of_pages(pages: ArrayLike, page_size: int, prefix_length: int) -> Indices:
    """The prefix positions of all of `pages`."""
    parts = [page_positions(int(page), page_size, prefix_length) for page in np.asarray(pages)]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def sparse_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, pages_per_kv_head: Sequence[ArrayLike], page_size: int
) -> tuple[Floats, Floats]:
    """Attention over the chosen pages of each kv head only: output and log-sum-exp."""
    q, k, v = _float64(q), _float64(k), _float64(v)
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    o, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for g in range(kv_heads):
        heads = slice(g * group, (g + 1) * group)
        read = positions_of_pages(pages_per_kv_head[g], page_size, k.shape[0])
        o[:, heads], lse[:, heads] = softmax_attention(q[:, heads], k[read, g : g + 1], v[read, g : g + 1])
    return o, lse


# LoSA's active set


def query_change(q: ArrayLike, q_previous: ArrayLike, relative: bool = False) -> Floats:
    """Change of each token, [T]: mean over heads and channels of the squared difference (LoSA).

    With `relative` over the mean square of the previous query.
    """
    change = ((_float64(q) - _float64(q_previous)) ** 2).mean(axis=(1, 2))
    return change / (_float64(q_previous) ** 2).mean(axis=(1, 2)) if relative else change


def select_active(
    change: ArrayLike, count: int, candidates: ArrayLike | None = None, threshold: float | None = None
) -> Indices:
    """The `count` tokens of largest change, sorted; of equal ones the earlier (LoSA).

    With `candidates` only the tokens for which it is true, with `threshold` only those whose change is
    above it: all of them if they are fewer.
    """
    change = _float64(change)
    among = np.arange(len(change)) if candidates is None else np.flatnonzero(candidates)
    if threshold is not None:
        among = among[change[among] > threshold]
    return among[_largest(change[among], count)]


def active_count(active: int | float, tokens: int) -> int:
    """Active tokens of a block: a count, or a fraction of the block rounded up."""
    if isinstance(active, float):
        return min(tokens, math.ceil(round(active * tokens, 9)))
    return min(tokens, active)


# Page selection


def page_bounds(k: ArrayLike, page_size: int) -> tuple[Floats, Floats]:
    """Minimum and maximum of each page's keys, each [pages, KVH, D] (QUEST, 2406.10774)."""
    k = _float64(k)
    pages = [k[start : start + page_size] for start in range(0, k.shape[0], page_size)]
    empty = np.zeros((0, *k.shape[1:]))
    if not pages:
        return empty, empty
    return np.stack([p.min(axis=0) for p in pages]), np.stack([p.max(axis=0) for p in pages])


CODED_PAGES = 16  # that share a channel's base and step


def coded_bounds(
    k_min: ArrayLike, k_max: ArrayLike, full: int, held: Callable[[Floats], Floats], least_step: float = 0.0
) -> tuple[Floats, Floats]:
    """Bounds [pages, KVH, D] in four bits, of the first `full` groups of 16 pages; of the rest as they are.

    A channel's bounds in a group become some of 16 values, base + code * step as the cache's format holds
    them (`held`): the largest that is not above a smallest key, the smallest that is not below a largest
    one. A group with bounds that are not finite stays as it is.
    """
    coded_min, coded_max = _float64(k_min).copy(), _float64(k_max).copy()
    for group in range(full):
        low, high = (x[CODED_PAGES * group :][:CODED_PAGES] for x in (coded_min, coded_max))
        if not np.isfinite(low + high).all():
            continue
        base, top = low.min(axis=0), high.max(axis=0)
        values = np.stack([held(base + code * coded_step(base, top, held, least_step)) for code in range(16)])
        if not np.isfinite(values).all():
            continue
        low[:] = np.where(values[:, None] <= low, values[:, None], -np.inf).max(axis=0)
        high[:] = np.where(values[:, None] >= high, values[:, None], np.inf).min(axis=0)
    return coded_min, coded_max


def coded_step(base: Floats, top: Floats, held: Callable[[Floats], Floats], least_step: float) -> Floats:
    """The least step of 8 significant bits, and `least_step`, by which code 15 reaches the top."""
    with np.errstate(over="ignore"):
        wanted = (top.astype(np.float32) - base.astype(np.float32)) / np.float32(15)
    mantissa, exponent = np.frexp(wanted.astype(np.float64))
    with np.errstate(invalid="ignore"):
        step = np.maximum(np.ldexp(np.ceil(mantissa * 256) / 256, exponent), least_step)
        short = held(base + 15 * step) < top
    return np.where(short, step + np.ldexp(1.0, np.frexp(step)[1] - 8), step)


def quest_scores(q_rows: ArrayLike, k_min: ArrayLike, k_max: ArrayLike) -> Floats:
    """Upper bound of q . k over each page, [T, H, pages] (QUEST).

    The sum over channels of max(q_d min_d, q_d max_d), for the kv head of each query head.
    """
    q, k_min, k_max = _float64(q_rows), _float64(k_min), _float64(k_max)
    group = q.shape[1] // k_min.shape[1]
    scores = np.zeros((*q.shape[:2], k_min.shape[0]))
    for h in range(q.shape[1]):
        for page in range(k_min.shape[0]):
            low, high = q[:, h] * k_min[page, h // group], q[:, h] * k_max[page, h // group]
            scores[:, h, page] = np.maximum(low, high).sum(axis=1)
    return scores


def page_count(budget: int, page_size: int) -> int:
    """Pages that one query selects: those that hold `budget` positions, at least one."""
    return max(1, math.ceil(budget / page_size))


def top_pages(scores: ArrayLike, count: int) -> Indices:
    """The `count` best pages of one query, sorted; of equal ones the earlier; at most all."""
    return _largest(scores, count)


def union_per_kv_head(scores: ArrayLike, kv_heads: int, count: int) -> list[Indices]:
    """Pages to read for each kv head: the union of the `count` best pages of every query (LoSA).

    scores [T, H, pages]; a query is one token of one query head. Sorted, without repetition.
    """
    scores = _float64(scores)
    tokens, heads = scores.shape[:2]
    group = heads // kv_heads
    unions: list[set[int]] = [set() for _ in range(kv_heads)]
    for t in range(tokens):
        for h in range(heads):
            unions[h // group].update(top_pages(scores[t, h], count).tolist())
    return [np.array(sorted(union), dtype=np.int64) for union in unions]


def page_mass(q: ArrayLike, k: ArrayLike, page_size: int) -> Floats:
    """Share of each query's softmax over the prefix that falls on each page, [T, H, pages] (SparseD)."""
    q, k = _float64(q), _float64(k)
    tokens, heads, width = q.shape
    group = heads // k.shape[1]
    starts = range(0, k.shape[0], page_size)
    mass = np.zeros((tokens, heads, len(starts)))
    for h in range(heads if len(starts) else 0):
        scores = q[:, h] @ k[:, h // group].T / math.sqrt(width)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        for page, start in enumerate(starts):
            mass[:, h, page] = weights[:, start : start + page_size].sum(axis=1)
    return mass


# Policies: how one layer attends in the passes over a block


@dataclass
class Pass:
    """What one call of `attend` read of the prefix.

    positions_read holds the sorted prefix positions of each kv head, active the tokens whose
    prefix attention was computed and not reused.
    """

    kind: str
    active: Indices
    positions_read: list[Indices]
    prefix_length: int

    @property
    def density(self) -> Floats:
        """Positions read / prefix length, [KVH]; 0 for an empty prefix."""
        return np.array([len(read) / max(1, self.prefix_length) for read in self.positions_read])


class DensePolicy:
    """Every pass reads the whole prefix; the base of the other policies.

    `kind` of a pass is "first", "later" or "commit". `passes` keeps one record per pass, over all
    blocks.
    """

    def __init__(
        self,
        budget: int = 256,
        page_size: int = 16,
        active: int | float | str = "auto",
        change_threshold: float = 0.05,
        commit: str = "dense",
        selector: str = "auto",
        drift: str = "auto",
        candidates: str = "all",
        first_pass: str = "auto",
        held: Callable[[Floats], Floats] = np.asarray,
        least_step: float = 0.0,
    ) -> None:
        self.budget, self.page_size, self.active, self.commit = budget, page_size, active, commit
        self.change_threshold = change_threshold
        if selector == "auto":
            selector = "both" if active == "auto" and first_pass != "sparse" else "quest"
        self.selector, self.candidates = selector, candidates
        self.drift = drift if drift != "auto" else "refresh" if active == "auto" else "previous"
        self.first_pass = first_pass
        self.held, self.least_step = held, least_step  # as bounds are coded
        self.passes: list[Pass] = []
        self.begin_block()

    def begin_block(self) -> None:
        """Forget the block before."""

    def attend(
        self,
        q: ArrayLike,
        k_block: ArrayLike,
        v_block: ArrayLike,
        k_prefix: ArrayLike,
        v_prefix: ArrayLike,
        kind: str,
        masked: ArrayLike | None = None,
    ) -> Floats:
        """Attention of the block's tokens over prefix and block, [T, H, D].

        `masked`, bool [T], are the tokens that are still masked when the pass begins.
        """
        if kind not in ("first", "later", "commit"):
            raise ValueError(kind)
        q, k_prefix, v_prefix = _float64(q), _float64(k_prefix), _float64(v_prefix)
        self.masked = masked
        o_p, lse_p = self._prefix(q, k_prefix, v_prefix, kind)
        o_b, lse_b = softmax_attention(q, k_block, v_block)
        return merge(o_p, lse_p, o_b, lse_b)

    def _prefix(self, q: Floats, k: Floats, v: Floats, kind: str) -> tuple[Floats, Floats]:
        return self._dense(q, k, v, kind)

    def _dense(self, q: Floats, k: Floats, v: Floats, kind: str) -> tuple[Floats, Floats]:
        everything = [np.arange(k.shape[0]) for _ in range(k.shape[1])]
        self.passes.append(Pass(kind, np.arange(q.shape[0]), everything, k.shape[0]))
        return softmax_attention(q, k, v)

    def _sparse(
        self, q: Floats, k: Floats, v: Floats, kind: str, pages: list[Indices], active: Indices
    ) -> tuple[Floats, Floats]:
        """Rows `active` of q over `pages`."""
        read = [positions_of_pages(chosen, self.page_size, k.shape[0]) for chosen in pages]
        self.passes.append(Pass(kind, active, read, k.shape[0]))
        return sparse_attention(q[active], k, v, pages, self.page_size)

    def _quest(self, q: Floats, k: Floats, v: Floats, kind: str) -> tuple[Floats, Floats]:
        """All tokens over the pages that they select."""
        return self._sparse(q, k, v, kind, self._quest_pages(q, k), np.arange(q.shape[0]))

    def _quest_pages(self, q_rows: Floats, k: Floats, count: int | None = None) -> list[Indices]:
        full = k.shape[0] // (CODED_PAGES * self.page_size)
        bounds = coded_bounds(*page_bounds(k, self.page_size), full, self.held, self.least_step)
        return self._top_pages(quest_scores(self.held(q_rows), *bounds), k.shape[1], count)

    def _top_pages(self, scores: Floats, kv_heads: int, count: int | None = None) -> list[Indices]:
        pages = page_count(self.budget, self.page_size)
        return union_per_kv_head(scores, kv_heads, pages if count is None else count)

    def _is_dense_commit(self, kind: str) -> bool:
        return kind == "commit" and self.commit == "dense"


class QuestPolicy(DensePolicy):
    """QUEST for every token of the block, the first pass too: the naive sparse attention of LoSA's paper.

    With `first_pass` "dense", after a dense one.
    """

    def _prefix(self, q: Floats, k: Floats, v: Floats, kind: str) -> tuple[Floats, Floats]:
        if self._is_dense_commit(kind) or (kind == "first" and self.first_pass == "dense"):
            return self._dense(q, k, v, kind)
        return self._quest(q, k, v, kind)


class SparsedPolicy(DensePolicy):
    """SparseD (2509.24014): the pages of most mass in the dense first pass serve the whole block."""

    def begin_block(self) -> None:
        self.pages: list[Indices] | None = None

    def _prefix(self, q: Floats, k: Floats, v: Floats, kind: str) -> tuple[Floats, Floats]:
        if kind == "first":
            per_head = page_mass(q, k, self.page_size).sum(axis=0, keepdims=True)
            self.pages = self._top_pages(per_head, k.shape[1])
            return self._dense(q, k, v, kind)
        if self.pages is None:
            raise RuntimeError("the block had no first pass")
        if self._is_dense_commit(kind):
            return self._dense(q, k, v, kind)
        return self._sparse(q, k, v, kind, self.pages, np.arange(q.shape[0]))


class LosaPolicy(DensePolicy):
    """LoSA (2604.12056): after a dense first pass, prefix attention anew for the active tokens only.

    Three choices that go past the paper: pages by `selector` "anchor" are those of most mass in the
    first pass, for each query its own, by "both" half of them are, and half by QUEST's bound, the odd one
    among them; by `drift` "refresh" change is measured against the query
    that the stored result belongs to; of `candidates` "masked" only masked tokens can be active.
    With `first_pass` "sparse" the first pass is QUEST's for every token (an ablation of the paper). With
    `active` "auto" all tokens are active whose relative change is above `change_threshold`.
    """

    def begin_block(self) -> None:
        self.q: Floats | None = None
        self.mass: Floats | None = None
        self.o_prefix: Floats | None = None
        self.lse_prefix: Floats | None = None

    def _prefix(self, q: Floats, k: Floats, v: Floats, kind: str) -> tuple[Floats, Floats]:
        if kind != "first" and self.q is None:
            raise RuntimeError("the block had no first pass")
        if kind == "first" or self._is_dense_commit(kind):
            sparse = kind == "first" and self.first_pass == "sparse"
            self.o_prefix, self.lse_prefix = (self._quest if sparse else self._dense)(q, k, v, kind)
            self.q = q.copy()
            if kind == "first" and self.selector != "quest":
                self.mass = page_mass(q, k, self.page_size)
        else:
            candidates = self.masked if self.candidates == "masked" else None
            auto = self.active == "auto"
            count = q.shape[0] if auto else active_count(self.active, q.shape[0])
            threshold = self.change_threshold if auto else None
            active = select_active(query_change(q, self.q, relative=auto), count, candidates, threshold)
            every = page_count(self.budget, self.page_size)
            by_mass = {"quest": 0, "both": every // 2, "anchor": every}[self.selector]
            pages = [np.empty(0, np.int64)] * k.shape[1]
            if by_mass < every:
                pages = self._quest_pages(q[active], k, every - by_mass)
            if by_mass:
                assert self.mass is not None
                stored = self._top_pages(self.mass[active], k.shape[1], by_mass)
                pages = [np.union1d(*two) for two in zip(pages, stored, strict=True)]
            o, lse = self._sparse(q, k, v, kind, pages, active)
            self.o_prefix[active], self.lse_prefix[active] = o, lse
            renewed = active if self.drift == "refresh" else np.arange(q.shape[0])
            self.q[renewed] = q[renewed]
        return self.o_prefix.copy(), self.lse_prefix.copy()


# Unmasking


def transfer_counts(block_length: int, steps: int) -> list[int]:
    """Tokens to fix in each step: block_length // steps, one more in the first block_length % steps."""
    return [block_length // steps + (step < block_length % steps) for step in range(steps)]


def remask(
    strategy: str,
    ids: ArrayLike,
    confidence: ArrayLike,
    entropy: ArrayLike,
    masked: ArrayLike,
    count: int,
    threshold: float,
    eb_threshold: float,
) -> Indices:
    """Positions of a block to fix in this pass, sorted (SDAR's remasking strategies).

    `ids` are the proposed tokens: no strategy looks at them. Only masked positions are ever fixed;
    of equal ones the lower position goes first.
    """
    confidence, entropy = _float64(confidence), _float64(entropy)
    candidates = np.flatnonzero(masked)
    assert len(np.asarray(ids)) == len(confidence) == len(entropy) == len(np.asarray(masked))
    if strategy == "sequential":
        return candidates[:count]
    if strategy == "low_confidence_static":
        return candidates[_largest(confidence[candidates], count)]
    if strategy == "low_confidence_dynamic":
        above = candidates[confidence[candidates] > threshold]
        surest = candidates[_largest(confidence[candidates], count)]
        return np.union1d(above, surest)
    if strategy == "entropy_bounded":
        ascending = candidates[np.argsort(entropy[candidates], kind="stable")]
        within = int((np.cumsum(entropy[ascending]) <= eb_threshold).sum())
        return np.sort(ascending[: max(1, within)])
    raise ValueError(strategy)
