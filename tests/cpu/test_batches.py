"""Rows of several sequences in one pass give what each sequence's pass gives alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import losart
from losart.config.options import generation_config
from losart.engine.batch import PassBatch, PassKind, PassResult, SequencePass
from losart.engine.remasking import remask
from losart.engine.sampling import Proposals
from losart.engine.sequence import Sequence

METHODS: list[dict[str, Any]] = [
    {},
    {"attention": "losa", "active": 3},
    {"attention": "losa", "candidates": "masked", "drift": "refresh", "commit": "sparse"},
    {"attention": "losa"},
    {"attention": "losa", "selector": "anchor"},
    {"attention": "quest", "commit": "sparse"},
    {"attention": "quest", "first_pass": "dense"},
    {"attention": "sparsed"},
]
PROMPTS = [list(range(75)), list(range(30, 190)), list(range(9))]


def passes(
    model: losart.Model, prompts: list[list[int]], together: bool, rides: bool = False, **options: Any
) -> list[list[Any]]:
    """Per pass, what each sequence of these prompts has proposed, read and observed."""
    engine, runner = model._engine, model._engine.runner
    config = generation_config(model.config, {"stop_token_ids": [], "max_new_tokens": 40, **options})
    sequences = [engine.sequence(prompt, config, engine.new_cache(prompt, config)) for prompt in prompts]
    found = []
    for sequence in sequences:
        sequence.commits_ride = rides and runner.commits_ride(config)
        engine.prefill(sequence)
        sequence.slot = runner.new_slot(config)
    while not any(sequence.finished for sequence in sequences):
        asked = [sequence.next_pass() for sequence in sequences]
        for requests in asked:
            requests[0].cache.reserve(requests[-1].prefix_length + len(requests[-1].ids))
        if together:
            result = runner.forward(PassBatch(sum(asked, ())), observe=True)
        else:
            result = joined([runner.forward(PassBatch(requests), observe=True) for requests in asked])
        found.append([described(result, index) for index in range(len(result.reads))])
        apply(sequences, asked, result.proposals)
    assert len(found) > 10
    return found


def rides_by_method(method: dict[str, Any]) -> bool:
    """Whether commits and first passes are dense."""
    dense_first = method.get("attention", "dense") != "quest" or "first_pass" in method
    return dense_first and "commit" not in method


def joined(results: list[PassResult]) -> PassResult:
    proposals = [result.proposals for result in results if result.proposals is not None]
    reads, layers = (
        [one for result in results for one in getattr(result, name)] for name in ("reads", "layers")
    )
    return PassResult(Proposals.joined(proposals) if proposals else None, reads, layers)


def described(result: PassResult, index: int) -> Any:
    layers = [
        (layer.active.tolist(), [pages.tolist() for pages in layer.pages], layer.density, layer.dense)
        for layer in result.layers[index]
    ]
    tokens = None if result.proposals is None else result.proposals.tokens.tolist()
    return tokens, result.reads[index], layers


def apply(
    sequences: list[Sequence], asked: list[tuple[SequencePass, ...]], proposals: Proposals | None
) -> None:
    if proposals is None:
        for sequence in sequences:
            sequence.apply()
        return
    denoised = [requests[-1] for requests in asked]
    for sequence, (block, masked) in zip(sequences, remask(proposals, denoised), strict=True):
        sequence.apply(block, masked)


@pytest.mark.parametrize("rides", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_sequences_do_not_see_each_other(tiny_checkpoint, method, rides):
    model = losart.load(tiny_checkpoint, "cpu")
    # One token per pass: all sequences commit in the same pass, as a batch of one kind wants it.
    length = 4 if rides else 5
    options = {"remasking": "sequential", "block_length": length, "budget": 32, "rides": rides, **method}
    prompts = [prompt[: len(prompt) // length * length] for prompt in PROMPTS]
    alone = passes(model, prompts, together=False, **options)
    assert passes(model, prompts, together=True, **options) == alone
    assert len(passes(model, prompts[:1], together=True, **options)) == len(alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_length", [1, 4, 11, 16, 32])
@pytest.mark.parametrize("method", [*METHODS, {"attention": "losa", "commit": "sparse"}], ids=str)
def test_a_commit_that_rides_changes_nothing(tiny_checkpoint, method, block_length, dtype, monkeypatch):
    """The same steps, reads and tokens as in two passes."""
    model = losart.load(tiny_checkpoint, "cpu", dtype)
    options = {
        "max_new_tokens": 50,
        "stop_token_ids": [],
        "block_length": block_length,
        "budget": 32,
        **method,
    }
    options |= {"temperature": 0.7, "seed": 1}
    found: list[Any] = []
    for rides in (True, False):
        monkeypatch.setattr(model._engine.runner.backend, "riding_blocks", [block_length] if rides else [])
        steps: list[losart.Step] = []
        result = model.generate(PROMPTS[1], observer=steps.append, **options)
        rides = rides and rides_by_method(method)
        assert result.stats.rides == (result.stats.commit_passes if rides else 0)
        assert result.stats.forward_passes == len(steps) - result.stats.rides
        layers = [
            (layer.active.tolist(), [ids.tolist() for ids in layer.pages], layer.density)
            for step in steps
            for layer in step.layers
        ]
        kinds = [(step.kind, step.block_start, step.block, step.fixed) for step in steps]
        reads = result.stats.density, result.stats.sparse_density, result.stats.active_fraction
        found.append((kinds, layers, result.token_ids, reads))
    assert found[0] == found[1]


def test_prefill_of_several_sequences(tiny_checkpoint):
    model = losart.load(tiny_checkpoint, "cpu")
    engine, runner = model._engine, model._engine.runner
    config = generation_config(model.config, {"block_length": 4})
    sequences = [engine.sequence(prompt, config, engine.new_cache(prompt, config)) for prompt in PROMPTS]
    requests = [sequence.next_pass()[0] for sequence in sequences]
    for request in requests:
        assert request.kind is PassKind.PREFILL
        request.cache.reserve(len(request.ids))
    runner.forward(PassBatch(tuple(requests)))
    apply(sequences, [], None)
    for sequence, prompt in zip(sequences, PROMPTS, strict=True):
        blocks = [step.block for step in engine.steps(sequence)]
        assert blocks == [step.block for step in engine.submit(prompt, config)]


def test_passes_count_the_experts_that_they_use(make_checkpoint):
    """Of all layers that have some, and of all sequences in a pass; prefill is not counted."""
    experts = {"num_experts": 16, "num_experts_per_tok": 3, "mlp_only_layers": [1]}
    path = make_checkpoint(family="sdar_moe", num_layers=3, extra_config=experts)
    model = losart.load(path, "cpu")
    backend, found, chosen = model._engine.runner.backend, [], []
    original = backend.experts

    def experts_of(x, layer, batch):
        if batch.kind is not PassKind.PREFILL:
            logits = (x @ np.asarray(layer.router.matrices[0]).T).astype(np.float64)
            chosen.append(len(np.unique(np.argsort(-logits, axis=1)[:, :3])))
        return original(x, layer, batch)

    backend.experts = experts_of
    options = {"max_new_tokens": 8, "stop_token_ids": [], "block_length": 4}
    for prompt in PROMPTS[:2]:
        found.append(model.generate(prompt, **options).stats)
        assert len(chosen) == 2 * found[-1].forward_passes
        assert found[-1].experts_used == pytest.approx(np.mean(chosen))
        assert 3 <= found[-1].experts_used <= 12
        chosen.clear()
    engine = losart.Engine(model)
    streams = [engine.submit(prompt, **options) for prompt in PROMPTS[:2]]
    together = [stream.result().stats.experts_used for stream in streams]
    assert engine.stats.experts_used == pytest.approx(np.mean(chosen))
    assert max(together) > max(one.experts_used for one in found)


def test_models_without_experts_count_none(tiny_checkpoint):
    model = losart.load(tiny_checkpoint, "cpu")
    assert model.generate(PROMPTS[0], max_new_tokens=4).stats.experts_used is None
    assert losart.Engine(model).stats.experts_used is None
