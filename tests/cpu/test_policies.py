"""The attention policies on the CPU against the reference's, driven layer by layer through blocks."""

from __future__ import annotations

import numpy as np
import pytest
from drive import PASSES, REFERENCES, Case, drive
from kv import model_config
from passes import block_batch, write

import losart
from losart.attention import make_policy
from losart.backends.cpu.backend import CpuBackend
from losart.config.options import AttentionConfig
from losart.config.precision import Precision
from losart.engine.batch import PassKind
from losart.errors import OptionError

METHODS = list(REFERENCES)
SPARSE = METHODS[1:]
# First passes that are not the method's own.
OTHER_FIRST = [("losa", {"first_pass": "sparse"}), ("quest", {"first_pass": "dense"})]
SETTINGS = [*((method, {}) for method in SPARSE), *OTHER_FIRST]

CASES = [
    *(Case(method, seed=seed) for method in METHODS for seed in range(2)),
    # Budgets below a page, of whole pages and not, of all of the prefix.
    *(Case(method, options={"budget": budget}) for method in SPARSE for budget in (1, 16, 40, 64, 199, 5000)),
    *(Case(method, options={"page_size": size, "budget": 96}) for method in SPARSE for size in (32, 48, 64)),
    *(
        Case(method, options={"commit": commit, "budget": 32, "dense_layers": layers})
        for method in METHODS
        for commit in ("dense", "sparse")
        for layers in (0, 1, 3, 9)
    ),
    *(
        Case(options={"active": active, "budget": 32, "commit": commit})
        for active in (0, 1, 3, 8, 99, 0.0, 0.1, 0.5, 1.0)
        for commit in ("dense", "sparse")
    ),
    *(
        Case(block_length=16, options={"change_threshold": threshold, "budget": 32, **others}, seed=3)
        for threshold in (0.0, 0.02, 0.08, 10.0)
        for others in (
            {},
            {"drift": "previous"},
            {"candidates": "masked"},
            {"selector": "quest"},
            {"selector": "anchor"},
        )
    ),
    *(Case(method, prefix=0, options={"commit": "sparse", "budget": 16}) for method in METHODS),
    *(
        Case(method, block_length=n, prefix=prefix, options={"budget": 32, "active": 1, "commit": "sparse"})
        for method in METHODS
        for n, prefix in ((1, 0), (1, 40), (2, 17), (64, 300))
    ),
    *(
        Case(method, prefix=1500, blocks=1, block_length=16, dtype=dtype, options={"budget": 128})
        for method in SPARSE
        for dtype in ("bfloat16", "float16")
    ),
    *(
        Case(method, prefix=90, kv_heads=kv_heads, group=group, width=width, options={"budget": 32})
        for method in SPARSE
        for kv_heads, group, width in ((1, 8, 16), (3, 1, 48), (1, 5, 128))
    ),
    *(
        Case(method, prefix=prefix, block_length=n, options={**options, **first})
        for method, first in [
            *OTHER_FIRST,
            ("losa", {"first_pass": "dense"}),
            ("dense", {"first_pass": "sparse"}),
        ]
        for prefix, n, options in (
            (200, 8, {"budget": 32}),
            (200, 8, {"budget": 40, "commit": "sparse", "dense_layers": 1, "page_size": 32}),
            (90, 8, {"budget": 16, "active": 0, "commit": "sparse"}),
            (300, 16, {"budget": 64, "active": 0.5, "drift": "refresh", "candidates": "masked"}),
            (0, 4, {"budget": 16}),
            (40, 1, {"budget": 16}),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_policy_is_the_references(case):
    drive(case)


def test_a_threshold_takes_tokens_by_how_much_they_changed():
    """A third of the block changes by about 9% of its square, a third by 2%, a third not at all."""
    counts = []
    for threshold in (0.0, 0.05, 10.0):
        options = {"change_threshold": threshold, "budget": 32, "drift": "previous"}
        _, _, passes = drive(Case(block_length=12, options=options))
        later = [len(record.active) for kind, records in passes if kind == "later" for record in records]
        counts.append((min(later), max(later)))
    assert counts == [(8, 8), (4, 4), (0, 0)]


def test_no_active_token_reads_nothing_after_the_first_pass():
    reads, _, passes = drive(Case(options={"active": 0, "commit": "sparse"}))
    assert reads.sparse_density == reads.active_fraction == 0.0
    assert reads.density == pytest.approx(1 / len(PASSES))
    assert not any(positions.size for kind, records in passes if kind != "first" for record in records
                   for positions in record.positions_read)  # fmt: skip


@pytest.mark.parametrize(("method", "first"), SETTINGS, ids=str)
def test_everything_read_and_active_is_dense_attention_to_the_bit(method, first):
    full = AttentionConfig(method, budget=1203, active=1.0, commit="sparse", **first)
    for dense, sparse in outputs(AttentionConfig("dense"), full):
        np.testing.assert_array_equal(dense, sparse)


def outputs(*configs: AttentionConfig) -> list[list[np.ndarray]]:
    """Of the passes of a block in one layer, with the same queries, keys and values for all configs."""
    rng = np.random.default_rng(0)
    model = model_config(2, 3, 32)
    backend = CpuBackend(model, Precision.of("float32"))
    cache = backend.new_cache(16)
    write(cache, 0, *rng.standard_normal((2, 1203, 2, 32), np.float32))
    cache.advance(1203)
    policies = [make_policy(config, model, 5) for config in configs]
    slots = [backend.new_slot(policy.stored) if policy.stored else None for policy in policies]
    passes = []
    for kind in PASSES:
        q = rng.standard_normal((5, 6, 32), np.float32)
        k, v = rng.standard_normal((2, 5, 2, 32), np.float32)
        passes.append([])
        for policy, slot in zip(policies, slots, strict=True):
            batch = block_batch(cache, 5, PassKind(kind), slot=slot)
            passes[-1].append(policy.attend(backend, 0, q.copy(), k, v, batch)[0])
    return passes


def test_quest_after_a_dense_first_pass_is_quest():
    dense, quest = AttentionConfig("dense"), AttentionConfig("quest", budget=64)
    passes = outputs(dense, quest, AttentionConfig("quest", budget=64, first_pass="dense"))
    for kind, (by_dense, by_quest, found) in zip(PASSES, passes, strict=True):
        assert np.array_equal(found, by_dense) == (kind != "later")
        assert np.array_equal(found, by_quest) == (kind != "first")


def test_losas_sparse_first_pass_is_quests_and_fills_what_later_ones_reuse():
    quest = AttentionConfig("quest", budget=64)
    losa = AttentionConfig("losa", budget=64, first_pass="sparse", active=5)
    for kind, (by_quest, found) in zip(PASSES, outputs(quest, losa), strict=True):
        assert np.array_equal(found, by_quest), kind  # all five tokens of the block are active
    _, (_, reused), *_ = outputs(quest, AttentionConfig("losa", budget=64, first_pass="sparse", active=0))
    _, (_, dense), *_ = outputs(quest, AttentionConfig("losa", budget=64, active=0))
    assert not np.array_equal(reused, dense)


@pytest.mark.parametrize(("method", "selector"), [("sparsed", "auto"), ("losa", "anchor"), ("losa", "both")])
def test_what_takes_masses_from_a_dense_first_pass_refuses_a_sparse_one(method, selector):
    config = AttentionConfig(method, selector=selector, first_pass="sparse")
    with pytest.raises(OptionError, match=r'^first_pass must not be "sparse" with .* dense first pass$'):
        make_policy(config, model_config(1, 1, 16), 4)


def test_an_unknown_policy_is_refused():
    with pytest.raises(OptionError, match="attention must be one of dense, losa, quest, sparsed, not 'mage'"):
        make_policy(AttentionConfig("mage"), model_config(1, 1, 16), 4)


# Whole generations

PROMPT = np.random.default_rng(0).integers(0, 256, 75).tolist()


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return losart.load(tiny_checkpoint, device="cpu")


@pytest.mark.parametrize("commit", ["dense", "sparse"])
@pytest.mark.parametrize(("method", "first"), SETTINGS, ids=str)
@pytest.mark.parametrize("block_length", [1, 4, 16])
def test_a_generation_with_everything_read_and_active_is_the_dense_one(
    model, method, first, commit, block_length
):
    options = {
        "max_new_tokens": 40,
        "block_length": block_length,
        "stop_token_ids": [],
        "temperature": 0.5,
        "seed": 3,
    }
    dense = model.generate(PROMPT, **options)
    full = {"budget": 4096, "active": 1.0, "commit": commit, "page_size": 32, **first}
    result = model.generate(PROMPT, attention=method, **full, **options)
    assert result.token_ids == dense.token_ids and result.text == dense.text
    assert result.stats.density == dense.stats.density == 1.0


def test_a_small_budget_is_not_the_dense_generation(model):
    """Otherwise the test above would show nothing."""
    options = {"max_new_tokens": 40, "block_length": 16, "stop_token_ids": []}
    dense = model.generate(PROMPT, **options).token_ids
    for method in SPARSE:
        sparse = model.generate(PROMPT, attention=method, budget=16, active=2, commit="sparse", **options)
        assert sparse.token_ids != dense
        assert 0 < sparse.stats.sparse_density < sparse.stats.density < 1 or method == "quest"


def test_no_active_token_reads_only_in_first_passes(model):
    options = {"max_new_tokens": 32, "block_length": 16, "stop_token_ids": [], "remasking": "sequential"}
    stats = model.generate(PROMPT, attention="losa", active=0, commit="sparse", **options).stats
    assert stats.sparse_density == stats.active_fraction == 0.0
    # 75 tokens are prefilled to 64; 16 passes less 11 known positions, then 16 and 16 (at most 11 of them).
    assert stats.denoising_passes == 5 + 16 + 11
    assert stats.density == pytest.approx(3 / (stats.denoising_passes + stats.commit_passes))


def test_statistics_count_a_first_pass_as_it_is_read(model):
    """In one block, which is not committed, with one position fixed in each of its 16 passes."""
    options = {"max_new_tokens": 16, "block_length": 16, "stop_token_ids": [], "remasking": "sequential"}

    def stats(method, first_pass, **others):
        return model.generate(PROMPT[:64], attention=method, first_pass=first_pass, **options, **others).stats

    # With no active token only the first pass reads.
    sparse = stats("losa", "sparse", active=0, budget=4096)
    assert sparse.sparse_density == sparse.density == sparse.active_fraction == pytest.approx(1 / 16)
    dense = stats("losa", "dense", active=0)
    assert (dense.sparse_density, dense.active_fraction) == (0.0, 0.0)
    assert dense.density == pytest.approx(1 / 16)
    assert stats("losa", "auto", active=0).density == dense.density

    after_dense, quest = (stats("quest", first_pass, budget=16) for first_pass in ("dense", "auto"))
    assert quest.sparse_density == quest.density < after_dense.density < 1
    assert after_dense.density == pytest.approx((1 + 15 * after_dense.sparse_density) / 16)
    assert after_dense.active_fraction == quest.active_fraction == 1.0
