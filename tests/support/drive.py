"""Attention policies driven layer by layer through blocks, each beside the reference's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import reference as ref
from kv import LEAST_STEP, held, model_config
from passes import block_batch, options_of, write
from test_attention_kernels import assert_close

from losart.attention import make_policy
from losart.backends.base import PassBody
from losart.backends.cpu.backend import CpuBackend
from losart.backends.cpu.selector import Selector
from losart.config.options import AttentionConfig
from losart.config.precision import Precision
from losart.engine.batch import PassKind
from losart.engine.sequence import ReadLog

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
        self.selectors = dict.fromkeys(self.selectors, CountingSelector())

    @property
    def scans(self) -> int:
        return self.selectors["auto"].scans

    def prefix_attention(self, layer, q, batch):
        self._note_dense(q, batch)
        return super().prefix_attention(layer, q, batch)

    def prefix_attention_and_masses(self, layer, q, batch):
        self._note_dense(q, batch)
        return super().prefix_attention_and_masses(layer, q, batch)

    def _note_dense(self, q, batch):
        every = [list(range(batch.sequences[0].prefix_length))] * self.config.num_kv_heads
        self.reads.append((list(range(len(q))), every))

    def sparse_prefix_attention(self, layer, q, selection, batch):
        assert selection.tokens is None
        self._note_sparse(range(len(q)), selection, batch)
        return super().sparse_prefix_attention(layer, q, selection, batch)

    def refresh_prefix_attention(self, layer, q, selection, batch, **stores):
        self._note_sparse(selection.tokens[0], selection, batch)
        return super().refresh_prefix_attention(layer, q, selection, batch, **stores)

    def _note_sparse(self, tokens, selection, batch):
        (pages,), (sequence,) = selection.pages, batch.sequences
        read = [
            ref.positions_of_pages(ids[:count], sequence.cache.page_size, sequence.prefix_length).tolist()
            for ids, count in zip(pages.ids, pages.counts, strict=True)
        ]
        assert pages.positions == sum(map(len, read))
        self.reads.append(([int(token) for token in tokens], read))


class CountingSelector(Selector):
    """Counts scans of bounds."""

    scans = 0

    def select_pages(self, *args, **stored):
        self.scans += 1
        return super().select_pages(*args, **stored)


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


def drive(case: Case) -> tuple[ReadLog, RecordingBackend, Passes]:
    """Run the policy and the reference's through the passes, comparing the two and what they count."""
    rng = np.random.default_rng(case.seed)
    mask_rng = np.random.default_rng([case.seed, 1])
    config = AttentionConfig(case.method, **case.options)
    model = model_config(case.kv_heads, case.group, case.width, case.layers)
    backend = RecordingBackend(model, Precision.of(case.dtype))
    cache = backend.new_cache(config.page_size)
    policy = make_policy(config, model, case.block_length)
    options = options_of(case.block_length, config)
    slot = backend.new_slot(policy.stored) if policy.stored else None
    reads = ReadLog(case.block_length)
    reference_options = {k: v for k, v in case.options.items() if k != "dense_layers"}
    least_step = LEAST_STEP.get(case.dtype, 0.0)
    reference_options |= {"held": lambda x: held(x, case.dtype), "least_step": least_step}
    references = [
        (ref.DensePolicy if layer < config.dense_layers else REFERENCES[case.method])(**reference_options)
        for layer in range(case.layers)
    ]

    def draw(tokens: int, heads: int, scale: float = 1.0) -> np.ndarray:
        return scale * rng.standard_normal((case.layers, tokens, heads, case.width), np.float32)

    def commit(k: np.ndarray, v: np.ndarray) -> None:
        for layer in range(case.layers):
            write(cache, layer, k[layer], v[layer])
        cache.advance(k.shape[1])

    prefix = [draw(case.prefix, case.kv_heads) for _ in range(2)]
    commit(*prefix)
    passes = []
    for _ in range(case.blocks):
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
            batch = block_batch(
                *(cache, case.block_length, PassKind(kind)),
                slot=slot,
                masked=np.flatnonzero(masked),
                options=options,
            )
            records, results, selections = [], [], []
            for layer in range(case.layers):
                o, selection = policy.attend(backend, layer, q[layer].copy(), k[layer], v[layer], batch)
                results.append(o)
                selections.append(selection)
            output = backend.begin(batch, PassBody(lambda _, read=selections: (None, [read])))()
            reads.add(
                policy.reads(batch.kind, *output.positions, *output.tokens), cache.length, case.kv_heads
            )
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
    check_reads(reads, passes, case)
    return reads, backend, passes


def check_reads(reads: ReadLog, passes: Passes, case: Case) -> None:
    """Densities and active fraction are those of the reference's records."""
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
