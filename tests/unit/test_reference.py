"""The float64 reference holds by itself: identities, corner cases and cases worked by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import reference as ref
from hypothesis import given, settings
from hypothesis import strategies as st

POLICIES = [ref.DensePolicy, ref.LosaPolicy, ref.QuestPolicy, ref.SparsedPolicy]


@dataclass
class Sizes:
    tokens: int
    kv_heads: int
    group: int
    width: int
    prefix: int
    page_size: int
    seed: int

    def arrays(self) -> tuple[np.ndarray, ...]:
        """q, k_block, v_block, k_prefix, v_prefix."""
        rng = np.random.default_rng(self.seed)
        kv = (self.kv_heads, self.width)
        q = rng.normal(size=(self.tokens, self.kv_heads * self.group, self.width))
        block = [rng.normal(size=(self.tokens, *kv)) for _ in range(2)]
        prefix = [rng.normal(size=(self.prefix, *kv)) for _ in range(2)]
        return (q, *block, *prefix)

    def queries(self, passes: int) -> np.ndarray:
        rng = np.random.default_rng(self.seed + 1)
        return rng.normal(size=(passes, self.tokens, self.kv_heads * self.group, self.width))


sizes = st.builds(
    Sizes,
    tokens=st.integers(1, 6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.sampled_from([2, 4, 8]),
    prefix=st.integers(0, 40),
    page_size=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 2**16),
)
SIZES = Sizes(tokens=4, kv_heads=2, group=2, width=8, prefix=70, page_size=16, seed=7)
fast = settings(max_examples=60, deadline=None)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


# Attention


def test_attention_of_one_query_by_hand() -> None:
    q = np.array([[[2.0, 0.0], [0.0, 4.0]]])  # one token, two heads that share the kv head
    k = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    v = np.array([[[1.0, 10.0]], [[2.0, 20.0]]])
    o, lse = ref.softmax_attention(q, k, v)
    a, b = np.exp(2 / np.sqrt(2)), np.exp(4 / np.sqrt(2))
    np.testing.assert_allclose(o[0, 0], [(a * 1 + 2) / (a + 1), (a * 10 + 20) / (a + 1)])
    np.testing.assert_allclose(o[0, 1], [(1 + b * 2) / (1 + b), (10 + b * 20) / (1 + b)])
    np.testing.assert_allclose(lse[0], np.log([a + 1, 1 + b]))


def test_heads_read_the_kv_head_of_their_group() -> None:
    q, _, _, k, v = SIZES.arrays()
    o, _ = ref.softmax_attention(q, k, v)
    for h, kv_head in enumerate([0, 0, 1, 1]):
        weights = softmax(k[:, kv_head] @ q[1, h] / np.sqrt(SIZES.width))
        np.testing.assert_allclose(o[1, h], weights @ v[:, kv_head], atol=1e-13)


def test_large_scores_do_not_overflow() -> None:
    q, _, _, k, v = SIZES.arrays()
    o, lse = ref.softmax_attention(1e4 * q, k, v)
    assert np.isfinite(o).all() and np.isfinite(lse).all()


@fast
@given(sizes)
def test_merge_equals_the_joint_softmax(s: Sizes) -> None:
    q, k_block, v_block, k, v = s.arrays()
    merged = ref.merge(*ref.softmax_attention(q, k, v), *ref.softmax_attention(q, k_block, v_block))
    joint, _ = ref.softmax_attention(q, np.concatenate([k, k_block]), np.concatenate([v, v_block]))
    np.testing.assert_allclose(merged, joint, atol=1e-12)


def test_empty_prefix() -> None:
    q, k_block, v_block, k, v = SIZES.arrays()
    o, lse = ref.softmax_attention(q, k[:0], v[:0])
    assert (o == 0).all() and (lse == -np.inf).all()
    alone, lse_block = ref.softmax_attention(q, k_block, v_block)
    np.testing.assert_array_equal(ref.merge(o, lse, alone, lse_block), alone)
    assert ref.page_mass(q, k[:0], 16).shape == (4, 4, 0)
    assert ref.page_bounds(k[:0], 16)[0].shape == (0, 2, 8)


# Pages


@fast
@given(sizes)
def test_the_quest_score_bounds_every_key_of_its_page(s: Sizes) -> None:
    q, _, _, k, _ = s.arrays()
    scores = ref.quest_scores(q, *ref.page_bounds(k, s.page_size))
    assert scores.shape[2] == -(-s.prefix // s.page_size)
    for h in range(q.shape[1]):
        exact = q[:, h] @ k[:, h // s.group].T
        for position in range(s.prefix):
            assert (exact[:, position] <= scores[:, h, position // s.page_size] + 1e-9).all()


@fast
@given(sizes)
def test_the_quest_score_of_a_page_of_one_key_is_exact(s: Sizes) -> None:
    q, _, _, k, _ = s.arrays()
    scores = ref.quest_scores(q, *ref.page_bounds(k, 1))
    for h in range(q.shape[1]):
        np.testing.assert_allclose(scores[:, h], q[:, h] @ k[:, h // s.group].T, atol=1e-12)


def test_page_bounds_of_a_part_full_page() -> None:
    k = np.array([3.0, -1.0, 2.0, 5.0, -7.0]).reshape(5, 1, 1)
    low, high = ref.page_bounds(k, 2)
    assert low.ravel().tolist() == [-1.0, 2.0, -7.0]
    assert high.ravel().tolist() == [3.0, 5.0, -7.0]


@fast
@given(sizes.filter(lambda s: s.prefix > 0))
def test_page_mass_is_the_softmax_by_page(s: Sizes) -> None:
    q, _, _, k, _ = s.arrays()
    mass = ref.page_mass(q, k, s.page_size)
    np.testing.assert_allclose(mass.sum(axis=2), 1.0)
    t, h = s.tokens - 1, q.shape[1] - 1
    weights = softmax(k[:, h // s.group] @ q[t, h] / np.sqrt(s.width))
    by_page = [weights[start : start + s.page_size].sum() for start in range(0, s.prefix, s.page_size)]
    np.testing.assert_allclose(mass[t, h], by_page)


def test_top_pages_take_the_earlier_of_equals() -> None:
    assert ref.top_pages([1.0, 3.0, 3.0, 2.0, 3.0], 2).tolist() == [1, 2]
    assert ref.top_pages([0.0, 5.0], 9).tolist() == [0, 1]


@pytest.mark.parametrize(("budget", "pages"), [(1, 1), (16, 1), (17, 2), (32, 2), (512, 32)])
def test_a_budget_is_whole_pages(budget: int, pages: int) -> None:
    assert ref.page_count(budget, 16) == pages


def test_the_union_is_over_tokens_and_the_heads_of_the_group() -> None:
    best = [[0, 1, 4, 4], [2, 1, 4, 0]]  # of two tokens, four query heads, two kv heads
    scores = np.eye(5)[best]
    assert [pages.tolist() for pages in ref.union_per_kv_head(scores, 2, 1)] == [[0, 1, 2], [0, 4]]


@fast
@given(sizes, st.data())
def test_sparse_attention_is_dense_attention_with_the_other_pages_masked(
    s: Sizes, data: st.DataObject
) -> None:
    q, _, _, k, v = s.arrays()
    every = list(range(-(-s.prefix // s.page_size)))
    some = st.sets(st.sampled_from(every)) if every else st.just(set())
    pages = [sorted(data.draw(some)) for _ in range(s.kv_heads)]
    o, lse = ref.sparse_attention(q, k, v, pages, s.page_size)
    for h in range(q.shape[1]):
        read = np.isin(np.arange(s.prefix) // s.page_size, pages[h // s.group])
        scores = k[:, h // s.group] @ q[0, h] / np.sqrt(s.width)
        if not read.any():
            assert lse[0, h] == -np.inf and (o[0, h] == 0).all()
            continue
        weights = softmax(np.where(read, scores, -np.inf))
        np.testing.assert_allclose(o[0, h], weights @ v[:, h // s.group], atol=1e-12)
        np.testing.assert_allclose(lse[0, h], np.log(np.exp(scores[read]).sum()), atol=1e-12)


# The active set


def test_query_change_by_hand() -> None:
    before = np.zeros((2, 2, 2))
    now = np.array([[[1.0, 0.0], [0.0, 3.0]], [[0.0, 0.0], [0.0, -2.0]]])
    assert ref.query_change(now, before).tolist() == [2.5, 1.0]


def test_the_active_set_takes_the_earlier_of_equals() -> None:
    assert ref.select_active([1.0, 2.0, 1.0, 2.0, 1.0], 3).tolist() == [0, 1, 3]
    assert ref.select_active([1.0, 2.0], 0).tolist() == []


@pytest.mark.parametrize(
    ("active", "tokens", "count"),
    [(5, 16, 5), (5, 4, 4), (0, 4, 0), (0.5, 5, 3), (0.0, 5, 0), (1.0, 5, 5), (0.01, 4, 1), (0.07, 100, 7)],
)
def test_active_is_a_count_or_a_fraction(active: int | float, tokens: int, count: int) -> None:
    assert ref.active_count(active, tokens) == count


# Policies


@pytest.mark.parametrize("commit", ["dense", "sparse"])
@pytest.mark.parametrize("policy_class", POLICIES)
@fast
@given(s=sizes)
def test_everything_read_and_active_is_dense(policy_class: type, commit: str, s: Sizes) -> None:
    _, k_block, v_block, k, v = s.arrays()
    policy = policy_class(budget=s.prefix + 1, page_size=s.page_size, active=1.0, commit=commit)
    for q, kind in zip(s.queries(3), ["first", "later", "commit"], strict=True):
        joint, _ = ref.softmax_attention(q, np.concatenate([k, k_block]), np.concatenate([v, v_block]))
        np.testing.assert_allclose(policy.attend(q, k_block, v_block, k, v, kind), joint, atol=1e-12)
        assert policy.passes[-1].active.tolist() == list(range(s.tokens))
        assert (policy.passes[-1].density == (1.0 if s.prefix else 0.0)).all()


@pytest.mark.parametrize("policy_class", [ref.LosaPolicy, ref.QuestPolicy, ref.SparsedPolicy])
def test_a_small_budget_is_not_dense(policy_class: type) -> None:
    _, k_block, v_block, k, v = SIZES.arrays()
    policy, dense = policy_class(budget=16), ref.DensePolicy()
    first, later = SIZES.queries(2)
    policy.attend(first, k_block, v_block, k, v, "first")
    o = policy.attend(later, k_block, v_block, k, v, "later")
    assert np.abs(o - dense.attend(later, k_block, v_block, k, v, "later")).max() > 1e-3
    assert (policy.passes[-1].density < 1).any()


def test_losa_recomputes_the_active_and_reuses_the_stable() -> None:
    _, k_block, v_block, k, v = SIZES.arrays()
    first, fresh = SIZES.queries(2)
    later = first.copy()
    later[2] = fresh[2]
    policy = ref.LosaPolicy(budget=16, active=1)
    policy.attend(first, k_block, v_block, k, v, "first")
    o = policy.attend(later, k_block, v_block, k, v, "later")
    assert policy.passes[-1].active.tolist() == [2]

    o_p, lse_p = ref.softmax_attention(first, k, v)
    for g in range(2):
        heads = slice(2 * g, 2 * g + 2)
        scores = ref.quest_scores(later[2:3], *ref.page_bounds(k, 16))[0, heads]
        pages = sorted(set(scores.argmax(axis=1).tolist()))
        read = np.flatnonzero(np.isin(np.arange(70) // 16, pages))
        assert policy.passes[-1].positions_read[g].tolist() == read.tolist()
        new = ref.softmax_attention(later[2:3, heads], k[read, g : g + 1], v[read, g : g + 1])
        o_p[2, heads], lse_p[2, heads] = new[0][0], new[1][0]
    expected = ref.merge(o_p, lse_p, *ref.softmax_attention(later, k_block, v_block))
    np.testing.assert_allclose(o, expected, atol=1e-13)


def test_losa_measures_change_against_the_pass_before() -> None:
    _, k_block, v_block, k, v = SIZES.arrays()
    q = SIZES.queries(1)[0]
    policy = ref.LosaPolicy(budget=16, active=1)
    active = []
    for token, step, kind in [(0, 0.0, "first"), (0, 9.0, "later"), (3, 1.0, "later"), (1, 0.1, "later")]:
        q = q.copy()
        q[token] += step
        policy.attend(q, k_block, v_block, k, v, kind)
        active.append(policy.passes[-1].active.tolist())
    assert active == [[0, 1, 2, 3], [0], [3], [1]]


def test_losa_keeps_what_a_later_pass_computed() -> None:
    _, k_block, v_block, k, v = SIZES.arrays()
    first, second = SIZES.queries(2)
    third = second.copy()
    third[0] += 1.0
    policy = ref.LosaPolicy(budget=16, active=1)
    policy.attend(first, k_block, v_block, k, v, "first")
    policy.active = 1.0
    policy.attend(second, k_block, v_block, k, v, "later")
    pages = ref.union_per_kv_head(ref.quest_scores(second, *ref.page_bounds(k, 16)), 2, 1)
    stored = ref.sparse_attention(second, k, v, pages, 16)
    policy.active = 1
    o = policy.attend(third, k_block, v_block, k, v, "later")
    expected = ref.merge(*stored, *ref.softmax_attention(third, k_block, v_block))
    np.testing.assert_allclose(o[1:], expected[1:], atol=1e-13)
    assert np.abs(o[0] - expected[0]).max() > 1e-3


def test_losa_with_no_active_token_reads_nothing() -> None:
    _, k_block, v_block, k, v = SIZES.arrays()
    first, later = SIZES.queries(2)
    policy = ref.LosaPolicy(active=0)
    policy.attend(first, k_block, v_block, k, v, "first")
    o = policy.attend(later, k_block, v_block, k, v, "later")
    reused = ref.softmax_attention(first, k, v)
    expected = ref.merge(*reused, *ref.softmax_attention(later, k_block, v_block))
    np.testing.assert_array_equal(o, expected)
    assert policy.passes[-1].density.tolist() == [0.0, 0.0]


def test_losa_may_measure_change_against_the_query_of_the_stored_result() -> None:
    """Token 0 drifts, token 2 swings to and fro: in the end the drift is larger than the swing."""
    _, k_block, v_block, k, v = SIZES.arrays()
    base = SIZES.queries(1)[0]
    active = {}
    for drift in ("previous", "refresh"):
        policy = ref.LosaPolicy(budget=16, active=1, drift=drift)
        for n in range(6):
            q = base.copy()
            q[0] += 0.4 * n
            q[2] += n % 2
            policy.attend(q, k_block, v_block, k, v, "later" if n else "first")
        active[drift] = [record.active.tolist() for record in policy.passes[1:]]
    # Token 0 is 1.2 away in the third later pass; in the fourth, token 2 is back where it was stored.
    assert active == {"previous": [[2]] * 5, "refresh": [[2], [2], [0], [0], [2]]}


def test_losa_may_select_by_the_masses_of_the_first_pass() -> None:
    _, k_block, v_block, k, v = SIZES.arrays()
    first, later = SIZES.queries(2)
    policy = ref.LosaPolicy(budget=16, active=2, selector="anchor")
    policy.attend(first, k_block, v_block, k, v, "first")
    mass = ref.page_mass(first, k, 16)
    for scale in (1.0, -1.0):  # whatever the query is now
        policy.attend(scale * later, k_block, v_block, k, v, "later")
        record = policy.passes[-1]
        for g, read in enumerate(record.positions_read):
            pages = set(mass[record.active, 2 * g : 2 * g + 2].argmax(axis=-1).ravel().tolist())
            assert sorted(set((read // 16).tolist())) == sorted(pages)


def test_losa_may_select_half_of_the_pages_by_each() -> None:
    _, k_block, v_block, k, v = SIZES.arrays()
    first, later = SIZES.queries(2)
    read = {}
    for selector, budget in (("quest", 32), ("anchor", 16), ("both", 48)):  # the odd page by the bound
        policy = ref.LosaPolicy(budget=budget, active=2, selector=selector)
        policy.attend(first, k_block, v_block, k, v, "first")
        policy.attend(later, k_block, v_block, k, v, "later")
        read[selector] = policy.passes[-1].positions_read
    for quest, anchor, both in zip(*read.values(), strict=True):
        assert both.tolist() == np.union1d(quest, anchor).tolist()


def test_losa_may_have_only_masked_tokens_active() -> None:
    _, k_block, v_block, k, v = SIZES.arrays()
    policy = ref.LosaPolicy(budget=16, active=2, candidates="masked", commit="sparse")
    sets = [("first", [1, 1, 0, 1]), ("later", [1, 1, 0, 1]), ("later", [0, 1, 0, 0]), ("commit", [0] * 4)]
    for q, (kind, masked) in zip(SIZES.queries(4), sets, strict=True):
        policy.attend(q, k_block, v_block, k, v, kind, masked)
    active = [record.active.tolist() for record in policy.passes]
    assert active[0] == [0, 1, 2, 3] and len(active[1]) == 2 and 2 not in active[1]
    assert active[2:] == [[1], []]
    assert policy.passes[-1].density.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("policy_class", [ref.LosaPolicy, ref.SparsedPolicy])
@pytest.mark.parametrize("kind", ["later", "commit"])
def test_a_block_starts_with_its_first_pass(policy_class: type, kind: str) -> None:
    q, *kv = SIZES.arrays()
    policy = policy_class()
    policy.attend(q, *kv, "first")
    policy.begin_block()
    with pytest.raises(RuntimeError, match="no first pass"):
        policy.attend(q, *kv, kind)


@pytest.mark.parametrize(("commit", "density"), [("dense", 1.0), ("sparse", 16 / 70)])
@pytest.mark.parametrize("policy_class", [ref.LosaPolicy, ref.QuestPolicy, ref.SparsedPolicy])
def test_the_commit_pass_follows_its_option(policy_class: type, commit: str, density: float) -> None:
    s = Sizes(tokens=1, kv_heads=1, group=1, width=8, prefix=70, page_size=16, seed=5)
    q, *kv = s.arrays()
    kv[2][-6:] = -9.0 * q[0]  # never the part full page
    policy = policy_class(budget=16, active=1, commit=commit)
    policy.attend(q, *kv, "first")
    policy.attend(q, *kv, "commit")
    assert policy.passes[-1].density.tolist() == [density]


def test_quest_selects_in_the_first_pass_too() -> None:
    q, *kv = SIZES.arrays()
    policy = ref.QuestPolicy(budget=16)
    policy.attend(q, *kv, "first")
    pages = ref.union_per_kv_head(ref.quest_scores(q, *ref.page_bounds(kv[2], 16)), 2, 1)
    for read, chosen in zip(policy.passes[0].positions_read, pages, strict=True):
        assert sorted(set((read // 16).tolist())) == chosen.tolist()


def test_sparsed_keeps_the_heaviest_pages_of_the_first_pass() -> None:
    _, k_block, v_block, k, v = SIZES.arrays()
    k = k.copy()
    first, other = SIZES.queries(2)
    first[:, 0] = [5.0] + [0.0] * 7
    k[:, 0, 0] = 0.0
    k[33, 0, 0] = 8.0  # page 2 holds nearly all the mass of head 0
    policy = ref.SparsedPolicy(budget=16)
    policy.attend(first, k_block, v_block, k, v, "first")
    assert (policy.passes[0].density == 1).all()
    heaviest = ref.page_mass(first, k, 16).sum(axis=0).argmax(axis=1)
    assert heaviest[0] == 2
    for q in (other, first):
        policy.attend(q, k_block, v_block, k, v, "later")
        for g, read in enumerate(policy.passes[-1].positions_read):
            assert set((read // 16).tolist()) == set(heaviest[2 * g : 2 * g + 2].tolist())
        assert policy.passes[-1].active.tolist() == [0, 1, 2, 3]


# Unmasking


def fix(strategy: str, count: int = 1, threshold: float = 0.5, eb_threshold: float = 1.0) -> list[int]:
    confidence = [0.99, 0.3, 0.8, 0.6, 0.6, 0.5]
    entropy = [0.0, 0.9, 0.1, 0.5, 0.5, 0.7]
    masked = [False, True, True, True, True, True]
    return ref.remask(
        strategy, range(6), confidence, entropy, masked, count, threshold, eb_threshold
    ).tolist()


def test_sequential_fixes_the_leftmost() -> None:
    assert fix("sequential", 2) == [1, 2]


def test_static_fixes_the_surest_and_the_earlier_of_equals() -> None:
    assert fix("low_confidence_static", 2) == [2, 3]
    assert fix("low_confidence_static", 9) == [1, 2, 3, 4, 5]
    assert fix("low_confidence_static", 0) == []


def test_dynamic_fixes_all_strictly_above_the_threshold_or_the_surest() -> None:
    assert fix("low_confidence_dynamic") == [2, 3, 4]
    assert fix("low_confidence_dynamic", threshold=0.6) == [2]
    assert fix("low_confidence_dynamic", threshold=0.9, count=2) == [2, 3]


def test_entropy_bounded_fixes_within_the_sum_and_at_least_one() -> None:
    assert fix("entropy_bounded", eb_threshold=0.05) == [2]
    assert fix("entropy_bounded", eb_threshold=0.65) == [2, 3]
    assert fix("entropy_bounded", eb_threshold=1.85) == [2, 3, 4, 5]


def test_entropy_bounded_admits_a_sum_at_the_threshold() -> None:
    fixed = ref.remask("entropy_bounded", [1, 2], [0.5, 0.5], [0.25, 0.25], [True, True], 1, 0.5, 0.5)
    assert fixed.tolist() == [0, 1]


@fast
@given(
    strategy=st.sampled_from(
        ["sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded"]
    ),
    rows=st.lists(
        st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 3.0), st.booleans()), min_size=1, max_size=9
    ).filter(lambda rows: any(masked for *_, masked in rows)),
    count=st.integers(1, 9),
)
def test_only_masked_positions_are_fixed_and_at_least_one(strategy: str, rows: list, count: int) -> None:
    confidence, entropy, masked = zip(*rows, strict=True)
    fixed = ref.remask(strategy, range(len(rows)), confidence, entropy, masked, count, 0.5, 1.0).tolist()
    assert fixed == sorted(set(fixed)) and fixed
    assert all(masked[i] for i in fixed)
    if strategy in ("sequential", "low_confidence_static"):
        assert len(fixed) == min(count, sum(masked))


@pytest.mark.parametrize(
    ("block_length", "steps", "counts"),
    [(4, 4, [1, 1, 1, 1]), (5, 3, [2, 2, 1]), (16, 5, [4, 3, 3, 3, 3]), (2, 4, [1, 1, 0, 0]), (1, 1, [1])],
)
def test_transfer_counts(block_length: int, steps: int, counts: list[int]) -> None:
    assert ref.transfer_counts(block_length, steps) == counts
