"""Attention policies driven layer by layer through blocks, each beside the reference's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import reference as ref
from kv import held, model_config
from test_attention_kernels import assert_close

from losart.attention import make_policy
from losart.attention.policy import PassKind
from losart.backends.base import PassInputs
from losart.backends.cpu.backend import CpuBackend
from losart.config.options import AttentionConfig

REFERENCES = {
    "dense": ref.DensePolicy,
    "losa": ref.LosaPolicy,
    "quest": ref.QuestPolicy,
    "sparsed": ref.SparsedPolicy,
}
PASSES = ["first", "later", "later", "later", "commit"]


class RecordingBackend(CpuBackend):
    """Notes which prefix positions each kv head read, and for which tokens; counts scans of bounds."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reads: list[tuple[list[int], list[list[int]]]] = []
        self.scans = 0

    def prefix_attention(self, q, cache, layer):
        every = [list(range(cache.length))] * self.config.num_kv_heads
        self.reads.append((list(range(len(q))), every))
        return super().prefix_attention(q, cache, layer)

    def prefix_attention_and_masses(self, q, cache, layer):
        every = [list(range(cache.length))] * self.config.num_kv_heads
        self.reads.append((list(range(len(q))), every))
        return super().prefix_attention_and_masses(q, cache, layer)

    def select_pages(self, q, tokens, cache, layer, count):
        self.scans += 1
        return super().select_pages(q, tokens, cache, layer, count)

    def sparse_prefix_attention(self, q, tokens, pages, cache, layer, into=None):
        read = [
            ref.positions_of_pages(ids[:count], cache.page_size, cache.length).tolist()
            for ids, count in zip(pages.ids, pages.counts, strict=True)
        ]
        assert pages.positions == sum(map(len, read))
        self.reads.append((list(range(len(q))) if tokens is None else tokens.tolist(), read))
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
        if self.method == "dense":
            return False
        if kind == "commit":
            return self.options.get("commit", "dense") == "sparse"
        if kind == "first":
            own = "sparse" if self.method == "quest" else "dense"
            return self.options.get("first_pass", "auto").replace("auto", own) == "sparse"
        return True


def fewer_masked(masked: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """What is still masked in a pass of this kind: some of what was, one position at least; then none."""
    if kind == "commit":
        return np.zeros_like(masked)
    fewer = masked & (rng.random(len(masked)) < 0.7)
    return fewer if fewer.any() else masked


Passes = list[tuple[str, list[ref.Pass]]]  # the kind of each pass, the reference's record of each layer


def drive(case: Case) -> tuple[Any, RecordingBackend, Passes]:
    """Run the policy and the reference's through the passes, comparing the two and what they count."""
    rng = np.random.default_rng(case.seed)
    mask_rng = np.random.default_rng([case.seed, 1])
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
        masked = np.ones(case.block_length, bool)
        for kind in PASSES:
            # Some tokens change much, some a little, some not at all.
            size = rng.permutation(case.block_length) % 3 * np.float32(0.3)
            q += size[:, None, None] * draw(case.block_length, case.kv_heads * case.group)
            k, v = (draw(case.block_length, case.kv_heads) for _ in range(2))
            masked = fewer_masked(masked, kind, mask_rng)
            policy.begin_pass(PassKind(kind), cache.length, np.flatnonzero(masked))
            records = []

            def layers(_ids: Any) -> list[Any]:
                return [
                    policy.attend(backend, layer, q[layer].copy(), k[layer], v[layer], cache)  # noqa: B023
                    for layer in range(case.layers)
                ]

            policy.use(backend)
            inputs = PassInputs(np.zeros(case.block_length, np.int64))
            results, positions = backend.run_pass(policy.shape, inputs, cache, layers)
            policy.end_pass(positions)
            for layer, o in enumerate(results):
                expected = references[layer].attend(
                    q[layer], k[layer], v[layer], k_prefix[layer], v_prefix[layer], kind, masked
                )
                assert_close(o, expected)
                record = references[layer].passes[-1]
                read = [of_head.tolist() for of_head in record.positions_read]
                assert backend.reads.pop(0) == (record.active.tolist(), read)
                records.append(record)
            assert not backend.reads
            passes.append((kind, records))
        commit(k, v)
        prefix = [np.concatenate(both, axis=1) for both in zip(prefix, (k, v), strict=True)]
    check_reads(policy, passes, case)
    return policy, backend, passes


def check_reads(policy: Any, passes: Passes, case: Case) -> None:
    """Densities and active fraction are those of the reference's records."""
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
