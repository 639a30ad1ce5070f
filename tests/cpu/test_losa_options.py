"""LoSA's selector, drift and candidates: the reference's, in all combinations, and what each is for."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from drive import Case, RecordingBackend, drive
from hypothesis import given
from hypothesis import strategies as st
from kv import model_config, steady
from passes import block_batch, write

import losart
from losart.attention import make_policy
from losart.config.options import CHOICES, AttentionConfig
from losart.config.precision import Precision
from losart.engine.batch import PassKind

NAMES = ("selector", "drift", "candidates")
SELECTORS = [name for name in CHOICES["selector"] if name != "auto"]  # which is one of them
COMBINATIONS = [
    dict(zip(NAMES, chosen, strict=True))
    for chosen in itertools.product(SELECTORS, *(CHOICES[name] for name in NAMES[1:]))
]
PROMPT = np.random.default_rng(0).integers(0, 256, 75).tolist()
GENERATION = {"max_new_tokens": 40, "block_length": 16, "stop_token_ids": [], "remasking": "sequential"}

every_combination = pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(o.values()))


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return losart.load(tiny_checkpoint, device="cpu")


# Against the reference

cases = st.builds(
    Case,
    prefix=st.integers(0, 300),
    block_length=st.integers(1, 20),
    layers=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.sampled_from([16, 32, 48]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    options=st.fixed_dictionaries(
        {
            "active": st.one_of(st.integers(0, 20), st.sampled_from([0.3, 1.0])),
            "budget": st.sampled_from([1, 16, 32, 70, 400]),
            "page_size": st.sampled_from([16, 32]),
            "commit": st.sampled_from(["dense", "sparse"]),
            "dense_layers": st.sampled_from([0, 0, 1]),
        }
    ),
    seed=st.integers(0, 999),
)


@every_combination
@steady(40)
@given(case=cases)
def test_each_combination_is_the_references(options, case):
    case.options |= options
    drive(case)


@every_combination
def test_each_combination_over_a_long_prefix(options):
    drive(
        Case(prefix=1500, blocks=1, block_length=16, width=128, layers=1, options={"budget": 64, **options})
    )


def test_the_options_are_no_matter_to_other_methods():
    for method in ("dense", "quest", "sparsed"):
        drive(Case(method, options={"budget": 32, "commit": "sparse", **COMBINATIONS[-1]}))


# Everything read is dense attention


@pytest.mark.parametrize("commit", CHOICES["commit"])
@pytest.mark.parametrize("block_length", [1, 4, 16])
@every_combination
def test_everything_read_and_active_is_the_dense_generation(model, options, block_length, commit):
    """With masked candidates only where no layer follows: a fixed token's result grows old, and its
    output, which no logit of this layer needs, would show in the keys and values of the next."""
    generation = GENERATION | {"block_length": block_length, "temperature": 0.5, "seed": 3}
    dense = model.generate(PROMPT, **generation)
    full = {"budget": 4096, "active": 1.0, "commit": commit, "page_size": 32, **options}
    if options["candidates"] == "masked":
        full["dense_layers"] = model.config.num_layers - 1
    result = model.generate(PROMPT, attention="losa", **full, **generation)
    assert result.token_ids == dense.token_ids and result.text == dense.text
    if options["candidates"] == "all":
        assert result.stats.density == 1.0


# What each option is for


def active_sets(queries: list[np.ndarray], **options: Any) -> list[list[int]]:
    """Active tokens of each pass after the first, in one layer with all tokens masked."""
    tokens, heads, width = queries[0].shape
    rng = np.random.default_rng(0)
    model = model_config(heads, 1, width)
    backend = RecordingBackend(model, Precision.of("float32"))
    cache = backend.new_cache(16)
    write(cache, 0, *rng.standard_normal((2, 100, heads, width), np.float32))
    cache.advance(100)
    k, v = rng.standard_normal((2, tokens, heads, width), np.float32)
    policy = make_policy(AttentionConfig("losa", budget=16, **options), model, tokens)
    slot = backend.new_slot(policy.stored)
    for n, q in enumerate(queries):
        kind = PassKind.LATER if n else PassKind.FIRST
        batch = block_batch(cache, tokens, kind, slot=slot, masked=range(tokens))
        policy.attend(backend, 0, q.copy(), k, v, batch)
    return [tokens for tokens, _ in backend.reads[1:]]


def test_refresh_catches_a_slow_drift_that_previous_misses():
    """Token 0 drifts, token 2 swings to and fro: in the end the drift is larger than the swing."""
    base = np.random.default_rng(1).standard_normal((4, 2, 16), np.float32)
    queries = []
    for n in range(6):
        q = base.copy()
        q[0] += np.float32(0.4 * n)
        q[2] += np.float32(n % 2)
        queries.append(q)
    assert active_sets(queries, active=1, drift="previous") == [[2]] * 5
    # Token 0 is 1.2 away in the third later pass; in the fourth, token 2 is back where it was stored.
    assert active_sets(queries, active=1, drift="refresh") == [[2], [2], [0], [0], [2]]


def test_anchor_scans_no_page_bounds():
    scans = {name: drive(Case(options={"selector": name}))[1].scans for name in CHOICES["selector"]}
    every = 2 * 3 * 3  # blocks, later passes, layers
    assert scans == {"auto": every, "both": every, "quest": every, "anchor": 0}


@pytest.mark.parametrize(
    ("options", "chosen", "other"),
    [
        ({}, "both", "quest"),
        ({"active": 3}, "quest", "both"),
        ({"active": 0.5}, "quest", "both"),
        ({"budget": 1, "selector": "both"}, "quest", "anchor"),  # a single page is not halved
    ],
)
def test_what_ranks_pages_unless_it_is_said(model, options, chosen, other):
    generation = GENERATION | {"attention": "losa", "budget": 32}

    def reads(**more):
        stats = model.generate(PROMPT * 3, **generation | options | more).stats
        return stats.density, stats.sparse_density

    assert reads() == reads(selector=chosen) != reads(selector=other)


def test_a_sparse_first_pass_has_pages_ranked_by_the_bound(model):
    sparse = GENERATION | {"attention": "losa", "budget": 32, "first_pass": "sparse"}
    found, by_bound = (model.generate(PROMPT * 3, **sparse | more) for more in ({}, {"selector": "quest"}))
    assert found.token_ids == by_bound.token_ids and found.stats.density == by_bound.stats.density


def test_a_fixed_position_is_never_active(model, monkeypatch):
    backend = model._engine.runner.backend
    recomputed: list[set[int]] = []
    refresh_prefix_attention = backend.refresh_prefix_attention

    def spy(layer, q, selection, batch, **stores):
        recomputed.append(set(selection.tokens[0].tolist()))
        return refresh_prefix_attention(layer, q, selection, batch, **stores)

    monkeypatch.setattr(backend, "refresh_prefix_attention", spy)
    options = {"attention": "losa", "candidates": "masked", "commit": "sparse", "budget": 32}
    layers, masked, sizes, blocks = model.config.num_layers, set(), [], 0
    for step in model.stream(PROMPT, active=5, **options, **GENERATION):
        blocks += step.kind == "first"
        own = recomputed[: layers if step.kind == "later" else 0]
        assert len(own) == (layers if step.kind == "later" else 0)
        assert all(tokens <= masked for tokens in own)
        sizes += [(len(masked), len(tokens)) for tokens in own]
        masked = {place for place, token in enumerate(step.block) if token is None}
        # After a block's last pass its commit, which has no masked position.
        commits = not masked and step.result is None
        assert recomputed[len(own) :] == [set()] * (layers if commits else 0)
        recomputed.clear()
    assert blocks > 1 and sizes and all(size == min(5, left) for left, size in sizes)


def test_passes_of_any_masks_have_one_shape(model, monkeypatch):
    """A captured pass is replayed for another whatever is masked."""
    keys, begin = [], model._engine.runner.backend.begin

    def noting(batch, body, *args):
        keys.append(body.key)
        return begin(batch, body, *args)

    monkeypatch.setattr(model._engine.runner.backend, "begin", noting)
    model.generate(PROMPT, attention="losa", candidates="masked", **GENERATION)
    shapes = {key for key in keys if key and key[-1][0] is PassKind.LATER}
    assert len([key for key in keys if key in shapes]) > 10
    assert len(shapes) == 1


def test_stats_count_fewer_active_tokens_and_passes_without_any(model):
    # Of 75 tokens 64 are prefilled: a block with 5 new tokens and its commit, then one with 16 and none.
    generation = GENERATION | {"max_new_tokens": 21}
    stats = model.generate(
        PROMPT, attention="losa", candidates="masked", commit="sparse", active=4, budget=4096, **generation
    ).stats
    active = [4, 3, 2, 1, 0] + [min(4, masked) for masked in range(15, 0, -1)]
    assert stats.active_fraction == pytest.approx(np.mean(active) / 16)
    assert stats.sparse_density == pytest.approx(19 / 20)
    assert stats.density == pytest.approx(21 / 22)


def test_each_option_makes_a_difference(model):
    """Otherwise the tests of whole generations would show nothing."""
    generation = GENERATION | {"max_new_tokens": 60, "attention": "losa", "budget": 32, "active": 3}
    default = model.generate(PROMPT * 3, **generation).token_ids
    for option in (
        {"selector": "anchor"},
        {"selector": "both"},
        {"drift": "refresh"},
        {"candidates": "masked"},
    ):
        assert model.generate(PROMPT * 3, **option, **generation).token_ids != default, option
