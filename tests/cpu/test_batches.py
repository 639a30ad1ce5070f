"""Rows of several sequences in one pass give what each sequence's pass gives alone."""

from __future__ import annotations

from typing import Any

import pytest

import losart
from losart.config.options import generation_config
from losart.engine.batch import PassBatch, PassKind, PassResult
from losart.engine.sequence import Sequence

METHODS: list[dict[str, Any]] = [
    {},
    {"attention": "losa", "active": 3},
    {"attention": "losa", "candidates": "masked", "drift": "refresh", "commit": "sparse"},
    {"attention": "losa", "selector": "anchor"},
    {"attention": "quest", "commit": "sparse"},
    {"attention": "sparsed"},
]
PROMPTS = [list(range(75)), list(range(30, 190)), list(range(9))]


def passes(model: losart.Model, prompts: list[list[int]], together: bool, **options: Any) -> list[list[Any]]:
    """Per pass, what each sequence of these prompts has proposed, read and observed."""
    engine, runner = model._engine, model._engine.runner
    config = generation_config(model.config, {"stop_token_ids": [], "max_new_tokens": 40, **options})
    sequences = [engine.sequence(prompt, config, engine.new_cache(prompt, config)) for prompt in prompts]
    found = []
    for sequence in sequences:
        engine.prefill(sequence)
        sequence.slot = runner.new_slot(config)
    while not any(sequence.finished for sequence in sequences):
        requests = [sequence.next_pass() for sequence in sequences]
        for request in requests:
            request.cache.reserve(request.prefix_length + len(request.ids))
        if together:
            result = runner.forward(PassBatch(tuple(requests)), observe=True)
        else:
            results = [runner.forward(PassBatch((request,)), observe=True) for request in requests]
            result = joined(results)
        found.append([described(result, index) for index in range(len(requests))])
        apply(sequences, result)
    assert len(found) > 10
    return found


def joined(results: list[PassResult]) -> PassResult:
    columns = ("proposals", "reads", "layers")
    return PassResult(*([one for result in results for one in getattr(result, name)] for name in columns))


def described(result: PassResult, index: int) -> Any:
    layers = [
        (layer.active.tolist(), [pages.tolist() for pages in layer.pages], layer.density, layer.dense)
        for layer in result.layers[index]
    ]
    tokens = result.proposals[index].tokens.tolist() if result.proposals else None
    return tokens, result.reads[index], layers


def apply(sequences: list[Sequence], result: PassResult) -> None:
    for index, sequence in enumerate(sequences):
        sequence.apply(*(result.proposals[index : index + 1]))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_sequences_do_not_see_each_other(tiny_checkpoint, method):
    model = losart.load(tiny_checkpoint, "cpu")
    # One token per pass: all sequences commit in the same pass, as a batch of one kind wants it.
    options = {"remasking": "sequential", "block_length": 5, "budget": 32, **method}
    prompts = [prompt[: len(prompt) // 5 * 5] for prompt in PROMPTS]
    alone = passes(model, prompts, together=False, **options)
    assert passes(model, prompts, together=True, **options) == alone
    assert passes(model, prompts[:1], together=True, **options) == [each[:1] for each in alone]


def test_prefill_of_several_sequences(tiny_checkpoint):
    model = losart.load(tiny_checkpoint, "cpu")
    engine, runner = model._engine, model._engine.runner
    config = generation_config(model.config, {"block_length": 4})
    sequences = [engine.sequence(prompt, config, engine.new_cache(prompt, config)) for prompt in PROMPTS]
    requests = [sequence.next_pass() for sequence in sequences]
    for request in requests:
        assert request.kind is PassKind.PREFILL
        request.cache.reserve(len(request.ids))
    runner.forward(PassBatch(tuple(requests)))
    apply(sequences, PassResult())
    for sequence, prompt in zip(sequences, PROMPTS, strict=True):
        blocks = [step.block for step in engine.steps(sequence)]
        assert blocks == [step.block for step in engine.submit(prompt, config)]
