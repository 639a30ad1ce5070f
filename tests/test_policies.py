"""The attention policies on the CPU against the reference's, driven layer by layer through blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import reference as ref
from kv import held, model_config
from test_attention_kernels import assert_close

import losart
from losart.attention import make_policy
from losart.attention.base import PassKind
from losart.backends.cpu import CpuBackend
from losart.errors import OptionError
from losart.options import AttentionConfig

REFERENCES = {
    "dense": ref.DensePolicy,
    "losa": ref.LosaPolicy,
    "quest": ref.QuestPolicy,
    "sparsed": ref.SparsedPolicy,
}
METHODS = list(REFERENCES)
SPARSE = METHODS[1:]
PASSES = ["first", "later", "later", "later", "commit"]


class RecordingBackend(CpuBackend):
    """Notes which prefix positions each kv head read, and for which tokens."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reads: list[tuple[list[int], list[list[int]]]] = []

    def prefix_attention(self, q, cache, layer):
        every = [list(range(cache.length))] * self.config.num_kv_heads
        self.reads.append((list(range(len(q))), every))
        return super().prefix_attention(q, cache, layer)

    def prefix_attention_and_masses(self, q, cache, layer):
        every = [list(range(cache.length))] * self.config.num_kv_heads
        self.reads.append((list(range(len(q))), every))
        return super().prefix_attention_and_masses(q, cache, layer)

    def sparse_prefix_attention(self, q, tokens, pages, cache, layer, into=None):
        read = [
            ref.positions_of_pages(ids[:count], cache.page_size, cache.length).tolist()
            for ids, count in zip(pages.ids, pages.counts, strict=True)
        ]
        assert pages.positions == sum(map(len, read))
        self.reads.append((tokens.tolist(), read))
        return super().sparse_prefix_attention(q, tokens, pages, cache, layer, into)


@dataclass
class Case:
    method: str = "losa"
    prefix: int = 200
    block_length: int = 8
    blocks: int = 2
    layers: int = 3
    kv_heads: int = 2
    group: int = 2
    width: int = 32
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __str__(self) -> str:
        changed = [f"{k}{v}" for k, v in vars(self).items() if v != getattr(Case(), k) and k != "options"]
        return "-".join([*changed, *(f"{k}={v}" for k, v in self.options.items())])

    def is_sparse_pass(self, kind: str) -> bool:
        if kind == "commit":
            return self.method != "dense" and self.options.get("commit", "dense") == "sparse"
        return self.method == "quest" or (kind == "later" and self.method != "dense")


def drive(case: Case) -> tuple[Any, list[list[tuple[str, ref.Pass]]]]:
    """Run the policy and the reference's through the passes, comparing the two.

    Returns the policy, and for each pass the kind and the reference's records of all layers.
    """
    rng = np.random.default_rng(case.seed)
    config = AttentionConfig(case.method, **case.options)
    model = model_config(case.kv_heads, case.group, case.width, case.layers)
    backend = RecordingBackend(model, case.dtype)
    cache = backend.new_cache(config.page_size)
    policy = make_policy(config, model, case.block_length)
    reference_options = {k: v for k, v in case.options.items() if k != "dense_layers"}
    references = [
        (ref.DensePolicy if layer < config.dense_layers else REFERENCES[case.method])(**reference_options)
        for layer in range(case.layers)
    ]

    def draw(tokens: int, heads: int, scale: float = 1.0) -> np.ndarray:
        return scale * rng.standard_normal((case.layers, tokens, heads, case.width), np.float32)

    def commit(k: np.ndarray, v: np.ndarray) -> None:
        for layer in range(case.layers):
            cache.write(layer, k[layer], v[layer])
        cache.advance(k.shape[1])

    prefix = [draw(case.prefix, case.kv_heads) for _ in range(2)]
    commit(*prefix)
    passes = []
    for _ in range(case.blocks):
        policy.begin_block()
        for reference in references:
            reference.begin_block()
        q = draw(case.block_length, case.kv_heads * case.group, 2.0)
        k_prefix, v_prefix = (held(x, case.dtype) for x in prefix)
        for kind in PASSES:
            # Some tokens change much, some a little, some not at all.
            size = rng.permutation(case.block_length) % 3 * np.float32(0.3)
            q += size[:, None, None] * draw(case.block_length, case.kv_heads * case.group)
            k, v = (draw(case.block_length, case.kv_heads) for _ in range(2))
            policy.begin_pass(PassKind(kind), cache.length)
            records = []
            for layer in range(case.layers):
                o = policy.attend(backend, layer, q[layer].copy(), k[layer], v[layer], cache)
                expected = references[layer].attend(
                    q[layer], k[layer], v[layer], k_prefix[layer], v_prefix[layer], kind
                )
                assert_close(o, expected)
                record = references[layer].passes[-1]
                read = [positions.tolist() for positions in record.positions_read]
                assert backend.reads.pop() == (record.active.tolist(), read)
                records.append(record)
            assert not backend.reads
            passes.append((kind, records))
        commit(k, v)
        prefix = [np.concatenate(both, axis=1) for both in zip(prefix, (k, v), strict=True)]
    return policy, passes


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
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_policy_is_the_references(case):
    policy, passes = drive(case)
    reads = policy.reads
    read = [(kind, record) for kind, records in passes for record in records if record.prefix_length]

    def mean(values: list[float]) -> float | None:
        return pytest.approx(np.mean(values)) if values else None

    assert reads.density == mean([record.density.mean() for _, record in read])
    assert reads.sparse_density == mean([r.density.mean() for kind, r in read if case.is_sparse_pass(kind)])

    dense_layers = case.options.get("dense_layers", 0)
    assert reads.active_fraction == mean(
        [
            len(record.active) / case.block_length
            for kind, records in passes
            if case.is_sparse_pass(kind)
            for record in records[dense_layers:]
        ]
    )


def test_no_active_token_reads_nothing_after_the_first_pass():
    policy, passes = drive(Case(options={"active": 0, "commit": "sparse"}))
    assert policy.reads.sparse_density == policy.reads.active_fraction == 0.0
    assert policy.reads.density == pytest.approx(1 / len(PASSES))
    assert not any(positions.size for kind, records in passes if kind != "first" for record in records
                   for positions in record.positions_read)  # fmt: skip


@pytest.mark.parametrize("method", SPARSE)
def test_everything_read_and_active_is_dense_attention_to_the_bit(method):
    """Over the passes of a block, with each block's queries, keys and values the same for both."""
    rng = np.random.default_rng(0)
    model = model_config(2, 3, 32)
    backend = CpuBackend(model, "float32")
    cache = backend.new_cache(16)
    cache.write(0, *rng.standard_normal((2, 1203, 2, 32), np.float32))
    cache.advance(1203)
    options = {"budget": 1203, "active": 1.0, "commit": "sparse"}
    policies = [make_policy(AttentionConfig(name, **options), model, 5) for name in ("dense", method)]
    for kind in PASSES:
        q = rng.standard_normal((5, 6, 32), np.float32)
        k, v = rng.standard_normal((2, 5, 2, 32), np.float32)
        outputs = []
        for policy in policies:
            if kind == "first":
                policy.begin_block()
            policy.begin_pass(PassKind(kind), cache.length)
            outputs.append(policy.attend(backend, 0, q.copy(), k, v, cache))
        np.testing.assert_array_equal(*outputs)


def test_an_unknown_policy_is_refused():
    with pytest.raises(OptionError, match="attention must be one of dense, losa, quest, sparsed, not 'mage'"):
        make_policy(AttentionConfig("mage"), model_config(1, 1, 16), 4)


# Whole generations

PROMPT = np.random.default_rng(0).integers(0, 256, 75).tolist()


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return losart.load(tiny_checkpoint, device="cpu")


@pytest.mark.parametrize("commit", ["dense", "sparse"])
@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("block_length", [1, 4, 16])
def test_a_generation_with_everything_read_and_active_is_the_dense_one(model, method, commit, block_length):
    options = {
        "max_new_tokens": 40,
        "block_length": block_length,
        "stop_token_ids": [],
        "temperature": 0.5,
        "seed": 3,
    }
    dense = model.generate(PROMPT, **options)
    full = {"budget": 4096, "active": 1.0, "commit": commit, "page_size": 32}
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
    assert stats.density == pytest.approx(3 / stats.forward_passes)
