"""With `deterministic` generations that share passes are bit for bit what each is alone, by real matmuls."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import losart

PROMPTS = [np.random.default_rng(seed).integers(0, 300, 3 + 70 * seed).tolist() for seed in range(4)]
PROMPTS.append(PROMPTS[3][:130] + PROMPTS[1])  # begins as another: of that it prefills the rest alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "method", [{}, {"attention": "losa", "budget": 32}, {"attention": "quest", "budget": 32}]
)
@pytest.mark.parametrize("block_length", [4, 12])
def test_what_shares_a_pass_changes_nothing(tiny_checkpoint, monkeypatch, dtype, method, block_length):
    model = losart.load(tiny_checkpoint, "cpu", dtype, deterministic=True)
    backend: Any = model._engine.runner.backend
    options = {"block_length": block_length, "max_new_tokens": 16, "stop_token_ids": [], **method}
    confidences: list[list[float]] = []
    propose = backend.propose

    def noting(*args: Any) -> Any:
        proposals = propose(*args)
        confidences[-1] += proposals.confidence.tolist()
        return proposals

    monkeypatch.setattr(backend, "propose", noting)
    confidences.append([])
    together = model.generate(PROMPTS, **options)
    alone = []
    for prompt in PROMPTS:
        confidences.append([])
        alone.append(model.generate(prompt, **options))
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert together[0].stats.mean_sequences > 1
    first, *others = confidences
    assert sorted(first) == sorted(x for of_one in others for x in of_one)
    step = math.lcm(block_length, 16)
    assert together[-1].stats.reused_tokens == 130 // step * step
