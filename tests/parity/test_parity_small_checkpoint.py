"""transformers' Qwen3 answers with the same tokens from the files of the small checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import losart
from losart.eval import TASKS
from losart.eval.questions import make_questions

pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", reason="the oracle needs transformers")

import oracle

pytestmark = pytest.mark.parity

DIRECTORY = Path(losart.__file__).parent / "small_checkpoint"
DYNAMIC: dict[str, Any] = {"remasking": "low_confidence_dynamic", "denoising_steps": 16}
TWO_A_PASS: dict[str, Any] = {"remasking": "low_confidence_static", "denoising_steps": 8}


@pytest.fixture(scope="module")
def model():
    return losart.load(device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("key", DYNAMIC),
        ("keys-4", DYNAMIC),
        ("values", DYNAMIC),
        ("chain-2", DYNAMIC),
        ("chain-3", TWO_A_PASS),
        ("keys-2", TWO_A_PASS),
    ],
)
def test_the_tokens_are_the_oracles(model, task, options):
    question = next(make_questions(model, TASKS[task], 1024, 1, 2, "symbols"))
    options = {**options, "max_new_tokens": 16, "confidence_threshold": 0.85, "eb_threshold": 0.35}
    answer = model.generate(question.prompt, **options)
    assert question.is_right(answer.text)
    expected = oracle.generate(
        DIRECTORY,
        model.tokenizer.encode(question.prompt),
        **options,
        block_length=model.config.block_length,
        mask_token_id=model.config.mask_token_id,
        stop_token_ids=model.config.end_token_ids,
    )
    assert answer.token_ids == expected
